"""The base of all plots: colours, plain numbers on axes, and files written whole. Needs matplotlib."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from sdinpaint_weights.atomic import atomic_write

from sdinpaint.checks import require_extra

__all__ = ["COLORS", "GREY", "LINES", "MARKERS", "new_figure", "plain_numbers", "save"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that colour-blind readers can tell apart. Source: Okabe and Ito, 2008."""
MARKERS, LINES = "osD^vP", ("-", "--", ":")
GREY = "#666666"
SHADES = 128
"""The number of colours in a file, those of antialiasing included."""


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Returns:
        A figure of matplotlib.

    Raises:
        SettingError: matplotlib is missing.
    """
    # pyplot would choose a window system and keep every figure
    return _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis 1, 2, 5, 10 in place of powers of ten.

    Args:
        axis: an axis of matplotlib.
    """
    axis.set_major_locator(_matplotlib("ticker").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(_matplotlib("ticker").NullLocator())


def save(figure: Any, target: Path) -> None:
    """Write a PNG of few colours, a third as large as one of all, whole or not at all.

    Args:
        figure: a figure of matplotlib.
        target: the file.

    Raises:
        OSError: it cannot be written.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as image, atomic_write(target) as file:
        image.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)


def _matplotlib(module: str) -> Any:
    return require_extra(f"matplotlib.{module}", extra="bench", what="drawing the benchmarks")
