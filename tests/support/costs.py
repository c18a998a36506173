"""What our code asks of torch, counted and not timed: so the same on every machine, for any number of threads.

`python tests/support/costs.py` records in data/costs.json what test_cost_guard.py finds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from places import DATA, TESTS
from sdinpaint_kernels import backend, moments
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sdinpaint.models import ControlNet, UNet, clip, layers, vae

Cost = Mapping[str, int]
"""Runs of each of MODELS, the SUMS, and calls of each operation by its name, as "aten.cat"."""

RECORDED = DATA / "costs.json"
GUARD = f"{TESTS / 'test_cost_guard.py'}::test_nothing_costs_more_than_it_did"
TORCH = ".".join(torch.__version__.split(".")[:2])
MODELS: dict[type[nn.Module], str] = {
    UNet: "UNet",
    ControlNet: "ControlNet",
    vae.Encoder: "VAE encoder",
    vae.Decoder: "VAE decoder",
    clip.Embeddings: "text encoder",  # which begins with them
}
SUMS = "operations", "bytes", "flops"
"""Of calls of operations; of memory that they put out anew; of floating point work in products and convolutions."""
FALL = 0.03
"""By which share a figure may fall before it has to be recorded again."""
DRIFT = 0.05
"""By which share a sum may grow under another torch, whose functions may be made of other operations."""
REMEDY = "run `python tests/support/costs.py` to record it"


class Meter(TorchDispatchMode):
    """Counts operations, and the memory of what they put out unless it is that of an input: views are free.

    In inference mode an operation is seen as our code calls it, before torch takes it apart: "aten.linear", not the
    "aten.addmm" and the views that it is made of. What it takes for itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cost: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = memory((args, kwargs))
        new = sum(size for where, size in memory(out).items() if where not in given)
        self.cost.update({str(func.overloadpacket): 1, "operations": 1, "bytes": new})
        return out


def memory(tensors: object) -> dict[int, int]:
    """Where the memory of tensors, at any depth, begins, and its size in bytes."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def attention_flops(q: torch.Size, k: torch.Size, *_: object, **options: object) -> int:
    """Of the two products, for the shapes (B, heads, N, D) and (B, heads, M, D)."""
    return 4 * q.numel() * k[2]


ALSO_PRODUCTS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""What FlopCounterMode does not know."""


@contextmanager
def counted(cost: Counter[str]) -> Iterator[None]:
    """Count runs of MODELS, whose forward says so; a hook would keep layers from being computed together."""
    with ExitStack() as patches:
        for kind, name in MODELS.items():

            def forward(self, *given, whole=kind.forward, name=name, **options):
                cost[name] += 1
                return whole(self, *given, **options)

            patches.enter_context(patch.object(kind, "forward", forward))
            if kind in layers._FORWARDS:
                patches.enter_context(patch.dict(layers._FORWARDS, {kind: forward}))
        yield


def measure(work: Callable[[], object]) -> Cost:
    """What `work()` costs the second time, when all that is kept from the first is there."""
    work()
    meter, counter = Meter(), FlopCounterMode(display=False, custom_mapping=ALSO_PRODUCTS)
    with counted(meter.cost), ExitStack() as plainly, torch.inference_mode(), counter, meter:
        # in torch: what runs in its place depends on the machine
        plainly.enter_context(patch.object(backend, "SETTING", "torch"))
        plainly.enter_context(patch.object(moments, "may_run_in_place", lambda *_: False))
        # and as if nobody counted: then layers would be called one by one
        plainly.enter_context(patch.object(backend, "is_observed", lambda: False))
        plainly.enter_context(patch.object(layers.torch_module, "_has_any_global_hook", lambda: False))
        work()
    return {**meter.cost, "flops": counter.get_total_flops()}


def complaints(recorded: Cost, found: Cost, *, same_torch: bool = True) -> list[str]:
    """Which figures grew, and which fell so far that they have to be recorded: from what to what, the sums first.

    Under another torch than that of the record, only what our own code decides is compared: the runs of models as
    strictly as ever, the sums if they grow by more than DRIFT, and no single operation.
    """
    lines = []
    for name in dict.fromkeys([*MODELS.values(), *SUMS, *sorted({*recorded, *found})]):
        before, now = recorded.get(name, 0), found.get(name, 0)
        strict = same_torch or name in MODELS.values()
        if not strict and name not in SUMS:
            continue
        if now > before * (1 if strict else 1 + DRIFT):
            lines.append(f"{name} grew from {before} to {now}: spare it, or {REMEDY}")
        elif strict and now < before * (1 - FALL):
            lines.append(f"{name} fell from {before} to {now}, cheaper now: {REMEDY}")
    return lines


class Recorder:
    """A plugin of pytest that takes down what the guard finds, whether or not it lets it pass."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for each part of a test."""
        if report.when == "call":
            self.costs.update(report.user_properties)


def record() -> None:
    """Write down what everything costs now."""
    recorder = Recorder()
    pytest.main([GUARD, "--quiet", "--tb=no", "--no-summary"], plugins=[recorder])
    if not recorder.costs:
        sys.exit(f"nothing is recorded: {GUARD} did not run")
    table = {"torch": TORCH, "costs": recorder.costs}
    RECORDED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
