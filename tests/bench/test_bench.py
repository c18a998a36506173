"""The benchmark suite: what it writes, and that nothing is timed that fails its check; no test looks at a time."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from math import nan

import pytest
import torch
from builders import as_sdxl
from click.testing import CliRunner

from sdinpaint import cli
from sdinpaint.bench import child, parts, suite
from sdinpaint.bench.cases import Case, StepInputs
from sdinpaint.bench.checkpoints import random_pipeline
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS, PEERS, Peer, SdInpaint
from sdinpaint.bench.report.pages import Places, write_pages
from sdinpaint.bench.report.rows import spread
from sdinpaint.bench.suite import Options, Outcome, run
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.errors import NumericError, SettingError
from sdinpaint.loading import save_diffusers

TOLD = "print('took 1.25 s')"
FIELDS = {"part", "what", "family", "dtype", "device", "size", "steps", "system", "unit", "values", "ratio", "check"}


def options(out, part="step", **changes):
    given = {"families": ("demo",), "quick": True, "rounds": 1, "steps": 1, "places": Places(out, out)}
    return Options(part=part, **{**given, **changes})


def measure(chosen):
    outcome = Outcome()
    run(chosen, outcome, progress=False)
    return outcome


def rows_in(folder, part):
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def command(program, time=r"took ([\d.]+) s"):
    return Command(f'{sys.executable} -c "{program}"', time)


def demo_case(**changes):
    given = {"family": "demo", "checkpoint": str(DEMO), "dtype": "float32", "stored": None, "device": "cpu"}
    return Case(**{**given, "size": 64, "steps": 1, "rounds": 1, "quick": True, **changes})


class Another(SdInpaint):
    """A peer that needs no package."""


@pytest.fixture
def peer(monkeypatch):
    """The name of a peer that computes as ours does."""
    monkeypatch.setitem(PEERS, "another", Peer(Another, lambda: None, "import json"))
    return "another"


@pytest.fixture(autouse=True)
def no_new_processes(monkeypatch):
    """For pictures and imports, which would take most of the time of these tests; not for `in_child`."""
    monkeypatch.setattr(parts, "first_picture", lambda name, case: 3.0)
    monkeypatch.setattr(parts, "import_seconds", lambda statement: 1.0)


# What is written


def test_rows_hold_their_fields(tmp_path, peer):
    measure(options(tmp_path, "step", peers=(peer,), dtypes=("float32", "bfloat16")))
    rows = rows_in(tmp_path, "step")
    assert [(row["dtype"], row["system"]) for row in rows] == [
        (dtype, system) for dtype in ("float32", "bfloat16") for _ in parts.RUNS for system in (OURS, peer)
    ]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["environment"]["torch"] == torch.__version__
        assert (row["ratio"] is None) == (row["system"] == OURS)


def test_the_table_shows_the_latest_rows_and_passes_over_those_of_other_benchmarks(tmp_path):
    (tmp_path / "step.jsonl").write_text('{"what": "step", "family": "sd15", "milliseconds": 5.7}\n')
    chosen = options(tmp_path)
    for _ in range(2):
        measure(chosen)
        write_pages(chosen.places)
    assert len(rows_in(tmp_path, "step")) == 1 + 2 * len(parts.RUNS)
    assert (tmp_path / "bench.md").read_text().count("guided step") == 1


def test_percentiles_lie_between_neighbours_in_proportion():
    assert spread([3.0]) == {"p20": 3, "p50": 3, "p80": 3}
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx({"p20": 2, "p50": 3.5, "p80": 5})


def test_load_and_memory_are_measured_over_the_weights():
    stored = sum(file.stat().st_size for file in DEMO.rglob("*.safetensors"))  # in half precision
    found = child.load(OURS, demo_case())
    assert found["weights"] == pytest.approx(2 * stored, rel=0.01)
    assert 0 < found["seconds"] <= found["touched"]
    assert found["peak"] > 0.9 * found["weights"]
    assert child.memory(OURS, demo_case())["step"] > 0


def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    rows = measure(options(tmp_path, "memory")).rows
    assert [row["what"] for row in rows] == ["step, peak memory", "picture, peak memory"]


def test_quality_is_of_the_included_checkpoint_whatever_family_is_asked_for(tmp_path):
    [row] = measure(options(tmp_path, "quality", families=("sd15",))).rows
    assert row["family"] == "demo"
    assert {"right_color", "seam", "ring_delta_e"} <= row.keys()


@pytest.mark.peer
def test_diffusers_makes_the_same_of_a_random_sdxl(tiny, tmp_path):
    save_diffusers(tmp_path, random_pipeline(as_sdxl(tiny)))
    chosen = options(tmp_path / "out", "picture", families=(), checkpoint=str(tmp_path), peers=("diffusers",))
    outcome = measure(chosen)
    assert outcome.refused == []
    assert outcome.rows[1]["check"].startswith("PSNR")


@pytest.mark.peer
def test_diffusers_makes_the_same_step_and_picture(tmp_path):
    for part, whats in (("step", [*parts.RUNS]), ("picture", ["picture", "first picture, new process"])):
        outcome = measure(options(tmp_path, part, peers=("diffusers",)))
        assert outcome.refused == []
        rows = [row for row in outcome.rows if row["unit"] == "s"]
        assert [(row["what"], row["system"]) for row in rows] == [*product(whats, (OURS, "diffusers"))]


# What is refused


def test_a_peer_that_differs_is_refused_and_the_command_says_so(tmp_path, peer, monkeypatch):
    monkeypatch.setattr(Another, "step", lambda self: 1.001 * SdInpaint.step(self))
    flags = ["bench", "step", "--families", "demo", "--quick", "--peers", peer, "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, flags)
    assert result.exit_code == 1
    assert "Refused: step, demo in float32 with another: guided step differs from ours by 0.001" in result.output
    assert "guided step" not in {row["what"] for row in rows_in(tmp_path, "step")}


def test_a_step_that_is_not_finite_is_refused_without_any_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(SdInpaint, "step", lambda self: torch.full((1, 4, 8, 8), torch.nan))
    outcome = measure(options(tmp_path))
    assert outcome.rows == []
    assert "NaN" in outcome.refused[0]


def test_what_fails_in_a_process_of_its_own_is_refused_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    monkeypatch.setattr(suite, "PARTS", {name: suite.PARTS[name] for name in ("load", "step")})
    outcome = measure(options(tmp_path, "all"))
    assert "ended with code 1" in outcome.refused[0]
    assert {row["part"] for row in outcome.rows} == {"load", "step"}


def test_another_picture_and_other_weights_are_refused(tmp_path, peer, monkeypatch):
    monkeypatch.setattr(Another, "picture", lambda self: SdInpaint.picture(self).rotate(180))
    assert "PSNR" in measure(options(tmp_path, "picture", peers=(peer,))).refused[0]

    def figures(part, system, case):
        return {"seconds": 1.0, "touched": 1.0, "weights": 8.0, "peak": 8.0, "sum": 1.0 if system == OURS else 1.01}

    monkeypatch.setattr("sdinpaint.bench.parts.in_child", figures)
    assert "bytes of weights" in measure(options(tmp_path, "load", peers=(peer,))).refused[0]


def test_an_interrupted_run_keeps_the_rows_that_are_done(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(suite.PARTS, "picture", interrupt)
    monkeypatch.setattr(suite, "PARTS", {name: suite.PARTS[name] for name in ("step", "picture")})
    flags = ["bench", "all", "--families", "demo", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, flags)
    assert result.exit_code == cli.common.INTERRUPTED
    assert len(rows_in(tmp_path, "step")) == len(parts.RUNS)
    assert "guided step" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("flags", "rows", "pages"),
    [
        ([], "benchmarks/results", "docs/benchmarks"),
        (["--quick"], "bench-results", "bench-results"),
        (["--out", "mine"], "mine", "mine"),
    ],
)
def test_a_checkout_keeps_all_but_quick_rows_apart_from_what_shows_them(tmp_path, monkeypatch, flags, rows, pages):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    (tmp_path / "docs" / "benchmarks" / "leads.toml").touch()
    (tmp_path / "README.md").write_text("# A library\n")
    monkeypatch.setattr(SdInpaint, "step", lambda self: torch.ones(1, 4, 8, 8))
    result = CliRunner().invoke(cli.main, ["bench", "step", "--families", "demo", "--rounds", "1", *flags])
    assert result.exit_code == 0, result.output
    assert "| guided step |" in result.output
    assert [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("step.jsonl")] == [rows]
    assert [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("bench.md")] == [pages]
    assert (tmp_path / pages / "step-demo-cpu.png").is_file()


def test_growth_runs_only_by_its_name_and_keeps_every_curve(tmp_path, monkeypatch):
    assert not {"growth", "modes"} & set(options(tmp_path, "all").parts)

    def curves(case, most_seconds, most_bytes, progress):
        yield {"case": case.family, "limits": [most_seconds, most_bytes]}
        raise NumericError("NUMERIC", "a step", "NaN")

    monkeypatch.setattr(suite, "growth_rows", curves)
    outcome = measure(options(tmp_path, "growth", most_seconds=7.0))
    assert [(row["case"], row["limits"]) for row in rows_in(tmp_path, "growth")] == [("demo", [7.0, None])]
    assert "NaN" in outcome.refused[0]


@pytest.mark.parametrize("changes", [{"most_seconds": 0.0}, {"most_bytes": -1.0}, {"steps": 0}, {"most_seconds": nan}])
def test_numbers_that_end_everything_are_refused(tmp_path, changes):
    with pytest.raises(SettingError, match=next(iter(changes))):
        options(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({"part": "pictures"}, "'picture'"),
        ({"families": ("sdx",)}, "'sdxl'"),
        ({"peers": ("difusers",)}, "'diffusers'"),
        ({"dtypes": ("float23",)}, "'float32'"),
    ],
)
def test_unknown_names_are_refused_with_the_closest_one(tmp_path, changes, close):
    with pytest.raises(SettingError) as caught:
        options(tmp_path, **changes)
    assert caught.value.hint == f"did you mean {close}?"


def test_a_missing_peer_is_refused_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingError, match="pip install"):
        options(tmp_path, peers=("diffusers",))


# Commands of the user's


def test_the_seconds_of_a_command_are_read_from_its_output(tmp_path):
    shows = command("import sys; print('took', sys.argv[1], 's')")
    shows = replace(shows, line=shows.line + " {steps}")
    rows = measure(options(tmp_path, "picture", commands=(shows,))).rows
    assert [row["values"] for row in rows if row["system"].startswith("command") and row["unit"] == "s"] == [[1.0]]


def test_a_command_finds_its_files(tmp_path):
    reads = "import sys; from PIL import Image; print('took', Image.open(sys.argv[1]).size[0], 's')"
    given = command(reads)
    with replace(given, line=given.line + " {mask}").inputs(demo_case()) as inputs:
        assert replace(given, line=given.line + " {mask}").seconds(inputs) == 64


@pytest.mark.parametrize(
    ("program", "time", "code"),
    [
        (TOLD, r"lasted ([\d.]+) s", "BENCH_PEER_TIME"),
        (TOLD, r"(took) ", "BENCH_PEER_TIME"),
        (TOLD, r"took [\d.]+ s", "BENCH_PEER_TIME"),
        (TOLD, r"took ([\d.]+ s", "BENCH_PEER_TIME"),
        ("raise SystemExit(2)", r"took ([\d.]+) s", "BENCH_PEER_COMMAND"),
        ("print('{model}')", r"took ([\d.]+) s", "BENCH_PEER_COMMAND"),
    ],
)
def test_a_command_that_tells_no_seconds_is_an_error(program, time, code):
    with pytest.raises(SettingError) as caught:
        command(program, time).seconds({})
    assert caught.value.code == code


# Random checkpoints


def test_random_weights_are_the_same_for_the_same_seed_and_finite_through_a_step(tiny, tmp_path):
    one, same, other = (random_pipeline(tiny, seed=seed) for seed in (3, 3, 4))
    for name, weight in one.unet.state_dict().items():
        assert torch.equal(weight, same.unet.state_dict()[name])
    assert not torch.equal(one.unet.out[2].weight, other.unet.out[2].weight)
    save_diffusers(tmp_path, one)
    system = SdInpaint(demo_case(checkpoint=str(tmp_path)))
    x0 = system.step()
    assert x0.isfinite().all()
    assert 0.1 < x0.std() / StepInputs.draw(one.family, demo_case()).x.std() < 10
