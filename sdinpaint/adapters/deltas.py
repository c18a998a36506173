"""The change that each algorithm of adapters makes to a weight.

Shapes: o and i are rows and columns of the weight, k a side of its kernel, r the rank of that layer.

Source: KohakuBlueleaf/LyCORIS lycoris/modules; https://arxiv.org/abs/2106.09685 (LoRA), 2108.06098 (LoHa), 2309.14859
(LoKr, tucker), 2402.09353 (DoRA), 2205.05638 (IA3), 2306.07967 (GLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sdinpaint_weights.adapter_names import algorithm_of
from torch import Tensor
from torch.nn import functional as F

__all__ = ["NUMBERS", "Parts", "as_layer", "bias_delta", "require_fit", "weight_delta"]

Parts = Mapping[str, Tensor]
"""The tensors of an adapter for one module, by their part: "down", "up", "alpha" and so on."""

LATENT_CHANNELS, INPAINTING = 4, 9
"""Input channels of a text-to-image UNet, which are the first of an inpainting UNet's."""
NUMBERS = ("alpha", "scale", "on_input")
"""Parts that are numbers, and no matrices."""
MISFITS = (ValueError, RuntimeError, IndexError)
"""Errors of parts that do not fit together, or not the weight."""


def weight_delta(parts: Parts, weight: Tensor) -> Tensor | None:
    """Compute what an adapter at weight 1 adds to a module's weight.

    Args:
        parts: the adapter's tensors for the module, all in the dtype of `weight`.
        weight: the checkpoint's own weight (o, i, k, k), (o, i), or (o,) of a norm, in float32 or better.

    Returns:
        The delta, in the shape of `weight`; None where the adapter changes the bias alone. One that was made for the 4
        channels of a text-to-image UNet is for the first 4 of an inpainting UNet's 9.

    Raises:
        ValueError: the delta does not have the shape of the weight.
        RuntimeError: the parts do not fit together.
    """
    try:
        return _delta(parts, weight)
    except MISFITS as error:
        if weight.ndim != 4 or weight.shape[1] != INPAINTING:
            raise
        try:
            delta = _delta(parts, weight[:, :LATENT_CHANNELS])
        except MISFITS:
            raise error from None
    return None if delta is None else F.pad(delta, (0, 0, 0, 0, 0, INPAINTING - LATENT_CHANNELS))


def bias_delta(parts: Parts) -> Tensor | None:
    """Return what an adapter at weight 1 adds to a module's bias.

    Args:
        parts: the adapter's tensors for the module.

    Returns:
        The delta (o,), or None.
    """
    return next((parts[name].flatten() for name in ("diff_b", "b_norm") if name in parts), None)


def require_fit(parts: Parts, weight: Tensor, bias: Tensor | None) -> None:
    """Check the shapes of an adapter's tensors for a module, without computing anything.

    Args:
        parts: the adapter's tensors for the module; only numbers among them are read.
        weight: the module's weight.
        bias: the module's bias, None where it has none.

    Raises:
        ValueError: they do not fit; the text says what does not.
    """
    if empty := [name for name, part in parts.items() if not part.numel()]:
        raise ValueError(f"{empty[0]} of shape {tuple(parts[empty[0]].shape)}, which holds nothing")
    shapes = {name: part if name in NUMBERS else part.to("meta", torch.float32) for name, part in parts.items()}
    if odd := [name for name in NUMBERS if name in parts and parts[name].numel() != 1]:
        raise ValueError(f"{odd[0]} of shape {tuple(parts[odd[0]].shape)}, which is one number elsewhere")
    try:
        weight_delta(shapes, weight.to("meta", torch.float32))
    except (RuntimeError, IndexError) as error:
        listed = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items() if name not in NUMBERS)
        raise ValueError(f"{listed}, for a weight of shape {tuple(weight.shape)}") from error
    added = bias_delta(shapes)
    if added is not None and (bias is None or added.shape != bias.shape):
        own = "no bias" if bias is None else f"a bias of shape {tuple(bias.shape)}"
        raise ValueError(f"a delta of the bias of shape {tuple(added.shape)}, for {own}")


def as_layer(parts: Parts, weight: Tensor) -> Parts:
    """Give the factors of a LoRA the shapes of its module's layer, which some programs require.

    Args:
        parts: the adapter's tensors for the module.
        weight: the module's weight.

    Returns:
        The parts, those of a linear layer as matrices and those of a convolution with kernels.
    """
    if not {"down", "up"} <= parts.keys():
        return parts
    down, up, ones = parts["down"], parts["up"], [1] * (weight.ndim - 2)
    kernel = ones if "mid" in parts else weight.shape[2:]
    return {**parts, "down": down.reshape(len(down), -1, *kernel), "up": up.reshape(len(up), len(down), *ones)}


