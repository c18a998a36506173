"""The part `defects`: diffusers still has the defects in the table, and sdinpaint has none of them."""

from __future__ import annotations

import json

import pytest
from places import ROOT

from sdinpaint.bench.cases import Case
from sdinpaint.bench.defects import measure_defects
from sdinpaint.bench.report.rows import WHAT_IT_IS
from sdinpaint.bench.report.tables import table
from sdinpaint.checkpoints.opening import DEMO

EXACT = {
    "7-pixel line in the mask": (12.5, 0),
    "4 x 4 square in the mask": (75, 0),
    "6 x 6 square in the mask": (43.75, 0),
    "8 x 8 square in the mask": (0, 0),
    "pasted back, edits: 1": ([0, 0], [0, 0]),
    "pasted back, edits: 2": ([0, 0], [0, 0]),
    "masked region alone, edits: 1": ([0, 0], [0, 0]),
    "masked region alone, edits: 2": ([0, 0], [0, 0]),
    "steps run of 50": ([0.58], []),
    "steps run of 20": ([], []),
    "steps run of 7": ([0.1], []),
    "empty mask: what is said": ("nothing", "a warning"),
    "empty mask, masked region alone": (
        "ValueError: Coordinate 'right' is less than 'left'",
        [0, 0.0, 0],
    ),
    "empty mask: the crop": ([480, 480, 32, 32], "MaskError: mask: nothing in it is repainted"),
    "mask in alpha, black paint": ([0, 0], [100, 0]),
    "mask in alpha, white paint": ([100, 100], [100, 0]),
    "picture of 128 x 96": ("128 x 128", "128 x 96"),
    "picture of 100 x 83": ("128 x 128", "100 x 83"),
    "picture of 96 x 128 stored sideways": ("128 x 128, sideways", "96 x 128, upright"),
    "guidance_scale of infinity": ("a black picture", "SettingError: guidance_scale: inf"),
}
"""Row -> what is measured in diffusers and in sdinpaint."""


def demo_case(peers):
    given = {"family": "demo", "checkpoint": str(DEMO), "dtype": "float32", "stored": None, "device": "cpu"}
    return Case(**given, size=128, steps=1, rounds=1, quick=True, peers=peers)


@pytest.fixture(scope="module")
def found():
    """The rows of a quick run."""
    return list(measure_defects(demo_case(("diffusers", "openvino")), ()))


@pytest.fixture(scope="module")
def rows(found):
    """Results by the names of the rows: (diffusers, sdinpaint)."""
    ours, theirs = ({row["what"]: row["found"] for row in found if row["system"] == name} for name in SYSTEMS)
    return {what: (theirs[what], ours[what]) for what in ours}


SYSTEMS = ("sdinpaint", "diffusers")


@pytest.mark.peer
def test_rows_are_those_of_the_suite_and_json(found):
    assert {row["system"] for row in found} == {*SYSTEMS}
    for row in found:
        assert row.keys() >= {*WHAT_IT_IS, "ratio"}
        assert json.loads(json.dumps(row)) == row


@pytest.mark.peer
@pytest.mark.parametrize("name", EXACT)
def test_measured_in_both(rows, name):
    assert rows[name] == EXACT[name]


@pytest.mark.peer
def test_a_faint_pixel_inflates_their_crop_alone(rows):
    theirs, ours = rows["crop with a faint pixel in the mask"]
    assert theirs > 3
    assert ours == 1


@pytest.mark.peer
@pytest.mark.parametrize(("name", "share"), [("by default", 95), ("pasted back, soft mask", 15)])
@pytest.mark.parametrize("edits", [1, 2])
def test_they_change_known_pixels(rows, name, share, edits):
    theirs, ours = rows[f"{name}, edits: {edits}"]
    assert theirs[0] > share
    assert ours == [0, 0]


@pytest.mark.peer
def test_an_item_of_a_batch_is_its_single_run(rows):
    for name in ("one picture", "three pictures"):
        _, (latents, share, levels) = rows[f"batch of {name} against single runs"]
        assert latents < 1e-4  # the size of float32's rounding
        assert share < 0.1
        assert levels <= 1
    theirs, _ = rows["batch of one picture against single runs"]
    assert theirs[0] > 1e-3  # ten times the bound for ours


@pytest.mark.peer
def test_an_empty_mask_costs_them_an_image(rows):
    theirs, ours = rows["empty mask"]
    assert theirs[0] == 1
    assert theirs[1] > 95
    assert ours == [0, 0, 0]


@pytest.mark.peer
def test_what_cannot_be_meant_is_refused(rows):
    nothing_repainted, ours = rows["mask by a red brush on black"]
    assert nothing_repainted == [0, 0]
    assert ours.startswith("MaskError: mask: 25.0% of it is coloured")
    theirs, ours = rows["NaN in a corner of the picture"]
    assert "picture" in theirs
    assert ours.endswith("values are nan or inf")


def test_every_recorded_row_is_in_the_table():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "defects.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "benchmarks" / "bench.md").read_text(encoding="utf-8")
    assert table(rows) in page
