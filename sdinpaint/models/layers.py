"""Layers that the UNet and the VAE share."""

from __future__ import annotations

from sdinpaint_kernels import group_norm
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """GroupNorm with an optional SiLU behind it, through the one implementation in `sdinpaint_kernels`."""

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.silu)


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with the height and width of `like`; a channels-last view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
