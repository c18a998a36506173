"""Quality against time, and cost as the work grows: what is measured, and that it is drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import sdinpaint
from sdinpaint.bench import growth
from sdinpaint.bench.cases import Case
from sdinpaint.bench.growth import GrowthOptions, exponent, growth_rows, measure_growth, peak_bytes
from sdinpaint.bench.quality import QualityOptions, measure_quality
from sdinpaint.bench.report import plots
from sdinpaint.bench.report.figures import COLORS
from sdinpaint.bench.report.plots import draw_growth, draw_quality
from sdinpaint.bench.report.rows import WHAT_IT_IS
from sdinpaint.checkpoints.opening import DEMO

MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    return sdinpaint.load("demo", device="cpu", progress=False)


@pytest.fixture(scope="module")
def quality(pipe):
    options = QualityOptions(scenes=4, batch=4, samplers=("ddim", "euler"), steps=(1, 6))
    return measure_quality(pipe, options, progress=False)


def of_float32(rows):
    """Rows of the suite, as far as a plot shows them."""
    return [{**row, "dtype": "float32", "device": "cpu"} for row in rows]


@pytest.fixture(scope="module")
def grown(pipe):
    options = GrowthOptions(
        start=growth.Work(size=64, steps=2), sizes=(64, 96, 128), pictures=(1, 4), steps=(2, 8), rounds=1
    )
    return list(measure_growth(pipe, options, progress=False))


def shown(path):
    """A plot as an array (H, W, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_there_is_a_quality_row_per_way(quality):
    assert [(row["steps"], row["sampler"]) for row in quality] == [
        (1, "ddim"),
        (1, "euler"),
        (6, "ddim"),
        (6, "euler"),
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
        one, six = found[sampler, 1], found[sampler, 6]
        assert six["right_shape"] >= one["right_shape"] + 0.25
        assert six["right_color"] >= 0.85


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


def test_the_peak_is_what_a_run_holds_at_once(freed_memory):
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
        ({"most_bytes": 2**29}, (1e-6, 100), None, 4),
        ({"most_seconds": 0.07, "most_bytes": 2**29}, (1e-6, 100), "seconds", 2),
        ({"most_bytes": 7 * MIB}, (1e-6, 100), "bytes", 2),
        ({"most_bytes": 7 * MIB}, (1e-6, None), None, 4),
    ],
)
def test_a_curve_ends_before_a_limit_and_tells_where_it_would_meet_each(
    pipe, monkeypatch, limits, law, ended_by, amounts
):
    ran = []

    def cost(_, work, rounds):
        ran.append(work)
        seconds, memory = law
        taken = seconds * work.pixels
        return growth.Cost(seconds=taken, cpu_seconds=taken, bytes=memory and memory * work.pixels)

    monkeypatch.setattr(growth, "_cost", cost)
    options = GrowthOptions(**{"sizes": (128, 256, 512, 1024), "most_seconds": 6.0, **limits})
    row = next(iter(measure_growth(pipe, options, progress=False)))
    assert row["ended_by"] == ended_by
    assert row["limits"]["seconds"] == options.most_seconds
    assert row["reaches"]["seconds"] == pytest.approx(options.most_seconds / law[0])
    assert row["reaches"]["bytes"] == (law[1] and pytest.approx(options.most_bytes / law[1]))
    assert len(row["amount"]) == amounts
    assert max(work.size for work in ran) == 128 * 2 ** (amounts - 1)


@pytest.mark.parametrize(
    ("seconds", "power", "met"), [(1.0, 1, 300), (0.07, 1, 300 / 0.07), (0.05, 1, None), (0.03, 2, 100)]
)
def test_where_a_limit_is_met_is_told_unless_that_is_far(pipe, monkeypatch, seconds, power, met):
    def cost(_, work, rounds):
        return growth.Cost(seconds=seconds * work.steps**power, cpu_seconds=1.0, bytes=100 * MIB + work.steps)

    monkeypatch.setattr(growth, "_cost", cost)
    *_, row = measure_growth(pipe, GrowthOptions(most_bytes=2**30), progress=False)
    assert row["grows"] == "steps"
    assert row["reaches"] == {"seconds": met and pytest.approx(met), "bytes": None}


