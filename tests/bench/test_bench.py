"""The benchmark suite: its rows, and that nothing is timed that fails its check; no test depends on a time."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from itertools import product
from math import nan

import pytest
import torch
from builders import as_sdxl
from click.testing import CliRunner
from sdinpaint_kernels import backend

from sdinpaint import cli
from sdinpaint.bench import child, kernels, parts, seams, startup, suite, tuning
from sdinpaint.bench.arithmetic import flops_of
from sdinpaint.bench.cases import Case, StepInputs
from sdinpaint.bench.checkpoints import random_pipeline
from sdinpaint.bench.child import in_child
from sdinpaint.bench.estimate import Planned, duration, estimated_seconds
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import OURS, PEERS, Peer, SdInpaint, open_system
from sdinpaint.bench.report.pages import Places, write_pages
from sdinpaint.bench.report.rows import environment, spread
from sdinpaint.bench.suite import Options, Outcome, run
from sdinpaint.bench.timing import first_round_told, interleaved, rounds_of
from sdinpaint.bench.tuning import candidates_of
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.errors import NumericError, SdInpaintError, SettingError
from sdinpaint.images.blending import BLENDS
from sdinpaint.loading import save_diffusers
from sdinpaint.models import fused

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
    """For images and imports, which would take most of the time of these tests; not for `in_child`."""
    monkeypatch.setattr(parts, "first_picture", lambda name, case: 3.0)
    monkeypatch.setattr(parts, "import_seconds", lambda statement: 1.0)


# What is written


def test_rows_hold_their_fields(tmp_path, peer):
    measure(options(tmp_path, "step", peers=(peer,)))
    rows = rows_in(tmp_path, "step")
    assert [row["system"] for row in rows] == [system for _ in parts.RUNS for system in (OURS, peer)]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["environment"]["torch"] == torch.__version__
        assert (row["ratio"] is None) == (row["system"] == OURS)


def test_a_step_of_several_images_is_a_measurement_of_its_own(tmp_path, peer):
    measure(options(tmp_path, "step", peers=(peer,), images=3))
    rows = rows_in(tmp_path, "step")
    assert [(row["what"], row["system"]) for row in rows] == [("guided step, 3 images", name) for name in (OURS, peer)]
    single = flops_of(demo_case(size=128))["guided step"] / 1e12
    assert [row["tflop"] for row in rows] == [pytest.approx(3 * single)] * 2


def test_a_lora_is_added_and_taken_off_exactly(tmp_path):
    measure(options(tmp_path, "adapters", rounds=1))
    rows = {row["what"]: row for row in rows_in(tmp_path, "adapters")}
    assert rows.keys() == parts.ADAPTED.keys()
    assert {row["check"] for row in rows.values()} == {"removal is exact"}


def test_images_belong_to_the_part_that_steps(tmp_path):
    with pytest.raises(SettingError, match="the part step") as caught:
        options(tmp_path, "load", images=3)
    assert caught.value.code == "BENCH_COUNT"


def test_the_diffusers_baseline_steps_several_images_as_we_do():
    one = demo_case(images=2)
    ours, theirs = SdInpaint(one).step(), open_system("diffusers", one).step()
    assert ours.shape == (2, 4, 8, 8)
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_the_table_shows_the_latest_rows_and_passes_over_those_of_other_benchmarks(tmp_path):
    (tmp_path / "step.jsonl").write_text('{"what": "step", "family": "sd15", "milliseconds": 5.7}\n')
    chosen = options(tmp_path)
    measure(chosen)
    earlier = (tmp_path / "step.jsonl").read_text()
    (tmp_path / "step.jsonl").write_text(earlier + earlier.partition("\n")[2])  # measured twice
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


def test_memory_is_that_of_the_first_step_of_the_second_one_and_of_an_image():
    steps, image = child.step_memory(OURS, demo_case()), child.picture_memory(OURS, demo_case())
    assert steps.keys() == {"step", "second step", "finite"}
    assert image.keys() == {"picture", "finite"}
    assert min(steps["step"], steps["second step"], image["picture"]) > 0
    assert steps["finite"]
    assert image["finite"]


def test_memory_is_measured_in_processes_of_their_own_at_the_size_that_is_chosen(tmp_path, monkeypatch):
    started = []

    def in_process(measure, system, case):
        started.append(measure)
        return in_child(measure, system, case) if measure == "step memory" else {"picture": 1e9, "finite": 1.0}

    monkeypatch.setattr(parts, "in_child", in_process)
    rows = measure(options(tmp_path, "memory", size=64)).rows
    assert [row["what"] for row in rows] == [f"{what}, peak memory" for what in ("step", "second step", "picture")]
    assert started == ["step memory", "picture memory"]
    assert {row["size"] for row in rows} == {64}


def test_parts_without_a_size_that_is_chosen_keep_their_own(tmp_path):
    chosen = options(tmp_path, "all", size=1024)
    assert {part: suite._size(chosen, part, 128) for part in chosen.parts} == {
        **dict.fromkeys(("memory", "kernels", "step", "picture"), 1024),
        **dict.fromkeys(("load", "quality", "startup"), 128),
    }


@pytest.mark.parametrize("changes", [{"size": 0}, {"size": 100}, {"part": "seams", "size": 128}])
def test_a_size_that_cannot_be_used_is_refused(tmp_path, changes):
    with pytest.raises(SettingError) as caught:
        options(tmp_path, **changes)
    assert caught.value.code == "BENCH_SIZE"


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
    assert "Time: unknown, the first round tells" in result.output
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


def test_another_image_and_other_weights_are_refused(tmp_path, peer, monkeypatch):
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
    (tmp_path / "docs" / "benchmarks" / "reasons.toml").touch()
    (tmp_path / "README.md").write_text("# A library\n")
    monkeypatch.setattr(SdInpaint, "step", lambda self: torch.ones(1, 4, 8, 8))
    result = CliRunner().invoke(cli.main, ["bench", "step", "--families", "demo", "--rounds", "1", *flags])
    assert result.exit_code == 0, result.output
    assert "| guided step |" in result.output
    assert [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("step.jsonl")] == [rows]
    assert [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("bench.md")] == [pages]
    assert [*(tmp_path / pages).glob("step-demo-cpu-*.png")]


def test_growth_runs_only_by_its_name_and_keeps_every_curve(tmp_path, monkeypatch):
    assert not {*suite.BY_NAME} & set(options(tmp_path, "all").parts)

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


# What is said before and during a run


def test_a_run_says_the_machine_and_that_the_time_is_unknown_or_estimated_by_earlier_rows(tmp_path):
    chosen = options(tmp_path, rounds=3)
    said = []
    for _ in range(2):
        run(chosen, Outcome(), progress=False, say=said.append)
    first, second = said
    assert first.startswith("Machine: ")
    assert "device cpu" in first
    assert first.endswith("Time: unknown, the first round tells")
    assert second.endswith("by earlier rows of this machine")


def planned(**changes):
    given = {"part": "step", "family": "demo", "dtype": "float32", "stored": None, "device": "cpu"}
    return Planned(**{**given, "quick": False, "rounds": 4, "steps": 10, **changes})


def earlier(what, p50, unit="s", system=OURS, **changes):
    fields = {name: getattr(planned(**changes), name) for name in ("part", "family", "dtype", "stored", "device")}
    row = {**fields, "what": what, "quick": False, "size": 128, "steps": 20, "system": system, "p50": p50, "unit": unit}
    return {**row, "environment": environment()}


@pytest.mark.parametrize(
    ("plan", "rows", "seconds"),
    [
        ({}, [earlier("guided step", 2.0), earlier("VAE decode", 3.0)], 5 * (2 + 3)),
        ({"peers": ("another",)}, [earlier("guided step", 2.0)], None),
        ({"peers": ("another",)}, [earlier("guided step", 2.0), earlier("guided step", 3.0, system="another")], 25),
        ({}, [earlier("guided step", 2.0), earlier("guided step", 3.0, system="another")], 10),
        ({}, [earlier("guided step", 2.0, dtype="bfloat16")], None),
        ({"size": 512}, [earlier("guided step", 2.0), {**earlier("guided step", 9.0), "size": 512}], 5 * 9),
        ({}, [{**earlier("guided step", 2.0), "environment": {"processor": "another", "cores": 1}}], None),
        (
            {"part": "picture"},
            [
                earlier("picture", 4.0, part="picture"),
                earlier("pictures a minute", 15.0, "1/min", part="picture"),
                earlier("first picture, new process", 6.0, part="picture"),
            ],
            (5 * 4 + 2 * 6) / 2,  # half as many steps
        ),
        ({"part": "kernels"}, [earlier("linear", 20.0, "ms", part="kernels")], 6 * 0.02),
        ({"part": "memory"}, [earlier("step, peak memory", 5.0, "GB", part="memory")], None),
    ],
)
def test_time_is_estimated_by_counted_runs_and_rows_of_the_same_machine(plan, rows, seconds):
    assert estimated_seconds(planned(**plan), rows) == (seconds and pytest.approx(seconds))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (59.2, "60 s"), (100, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations_are_short(seconds, said):
    assert duration(seconds) == said


def test_the_first_round_of_a_measurement_is_told_and_rounds_within_it_are_not():
    told = []
    with first_round_told(lambda seconds, left: told.append(left)):
        for _ in rounds_of(range(3)):
            assert interleaved({"one": lambda: 1.0}, 5) == {"one": [1.0] * 5}
        with pytest.raises(ValueError, match="it fails"):
            interleaved({"one": fail}, 2)
        interleaved({"one": lambda: 1.0}, 2)
    interleaved({"one": lambda: 1.0}, 2)
    assert told == [2, 1]


def fail():
    raise ValueError("it fails")


def test_a_long_measurement_says_after_its_first_round_how_long_it_still_takes():
    said = []
    tell = suite._teller("step, demo in float32", said.append)
    tell(20.0, 3)
    tell(1.0, 3)
    assert said == ["step, demo in float32: round 1 of 4 took 20 s, about 60 s left"]


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_gpu_is_taken_where_there_is_one(tmp_path, monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert options(tmp_path).device == device
    assert options(tmp_path, device="cpu").device == "cpu"


def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(SettingError, match="without it"):
        options(tmp_path, device="hpu")


# Parts that run once


def test_startup_is_the_ratio_of_medians_to_importing_torch(tmp_path, monkeypatch):
    taken = {"--help": 0.5, "samplers": 3.0}
    ran = []

    def seconds(*arguments):
        ran.append(arguments)
        first = 100.0 * (len(ran) <= 1 + len(startup.COMMANDS))  # fills the page cache
        return first + (2.0 if arguments[1] == "import torch" else taken.get(" ".join(arguments[2:]), 1.0))

    monkeypatch.setattr(startup, "process_seconds", seconds)
    rows = measure(options(tmp_path, "startup", families=("sd15", "sdxl"), rounds=2)).rows
    assert len(ran) == 3 * (1 + len(startup.COMMANDS))
    assert [(row["what"], row["system"]) for row in rows] == [*product(startup.COMMANDS, (OURS, "torch"))]
    assert [row["ratio"] for row in rows] == [None, 0.25, *3 * (None, 0.5), None, 1.5]
    assert all(row.keys() >= FIELDS and row["family"] == "none" for row in rows)
    write_pages(Places(tmp_path, tmp_path))
    assert [*tmp_path.glob("startup-none-cpu-*.png")]
    assert "| startup | --help | none |  | float32 |" in (tmp_path / "bench.md").read_text()
    assert [row["dtype"] for row in rows_in(tmp_path, "startup")] == ["float32"] * len(rows)


def test_a_command_that_fails_has_no_start_up_time():
    assert startup.process_seconds("-c", "pass") > 0
    with pytest.raises(SdInpaintError, match="ended with code 3: no"):
        startup.process_seconds("-c", "import sys; sys.exit((sys.stderr.write('no'), 3)[1])")


def test_seams_have_a_row_for_every_way_of_joining_and_known_pixels_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(seams, "QUICK_SCENES", 2)
    rows = measure(options(tmp_path, "seams")).rows
    ways = {(row["cover"], row["blend"], row["match_color"]) for row in rows}
    assert ways == {*product(seams.COVERS, BLENDS, (False, True))}
    assert len({row["what"] for row in rows}) == len(rows)
    assert all(row["p50"] == row["seam"] and row["known_error"] == 0 for row in rows)
    monkeypatch.setattr(seams, "compose", lambda image, after, hole, **options: 255 - image)
    assert "known pixels are changed" in measure(options(tmp_path, "seams")).refused[0]


# Variants of sdinpaint


def test_variants_of_sdinpaint_are_baselines_that_make_the_same_step(tmp_path):
    variants = ("sdinpaint-torch", "sdinpaint-uncaptured")
    outcome = measure(options(tmp_path, peers=variants))
    assert outcome.refused == []
    assert {row["system"] for row in outcome.rows} == {OURS, *variants}
    assert backend.SETTING == "auto"


def test_without_kernels_every_operation_is_torchs(monkeypatch):
    system = open_system("sdinpaint-torch", demo_case())
    seen = []
    monkeypatch.setattr(SdInpaint, "decode", lambda self: seen.append(backend.SETTING))
    system.decode()
    assert seen == ["torch"]


def test_tuning_needs_a_gpu(tmp_path):
    with pytest.raises(SettingError, match="tuning"):
        measure(options(tmp_path, "tuning"))


@pytest.mark.parametrize(
    ("operation", "given"),
    [
        ("attention", [torch.empty(2, 64, 8, 40), torch.empty(2, 64, 8, 40)]),
        ("attention", [torch.empty(2, 1024, 8, 160), torch.empty(2, 1024, 8, 160)]),
        ("group_norm", [torch.empty(2, 320, 64, 64), 32]),
        ("group_norm", [torch.empty(2, 1280, 8, 8), 32]),
        ("geglu", [torch.empty(8, 64)]),
        ("add_layer_norm", [torch.empty(8, 64)]),
    ],
)
def test_configurations_are_distinct_and_of_one_kind_with_the_shipped_one_first(operation, given):
    shipped, *others = candidates_of(operation, given)
    assert len(others) >= 4
    assert shipped not in others
    assert {type(one) for one in others} == {type(shipped)}
    assert len(set(others)) == len(others)


def test_tuning_compares_each_configuration_with_the_shipped_one(monkeypatch):
    """On the CPU, with a launch that takes any configuration."""
    geglu = import_module("sdinpaint_kernels.geglu")
    called = []

    def launch(x, tile):
        called.append(tile)
        if tile.warps == 8:
            raise RuntimeError("out of registers")
        return geglu.reference(x) + (tile.rows == 2)

    monkeypatch.setattr(geglu, "launch", launch)
    monkeypatch.setattr(
        tuning, "milliseconds", lambda calls, device: lambda: 1.0 if calls[0].args[1].rows == 8 else 2.0
    )
    with kernels.recording() as calls:
        fused.geglu(torch.randn(2, 4, 32))
    [(what, call, line)] = kernels.heaviest_first("UNet step", calls, demo_case())
    found = list(tuning._tuned(what, call, line, demo_case(device="cpu")))
    rows = [row for row in found if not isinstance(row, str)]
    assert rows[0]["system"] == OURS
    assert all((row["ratio"] == 2.0) == ("rows=8" in row["system"]) for row in rows[1:])
    right = {str(one) for one in called if one.warps < 8 and one.rows != 2 and one != geglu.TILE}
    assert {row["system"] for row in rows} == {OURS, *right}
    assert len([one for one in found if isinstance(one, str)]) == 3  # a wrong result is told
