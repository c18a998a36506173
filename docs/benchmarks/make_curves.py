"""Draw the curves of this page from the rows in benchmarks/results, and measure those rows anew where asked to.

python docs/benchmarks/make_curves.py [--measure quality] [--measure growth]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sdinpaint
from sdinpaint.bench.growth import GrowthOptions, measure_growth
from sdinpaint.bench.plots import draw_growth, draw_quality
from sdinpaint.bench.quality import QualityOptions, measure_quality
from sdinpaint.bench.rows import append

PICTURES = Path(__file__).parent
RESULTS = PICTURES.parents[1] / "benchmarks" / "results"
CLOCK = "cpu_seconds"
"""The machine of these rows was shared: its time says more of the others."""


def measured(what: str) -> Iterator[dict[str, Any]]:
    """The rows of "quality" or "growth", of the included checkpoint on the CPU."""
    pipe = sdinpaint.load("demo", device="cpu", dtype="float32", progress=False)
    if what == "growth":
        yield from measure_growth(pipe, GrowthOptions())
        return
    for steps in QualityOptions().steps:  # each is kept once it is done
        yield from measure_quality(pipe, QualityOptions(steps=(steps,)))


def latest(what: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows in the results, the last of those that agree in `keys`."""
    rows = map(json.loads, (RESULTS / f"{what}.jsonl").read_text("utf-8").splitlines())
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def main() -> None:
    """Measure what is asked for, and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["quality", "growth"], action="append", default=[])
    for what in parser.parse_args().measure:
        for row in measured(what):
            append(RESULTS / f"{what}.jsonl", row)
    draw_quality(latest("quality", ["steps", "sampler"]), PICTURES / "quality.png", CLOCK)
    draw_growth(latest("growth", ["grows"]), PICTURES / "growth.png", CLOCK)


if __name__ == "__main__":
    main()
