"""What has to hold of a system before its figures count: all is finite, and a peer's is like ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdinpaint.bench.cases import Case
from sdinpaint.bench.child import Figures
from sdinpaint.bench.peers.systems import OURS
from sdinpaint.errors import NumericError
from sdinpaint.metrics import psnr

__all__ = ["check_load", "check_memory", "check_picture", "check_tensor", "subject"]

Bytes = NDArray[np.uint8]

BOUNDS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest relative difference at which two systems are taken to compute the same; guidance enlarges what they round."""
LEAST_PSNR = 40.0
"""Of a float32 picture beside a peer's, in dB; where less precise steps add up it is shown, and bounds nothing."""
SUM_BOUND = 1e-9
"""Largest relative difference of the sum of all weights, which are the same but in another order."""
GB = 1e9


def subject(part: str, case: Case, system: str) -> str:
    """What an error is about."""
    return f"{part}, {case.family} in {case.dtype} with {system}"


def check_load(case: Case, name: str, found: Figures, ours: Figures) -> str:
    """The weights are those that ours has."""
    if not found["weights"]:
        return "weights in forms of its own, unchecked"
    difference = abs(found["sum"] - ours["sum"]) / ours["sum"]
    if found["weights"] != ours["weights"] or not difference <= SUM_BOUND:
        what = f"{found['weights']:.0f} bytes of weights, whose sizes add up to {found['sum']!r}"
        raise _wrong("load", case, name, what, f"{ours['weights']:.0f} and {ours['sum']!r}, as ours")
    return f"{found['weights'] / GB:.3g} GB of weights"


def check_memory(case: Case, name: str, runs: Sequence[Figures]) -> str:
    """A step is finite in every round."""
    if not all(one["finite"] for one in runs):
        raise _wrong("memory", case, name, "a step with NaN or infinity", "finite numbers")
    return "finite"


def check_tensor(what: str, exact: Tensor | None, case: Case, name: str, found: Tensor, ours: Tensor) -> str:
    """Finite, and like `exact`, ours in float32, which ours is at most twice as far from; without it, like ours."""
    if found.shape != ours.shape or not bool(found.isfinite().all()):
        bad = f"{what}: shape {tuple(found.shape)}, {int((~found.isfinite()).sum())} NaN or infinite"
        raise _wrong("step", case, name, bad, f"finite numbers of shape {tuple(ours.shape)}")
    if name == OURS and exact is None:
        return "finite"
    beside, bound = "ours" if exact is None else "ours in float32", BOUNDS[case.dtype]
    difference = _difference(found, ours if exact is None else exact)
    if not difference <= bound:
        raise _wrong("step", case, name, f"{what} differs from {beside} by {difference:.2g}", f"at most {bound:g}")
    if name == OURS or exact is None:
        return f"differs from {beside} by {difference:.1e} (bound {bound:g})"
    own, bound = _difference(ours, exact), 2 * difference + torch.finfo(case.torch_dtype).eps
    if not own <= bound:
        found_ = f"{what} of ours differs from ours in float32 by {own:.2g}, it by {difference:.2g}"
        raise _wrong("step", case, name, found_, f"ours at most {bound:.2g}, twice as much and a rounding")
    return f"differs from {beside} by {difference:.1e}, ours by {own:.1e} (bound {bound:.1e})"


def _difference(found: Tensor, ours: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - ours.double()).norm() / ours.double().norm())


def check_picture(case: Case, name: str, picture: Bytes, ours: Bytes) -> str:
    """It is one, and like ours."""
    if picture.shape != (case.size, case.size, 3) or picture.min() == picture.max():
        raise _wrong("picture", case, name, f"shape {picture.shape}, {picture.min()} to {picture.max()}", "a picture")
    if name == OURS:
        return "finite"  # of anything else the pipeline makes no picture
    likeness = psnr(picture, ours)
    if case.dtype != "float32":
        return f"PSNR {likeness:.1f} dB"
    if likeness < LEAST_PSNR:
        raise _wrong("picture", case, name, f"a PSNR of {likeness:.1f} dB", f"at least {LEAST_PSNR:g} dB")
    return f"PSNR {likeness:.1f} dB (bound {LEAST_PSNR:g})"


def _wrong(part: str, case: Case, system: str, found: str, expected: str) -> NumericError:
    return NumericError(
        "BENCH_WRONG", subject(part, case, system), found, expected=expected, hint="nothing of it is recorded"
    )
