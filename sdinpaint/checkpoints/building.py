"""Build the networks of a checkpoint without weights, which checks that every name and shape of its files fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sdinpaint_weights.native import NativeState, check_complete
from torch import nn
from torch.overrides import TorchFunctionMode

from sdinpaint.checkpoints.configs import check_fit
from sdinpaint.checkpoints.embedded import embedded_vocabulary
from sdinpaint.checkpoints.opening import CONTROLNET, Checkpoint
from sdinpaint.checkpoints.sources import COMPONENTS
from sdinpaint.checks import dtype_name
from sdinpaint.errors import CheckpointError
from sdinpaint.models import VAE, CLIPText, ControlNet, UNet
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["MODELS", "build", "build_models", "find_dtype", "own_tokenizer"]

MODELS: dict[str, Callable[[Any], nn.Module]] = dict(
    zip((*COMPONENTS, CONTROLNET), (UNet, VAE, CLIPText, CLIPText, ControlNet), strict=True)
)
"""The network of each component."""
SPARE = 2000
"""Tensors that a file may lack so that each is looked for by its name; the largest released network has 1,680."""


def find_dtype(dtype: object) -> torch.dtype:
    """Find the dtype of a name.

    Args:
        dtype: torch's dtype, or a name that `checks.dtype_name` knows.

    Returns:
        The dtype.

    Raises:
        SettingError: there is no such dtype.
    """
    found: torch.dtype = getattr(torch, dtype_name(dtype))
    return found


class _TooLargeError(Exception):
    pass


class _Skeleton(TorchFunctionMode):
    """A mode in which new parameters are on the meta device and stay unfilled.

    Filling them there would import 800 modules of torch for nothing, and `torch.device("meta")` takes twice the time.

    Args:
        most: number of parameters after which building stops: numbers in the names of a file may tell any size.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    FILLING = frozenset({nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLING:
            return kwargs["tensor"]
        if func is torch.empty:
            kwargs["device"] = "meta"
            self.left -= 1
            if self.left < 0:
                raise _TooLargeError
        return func(*args, **kwargs)


def build(checkpoint: Checkpoint) -> dict[str, Any]:
    """Build the networks of a checkpoint on the meta device, and check that every name and shape fits.

    Args:
        checkpoint: the opened checkpoint.

    Returns:
        Component name -> network.

    Raises:
        CheckpointError: tensors are missing or do not fit.
    """
    beside = {} if checkpoint.controlnet is None else {CONTROLNET: checkpoint.controlnet}
    models = build_models(checkpoint.family.components | beside, checkpoint.states)
    check_fit(checkpoint.family, checkpoint.path)
    return models


def build_models(configs: Mapping[str, Any], states: Mapping[str, NativeState]) -> dict[str, Any]:
    """Build networks on the meta device, and check that every name and shape fits.

    Args:
        configs: configuration of each component by its name.
        states: tensors of each component by its name.

    Returns:
        Component name -> network.

    Raises:
        CheckpointError: tensors are missing or do not fit.
    """
    models = {name: _built(name, config, states[name]) for name, config in configs.items()}
    for name, model in models.items():
        check_complete(states[name], {key: tuple(value.shape) for key, value in model.state_dict().items()})
    return models


def _built(name: str, config: Any, state: NativeState) -> nn.Module:
    """Build a network, of at most `SPARE` tensors more than the file has."""
    held = len(state.sources)
    try:
        with _Skeleton(held + SPARE):
            return MODELS[name](config)
    except _TooLargeError:
        found = f"{name}: numbers in its names tell a network of more than {held + SPARE} tensors, and it has {held}"
        hint = "fetch the file again"
        raise CheckpointError("CKPT_KEYS", state.weights.path, found, expected="all of them", hint=hint) from None


def own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the tokenizer that a single file holds itself.

    Args:
        checkpoint: the opened checkpoint.

    Returns:
        The tokenizer of its text encoder; None where the file holds no vocabulary.

    Raises:
        CheckpointError: the vocabulary in it is damaged.
    """
    vocabulary = embedded_vocabulary(checkpoint.parts["text_encoder"].state.weights)
    return None if vocabulary is None else Tokenizer(*vocabulary)
