"""Checks of a system's output before it is timed: all is finite, and a baseline's is close to ours."""

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

__all__ = ["check_adapter", "check_load", "check_memory", "check_picture", "check_tensor", "subject"]

Bytes = NDArray[np.uint8]

BOUNDS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""The largest relative difference at which two systems compute the same; guidance enlarges rounding errors."""
LEAST_PSNR = 40.0
"""The smallest PSNR in dB of two float32 images; in other dtypes, where rounding adds up, PSNR is only shown."""
SUM_BOUND = 1e-9
"""The largest relative difference of the sum of all weights, which are the same in another order."""
GB = 1e9


def subject(part: str, case: Case, system: str) -> str:
    """Name the subject of an error.

    Args:
        part: the part of the suite.
        case: family and dtype.
        system: the system that is checked.

    Returns:
        A text such as "step, sd15 in float32 with diffusers".
    """
    return f"{part}, {case.family} in {case.dtype} with {system}"


def check_load(case: Case, name: str, found: Figures, ours: Figures) -> str:
    """Check that a system has the same weights as ours.

    Args:
        case: the case.
        name: the system.
        found: its figures.
        ours: those of sdinpaint.

    Returns:
        The check in words.

    Raises:
        NumericError: the weights differ.
    """
    if not found["weights"]:
        return "weights in a layout of its own, unchecked"
    difference = abs(found["sum"] - ours["sum"]) / ours["sum"]
    if found["weights"] != ours["weights"] or not difference <= SUM_BOUND:
        what = f"{found['weights']:.0f} bytes of weights, with absolute values that add up to {found['sum']!r}"
        raise _wrong("load", case, name, what, f"{ours['weights']:.0f} and {ours['sum']!r}, as ours")
    return f"{found['weights'] / GB:.3g} GB of weights"


def check_memory(case: Case, name: str, runs: Sequence[Figures]) -> str:
    """Check that what every process computed is finite.

    Args:
        case: the case.
        name: the system.
        runs: its figures, by round.

    Returns:
        The check in words.

    Raises:
        NumericError: there is NaN or infinity.
    """
    if not all(one["finite"] for one in runs):
        raise _wrong("memory", case, name, "NaN or infinity", "finite numbers")
    return "finite"


def check_adapter(case: Case, name: str, found: Figures) -> str:
    """Check that a LoRA changed a step, and say whether the model was the same after it was taken off.

    Args:
        case: the case.
        name: the system.
        found: its figures.

    Returns:
        The check in words.

    Raises:
        NumericError: the step is the same with it, or NaN or infinite.
    """
    if not found["finite"]:
        raise _wrong("adapters", case, name, "a step that is not finite, or the same as without", "another step")
    return "removal is exact" if found["exact"] else "finite; removal is not exact"


def check_tensor(what: str, exact: Tensor | None, case: Case, name: str, found: Tensor, ours: Tensor) -> str:
    """Check that a tensor is finite and close to the reference.

    The reference is ours in float32 where `exact` is given, and our error may be twice the baseline's; else it is ours.

    Args:
        what: the name of the measurement.
        exact: what ours makes in float32, or None.
        case: the case.
        name: the system.
        found: its tensor.
        ours: that of sdinpaint, of the same shape.

    Returns:
        The check in words.

    Raises:
        NumericError: it is not finite, or differs by more than BOUNDS allows.
    """
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
    """Compute the difference relative to the norm of `ours`."""
    return float((found.double() - ours.double()).norm() / ours.double().norm())


def check_picture(case: Case, name: str, image: Bytes, ours: Bytes) -> str:
    """Check that an image has the right shape and is close to ours.

    Args:
        case: the case.
        name: the system.
        image: its image (S, S, 3).
        ours: that of sdinpaint.

    Returns:
        The check in words.

    Raises:
        NumericError: it is empty, or in float32 its PSNR is below LEAST_PSNR.
    """
    if image.shape != (case.size, case.size, 3) or image.min() == image.max():
        raise _wrong("picture", case, name, f"shape {image.shape}, {image.min()} to {image.max()}", "an image")
    if name == OURS:
        return "finite"  # the pipeline raises an error for anything else
    likeness = psnr(image, ours)
    if case.dtype != "float32":
        return f"PSNR {likeness:.1f} dB"
    if likeness < LEAST_PSNR:
        raise _wrong("picture", case, name, f"a PSNR of {likeness:.1f} dB", f"at least {LEAST_PSNR:g} dB")
    return f"PSNR {likeness:.1f} dB (bound {LEAST_PSNR:g})"


def _wrong(part: str, case: Case, system: str, found: str, expected: str) -> NumericError:
    return NumericError(
        "BENCH_WRONG", subject(part, case, system), found, expected=expected, hint="no row of it is recorded"
    )
