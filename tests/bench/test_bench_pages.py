"""Pages made of rows: tables, summary, where a baseline is faster and why, plots, README; and removal of old rows."""

from __future__ import annotations

import json
import platform
import re
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageColor
from places import ROOT
from sdinpaint_kernels import cpu_kinds

from sdinpaint import cli
from sdinpaint.bench.report import kinds
from sdinpaint.bench.report.bars import MOST_CALLS, draw_bars, draw_modes, draw_roofline, draw_seams
from sdinpaint.bench.report.figures import COLORS
from sdinpaint.bench.report.headline import BEGIN, END, headline, with_headline
from sdinpaint.bench.report.layouts import faster_layouts
from sdinpaint.bench.report.pages import Places, pages, prune, read_rows, tables, write_pages
from sdinpaint.bench.report.rows import append, environment, identity, latest, machine
from sdinpaint.bench.report.slower import UNWRITTEN, open_questions, read_reasons, where_slower
from sdinpaint.bench.report.summary import summary
from sdinpaint.bench.report.tables import baseline_is_faster, number, table
from sdinpaint.errors import SdInpaintWarning, SettingError

README = f"# A library\n\n{BEGIN}\nan older table\n{END}\n\nmore\n"


def row(system="sdinpaint", p50=8.0, ratio=None, **changes):
    return {
        "part": "step",
        "what": "guided step",
        "family": "sd15",
        "dtype": "float32",
        "stored": "float32",
        "device": "cpu",
        "size": 512,
        "steps": None,
        "quick": False,
        "system": system,
        "p20": 0.9 * p50,
        "p50": p50,
        "p80": 1.1 * p50,
        "unit": "s",
        "ratio": ratio,
        "check": "finite",
        **changes,
    }


def curve(**changes):
    powers = {"seconds": 1.25, "cpu_seconds": 1.5, "bytes": None}
    return {
        **row(part="growth", what="pixels", size=256, steps=2),
        "grows": "pixels",
        "amount": [256**2, 512**2],
        "exponent": powers,
        "last_exponent": {**powers, "seconds": 1.75},
        "ended_by": "seconds",
        "limits": {"seconds": 300.0, "bytes": 16e9},
        "reaches": {"seconds": 1000.0**2, "bytes": None},
        **changes,
    }


BESIDE = [row("diffusers", 10.0, 0.8), row(), row("openvino", 7.9, 1.0125)]


def on(kind, **more):
    """The environment of rows on two cores of that kind."""
    return {"environment": {"processor": "EPYC", "cores": 2, "kind": kind, **more}}


AVX512 = on("avx512_bf16")
AVX2 = on("avx2", pretended=True)


def lines(said):
    """The lines of a Markdown table as {heading: cell}."""
    heading, _, *rest = [line.strip("|\n").split("|") for line in said.splitlines() if line.startswith("|")]
    return [{name.strip(): cell.strip() for name, cell in zip(heading, line, strict=True)} for line in rest]


# Tables


def test_a_table_has_a_line_for_every_row_ours_first_and_ratios_above_one_bold():
    rows = [*BESIDE, row(dtype="bfloat16", p50=1234.5, percent_of_floor=81.26, stored=None)]
    found = lines(table(rows))
    assert [line["system"] for line in found] == ["sdinpaint", "diffusers", "openvino", "sdinpaint"]
    assert [line["ratio to baseline"] for line in found] == ["", "0.800", "**1.01**", ""]
    assert [line["% of roofline"] for line in found] == ["", "", "", "81.3"]
    assert found[1]["p50 (p20-p80)"] == "10.0 (9.00-11.0)"
    assert found[3]["p50 (p20-p80)"] == "1234 (1111-1358)"


def test_tables_have_a_heading_for_every_part_family_and_device():
    rows = [row(), row(family="sdxl"), row(part="picture", what="picture", steps=4), row(device="cuda"), row("x")]
    said = tables(rows)
    assert [line for line in said.splitlines() if line and not line.startswith("|")] == [
        "step: sd15, cpu",
        "step: sdxl, cpu",
        "picture: sd15, cpu",
        "step: sd15, cuda",
    ]
    assert "| picture, 4 steps |" in said


