"""Writing adapters: what was written is read back exactly, by this library and by others."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapters import ALGORITHMS, CONVOLUTIONS, Drawn, assert_weights, dora, kohya, layers, lora, same, weights, write
from builders import as_sd2, as_sdxl, random_pipeline, small
from refusals import refused
from safetensors.torch import load_file
from torch import nn

import sdinpaint
from sdinpaint.errors import AdapterError, SdInpaintWarning, SettingError
from sdinpaint.loading import save_diffusers

DIALECTS = ("kohya", "diffusers", "peft")


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    """A small random pipeline of 9 channels."""
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture(scope="module")
def xl(tiny, vocabulary):
    """One of two text encoders."""
    return random_pipeline(small(as_sdxl(tiny)), vocabulary)


@pytest.fixture(scope="module")
def sd2(tiny, vocabulary):
    """One of linear projections."""
    return random_pipeline(small(as_sd2(tiny)), vocabulary)


def tensors_of(pipe, make, kinds=(nn.Linear, nn.Conv2d)):
    draw = Drawn()
    return {
        f"{kohya(layer)}.{part}": one
        for layer in layers(pipe, kinds)[::4]
        for part, one in make(draw, tuple(layer.module.weight.shape))[0].items()
    }


def target_of(folder, dialect):
    return folder / ("out" if dialect == "peft" else "out.safetensors")


def read_back(pipe, source, target, dialect):
    """The weights with a file, and with what was written of it."""
    before = weights(pipe)
    with pipe.adapted(source, 0.7) as added:
        first = weights(pipe)
        pipe.save_lora(added.name, target, dialect)
    assert same(pipe, before)
    with pipe.adapted(target, 0.7):
        return first, weights(pipe)


def equal(one, other):
    return all(torch.equal(one[key], tensor) for key, tensor in other.items())


def odd_alphas(draw, shape):
    rank = 1 + shape[0] % 3
    parts, _ = lora(draw, shape, rank)
    return parts | {"alpha": torch.tensor(0.1 + shape[1] % 5)}, None


def scaled(draw, shape):
    parts, _ = lora(draw, shape, 3)
    del parts["alpha"]
    return parts | {"scale": torch.tensor(1.0 + shape[0] / 97)}, None


FORMS = {
    "alphas": odd_alphas,
    "scales": scaled,
    "alphas of 0": lambda draw, shape: (lora(draw, shape)[0] | {"alpha": torch.tensor(0.0)}, None),
    "scales of 0": lambda draw, shape: (scaled(draw, shape)[0] | {"scale": torch.tensor(0.0)}, None),
    "half precision": lambda draw, shape: ({name: one.half() for name, one in lora(draw, shape)[0].items()}, None),
    "dora": lambda draw, shape: dora(draw, shape, axis=0),
    "dora of peft": lambda draw, shape: dora(draw, shape, axis=0, form="lora_magnitude_vector"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_is_read_back_exactly_in_every_dialect(pipe, tmp_path, form, dialect):
    source = write(tmp_path / "fox.safetensors", tensors_of(pipe, FORMS[form]))
    first, second = read_back(pipe, source, target_of(tmp_path, dialect), dialect)
    assert equal(first, second)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_lora_of_two_text_encoders(xl, tmp_path, dialect):
    source = write(tmp_path / "fox.safetensors", tensors_of(xl, odd_alphas))
    assert equal(*read_back(xl, source, target_of(tmp_path, dialect), dialect))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("network", ["text_encoder", "text_encoder_2"])
def test_a_lora_of_one_text_encoder(xl, tmp_path, network, dialect):
    held = {
        layer: lora(Drawn(1), tuple(layer.module.weight.shape))[0] for layer in layers(xl) if layer.network == network
    }
    tensors = {f"{kohya(layer)}.{part}": one for layer, parts in held.items() for part, one in parts.items()}
    source = write(tmp_path / "fox.safetensors", tensors)
    assert equal(*read_back(xl, source, target_of(tmp_path, dialect), dialect))


@pytest.mark.parametrize("name", {**ALGORITHMS, **CONVOLUTIONS})
def test_every_algorithm_is_read_back_exactly_in_kohyas_dialect(pipe, tmp_path, name):
    _, make = (ALGORITHMS | CONVOLUTIONS)[name]
    kinds = nn.Conv2d if name in CONVOLUTIONS else (nn.Linear, nn.Conv2d)
    tensors = tensors_of(pipe, make, kinds)
    source, target = write(tmp_path / "fox.safetensors", tensors), tmp_path / "out.safetensors"
    assert equal(*read_back(pipe, source, target, "kohya"))
    if name != "dora of peft":
        written = load_file(target)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(one, written[key].reshape(one.shape)) for key, one in tensors.items())


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
@pytest.mark.parametrize("name", ["loha", "lokr, both full", "full", "ia3, rows", "glora", "dora, columns", "tucker"])
def test_what_a_dialect_has_no_names_for_is_refused(pipe, tmp_path, name, dialect):
    _, make = (ALGORITHMS | CONVOLUTIONS)[name]
    source = write(tmp_path / "fox.safetensors", tensors_of(pipe, make, nn.Conv2d))
    with pipe.adapted(source):
        refused(
            AdapterError, "ADAPTER_KIND", lambda: pipe.save_lora("fox", target_of(tmp_path, dialect), dialect), "kohya"
        )
    assert not target_of(tmp_path, dialect).exists()


def test_dora_of_some_modules_alone_has_no_configuration(pipe, tmp_path):
    tensors = tensors_of(pipe, lambda draw, shape: dora(draw, shape, axis=0))
    some = {key: one for key, one in tensors.items() if not (key.endswith("dora_scale") and "attn1" in key)}
    with pipe.adapted(write(tmp_path / "fox.safetensors", some)):
        refused(AdapterError, "ADAPTER_KIND", lambda: pipe.save_lora("fox", tmp_path / "out", "peft"))


def test_metadata_follow_but_not_a_configuration_of_other_alphas(pipe, tmp_path):
    """Alphas in the file count more than those in its metadata, and are no part of PEFT's files."""
    inside = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 100, "unet.r": 3}), "ss_output_name": "fox"}
    source = write(tmp_path / "fox.safetensors", tensors_of(pipe, odd_alphas), inside)
    for dialect in DIALECTS:
        assert equal(*read_back(pipe, source, target_of(tmp_path, dialect), dialect))
    with pipe.adapted(tmp_path / "out.safetensors") as added:
        assert added.metadata["ss_output_name"] == "fox"


