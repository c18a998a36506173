"""The evidence of whether a UNet predicts noise or v, in its order, and evidence that cannot be right."""

import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sdinpaint_weights.reader import open_weights

from sdinpaint.checkpoints.prediction import find_prediction
from sdinpaint.checkpoints.schedule_buffers import check_buffers
from sdinpaint.errors import CheckpointError, SdInpaintWarning
from sdinpaint.families import SD15

V_YAML = "model:\n  params:\n    parameterization: v\n"
SGM = "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.modules.diffusionmodules.%s}}}}}"

# In their order: (what says v, what says eps), each as arguments of `say`.
SOURCES = [
    ({"keys": {"v_pred"}}, None),
    ({"keys": {"model.v_pred"}}, None),
    ({"metadata": {"modelspec.prediction_type": "v"}}, {"metadata": {"modelspec.prediction_type": "epsilon"}}),
    ({"metadata": {"modelspec.predict_key": "v"}}, {"metadata": {"modelspec.predict_key": "epsilon"}}),
    ({"metadata": {"ss_v_parameterization": "True"}}, {"metadata": {"ss_v_parameterization": "False"}}),
    ({"scheduler": {"prediction_type": "v_prediction"}}, {"scheduler": {"prediction_type": "epsilon"}}),
    ({"yaml": V_YAML}, {"yaml": V_YAML.replace("tion: v", "tion: eps")}),
    ({"yaml": SGM % "denoiser_scaling.VScaling"}, {"yaml": SGM % "denoiser_scaling.EpsScaling"}),
    ({"yml": "{model: {params: {parameterization: 'v'}}}"}, {"yml": '{model: {params: {parameterization: "eps"}}}'}),
]
SILENT = [
    {"scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.00085}},
    {"scheduler": {"prediction_type": None}},
    {"yaml": "name: a model\nnotes: from a catalogue, no configuration\n"},
    {"yaml": "model:\n  params:\n    linear_start: 0.00085\n"},
    {"yaml": "parameterization: v"},
    {"yaml": "# parameterization: v\n"},
    {"yaml": "model: &m\n  params: *m\n"},
    {"yaml": ""},
    {"metadata": {"ss_v_parameterization": "None", "modelspec.prediction_type": ""}},
    {"metadata": {"modelspec.prediction_type": "None"}},
    {"keys": {"ztsnr"}},
]


@pytest.fixture
def say(tmp_path):
    def say(*sources, asked=None):
        given = {name: value for source in sources for name, value in source.items()}
        weights = tmp_path / "model.safetensors"
        weights.touch()
        for suffix in ("yaml", "yml"):
            weights.with_suffix(f".{suffix}").unlink(missing_ok=True)
            if suffix in given:
                weights.with_suffix(f".{suffix}").write_text(given[suffix])
        metadata = {key: value for source in sources for key, value in source.get("metadata", {}).items()}
        return find_prediction(asked, given.get("scheduler", {}), weights, metadata, given.get("keys", set()))

    return say


@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_each_source_is_heard(say, number):
    for source, prediction in zip(SOURCES[number], ("v", "eps"), strict=True):
        if source is not None:
            assert say(source).prediction == prediction
            assert [say(silent, source).prediction for silent in SILENT if not silent.keys() & source] == [
                prediction for silent in SILENT if not silent.keys() & source
            ]


@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_a_source_without_a_word_is_silent(say, silent):
    assert say(silent).prediction is None


@pytest.mark.parametrize("higher", range(len(SOURCES)))
@pytest.mark.parametrize("lower", range(len(SOURCES)))
def test_two_that_contradict_are_named(say, higher, lower):
    says, denies = SOURCES[higher][0], SOURCES[lower][1]
    if higher >= lower or denies is None or says.keys() & denies.keys() - {"metadata"}:
        return
    with pytest.raises(CheckpointError) as caught:
        say(says, denies)
    assert caught.value.code == "CKPT_CONTRADICTION"
    first, second = say(says).why, say(denies).why
    assert caught.value.found.endswith(f"{first}; {second}")
    assert "prediction='v' or prediction='eps'" in caught.value.hint
    assert (say(says, denies, asked="eps").prediction, say(says, denies, asked="v").prediction) == ("eps", "v")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"keys": {"edm_vpred.sigma_max"}}, "CosXL"),
        ({"keys": {"edm_vpred.sigma_min"}}, "CosXL"),
        ({"keys": {"edm_mean", "edm_std"}}, "Playground 2.5"),
        ({"keys": {"model.diffusion_model.edm_mean"}}, "Playground 2.5"),
        ({"metadata": {"modelspec.prediction_type": "rectified_flow"}}, "rectified_flow"),
        ({"metadata": {"modelspec.predict_key": "sample"}}, "sample"),
        ({"scheduler": {"prediction_type": "sample"}}, "sample"),
        ({"yaml": "{model: {params: {parameterization: x0}}}"}, "x0"),
        ({"yaml": SGM % "denoiser_scaling.EDMScaling"}, "EDMScaling"),
        ({"yaml": SGM % "denoiser_scaling.VScalingWithEDMcNoise"}, "VScalingWithEDMcNoise"),
    ],
)
def test_what_is_not_built_is_refused_by_name(say, source, name):
    with pytest.raises(CheckpointError, match=name):
        say(source)
    if "keys" in source:
        with pytest.raises(CheckpointError, match=name):
            say(source, asked="v")


