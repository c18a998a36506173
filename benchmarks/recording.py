"""Where the scripts keep their rows, which are those of `sdinpaint bench`: JSON lines with the environment."""

from __future__ import annotations

from pathlib import Path

from sdinpaint.bench.report.rows import append, environment

__all__ = ["RESULTS", "append", "environment"]

RESULTS = Path(__file__).parent / "results"