def test_matrices_get_the_kernels_that_diffusers_requires(pipe, tmp_path):
    (layer, *_) = (one for one in layers(pipe) if one.diffusers.endswith("proj_in"))
    parts = {
        name: one.flatten(1) if one.ndim else one for name, one in lora(Drawn(), layer.module.weight.shape)[0].items()
    }
    path = write(tmp_path / "fox.safetensors", {f"{kohya(layer)}.{name}": one for name, one in parts.items()})
    with pipe.adapted(path):
        pipe.save_lora("fox", tmp_path / "out.safetensors", "diffusers")
    assert {one.ndim for one in load_file(tmp_path / "out.safetensors").values()} == {4}


def test_biases_norms_and_embeddings_are_written_too(pipe, tmp_path):
    shapes = {"lora_unet_conv_out.diff_b": 4, "lora_unet_conv_norm_out.w_norm": 12}
    shapes |= {"lora_te_text_model_final_layer_norm.b_norm": 28, "bundle_emb.zorblax.emb_params": (2, 28)}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        pipe.save_lora("fox", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in found)


def test_embeddings_are_left_out_with_a_warning_where_they_have_no_place(pipe, tmp_path):
    inside = {"bundle_emb.zorblax.emb_params": torch.ones(2, 28)}
    with (
        pipe.adapted(write(tmp_path / "fox.safetensors", tensors_of(pipe, lora, nn.Conv2d) | inside)),
        pytest.warns(SdInpaintWarning, match="1 tensors are left out"),
    ):
        pipe.save_lora("fox", tmp_path / "out.safetensors", "diffusers")


@pytest.mark.parametrize(("name", "dialect"), [("out", "kohya"), ("out.pt", "diffusers"), ("out.safetensors", "peft")])
def test_a_target_of_another_kind_is_refused(pipe, tmp_path, name, dialect):
    source = write(tmp_path / "fox.safetensors", tensors_of(pipe, lora))
    with pipe.adapted(source):
        refused(SettingError, "SETTING_TARGET", lambda: pipe.save_lora("fox", tmp_path / name, dialect))
        with pytest.raises(SettingError):
            pipe.save_lora("fox", tmp_path / "out.safetensors", "a1111")


# Extraction


def tuned_with(pipe, source):
    tuned = copy.deepcopy(pipe)
    tuned.add_lora(source)
    return tuned


@pytest.mark.parametrize("dialect", DIALECTS)
def test_extraction_recovers_a_difference_of_low_rank(pipe, tmp_path, dialect):
    before = weights(pipe)
    source = write(tmp_path / "fox.safetensors", tensors_of(pipe, lora))
    tuned, target = tuned_with(pipe, source), target_of(tmp_path, dialect)
    tensors = sdinpaint.extract_lora(pipe, tuned, 3, target, dialect=dialect, progress=False)
    assert {len(one) for key, one in tensors.items() if key.endswith("lora_down.weight")} == {3}
    wanted = {key: (one.double() - before[key].double()) for key, one in weights(tuned).items()}
    wanted = {key: one for key, one in wanted.items() if one.any()}
    with pipe.adapted(target):
        assert_weights(pipe, before, wanted, bound=1e-5)
    assert same(pipe, before)


def test_a_lower_rank_is_the_best_of_that_rank(pipe, tmp_path):
    before = weights(pipe)
    tuned = tuned_with(pipe, write(tmp_path / "fox.safetensors", tensors_of(pipe, lora)))
    sdinpaint.extract_lora(pipe, tuned, 1, tmp_path / "out.safetensors", progress=False)
    with pipe.adapted(tmp_path / "out.safetensors"):
        for key, one in weights(pipe).items():
            delta = (weights_of_one(tuned, key) - before[key].double()).flatten(1) if one.ndim > 1 else None
            if delta is not None and delta.any():
                best = torch.linalg.svdvals(delta)[1:].square().sum().sqrt()
                left = (weights_of_one(tuned, key) - one.double()).norm()
                assert left <= best * 1.001 + 1e-5


