"""The adapters of a model's networks: the weights from before, and the sums that take their place.

W = W0 + sum of weight * delta(W0) over all adapters, in float32, rounded once. W0 is kept as it lies, so that it comes
back bit for bit. Where a file backs it, the sum lies in a temporary file, and takes its place in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sdinpaint_weights.adapter_layout import family_of
from sdinpaint_weights.adapter_names import Target, spellings, targets_of
from sdinpaint_weights.spool import Convert, in_memory, spool
from torch import Tensor, nn

from sdinpaint.adapters.deltas import bias_delta, require_fit, weight_delta
from sdinpaint.adapters.lora import Lora
from sdinpaint.adapters.reading import EXAMPLES, LoraFile, other_family, read_lora
from sdinpaint.errors import AdapterError, warn
from sdinpaint.models.offloading import Offloading
from sdinpaint.models.weights import Contents, backed_by_files, contents, pack, point_to, release, unchanged
from sdinpaint.progress import Bar

__all__ = ["Change", "Networks", "Plan", "Stack", "changed_weight", "plans_of", "read_fitting", "targets_in"]

Networks = Mapping[str, nn.Module]
"""The networks by name: "unet", "text_encoder" and for SDXL "text_encoder_2"."""
Bars = Callable[[int], AbstractContextManager[Bar]]
"""Returns a progress bar for so many weights."""
IN_BIAS = {"diff_b", "b_norm"}
"""Parts of an adapter that change a module's bias."""


class Change(NamedTuple):
    """The change that one adapter makes to a weight."""

    file: LoraFile
    target: Target
    kind: str
    """"weight" or "bias"."""
    factor: float


Plan = tuple[Change, ...]
"""The changes of a weight, in the order of the adapters' names."""


class Kept(NamedTuple):
    """A weight that adapters have changed."""

    original: Tensor
    """The numbers from before, where they lay."""
    plan: Plan
    merged: Contents | None
    """The state of the sum, so that edits are noticed; None in a copy."""