@pytest.mark.parametrize(
    "text", ["\tbad: [", "[" * 60_000, "{a: " * 15_000, "a" * 100_000, "\0", "!!python/object:os.x []"]
)
def test_a_file_that_is_no_yaml_is_told_within_seconds(say, text):
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert say({"yaml": text}).prediction is None
    assert time.monotonic() - start < 5
    assert "python" in text or [one.category for one in told] == [SdInpaintWarning]


def test_aliases_are_not_written_out(say):
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
    merged = ["b0: &b0 {k: v}"] + [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}" for i in range(1, 60)]
    start = time.monotonic()
    assert say({"yaml": "\n".join([*lines, *merged, V_YAML])}).prediction == "v"
    assert time.monotonic() - start < 2


# buffers


def alphas(beta_end=0.012, steps=1000):
    return np.cumprod(1 - np.linspace(0.00085**0.5, beta_end**0.5, steps) ** 2)


def to_zero(products):
    roots = np.sqrt(products)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def buffers(products):
    betas = 1 - products / np.concatenate([[1], products[:-1]])
    sigmas = np.sqrt((1 - products) / np.maximum(products, 1e-30))
    return {"betas": betas, "alphas_cumprod": products, "denoiser.sigmas": sigmas}


@pytest.fixture
def checked(tmp_path):
    def checked(values, dtype=torch.float32):
        path = tmp_path / "model.safetensors"
        save_file({name: torch.tensor(value.copy()).to(dtype) for name, value in values.items()}, path)
        return check_buffers(open_weights(path), SD15.schedule)

    return checked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "denoiser.sigmas"])
def test_buffers_are_compared_with_the_schedule(checked, name, dtype):
    right = {name: buffers(alphas())[name]}
    assert checked(right, dtype) is False
    for products in (alphas(beta_end=0.0125), alphas(steps=999), 1 - np.linspace(0.0001, 0.999, 1000)):
        with pytest.raises(CheckpointError, match=name) as caught:
            checked({name: buffers(products)[name]}, dtype)
        assert caught.value.code == "CKPT_CONTRADICTION"


def test_noise_levels_may_fall(checked):
    assert checked({"denoiser.sigmas": buffers(alphas())["denoiser.sigmas"][::-1]}) is False


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_zero_terminal_snr_is_recognised(checked, name):
    assert checked({name: buffers(to_zero(alphas()))[name]}) is True


def test_no_buffers_and_a_hole_in_the_file_say_nothing(checked):
    assert checked({"other": alphas()}) is False
    assert checked({"betas": np.zeros(1000)}) is False
