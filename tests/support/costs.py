"""Costs of our code, counted and not timed: so they are the same on every machine, for any number of threads.

`python tests/support/costs.py` records in data/costs.json what test_cost_guard.py finds. As a plugin of pytest, this
module lists the costs that fell at the end of a test run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
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
"""Runs of each of MODELS, the SUMS, and calls of each operation by its name, such as "aten.cat"."""

RECORDED = DATA / "costs.json"
GUARD = f"{TESTS / 'test_cost_guard.py'}::test_work_costs_no_more_than_recorded"
TORCH = ".".join(torch.__version__.split(".")[:2])
MODELS: dict[type[nn.Module], str] = {
    UNet: "UNet",
    ControlNet: "ControlNet",
    vae.Encoder: "VAE encoder",
    vae.Decoder: "VAE decoder",
    clip.Embeddings: "text encoder",  # which begins with them
}
SUMS = "operations", "bytes", "flops"
"""Calls of operations; new memory that they return; floating-point operations of products and convolutions."""
FALL = 0.03
"""The share by which a figure may fall before it is reported."""
FELL = "costs that fell"
"""The property of a test under which it reports them."""
DRIFT = 0.05
"""The share by which a sum may grow under another torch, whose functions may consist of other operations."""
REMEDY = "run `python tests/support/costs.py` to record them"


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
    """Return the address and the size in bytes of the memory of tensors, at any depth."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def attention_flops(q: torch.Size, k: torch.Size, *_: object, **options: object) -> int:
    """Count the two products of attention, for q (B, heads, N, D) and k (B, heads, M, D)."""
    return 4 * q.numel() * k[2]


ALSO_PRODUCTS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""Operations that FlopCounterMode does not know."""


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
    """Return the cost of a second call of `work()`, which finds everything that the first one cached."""
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


def rises(recorded: Cost, found: Cost, *, same_torch: bool = True) -> list[str]:
    """Say which figures grew, and from what to what, the sums first.

    Under another torch than that of the record, only what our own code decides is compared: the runs of models as
    strictly as ever, the sums if they grow by more than DRIFT, and no single operation.
    """
    lines = []
    for name, before, now, strict in _figures(recorded, found, same_torch):
        if now > before * (1 if strict else 1 + DRIFT):
            lines.append(f"{name} grew from {before} to {now}: spend less, or {REMEDY}")
    return lines


def falls(recorded: Cost, found: Cost, *, same_torch: bool = True) -> list[str]:
    """Say which figures fell by more than FALL, and from what to what; under another torch, only runs of models."""
    return [
        f"{name} fell from {before} to {now}"
        for name, before, now, strict in _figures(recorded, found, same_torch)
        if strict and now < before * (1 - FALL)
    ]


def _figures(recorded: Cost, found: Cost, same_torch: bool) -> Iterator[tuple[str, int, int, bool]]:
    """Yield the name of each figure, its values before and now, and whether every difference counts."""
    for name in dict.fromkeys([*MODELS.values(), *SUMS, *sorted({*recorded, *found})]):
        strict = same_torch or name in MODELS.values()
        if strict or name in SUMS:
            yield name, recorded.get(name, 0), found.get(name, 0), strict


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the costs that fell: pytest calls this at the end of a run."""
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ()))
    lines = [line for report in reports for name, found in report.user_properties if name == FELL for line in found]
    if lines:
        terminalreporter.section(f"{FELL}: {REMEDY}")
        for line in lines:
            terminalreporter.write_line(line)


class Recorder:
    """A plugin of pytest that keeps the costs that the guard finds, whether or not it lets them pass."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for each part of a test."""
        if report.when == "call":
            self.costs.update((name, found) for name, found in report.user_properties if name != FELL)


def record() -> None:
    """Record the present costs."""
    recorder = Recorder()
    pytest.main([GUARD, "--quiet", "--tb=no", "--no-summary"], plugins=[recorder])
    if not recorder.costs:
        sys.exit(f"nothing is recorded: {GUARD} did not run")
    table = {"torch": TORCH, "costs": recorder.costs}
    RECORDED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