class Stack:
    """The adapters that were added to some networks.

    Args:
        offloading: where the networks stay between uses; None where they stay on their device.
    """

    def __init__(self, offloading: Offloading | None = None) -> None:
        self.loras: dict[str, Lora] = {}
        self._offloading = offloading
        self._kept: dict[nn.Parameter, Kept] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = {weight: one._replace(merged=None) for weight, one in self._kept.items()}
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def at_rest(self, weight: Any) -> Any:
        """Return the tensor that holds a weight's numbers from before adapters.

        Args:
            weight: a weight of a network.

        Returns:
            The weight itself where no adapter changes it; else where the numbers lay, in the dtype that they had.
        """
        kept = self._kept.get(weight)
        return weight if kept is None else kept.original

    def original(self, weight: Any) -> Any:
        """Return a weight as it was before adapters, in the dtype that it has now.

        Args:
            weight: a weight of a network.

        Returns:
            The weight itself where no adapter changes it; else its numbers from before.
        """
        kept = self._kept.get(weight)
        return weight if kept is None else kept.original.to(weight.dtype)

    def put(self, loras: Mapping[str, Lora], networks: Networks, bars: Bars) -> None:
        """Let these adapters and no others change the networks: all of them, or after an error as before.

        Args:
            loras: the adapters by name.
            networks: the networks.
            bars: the progress bar to show.

        Raises:
            AdapterError: the values of an adapter cannot be used.
            CheckpointError: a file cannot be read any more.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            plans = plans_of(loras.values(), networks)
            present = {weight for network in networks.values() for weight in network.parameters()}
            gone = [weight for weight in self._kept if weight in present and weight not in plans]
            changed = {weight: plan for weight, plan in plans.items() if plan != self._plan(weight)}
            sums = self._sums(changed, bars)
            self._warn_of_edits([*gone, *(weight for weight in changed if weight in self._kept)], networks)
            for weight in gone:
                self._place(weight, self._kept.pop(weight).original)
            originals = {weight: self._original(weight) for weight in changed}
            for weight, data in sums.items():
                self._place(weight, data)
            for network in networks.values():
                if self._offloading is None and not {*gone, *changed}.isdisjoint(network.parameters()):
                    pack(network)
            states = contents(list(changed))
            for (weight, plan), state in zip(changed.items(), states, strict=True):
                self._kept[weight] = Kept(originals[weight], plan, state)
            self.loras = dict(loras)

    def _plan(self, weight: nn.Parameter) -> Plan:
        kept = self._kept.get(weight)
        return () if kept is None else kept.plan

    def _original(self, weight: nn.Parameter) -> Tensor:
        """Return the numbers of a weight before adapters, at rest; those on a GPU are copied to the host."""
        if weight in self._kept:
            return self._kept[weight].original
        data = weight.data if self._offloading is None else self._offloading.at_rest(weight)
        return data.cpu()

    def _dtype(self, weight: nn.Parameter) -> torch.dtype:
        return weight.dtype if self._offloading is None else self._offloading.dtype_in_use(weight)

    def _place(self, weight: nn.Parameter, data: Tensor) -> None:
        """Let a weight have these numbers, also in a use of an offloaded model that is in progress."""
        if self._offloading is None:
            point_to(weight, data.to(weight.device, weight.dtype))
        else:
            self._offloading.place(weight, data)

    def _sums(self, plans: Mapping[nn.Parameter, Plan], bars: Bars) -> dict[nn.Parameter, Tensor]:
        """Compute the sums of some weights on the host; nothing is changed yet."""
        originals = {weight: self._original(weight) for weight in plans}
        backed = dict(zip(plans, backed_by_files(list(originals.values())), strict=True))
        sums = {}
        with ExitStack() as files, bars(len(plans)) as bar:
            converts: dict[torch.dtype, Convert] = {}
            for dtype in {self._dtype(weight) for weight in plans}:
                shapes = {
                    str(number): tuple(weight.shape)
                    for number, weight in enumerate(plans)
                    if backed[weight] and self._dtype(weight) == dtype
                }
                converts[dtype] = files.enter_context(spool(shapes, dtype))
            for number, (weight, plan) in enumerate(plans.items()):
                dtype = self._dtype(weight)
                total = changed_weight(originals[weight].to(dtype), plan, weight.device)
                if backed[weight]:
                    release(originals[weight])
                convert = converts[dtype] if backed[weight] else in_memory
                sums[weight] = convert(str(number), total.cpu(), dtype)
                bar.update()
        return sums

    def _warn_of_edits(self, weights: Iterable[nn.Parameter], networks: Networks) -> None:
        """Warn where a sum was written to after it was made: what was written is dropped with the sum."""
        held = {weight: self._kept[weight] for weight in weights}
        known = {weight: kept.merged for weight, kept in held.items() if kept.merged is not None}
        same = dict(zip(known, unchanged(list(known.values()), list(known)), strict=True))
        edited = {weight for weight, kept in held.items() if not same.get(weight) and not _equals(weight, kept)}
        if edited:
            names = [name for network in networks.values() for name, one in network.named_parameters() if one in edited]
            listed = ", ".join(names[:EXAMPLES])
            warn(f"{len(names)} weights were written to while adapters changed them, which is undone: {listed}")


def read_fitting(source: str | Path, networks: Networks, family: str, *, strict: bool) -> LoraFile:
    """Read an adapter whose every tensor fits a module.

    Args:
        source: file, folder or name on the hub.
        networks: the networks.
        family: kind of the model: "sd1", "sd2" or "sdxl".
        strict: refuse keys that no module has.

    Returns:
        The adapter.

    Raises:
        AdapterError: it is none, or not one for this model.
        CheckpointError: the file cannot be read.
    """
    file = read_lora(source, spellings(targets_in(networks)), family, strict=strict)
    for target in file.parts:
        module: Any = networks[target.network].get_submodule(target.module)
        file.require_finite(target)
        try:
            require_fit(file.tensors(target), module.weight, module._parameters.get("bias"))
        except ValueError as error:
            path, other = file.weights.path, family_of(file.shapes())
            if other not in (family, "unknown"):
                raise other_family(path, other, family) from error
            keys = ", ".join(file.parts[target].values())
            hint = "the adapter was made for a model of other sizes, or its file is damaged"
            found, expected = f"{keys}: {error}", f"tensors that fit {target.name}"
            raise AdapterError("ADAPTER_SHAPE", path, found, expected=expected, hint=hint) from error
    return file


def targets_in(networks: Networks) -> list[Target]:
    """List the modules that an adapter may change.

    Args:
        networks: the networks.

    Returns:
        The modules that have weights of their own.
    """
    found = []
    for name, network in networks.items():
        found += targets_of(name, [key for key, one in network.named_modules() if "weight" in one._parameters])
    return found


def plans_of(loras: Iterable[Lora], networks: Networks) -> dict[nn.Parameter, Plan]:
    """List what is added to each weight.

    Args:
        loras: the adapters.
        networks: the networks.

    Returns:
        Weight -> its changes; weights that nothing is added to are left out.
    """
    plans: dict[nn.Parameter, list[Change]] = {}
    for lora in sorted(loras, key=lambda one: one.name):
        for target, parts in lora.file.parts.items():
            module, factor = networks[target.network].get_submodule(target.module), lora.factor(target)
            kinds = [*(["weight"] if parts.keys() - IN_BIAS else []), *(["bias"] if parts.keys() & IN_BIAS else [])]
            for kind in kinds if factor else ():
                plans.setdefault(getattr(module, kind), []).append(Change(lora.file, target, kind, factor))
    return {weight: tuple(plan) for weight, plan in plans.items()}


def changed_weight(original: Tensor, plan: Plan, device: torch.device) -> Tensor:
    """Add changes to a weight, in float32 or better.

    Args:
        original: the weight before them, in the dtype that it will be stored in.
        plan: the changes.
        device: the device that computes.

    Returns:
        The sum, not yet rounded.

    Raises:
        AdapterError: the sum is beyond that dtype.
    """
    wide = torch.promote_types(original.dtype, torch.float32)
    start = original.to(device, wide)
    total = start.clone()
    for file, target, kind, factor in plan:
        parts = {name: part.to(device) for name, part in file.tensors(target, wide).items()}
        delta = weight_delta(parts, start) if kind == "weight" else bias_delta(parts)
        if delta is not None:
            total += delta * torch.tensor(factor, dtype=wide, device=device)  # infinite where it is too large
    most = torch.finfo(original.dtype).max
    if not float(torch.linalg.vector_norm(total, ord=torch.inf)) <= most:  # also of NaN
        path, dtype = plan[-1].file.weights.path, str(original.dtype).removeprefix("torch.")
        found = f"{plan[0].target.name} with it is beyond the largest number of {dtype}"
        hint = "take a smaller weight, or another dtype"
        raise AdapterError("ADAPTER_VALUES", path, found, expected=f"at most {most:.4g}", hint=hint)
    return total


def _equals(weight: nn.Parameter, kept: Kept) -> bool:
    """Tell whether a weight that was moved or cast still is the sum, but for rounding."""
    made = changed_weight(kept.original.to(weight.dtype), kept.plan, weight.device)
    eps = 4 * max(torch.finfo(dtype).eps for dtype in (kept.original.dtype, weight.dtype))
    return torch.allclose(made, weight.data.to(made.dtype), rtol=eps, atol=eps * float(made.abs().max()))
