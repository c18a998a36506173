"""Plot the loss curves of a training run. Needs matplotlib (the `train` extra)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from sdinpaint.errors import SettingError

SMOOTHING = 0.95


def require_matplotlib() -> None:
    """Raise SettingError where matplotlib is missing, before hours of training are spent."""
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'sdinpaint[train]'"
        raise SettingError("SETTING_MATPLOTLIB", "training", "matplotlib is not installed", hint=hint)


def draw(folder: Path, target: Path) -> None:
    """Plot the logs of a training run.

    Args:
        folder: folder of the run, with autoencoder/log.jsonl and inpainting/log.jsonl.
        target: the PNG file to write.

    Raises:
        SettingError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt  # noqa: PLC0415 - an extra

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    panels = [
        ("autoencoder", "psnr", "autoencoder: PSNR, dB"),
        ("inpainting", "loss", "UNet: weighted loss"),
        ("inpainting", "hole", "UNet: error of the noise in the hole"),
    ]
    for axis, (stage, figure_name, title) in zip(axes, panels, strict=True):
        rows = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text("utf-8").splitlines()]
        found = {row["step"]: row[figure_name] for row in rows}  # steps repeated after an interruption count once
        steps, values = list(found), list(found.values())
        axis.plot(steps, values, color="#c8d4e8", linewidth=0.8)
        axis.plot(steps, _smoothed(values), color="#1f4e9c", linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if figure_name != "psnr":
            axis.set_yscale("log")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    smooth, average = [], values[0]
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smooth.append(average)
    return smooth
