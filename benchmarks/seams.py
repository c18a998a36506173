"""What blending and colour matching do to the edge of the hole, and to what was asked for in it.

    python benchmarks/seams.py [--scenes 64] [--cover max|nearest] [--sheet FILE]

The included demo checkpoint repaints held-out scenes (25 steps, guidance 7.5, float32, CPU). Every scene is painted
once and joined to its picture in every way, so that the ways differ in nothing else. Rows are appended to
results/seams.jsonl, and the table goes to the output.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from recording import RESULTS, append

import sdinpaint
from sdinpaint import metrics
from sdinpaint.images.blending import BLENDS, compose
from sdinpaint.images.sheets import contact_sheet
from sdinpaint.training.evaluate import Case, held_out
from sdinpaint.training.judge import judge

BATCH = 16
STEPS = 25
SHOWN = 4
Bytes = NDArray[np.uint8]


def generated(cases: Sequence[Case], cover: str) -> list[Bytes]:
    """The model's own picture for every case, known pixels too: what there is to join."""
    pipe = sdinpaint.load("demo", device="cpu", dtype="float32", progress=False)
    pictures: list[Bytes] = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        result = pipe.inpaint(
            [case.image for case in part],
            [case.hole for case in part],
            [case.prompt for case in part],
            steps=STEPS,
            seed=[start + index for index in range(len(part))],
            cover=cover,
            paste_back=False,
        )
        pictures += [np.asarray(image) for image in result.images]
    return pictures


def measure(cases: Sequence[Case], pictures: Sequence[Bytes], blend: str, match: bool) -> dict[str, object]:
    """Means of the scores, and the judge's verdicts, of one way of joining."""
    joined = [
        compose(case.image, picture, case.hole, blend=blend, match=match)
        for case, picture in zip(cases, pictures, strict=True)
    ]
    scores = [metrics.scores(case.image, after, case.hole) for case, after in zip(cases, joined, strict=True)]
    verdicts = [judge(after, case.hole, case.background) for case, after in zip(cases, joined, strict=True)]
    count = len(cases)
    return {
        "blend": blend,
        "match_color": match,
        "scenes": count,
        "steps": STEPS,
        "seam": statistics.mean(score.seam or 0 for score in scores),
        "ring_delta_e": statistics.mean(score.ring_delta_e or 0 for score in scores),
        "right_color": sum(v.color == case.color for v, case in zip(verdicts, cases, strict=True)) / count,
        "right_shape": sum(v.shape == case.shape for v, case in zip(verdicts, cases, strict=True)) / count,
        "known_error": max(score.known_error for score in scores),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| blend | match_color | seam | ring delta E | colour right | shape right | known pixels changed by |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        match = "yes" if row["match_color"] else "no"
        lines.append(
            f"| {row['blend']} | {match} | {row['seam']:.2f} | {row['ring_delta_e']:.2f} | {row['right_color']:.1%} "
            f"| {row['right_shape']:.1%} | {row['known_error']} |"
        )
    return "\n".join(lines)


def sheet(cases: Sequence[Case], pictures: Sequence[Bytes]) -> Image.Image:
    """The first scenes, joined in every way."""
    rows = []
    for case, picture in zip(cases[:SHOWN], pictures, strict=False):
        ways = product(BLENDS, (False, True))
        rows.append(
            [
                (
                    Image.fromarray(compose(case.image, picture, case.hole, blend=blend, match=match)),
                    f"{case.prompt}\n{blend}{', match_color' if match else ''}",
                )
                for blend, match in ways
            ]
        )
    return contact_sheet(rows, scale=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--sheet", type=Path, help="write a picture of the first scenes")
    parser.add_argument("--cover", choices=["max", "nearest"], default="max")
    options = parser.parse_args()
    cases = held_out(options.scenes)
    pictures = generated(cases, options.cover)
    rows = [measure(cases, pictures, blend, match) for blend, match in product(BLENDS, (False, True))]
    for row in rows:
        append(RESULTS / "seams.jsonl", {"cover": options.cover, **row})
    print(table(rows))
    if options.sheet is not None:
        sheet(cases, pictures).save(options.sheet)


if __name__ == "__main__":
    main()
