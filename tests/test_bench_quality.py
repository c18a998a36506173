"""Quality against time, and cost as the work grows: what is measured, and that it is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import sdinpaint
from sdinpaint.bench import growth
from sdinpaint.bench.growth import GrowthOptions, exponent, measure_growth, peak_bytes
from sdinpaint.bench.plots import COLORS, draw_growth, draw_quality
from sdinpaint.bench.quality import QualityOptions, measure_quality

MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    return sdinpaint.load("demo", device="cpu", progress=False)


@pytest.fixture(scope="module")
def quality(pipe):
    options = QualityOptions(scenes=8, batch=8, samplers=("ddim", "euler"), steps=(1, 10))
    return measure_quality(pipe, options, progress=False)


@pytest.fixture(scope="module")
def grown(pipe):
    options = GrowthOptions(
        start=growth.Work(size=64, steps=2), sizes=(64, 96, 128), pictures=(1, 4), steps=(2, 8), rounds=1
    )
    return measure_growth(pipe, options, progress=False)


def shown(path):
    """A picture as an array (H, W, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_there_is_a_quality_row_per_way(quality):
    assert [(row["steps"], row["sampler"]) for row in quality] == [
        (1, "ddim"),
        (1, "euler"),
        (10, "ddim"),
        (10, "euler"),
    ]
    for row in quality:
        assert 0 <= row["right_color"] <= 1
        assert 0 <= row["right_shape"] <= 1
        assert row["cpu_seconds"] > 0.001
        assert row["seconds"] > 0.001
        assert row["ring_delta_e"] > row["background"]["ring_delta_e"] > 0
        assert json.loads(json.dumps(row)) == row


def test_more_steps_paint_more_of_what_was_asked_for(quality):
    found = {(row["sampler"], row["steps"]): row for row in quality}
    for sampler in ("ddim", "euler"):
        one, ten = found[sampler, 1], found[sampler, 10]
        assert ten["right_shape"] >= one["right_shape"] + 0.25
        assert ten["right_color"] >= 0.85


def test_scores_do_not_change_from_run_to_run(pipe):
    options = QualityOptions(scenes=2, batch=2, samplers=("euler_ancestral",), steps=(3,))
    first, second = (measure_quality(pipe, options, progress=False)[0] for _ in range(2))
    times = ("seconds", "cpu_seconds")
    assert {**first, **dict.fromkeys(times)} == {**second, **dict.fromkeys(times)}


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    amounts = [1, 2, 5, 16, 100]
    assert exponent(amounts, [3e-3 * amount**power for amount in amounts]) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("costs", [[], [1.0], [None, 2.0, 3.0], [0.0, 1.0]])
def test_nothing_is_fitted_to_what_is_not_there(costs):
    assert exponent(range(1, len(costs) + 1), costs) is None


def test_the_peak_is_what_a_run_holds_at_once():
    def block():
        return torch.ones(48 * MIB // 4)  # so large that its pages go back to the system when it is freed

    all_of_them, one = (
        peak_bytes(run, torch.device("cpu"))
        for run in (lambda: [block() for _ in range(3)], lambda: [block().sum() for _ in range(3)])
    )
    if growth.CLEAR_REFS.exists():
        assert 47 * MIB < one < 72 * MIB
        assert 143 * MIB < all_of_them < 168 * MIB
    else:
        assert one is None


def test_there_is_a_curve_for_all_that_grows(grown):
    assert [(row["grows"], row["amount"]) for row in grown] == [
        ("pixels", [64**2, 96**2, 128**2]),
        ("pictures", [1, 4]),
        ("steps", [2, 8]),
    ]
    for row in grown:
        for name in growth.COSTS:
            assert len(row[name]) == len(row["amount"])
            assert row["exponent"][name] == exponent(row["amount"], row[name])
            assert row["last_exponent"][name] == exponent(row["amount"][-2:], row[name][-2:])
        assert all(seconds > 0.001 for seconds in row["seconds"] + row["cpu_seconds"])
        assert row["ended_by"] is None
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("limits", "law", "ended_by", "amounts"),
    [
        ({}, (1e-6, 100), None, 4),
        ({"most_seconds": 0.07}, (1e-6, 100), "seconds", 2),
        ({"most_bytes": 7 * MIB}, (1e-6, 100), "bytes", 2),
        ({"most_bytes": 7 * MIB}, (1e-6, None), None, 4),
    ],
)
def test_a_curve_ends_before_a_limit(pipe, monkeypatch, limits, law, ended_by, amounts):
    ran = []

    def cost(_, work, rounds):
        ran.append(work)
        seconds, memory = law
        taken = seconds * work.pixels
        return growth.Cost(seconds=taken, cpu_seconds=taken, bytes=memory and memory * work.pixels)

    monkeypatch.setattr(growth, "_cost", cost)
    options = GrowthOptions(sizes=(128, 256, 512, 1024), pictures=(1,), steps=(1,), **limits)
    row = measure_growth(pipe, options, progress=False)[0]
    assert row["ended_by"] == ended_by
    assert len(row["amount"]) == amounts
    assert max(work.size for work in ran) == 128 * 2 ** (amounts - 1)


@pytest.mark.parametrize(
    ("rows", "draw", "clock"), [("quality", draw_quality, "seconds"), ("grown", draw_growth, "cpu_seconds")]
)
def test_the_picture_is_drawn(rows, draw, clock, request, tmp_path):
    target = tmp_path / "curve.png"
    target.write_bytes(b"an older picture")
    draw(request.getfixturevalue(rows), target, clock=clock)
    pixels = shown(target)
    assert min(pixels.shape[:2]) >= 600
    assert (pixels == 255).all(-1).mean() > 0.5
    for color in COLORS[:2]:
        assert (pixels == ImageColor.getrgb(color)).all(-1).sum() > 500
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(quality, tmp_path, monkeypatch):
    target = tmp_path / "curve.png"
    target.write_bytes(b"an older picture")

    def fails(self, path, **options):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="no space"):
        draw_quality(quality, target)
    assert target.read_bytes() == b"an older picture"
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_what_the_system_does_not_tell_is_left_out_of_the_picture(grown, tmp_path):
    draw_growth([{**row, "bytes": [None] * len(row["bytes"])} for row in grown], tmp_path / "g")
    pixels = shown(tmp_path / "g")
    coloured = (pixels.max(-1) - pixels.min(-1)) > 60
    half = len(pixels) // 2
    assert coloured[:half].any()
    assert not coloured[half + 40 :].any()
