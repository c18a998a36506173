"""Merge adapters into a checkpoint that is written, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from sdinpaint.adapters.lora import Lora, checked_blocks, checked_weight
from sdinpaint.adapters.stack import Networks, Plan, changed_weight, plans_of, read_fitting
from sdinpaint.errors import warn
from sdinpaint.load_options import LoraOption

__all__ = ["Merged", "read_loras"]

Produce = Callable[[], Tensor]


class Merged:
    """The changes that adapters make to a checkpoint's tensors.

    Args:
        loras: the adapters.
        networks: the networks, which may be on the meta device.
    """

    def __init__(self, loras: Iterable[Lora], networks: Networks) -> None:
        plans = plans_of(loras, networks)
        self._plans: dict[tuple[str, str], Plan] = {
            (name, key): plans[weight]
            for name, network in networks.items()
            for key, weight in network.named_parameters()
            if weight in plans
        }

    def __call__(self, network: str, key: str, produce: Produce) -> Produce:
        """Return the function that makes a tensor with the changes, in float32, or `produce` where there are none.

        Args:
            network: name of the network.
            key: native name of the tensor in it.
            produce: makes the tensor without changes.

        Returns:
            The function.
        """
        plan = self._plans.get((network, key))
        return produce if plan is None else partial(_changed, produce, plan)


def read_loras(options: Iterable[LoraOption], networks: Networks, kind: str) -> list[Lora]:
    """Read the adapters that a checkpoint is to be written with.

    Args:
        options: what was asked for.
        networks: the networks.
        kind: kind of the model: "sd1", "sd2" or "sdxl".

    Returns:
        The adapters.

    Raises:
        AdapterError: one is none, or does not fit the model.
        CheckpointError: a file cannot be read.
        SettingError: a weight is no finite number.
    """
    loras = []
    for source, weight, text_weight, name, blocks, strict in options:
        given = checked_weight("weight", weight)
        text = None if text_weight is None else checked_weight("text_weight", text_weight)
        file = read_fitting(source, networks, kind, strict=strict)
        if file.embeddings:
            warn(f"{source}: it holds embeddings, which a checkpoint has no place for: {', '.join(file.embeddings)}")
        factors, own = checked_blocks(blocks, file), name or file.name
        loras.append(Lora(own, str(source), file, given, text, factors))
    return loras


def _changed(produce: Produce, plan: Plan) -> Tensor:
    return changed_weight(produce(), plan, torch.device("cpu"))