def test_a_name_with_a_bar_does_not_add_a_cell():
    assert "| command 1: a\\|b |" in table([row("command 1: a|b", ratio=0.5)])


def test_curves_tell_their_powers_and_where_they_end():
    [line] = lines(table([curve()]))
    assert (line["from"], line["to"]) == ("256 x 256", "512 x 512")
    assert line["power of time; of its last two points"] == "1.25; 1.75"
    assert line["power of memory"] == ""
    assert line["ended by"] == "seconds"
    assert line["where the power meets the limits"] == "300 s at 1000 x 1000"


@pytest.mark.parametrize(
    ("value", "said"), [(None, ""), (0.01234, "0.0123"), (8.0, "8.00"), (100.4, "100"), (1e6, "1000000")]
)
def test_numbers_are_short(value, said):
    assert number(value) == said


# Processor kinds


def test_rows_of_two_kinds_are_two_measurements_on_two_machines():
    own, pretended, had = row(**AVX512), row(**AVX2), row(**on("avx2"))
    assert [*map(machine, (own, pretended, had))] == [
        "EPYC, 2 cores, avx512_bf16",
        "EPYC, 2 cores, avx2 (pretended)",
        "EPYC, 2 cores, avx2",
    ]
    assert len({*map(identity, (own, pretended, had, row(**AVX512)))}) == 3
    assert machine(row(device="cuda", environment=AVX512["environment"] | {"gpu": "H200"})) == "H200"


def test_each_kind_has_a_table_the_machines_own_and_the_widest_first():
    rows = [row(part=part, **of) for of in (AVX2, on("avx512", pretended=True), AVX512) for part in ("step", "load")]
    named = ("avx512_bf16", "avx512 (pretended)", "avx2 (pretended)")
    assert [line for line in tables(rows).splitlines() if line and not line.startswith("|")] == [
        f"{part}: sd15, cpu, {kind}" for part in ("step", "load") for kind in named
    ]