def test_by_default_a_run_may_take_most_of_the_memory_that_is_free(pipe, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(growth, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(growth, "_cost", lambda *_, **__: growth.Cost(seconds=1.0, cpu_seconds=1.0, bytes=1.0))
    row = next(iter(measure_growth(pipe, GrowthOptions(), progress=False)))
    assert row["limits"]["bytes"] == pytest.approx(800 * 1024)


def test_a_run_that_takes_long_is_not_repeated(pipe, monkeypatch):
    ran = []
    monkeypatch.setattr(type(pipe), "inpaint", lambda self, *_, **__: ran.append(1))
    growth._cost(pipe, growth.Work(), rounds=3)
    assert len(ran) == 1 + 3
    ran.clear()
    monkeypatch.setattr(growth, "LONG", 0.0)
    growth._cost(pipe, growth.Work(), rounds=3)
    assert len(ran) == 1


def test_the_suite_has_a_row_for_every_curve(monkeypatch):
    monkeypatch.setattr(growth, "_cost", lambda *_, **__: growth.Cost(seconds=1.0, cpu_seconds=1.0, bytes=1.0))
    case = Case(
        family="demo",
        checkpoint=str(DEMO),
        dtype="float32",
        stored=None,
        device="cpu",
        size=128,
        steps=4,
        rounds=1,
        quick=True,
    )
    rows = list(growth_rows(case, most_seconds=7.0, most_bytes=5e9, progress=False))
    assert len({tuple(row[name] for name in WHAT_IT_IS) for row in rows}) == 3
    assert {tuple(row["limits"].values()) for row in rows} == {(7.0, 5e9)}
    assert {(row["family"], row["dtype"], row["part"]) for row in rows} == {("demo", "float32", "growth")}
    assert {(row["size"], row["steps"]) for row in rows} == {(64, 1)}


@pytest.mark.parametrize(("worked", "clock"), [(0.9, "seconds"), (1.9, "seconds"), (0.4, "cpu_seconds")])
def test_on_a_busy_machine_processor_time_is_shown(worked, clock):
    rows = [{"seconds": [1.0, 2.0], "cpu_seconds": [worked, 2 * worked]}, {"seconds": 3.0, "cpu_seconds": 3 * worked}]
    assert plots._clock(rows) == clock


@pytest.mark.parametrize(("rows", "draw"), [("quality", draw_quality), ("grown", draw_growth)])
def test_the_plot_is_drawn_with_a_colour_for_each_line(rows, draw, request, tmp_path):
    target = tmp_path / "curve.png"
    target.write_bytes(b"an older plot")
    found = of_float32(request.getfixturevalue(rows))
    if draw is draw_growth:
        found += [{**row, "dtype": "bfloat16", "seconds": [2 * taken for taken in row["seconds"]]} for row in found]
    draw(found, target)
    pixels = shown(target)
    assert min(pixels.shape[:2]) >= 600
    assert (pixels == 255).all(-1).mean() > 0.5
    for color in COLORS[:2]:
        assert (pixels == ImageColor.getrgb(color)).all(-1).sum() > 500
    assert (pixels == ImageColor.getrgb(COLORS[2])).all(-1).sum() == 0
    assert target.stat().st_size < 150_000
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_plot_that_cannot_be_drawn_leaves_the_old_one(quality, tmp_path, monkeypatch):
    target = tmp_path / "curve.png"
    target.write_bytes(b"an older plot")

    def fails(self, path, **options):
        if options.get("optimize"):  # the plot itself, which the drawing library has made in memory
            path.write(b"half of it")
            raise OSError("no space left on device")
        save(self, path, **options)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="no space"):
        draw_quality(of_float32(quality), target)
    assert target.read_bytes() == b"an older plot"
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_what_the_system_does_not_tell_is_left_out_of_the_plot(grown, tmp_path):
    draw_growth([{**row, "bytes": [None] * len(row["bytes"])} for row in of_float32(grown)], tmp_path / "g")
    pixels = shown(tmp_path / "g")
    coloured = (pixels.max(-1) - pixels.min(-1)) > 60
    half = len(pixels) // 2
    assert coloured[:half].any()
    assert not coloured[half + 40 :].any()