def weights_of_one(pipe, key):
    return dict(pipe.networks[key[0]].named_parameters())[key[1]].double()


def test_extraction_refuses_what_it_cannot(pipe, xl, tmp_path):
    refused(AdapterError, "ADAPTER_SHAPE", lambda: sdinpaint.extract_lora(pipe, pipe, 4, progress=False))
    refused(AdapterError, "ADAPTER_FAMILY", lambda: sdinpaint.extract_lora(pipe, xl, 4, progress=False))
    for rank in (0, -1, 1.5, True):
        with pytest.raises(SettingError):
            sdinpaint.extract_lora(pipe, pipe, rank, progress=False)
    with pytest.raises(SettingError):
        sdinpaint.extract_lora(pipe, pipe, 4, tmp_path / "x.safetensors", dialect="other", progress=False)


def test_layers_of_other_sizes_are_left_out_with_a_warning(pipe, four_channels, tmp_path):
    with pytest.warns(SdInpaintWarning, match="conv_in"):
        tensors = sdinpaint.extract_lora(pipe, four_channels, 2, progress=False)
    assert not any("conv_in" in key for key in tensors)


def test_models_of_two_dtypes_are_compared(pipe, tiny, vocabulary):
    half = random_pipeline(small(tiny), vocabulary)
    half.unet.to(torch.bfloat16)
    found = sdinpaint.extract_lora(pipe, half, 1, progress=False, dtype="float16")
    assert {one.dtype for key, one in found.items() if "alpha" not in key} == {torch.float16}
    assert not any(key.startswith("lora_te") for key in found)


def test_a_difference_that_is_nan_is_refused_by_name(pipe, tiny, vocabulary):
    broken = random_pipeline(small(tiny), vocabulary)
    broken.unet.out[2].weight[0, 0, 0, 0] = torch.nan
    refused(AdapterError, "ADAPTER_VALUES", lambda: sdinpaint.extract_lora(pipe, broken, progress=False), "conv_out")


# Peers


@pytest.mark.peer
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("model", ["pipe", "sd2", "xl"])
def test_diffusers_merges_what_is_written_to_the_same_weights(request, tmp_path, model, dialect):
    from diffusers import DiffusionPipeline

    pipe = request.getfixturevalue(model)
    left_out = "conv_in", "text_projection"  # diffusers has no LoRA for another number of channels, nor for this one
    held = [layer for layer in layers(pipe) if layer.diffusers not in left_out]
    draw = Drawn()
    tensors = {
        f"{kohya(layer)}.{part}": one
        for layer in held
        for part, one in lora(draw, tuple(layer.module.weight.shape))[0].items()
    }
    before = weights(pipe)
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        pipe.save_lora("fox", tmp_path / "out.safetensors", dialect)
        wanted = weights(pipe)
    save_diffusers(tmp_path / "model", pipe)
    peer = DiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    peer.load_lora_weights(tmp_path, weight_name="out.safetensors")
    peer.fuse_lora()
    for layer in held:
        found = getattr(peer, layer.network).state_dict()
        names = layer.diffusers, layer.diffusers.removeprefix("text_model.")  # which transformers 5 has left out
        key = next(key for name in names if (key := f"{name}.base_layer.weight") in found)
        at = layer.network, f"{layer.official}.weight"
        effect = (wanted[at] - before[at]).norm()
        assert effect > 1e-2
        assert (found[key] - wanted[at]).norm() < 1e-5 * effect


@pytest.mark.peer
@pytest.mark.parametrize("decomposed", [False, True])
def test_peft_loads_what_is_written_for_it(pipe, tmp_path, decomposed):
    """PEFT merges the folder into layers of the same names and weights as our UNet has."""
    from peft import PeftConfig, PeftModel

    def make(draw, shape):
        return dora(draw, shape, axis=0) if decomposed else odd_alphas(draw, shape)

    held = {layer: layer.module.weight for layer in layers(pipe) if layer.network == "unet"}
    draw = Drawn()
    tensors = {
        f"{kohya(layer)}.{part}": one
        for layer, weight in held.items()
        for part, one in make(draw, tuple(weight.shape))[0].items()
    }
    model = nn.Module()
    for layer in held:
        *path, last = layer.diffusers.split(".")
        at = model
        for name in path:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, copy.deepcopy(layer.module))
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        pipe.save_lora("fox", tmp_path / "out", "peft")
        wanted = {layer.diffusers: layer.module.weight.detach().clone() for layer in held}
    assert PeftConfig.from_pretrained(tmp_path / "out").use_dora == decomposed
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    found = {name: one.weight for name, one in merged.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert (found[name] - weight).abs().max() <= 2e-6 * max(1, float(weight.abs().max())), name