def test_each_kind_has_a_page_section_and_a_plot(places):
    rows = [{**one, **of} for of in (AVX512, AVX2) for one in BESIDE]
    (places.rows / "step.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    write_pages(places)
    said = (places.pages / "bench.md").read_text()
    assert "## step: sd15, cpu, avx2 (pretended)\n\nEPYC, 2 cores, avx2 (pretended)\n" in said
    for name in ("step-sd15-cpu-avx512_bf16.png", "step-sd15-cpu-avx2-pretended.png"):
        assert f"]({name})" in said
        assert (places.pages / name).is_file()


def test_in_a_table_of_two_machines_of_one_kind_each_line_names_its_own():
    rows = [row(**AVX512), row(**on("avx512_bf16", processor="Xeon"))]
    assert [line["machine"] for line in lines(table(rows))] == [
        "EPYC, 2 cores, avx512_bf16",
        "Xeon, 2 cores, avx512_bf16",
    ]
    assert "machine" not in table(rows[:1])


@pytest.mark.parametrize(
    ("variables", "kind", "pretended"),
    [
        ({}, "avx512", False),
        ({"SDINPAINT_CPU_KIND": "avx512"}, "avx512", False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}, "avx2", True),
        ({"SDINPAINT_CPU_KIND": "other"}, "other", True),
        ({"ATEN_CPU_CAPABILITY": "default"}, "avx512", True),
    ],
)
def test_an_environment_says_the_kind_and_what_pretends_it(monkeypatch, variables, kind, pretended):
    for name in kinds.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, test in cpu_kinds.TESTS.items():
        monkeypatch.setattr(torch.cpu, test, lambda name=name: name in ("avx512", "avx2"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_kinds, "cpu_kind", cpu_kinds.cpu_kind.__wrapped__)
    used = "DEFAULT" if "ATEN_CPU_CAPABILITY" in variables else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    said = " ".join(f"{name}={value}" for name, value in variables.items())
    more = {"pretended": True, "own_kind": "avx512", "pretended_by": said}
    assert kinds.measured_kind() == {"kind": kind, **(more if pretended else {})}


def test_rows_hold_the_kind_of_this_process():
    assert environment().items() >= kinds.measured_kind().items()


# Where a baseline is faster


@pytest.mark.parametrize(
    ("changes", "faster"),
    [
        ({"ratio": 1.01}, True),
        ({"ratio": 1.0}, False),
        ({"ratio": 0.9}, False),
        ({"ratio": None}, False),
        ({"ratio": 1.2, "unit": "1/min"}, False),
        ({"ratio": 0.8, "unit": "1/min"}, True),
    ],
)
def test_a_baseline_is_faster_where_ours_takes_more_or_has_a_lower_rate(changes, faster):
    one = row("diffusers", **changes)
    assert baseline_is_faster(one) == faster
    assert ("| diffusers |" in where_slower([one], [])) == (faster and "unit" not in changes)


def test_every_faster_baseline_has_the_first_reason_that_agrees_or_says_that_there_is_none():
    slower = [
        row("openvino", ratio=1.1, dtype=dtype, part=part)
        for part, dtype in [("step", "float32"), ("step", "bfloat16"), ("load", "float32"), ("vae", "float32")]
    ]
    reasons = [
        {"part": "step", "dtype": "bfloat16", "reason": "narrow", "next": "one"},
        {"part": "step", "system": "openvino", "reason": "wide", "next": "two"},
        {"part": "load", "system": "diffusers", "reason": "another's", "next": "three"},
    ]
    found = lines(where_slower(slower, reasons))
    assert [line["reason"] for line in found] == ["wide", "narrow", UNWRITTEN, UNWRITTEN]
    assert [line["next idea"] for line in found] == ["two", "one", "", ""]


def test_a_reason_may_be_of_a_kind_and_of_several_values():
    slower = [
        row("openvino", ratio=1.1, dtype=dtype, **of) for dtype in ("float32", "bfloat16") for of in (AVX512, AVX2)
    ]
    slower += [row("openvino", ratio=1.1, dtype="float16", **AVX2), row("openvino", ratio=1.1)]
    reasons = [{"kind": "avx2", "dtype": ["float32", "bfloat16"], "reason": "narrow", "next": "one"}]
    reasons += [{"kind": "avx512_bf16", "reason": "wide", "next": "two"}]
    found = lines(where_slower(slower, reasons))
    assert [line["reason"] for line in found] == ["wide", "narrow", "wide", "narrow", UNWRITTEN, UNWRITTEN]
    assert [line["machine"] for line in found[:2]] == ["EPYC, 2 cores, avx512_bf16", "EPYC, 2 cores, avx2 (pretended)"]


def test_open_questions_are_rows_without_a_reason_and_reasons_without_a_row(tmp_path):
    file = tmp_path / "reasons.toml"
    file.write_text('# why\n\n[[case]]\npart = "load"\nreason = "old"\nnext = "one"\n\n[[case]]\ndtype = "float32"\n')
    with file.open("a") as more:
        more.write('reason = "of the day"\nnext = "two"\n')
    asked = row("openvino", ratio=1.1, dtype="bfloat16", stored="bfloat16", **AVX2)
    said = open_questions([*BESIDE, asked], file)
    assert said == [
        f"{file}: no reason for step, guided step, sd15 at 512 in bfloat16, EPYC, 2 cores, avx2 (pretended): "
        "openvino is faster, ratio 1.10",
        f"{file}:3: there is no row where a baseline is faster for this reason",
    ]
    assert open_questions([], tmp_path / "none.toml") == []


@pytest.mark.parametrize(
    "text",
    [
        '[[case]]\nreason = "it is"\n',
        '[[case]]\nreason = "it is"\nnext = ""\n',
        '[[case]]\nreason = "it is"\nnext = "more"\nsytem = "openvino"\n',
        '[case]\nreason = "it is"\nnext = "more"\n',
        "[[case]\n",
    ],
)
def test_a_file_of_reasons_that_cannot_be_used_is_an_error(text, tmp_path):
    (tmp_path / "reasons.toml").write_text(text)
    with pytest.raises(SettingError) as caught:
        read_reasons(tmp_path / "reasons.toml")
    assert caught.value.code == "BENCH_REASONS"


# Layouts of diffusers


def test_of_two_layouts_the_faster_one_of_each_measurement_is_compared():
    default, last = partial(row, "diffusers"), partial(row, "diffusers-channels-last")
    rate = {"part": "picture", "what": "pictures a minute", "unit": "1/min"}
    rows = [row(), default(ratio=0.7), last(ratio=0.9), default(ratio=0.8, **AVX2), last(ratio=0.6, **AVX2)]
    rows += [default(ratio=1.2, **rate), last(ratio=1.1, **rate), last(ratio=0.5, dtype="bfloat16")]
    assert faster_layouts(rows) == [rows[0], rows[2], rows[3], rows[6], rows[7]]


def test_the_summary_the_readme_and_the_table_of_faster_baselines_name_the_layout():
    rows = [row(), row("diffusers", ratio=0.9), row("diffusers-channels-last", ratio=1.1)]
    assert lines(headline(rows))[0]["/ diffusers"] == "**1.10** (channels-last)"
    assert lines(summary(rows))[0]["/ diffusers"] == "**1.10** (channels-last)"
    assert [line["baseline"] for line in lines(where_slower(rows, []))] == ["diffusers-channels-last"]
    assert [line["system"] for line in lines(table(rows))] == ["sdinpaint", "diffusers", "diffusers-channels-last"]
    rows[1]["ratio"] = 1.2
    assert lines(headline(rows))[0]["/ diffusers"] == lines(summary(rows))[0]["/ diffusers"] == "**1.20**"
    assert [line["baseline"] for line in lines(where_slower(rows, []))] == ["diffusers"]


# The page and its plots


@pytest.fixture
def places(tmp_path):
    """With rows of a step and a curve of growth."""
    found = Places(tmp_path / "rows", tmp_path / "pages", tmp_path / "README.md")
    found.pages.mkdir()
    found.readme.write_text(README)
    for one in BESIDE:
        append(found.rows / "step.jsonl", one)
    return found


def test_a_page_shows_all_rows_their_plots_the_reasons_and_the_environments(places):
    reason = '[[case]]\npart = "step"\nreason = "fewer copies"\nnext = "none"\n'
    (places.pages / "reasons.toml").write_text(reason)
    write_pages(places, ["step: it differs"])
    said = (places.pages / "bench.md").read_text()
    assert table(BESIDE) in said
    assert "fewer copies" in said
    assert UNWRITTEN not in said
    assert "- step: sdinpaint 0" in said
    assert "Refused: step: it differs" in said
    [plot] = places.pages.glob("step-sd15-cpu-*.png")
    assert f"({plot.name})" in said
    assert {path.name for path in places.pages.iterdir()} == {"bench.md", "reasons.toml", plot.name}
    assert headline(BESIDE) in places.readme.read_text()


def test_a_checkpoint_of_any_name_has_a_plot(places):
    append(places.rows / "step.jsonl", row(family="mine (2)/é.ckpt"))
    write_pages(places)
    assert [*places.pages.glob("step-mine__2__é.ckpt-cpu-*.png")]


def test_without_matplotlib_there_is_the_page_and_a_warning(places, monkeypatch):
    def missing(*_):
        raise SettingError("SETTING_EXTRA", "drawing", "needs matplotlib", hint="pip install")

    monkeypatch.setattr("sdinpaint.bench.report.pages.draw_bars", missing)
    with pytest.warns(SdInpaintWarning, match="pip install"):
        write_pages(places)
    assert (places.pages / "bench.md").is_file()


def test_without_rows_nothing_is_written(places):
    write_pages(Places(places.pages, places.pages, places.readme))
    assert [*places.pages.iterdir()] == []
    assert places.readme.read_text() == README


def bar_lengths(path):
    """The widest run of each system's colour, in its order."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return [int((pixels == ImageColor.getrgb(color)).all(-1).sum(1).max()) for color in COLORS]


def test_bars_are_as_long_as_what_they_show(tmp_path):
    draw_bars(BESIDE, tmp_path / "bars.png")
    ours, first, second, *rest = bar_lengths(tmp_path / "bars.png")
    assert ours / first == pytest.approx(8 / 10, abs=0.02)
    assert second / first == pytest.approx(7.9 / 10, abs=0.02)
    assert rest == [0, 0, 0]


def test_modes_have_a_bar_each(tmp_path):
    rows = [row(part="modes", what=what, p50=p50) for what, p50 in (("default", 8.0), ("offload", 2.0))]
    draw_modes(rows, tmp_path / "modes.png")
    draw_bars(rows, tmp_path / "bars.png")
    assert Image.open(tmp_path / "modes.png").size[1] < Image.open(tmp_path / "bars.png").size[1]
    assert bar_lengths(tmp_path / "modes.png")[0] > 100


def call(index, percent=20.0, **changes):
    return row(part="kernels", what=f"call {index}", percent_of_floor=percent, **{"count": 1, **changes})


def test_bars_of_kernels_are_percent_of_roofline(tmp_path):
    draw_roofline([call(1, 80.0, p50=3.0), call(1, 40.0, p50=5.0, system="torch")], tmp_path / "roofline.png")
    ours, torchs, *_ = bar_lengths(tmp_path / "roofline.png")
    assert torchs / ours == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("p50", "count", "shown"), [(3.0, 1, True), (0.5, 9, True), (0.5, 1, False)])
def test_bars_of_kernels_are_of_the_calls_that_take_most(tmp_path, p50, count, shown):
    rows = [call(index, p50=1.0) for index in range(MOST_CALLS)]
    beside = [call("one more", p50=p50, count=count), call("one more", system="torch")]
    draw_roofline([*beside, *rows] if not shown else [*rows, *beside], tmp_path / "roofline.png")
    assert (bar_lengths(tmp_path / "roofline.png")[1] > 0) == shown


# The README


def test_the_readme_shows_ours_and_the_ratio_to_each_baseline():
    rows = [
        *BESIDE,
        row(part="load", what="load, with the weights in memory", dtype="bfloat16", stored="float16", p50=1.2),
        row(part="memory", what="step, peak memory", unit="GB", p50=4.1),
        row("diffusers", part="memory", what="step, peak memory", unit="GB", ratio=0.9),
    ]
    assert lines(headline(rows)) == [
        {
            "": "guided step",
            "dtype": "float32",
            "sdinpaint": "8.00 s",
            "/ diffusers": "0.800",
            "/ openvino": "**1.01**",
        },
        {
            "": "load, weights in memory",
            "dtype": "bfloat16 from float16",
            "sdinpaint": "1.20 s",
            "/ diffusers": "",
            "/ openvino": "",
        },
        {
            "": "peak memory of a step",
            "dtype": "float32",
            "sdinpaint": "4.10 GB",
            "/ diffusers": "0.900",
            "/ openvino": "",
        },
    ]


def test_the_readme_shows_two_kinds_side_by_side():
    rows = [{**one, **of} for of in (on("avx512", pretended=True), AVX2, AVX512) for one in BESIDE]
    rows += [row(dtype="bfloat16", p50=4.0, **AVX512)]
    found = lines(headline(rows))
    assert [*found[0]] == [
        "",
        "dtype",
        "avx512_bf16: sdinpaint",
        "avx512_bf16: / diffusers",
        "avx512_bf16: / openvino",
        "avx2 (pretended): sdinpaint",
        "avx2 (pretended): / diffusers",
        "avx2 (pretended): / openvino",
    ]
    assert [line["avx512_bf16: sdinpaint"] for line in found] == ["8.00 s", "4.00 s"]
    assert [line["avx2 (pretended): / openvino"] for line in found] == ["**1.01**", ""]
    assert "amx_bf16: sdinpaint" in headline([*rows, row(**on("amx_bf16"))])
    assert "avx2" not in headline([*rows, row(**on("amx_bf16"))])  # two that machines had


def test_the_readme_shows_of_each_kind_the_machine_that_comes_last():
    rows = [row(p50=p50, **on("avx2", processor=processor)) for processor, p50 in (("Xeon", 5.0), ("EPYC", 6.0))]
    assert [line["sdinpaint"] for line in lines(headline(rows))] == ["6.00 s"]


@pytest.mark.parametrize(
    "other",
    [
        {"size": 1024},
        {"family": "sdxl"},
        {"device": "cuda"},
        {"quick": True},
        {"what": "another step"},
        {"system": "openvino"},
    ],
)
def test_the_readme_shows_nothing_of_other_rows(other):
    assert headline([row(**other)]) == ""


def test_the_table_of_a_readme_is_made_anew_between_its_markers():
    made = with_headline(README, BESIDE)
    assert made == README.replace("an older table\n", headline(BESIDE))
    assert with_headline(made, BESIDE) == made
    assert with_headline(made, [row(p50=7.0), *BESIDE[::2]]) != made


@pytest.mark.parametrize("readme", ["# A library\n", f"{BEGIN} and no end\n", f"{END} before {BEGIN}\n"])
def test_a_readme_without_markers_stays_as_it_is(readme):
    assert with_headline(readme, BESIDE) == readme


def test_the_table_of_the_repository_is_what_its_rows_give():
    rows = latest(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == with_headline(readme, rows)
    assert BEGIN in readme or not headline(rows)


def test_the_pages_of_the_repository_are_what_its_rows_give():
    places = Places(ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks")
    rows = read_rows(places)
    made = pages(rows, places)
    assert {
        name: (places.pages / name).read_text(encoding="utf-8") == text for name, text in made.items()
    } == dict.fromkeys(made, True)
    plots = {*re.findall(r"\]\(([^)]+\.png)\)", made["bench.md"])}
    by_hand = {"README.md", places.reasons.name}
    assert {path.name for path in places.pages.iterdir()} == {*made, *plots, *by_hand}


def test_every_row_of_the_repository_where_a_baseline_is_faster_has_a_reason_and_a_next_idea():
    places = Places(ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks")
    assert read_reasons(places.reasons)
    assert [said for said in open_questions(read_rows(places), places.reasons) if "no reason" in said] == []


def test_every_row_of_a_cpu_of_the_repository_has_a_processor_kind():
    files = (ROOT / "benchmarks" / "results").glob("*.jsonl")
    rows = [row for row in latest(files) if not row["device"].startswith("cuda")]
    assert {row["environment"].get("kind") for row in rows} <= {*cpu_kinds.KINDS}


# The summary


def test_the_summary_has_a_line_for_each_part_family_size_and_machine_with_ratios_by_dtype():
    here, gpu = AVX512["environment"], {"processor": "EPYC", "cores": 2, "gpu": "H200"}
    rows = [
        *({**one, "environment": here} for one in BESIDE),
        row("diffusers", ratio=0.5, dtype="bfloat16", environment=here),
        row("diffusers", ratio=0.25, device="cuda", environment=gpu),
        row("diffusers-captured", ratio=1.5, device="cuda", environment=gpu),
        row("diffusers", ratio=3.0, what="VAE decode", environment=here),
        row(part="modes", what="inpaint", environment=here),
        row("diffusers", part="picture", what="picture", steps=20, ratio=0.75, environment=here),
        row("diffusers", ratio=0.875, **AVX2),
        row("diffusers", ratio=0.625, size=1024, environment=here),
    ]
    found = lines(summary(rows))
    own, pretended = "EPYC, 2 cores, avx512_bf16", "EPYC, 2 cores, avx2 (pretended)"
    assert [line["machine"] for line in found] == [own, "H200", own, pretended, own]
    assert [line["size"] for line in found] == ["512", "512", "512", "512", "1024"]
    assert [line["/ diffusers"] for line in found] == ["0.800, 0.500", "0.250", "0.750", "0.875", "0.625"]
    assert [line["/ openvino"] for line in found] == ["**1.01**, -", "", "", "", ""]
    assert [line["other baselines"] for line in found] == ["", "diffusers-captured **1.50**", "", "", ""]


def test_calls_of_kernels_are_added_up():
    rows = [call(1, p50=2.0, count=3), call(1, p50=4.0, count=3, system="torch"), call(2, p50=5.0), call(3, p50=100.0)]
    rows.append(call(2, p50=1.0, system="torch", ratio=5.0))
    [line] = lines(summary(rows))
    assert line["/ torch"] == f"{(3 * 2 + 5) / (3 * 4 + 1):.3f}"


def test_nothing_is_summed_up_where_nothing_was_compared():
    assert summary([row(), call(1)]) == ""


def test_a_long_table_is_a_file_of_its_own(places):
    for index in range(50):
        append(places.rows / "kernels.jsonl", call(index))
    write_pages(places)
    [long] = places.pages.glob("kernels-sd15-cpu-*.md")
    assert f"[{long.name}]({long.name})" in (places.pages / "bench.md").read_text()
    assert long.read_text().count("| call ") == 50


def test_defects_have_a_column_for_each_system():
    given = {"part": "defects", "what": "empty mask", "unit": "steps", "how": "by default"}
    rows = [
        row("diffusers", **given, found=[10, 99.9]),
        row(**given, found=[]),
        row(**given | {"what": "NaN"}, found="an error"),
    ]
    assert lines(table(rows)) == [
        {"what": "empty mask", "unit": "steps", "sdinpaint": "none", "diffusers": "10; 99.9", "how": "by default"},
        {"what": "NaN", "unit": "steps", "sdinpaint": "an error", "diffusers": "", "how": "by default"},
    ]


def test_seams_are_drawn(tmp_path):
    rows = [
        row(part="seams", what=f"blend {seam}", seam=seam, ring_delta_e=2 * seam, unit="delta E") for seam in (1.0, 4.0)
    ]
    draw_seams(rows, tmp_path / "seams.png")
    assert bar_lengths(tmp_path / "seams.png")[0] > 300


# Superseded rows


def test_prune_keeps_the_latest_row_of_each_measurement_on_each_machine_and_says_how_many_went(places):
    other = '{"what": "of another benchmark"}'
    file = places.rows / "step.jsonl"
    elsewhere = row(p50=1.0, environment={"processor": "another", "cores": 4})
    with file.open("a") as rows:
        rows.write(f"{other}\n{json.dumps(elsewhere)}\n")
    append(file, row(p50=6.0))
    append(file, row(p50=7.0))
    append(places.rows / "load.jsonl", row(part="load"))
    result = CliRunner().invoke(cli.main, ["bench", "prune", "--out", str(places.rows)])
    assert result.output == f"2 superseded rows removed from {places.rows}, 2 of step.jsonl\n"
    kept = file.read_text().splitlines()
    assert other in kept
    assert [one["p50"] for one in map(json.loads, kept) if one.get("system") == "sdinpaint"] == [1.0, 7.0]
    assert (places.rows / "bench.md").is_file()
    assert prune(Places(places.rows, places.pages)) == {}


@pytest.mark.parametrize("line", [b'{"part": "step", "wh', b"\xff\xfe", b"[1]", b"3", b"[" * 10_000])
def test_a_line_that_was_cut_off_or_is_no_row_spoils_nothing(places, line):
    file = places.rows / "step.jsonl"
    before = latest([file])
    with file.open("ab") as rows:
        rows.write(line)
    append(file, row(p50=7.0))
    assert [one["p50"] for one in before] == [10.0, 8.0, 7.9]
    assert [one["p50"] for one in latest([file])] == [10.0, 7.0, 7.9]
    result = CliRunner().invoke(cli.main, ["bench", "prune", "--out", str(places.rows)])
    assert result.exit_code == 0
    assert len(file.read_bytes().splitlines()) == len(before) + 1


def test_pages_measures_nothing_and_lists_the_reasons_to_write(places):
    result = CliRunner().invoke(cli.main, ["bench", "pages", "--out", str(places.rows)])
    assert result.exit_code == 0
    assert result.output.startswith(f"{places.rows / 'reasons.toml'}: no reason for step, guided step, sd15 at 512 in ")
    assert result.output.count("\n") == 1
    assert "guided step" in (places.rows / "bench.md").read_text()
