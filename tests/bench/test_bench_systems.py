"""The suite's baselines: each computes the same as ours from the same inputs, and one that fails is left out."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from builders import as_sdxl, small
from torch import nn

from sdinpaint.bench import child, parts
from sdinpaint.bench.arithmetic import flops_of
from sdinpaint.bench.cases import Case
from sdinpaint.bench.checkpoints import random_pipeline
from sdinpaint.bench.checks import check_tensor
from sdinpaint.bench.child import first_picture, import_seconds
from sdinpaint.bench.parts import measure_load, measure_step
from sdinpaint.bench.peers.diffusers_peer import captured
from sdinpaint.bench.peers.systems import OURS, PEERS, Peer, SdInpaint, open_system
from sdinpaint.bench.roofline import flop_count
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.errors import SdInpaintError, SettingError
from sdinpaint.loading import save_diffusers
from sdinpaint.metrics import psnr
from sdinpaint.sampling.graphs import Graphs

ROUNDS = 2


def case_of(checkpoint, **changes):
    given = {"family": "tiny", "checkpoint": str(checkpoint), "dtype": "float32", "stored": None, "device": "cpu"}
    return Case(**{**given, "size": 64, "steps": 1, "rounds": ROUNDS, "quick": True, **changes})


@pytest.fixture(scope="module")
def sd1(tiny, tmp_path_factory):
    """A folder of random weights."""
    folder = tmp_path_factory.mktemp("sd1")
    save_diffusers(folder, random_pipeline(small(tiny)))
    return folder


@pytest.fixture(scope="module")
def sdxl(tiny, tmp_path_factory):
    """Return the family of SDXL, with a transformer in every place that it needs."""
    folder = tmp_path_factory.mktemp("sdxl")
    family = as_sdxl(tiny)
    unet = replace(family.unet, channel_mult=(1, 2), transformer_depth=(0, 1), num_res_blocks=1, middle_depth=1)
    save_diffusers(folder, random_pipeline(replace(family, unet=unet)))
    return folder


def compare(peer, ours, whats=tuple(parts.RUNS)):
    """Raises where one of these is not as ours."""
    for what in whats:
        check_tensor(what, None, peer.case, "peer", parts.RUNS[what](peer), parts.RUNS[what](ours))


# OpenVINO


# OpenVINO's own oneDNN finds no form of a softmax where a lesser CPU is only pretended
pretended = pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="runs wherever ONEDNN_MAX_CPU_ISA is not set; OpenVINO refuses a pretended CPU",
)


@pretended
@pytest.mark.peer
def test_openvino_makes_what_ours_makes_and_converts_what_it_needs(sd1):
    ours, peer = (open_system(name, case_of(sd1)) for name in (OURS, "openvino"))
    compare(peer, ours, ["guided step"])
    assert sum(weight.numel() for weight in peer.pipe.unet.parameters()) == 0
    assert all(weight.numel() for weight in peer.pipe.vae.parameters())
    compare(peer, ours)
    assert psnr(np.asarray(peer.picture()), np.asarray(ours.picture())) > 60


@pretended
@pytest.mark.peer
def test_openvino_tells_sdxl_the_sizes_and_computes_in_bfloat16(sdxl):
    case = case_of(sdxl, dtype="bfloat16")
    ours, peer = (open_system(name, case) for name in (OURS, "openvino"))
    peer.ready()
    for network in (peer.unet, peer.decoder, peer.encoder, *peer.texts):
        assert network.is_compiled
        assert "bfloat16" in str(network._compiled.get_property("INFERENCE_PRECISION_HINT"))
    compare(peer, ours)


@pytest.mark.peer
@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"device": "cuda"}])
def test_openvino_is_refused_where_it_is_not_run(changes):
    with pytest.raises(SettingError, match="expected: float32 or bfloat16 on the CPU") as caught:
        open_system("openvino", case_of(DEMO, **changes))
    assert caught.value.subject == "the baseline openvino"


@pytest.mark.peer
def test_openvino_reports_to_nobody():
    PEERS["openvino"].library()
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__.endswith("telemetry_stub")


# diffusers, compiled


@pytest.mark.peer
def test_what_is_compiled_is_the_unet_and_the_decoder(sd1, monkeypatch):
    ran = []

    def compile_nothing(module):  # as torch does it, which takes minutes
        def run(*args, **options):
            ran.append(type(module).__name__)
            return module._call_impl(*args, **options)

        module._compiled_call_impl = run

    monkeypatch.setattr(nn.Module, "compile", compile_nothing)
    ours, peer = (open_system(name, case_of(sd1)) for name in (OURS, "diffusers-compiled"))
    assert ran == []
    peer.ready()
    assert ran == ["UNet2DConditionModel", "Decoder"]
    compare(peer, ours)


# diffusers with a CUDA graph


@pytest.mark.peer
def test_a_captured_unet_is_called_as_diffusers_calls_it(sdxl):
    ours, peer = (open_system(name, case_of(sdxl)) for name in (OURS, "diffusers"))
    seen, graphs = [], Graphs(True)

    def forward(x, t, context, **options):
        seen.append(options)
        return plain(x, t, context, **options)

    plain, peer.pipe.unet.forward = peer.pipe.unet.forward, captured(forward, graphs)
    compare(peer, ours, ["guided step"])
    assert [set(options["added_cond_kwargs"]) for options in seen] == [{"text_embeds", "time_ids"}]


@pytest.mark.peer
def test_without_a_gpu_nothing_is_captured(sd1):
    with pytest.raises(SettingError, match="expected: on cuda"):
        open_system("diffusers-captured", case_of(sd1))


# What is left out


class Another(SdInpaint):
    """A peer that needs no package."""


class Worse(Another):
    """One whose decoder is off."""

    def decode(self):
        return 1.001 * super().decode()


class Failing(Another):
    """One that cannot encode an image, in the way of torch and OpenVINO."""

    def encode(self):
        raise RuntimeError("out of memory")


class Refusing(Another):
    """One that cannot be opened."""

    def __init__(self, case):
        raise SettingError("BENCH_PEER", "the peer refusing", "float32", expected="something else")


@pytest.fixture
def peers(monkeypatch):
    for kind in (Another, Worse, Failing, Refusing):
        monkeypatch.setitem(PEERS, kind.__name__.lower(), Peer(kind, lambda: None, "import json"))


def systems_by_row(case):
    """By what is measured, those with a row; and why others have none."""
    found = list(measure_step(case, ()))
    rows = [row for row in found if not isinstance(row, str)]
    by_what = {what: [row["system"] for row in rows if row["what"] == what] for what in parts.RUNS}
    return by_what, [one for one in found if isinstance(one, str)]


def test_a_peer_is_left_out_where_it_fails_and_nowhere_else(sd1, peers):
    found, refused = systems_by_row(case_of(sd1, peers=("refusing", "failing", "another", "worse")))
    assert found == {
        "guided step": [OURS, "failing", "another", "worse"],
        "VAE decode": [OURS, "failing", "another"],
        "VAE encode": [OURS, "another", "worse"],
        "text encoders, 2 prompts": [OURS, "failing", "another", "worse"],
    }
    assert [reason.partition(":")[0] for reason in refused] == [
        "step, tiny in float32 with refusing",
        "step, tiny in float32 with worse",
        "step, tiny in float32 with failing",
    ]
    assert "differs from ours by 0.001" in refused[1]
    assert "out of memory" in refused[2]


def test_ours_has_no_row_where_no_peer_agrees_with_it(sd1, peers):
    found, refused = systems_by_row(case_of(sd1, peers=("worse",)))
    assert found["VAE decode"] == []
    assert found["VAE encode"] == [OURS, "worse"]
    assert len(refused) == 1


def test_less_than_float32_is_held_against_float32(sd1, peers, monkeypatch):
    case = case_of(sd1, dtype="bfloat16", peers=("another",))
    rows = [row for row in measure_step(case, ()) if not isinstance(row, str)]
    assert len(rows) == 2 * len(parts.RUNS)
    assert all("differs from ours in float32 by" in row["check"] for row in rows)
    monkeypatch.setattr(parts, "free_bytes", lambda device: 1000)
    assert next(iter(measure_step(case, ())))["check"] == "finite"


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (0.05, 0.107, None),
        (0.05, 0.109, "of ours differs from ours in float32 by 0.11, it by 0.05"),
        (0.199, 0.05, None),
        (0.201, 0.05, "differs from ours in float32 by 0.2"),
    ],
)
def test_ours_is_at_most_twice_as_far_from_float32_as_a_peer(theirs, ours, said):
    exact, case = torch.ones(100), case_of(DEMO, dtype="bfloat16")
    with nullcontext() if said is None else pytest.raises(SdInpaintError, match=said):
        check_tensor("step", exact, case, "another", exact * (1 + theirs), exact * (1 - ours))


def test_ours_is_never_left_out_quietly(sd1, monkeypatch):
    monkeypatch.setattr(SdInpaint, "encode", lambda self: torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(SdInpaintError, match=r"VAE encode: shape .*, 256 NaN or infinite"):
        list(measure_step(case_of(sd1), ()))


# The roofline


def test_every_system_is_held_against_the_same_arithmetic(sd1, peers):
    case = case_of(sd1, peers=("another",))
    flops = flops_of(case)
    rows = [row for row in measure_step(case, ()) if row["what"] in flops]
    assert len(rows) == 2 * len(flops)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["tflop"] == theirs["tflop"] == flops[ours["what"]] / 1e12
        faster = ours["p50"] / theirs["p50"]
        assert theirs["percent_of_floor"] / ours["percent_of_floor"] == pytest.approx(faster)


@pytest.mark.peer
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_arithmetic_is_what_diffusers_asks_for(family, request):
    case = case_of(request.getfixturevalue(family))
    peer = open_system("diffusers", case)
    for what, flops in flops_of(case).items():
        assert flop_count(partial(parts.RUNS[what], peer)) == pytest.approx(flops, rel=1e-3)


# In processes of their own


def test_importing_is_beside_torch_alone(monkeypatch, peers):
    monkeypatch.setattr(parts, "import_seconds", lambda statement: 2.0 if "torch" in statement else 5.0)
    monkeypatch.setattr(parts, "in_child", lambda *_: {"seconds": 1, "touched": 1, "weights": 1, "sum": 1})
    rows = [row for row in measure_load(case_of(DEMO, peers=("another",)), ()) if row["what"] == "import"]
    assert [(row["system"], row["percent_of_floor"], row["ratio"]) for row in rows] == [
        (OURS, 40, None),
        ("another", 40, 1),
        ("torch", 100, 2.5),
    ]


def test_who_loads_slowly_is_asked_once(monkeypatch, peers):
    taken = {OURS: 1.0, "another": parts.SLOW}
    asked = []

    def figures(part, name, case):
        asked.append(name)
        return {"seconds": taken[name], "touched": taken[name], "weights": 1, "sum": 1}

    monkeypatch.setattr(parts, "import_seconds", lambda statement: 1.0)
    monkeypatch.setattr(parts, "in_child", figures)
    rows = list(measure_load(case_of(DEMO, peers=("another",), rounds=2), ()))
    assert (asked.count(OURS), asked.count("another")) == (3, 1)
    loads = {row["system"]: row for row in rows if row["what"] == "load"}
    assert [len(loads[name]["values"]) for name in taken] == [2, 1]
    assert loads["another"]["ratio"] == 1 / parts.SLOW


def test_imports_and_the_first_picture_are_timed_from_the_start_of_a_process(monkeypatch):
    assert 0 < import_seconds("import json") < 1 < import_seconds("import time; time.sleep(1)")
    began = time.time()
    taken = first_picture(OURS, case_of(DEMO))
    assert 0.5 < taken < time.time() - began
    monkeypatch.setattr(child, "in_child", lambda *_: {"done": time.time() + 5})
    assert first_picture(OURS, case_of(DEMO)) == pytest.approx(5, abs=0.1)
    with pytest.raises(SdInpaintError, match="No module named 'no_such_module'"):
        import_seconds("import no_such_module")