def _delta(parts: Parts, weight: Tensor) -> Tensor | None:
    found = DELTAS[str(algorithm_of(parts))](parts, weight)
    if found is None:
        return None
    delta = _shaped(found, weight)
    if "magnitude" in parts:  # PEFT's, always of rows, and of shape (1, o, 1, 1) for a convolution
        return _decomposed(weight + delta, parts["magnitude"].flatten()) - weight
    return delta if "dora_scale" not in parts else _decomposed(weight + delta, parts["dora_scale"]) - weight


def _shaped(delta: Tensor, weight: Tensor) -> Tensor:
    """Give a delta the shape of the weight: a matrix is a 1 x 1 kernel, or has kernels in its rows."""
    rows = (len(weight), weight[0].numel())
    if delta.shape not in (weight.shape, rows, (*rows, 1, 1)):
        raise ValueError(f"a delta of shape {tuple(delta.shape)}, for a weight of shape {tuple(weight.shape)}")
    return delta.reshape(weight.shape)


def _lora(parts: Parts, _: Tensor) -> Tensor:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        product = torch.einsum("or,rskl,si->oikl", up.flatten(1), parts["mid"], down.flatten(1))
    else:
        product = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
    return product * _factor(parts, len(down))


def _loha(parts: Parts, _: Tensor) -> Tensor:
    one, two = (_low_rank(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    return one * two * _factor(parts, len(parts["hada_w1_b"]))


def _lokr(parts: Parts, weight: Tensor) -> Tensor:
    one, two = parts.get("lokr_w1"), parts.get("lokr_w2")
    rank = next((len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
    factor = _factor(parts, rank)  # two full matrices have no rank, whatever alpha says
    if one is None:
        one = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if two is None:
        two = _low_rank(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    kernel = weight.shape[2:]
    if two.ndim == 2 and kernel.numel() > 1:
        two = two.unflatten(1, (-1, *kernel))
    one = one.reshape(*one.shape, *[1] * (two.ndim - 2))
    return torch.kron(one, two.contiguous()) * factor


def _low_rank(parts: Parts, a: str, b: str, core: str) -> Tensor:
    """Multiply a (o, r) by b (r, i k k); with a core (r, r, k, k), a is (r, o) and b (r, i)."""
    if core in parts:
        return torch.einsum("ijkl,jr,ip->prkl", parts[core], parts[b], parts[a])
    return parts[a] @ parts[b]


def _full(parts: Parts, _: Tensor) -> Tensor | None:
    return parts.get("diff")


def _norm(parts: Parts, _: Tensor) -> Tensor | None:
    return parts.get("w_norm")


def _ia3(parts: Parts, weight: Tensor) -> Tensor:
    along = 1 if bool(parts["on_input"]) else 0
    shape = [1] * weight.ndim
    shape[along] = weight.shape[along]
    return weight * parts["weight"].reshape(shape)


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if (len(a1), len(b1)) != (weight.shape[1], len(weight)):  # files of before have the factors in the other order
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = a1.shape[1]
    added = b1 @ b2 if "bm" not in parts else torch.einsum("or,rskl,si->oikl", b1, parts["bm"], b2)
    through = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    return (_shaped(added, weight) + through) * _factor(parts, rank)


DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "full": _full, "norm": _norm, "ia3": _ia3}


def _factor(parts: Parts, rank: int | None) -> float:
    """Return the factor of the product: `scale`, else alpha / rank; 1 without a rank or an alpha, or with one of 0."""
    if "scale" in parts:
        return float(parts["scale"])
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return alpha / rank if alpha and rank else 1.0


def _decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Give each row of a weight, or each column where the magnitude is (1, i, ...), its norm (DoRA)."""
    count = magnitude.numel()
    if count == len(weight) and len(magnitude) == count:
        kept = 0
    elif magnitude.ndim > 1 and count == weight.shape[1] == magnitude.shape[1]:
        kept = 1
    else:
        raise ValueError(f"a magnitude of shape {tuple(magnitude.shape)}, for a weight of shape {tuple(weight.shape)}")
    others = [axis for axis in range(weight.ndim) if axis != kept]
    shape = [1] * weight.ndim
    shape[kept] = -1
    norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * magnitude.reshape(shape) / norms.clamp_min(torch.finfo(weight.dtype).tiny)  # a zero stays one
