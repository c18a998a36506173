"""An inpainting model made of others: all of them are in it, where they belong, and nothing else is."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from builders import as_sd2, for_text_to_image, random_pipeline, small, states
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdinpaint.checkpoints import merging
from sdinpaint.checkpoints.converting import convert
from sdinpaint.checkpoints.merging import FIRST, to_inpainting, widen_input
from sdinpaint.cli import main
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.loading import load, save_diffusers

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def home(tiny, vocabulary, tmp_path_factory):
    """Folders `base`, `custom` (4 channels) and `inpaint` (9), and `custom.safetensors`: the same as one file."""
    home = tmp_path_factory.mktemp("models")
    families = {"base": for_text_to_image(tiny), "custom": for_text_to_image(tiny), "inpaint": tiny}
    for seed, (name, family) in enumerate(families.items()):
        save_diffusers(home / name, random_pipeline(family, vocabulary, seed=seed + 1))
        convert(home / name, home / f"{name}.safetensors", progress=False)
    return home


def merge(home, target, *, custom="custom", base="base", inpaint="inpaint", **options):
    to_inpainting(home / custom, target, base=home / base, inpaint=home / inpaint, progress=False, **options)
    return load(target, device="cpu", progress=False) if target.is_dir() else load_file(target)


def networks(path):
    return states(load(path, device="cpu", progress=False))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# new input channels


@pytest.fixture
def inputs(tiny):
    """Noisy latents, the mask and masked latents beside them, times and text states."""
    unet = tiny.unet
    return {"x": draw(3, 4, 8, 12), "shown": 5 * draw(3, 5, 8, 12, seed=1), "t": torch.tensor([1.0, 413.75, 999.0])} | {
        "context": draw(3, 7, unet.context_dim, seed=2)
    }


def output(unet, inputs, *, shown=False):
    """The UNet's output as float64, computed in the dtype of its weights."""
    given = {name: value.to(unet.out[2].weight.dtype) for name, value in inputs.items()}
    x = torch.cat([given["x"], given["shown"]], dim=1) if shown else given["x"]
    with torch.no_grad():
        return unet(x, given["t"], given["context"]).double()


def distance(one, other):
    """The largest difference, in units of the standard deviation."""
    return ((one - other).abs().max() / other.std()).item()


def test_a_widened_unet_does_what_it_did_whatever_it_is_shown(home, inputs):
    """Nine channels are added up in another order than four: equal but for rounding, of which there is no more."""
    unet = load(home / "base", device="cpu", progress=False).unet
    wide = widen_input(unet)
    assert wide.config == replace(unet.config, in_channels=9)
    single = output(unet, inputs), output(wide, inputs, shown=True)
    exact, same = output(unet.double(), inputs), output(wide.double(), inputs, shown=True)
    assert distance(same, exact) < 1e-13
    assert distance(single[1], exact) < 2 * distance(single[0], exact) + 1e-7
    assert distance(*single) < 5e-6


@pytest.mark.parametrize(
    "order", [[4, 0, 1, 2, 3, 5, 6, 7, 8], [3, 2, 1, 0, 4, 5, 6, 7, 8], [5, 6, 7, 8, 4, 0, 1, 2, 3]]
)
def test_channels_in_another_place_are_seen(home, inputs, order):
    """Broken on purpose: the mask first, the latents turned round, the masked latents first."""
    unet = load(home / "base", device="cpu", progress=False).unet
    wide = widen_input(unet)
    state = wide.state_dict()
    wide.load_state_dict({**state, FIRST: state[FIRST][:, order].contiguous()})
    assert distance(output(wide, inputs, shown=True), output(unet, inputs)) > 0.1


def test_all_other_weights_are_shared(home):
    unet = load(home / "base", device="cpu", progress=False).unet
    ours, theirs = widen_input(unet).state_dict(), unet.state_dict()
    assert {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()} == {FIRST}


def test_an_inpainting_unet_is_not_widened(home):
    with pytest.raises(SettingError) as caught:
        widen_input(load(home / "inpaint", device="cpu", progress=False).unet)
    assert caught.value.code == "SETTING_UNET"


def test_a_file_is_widened_as_the_model_in_memory_is(home, tmp_path):
    to_inpainting(home / "custom", tmp_path / "wide", progress=False)
    written = networks(tmp_path / "wide")
    pipe = load(home / "custom", device="cpu", progress=False)
    expected = states(pipe) | {"unet": widen_input(pipe.unet).state_dict()}
    for component, tensors in expected.items():
        assert written[component].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(written[component][name], tensor), name
    assert load(tmp_path / "wide", device="cpu", progress=False).family.name == "sd15-inpainting"


# differences of weights


def test_custom_equal_to_base_gives_inpaint_to_the_last_bit(home, tmp_path):
    for dtype in ("fp32", "fp16"):
        merge(home, tmp_path / dtype, custom="base", dtype=dtype)
    expected, found = networks(home / "inpaint")["unet"], networks(tmp_path / "fp32")["unet"]
    halves = networks(tmp_path / "fp16")["unet"]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(halves[name], tensor.half().float()), name


def test_every_tensor_is_custom_and_inpaint_without_base(home, tmp_path):
    merge(home, tmp_path / "merged")
    found = networks(tmp_path / "merged")
    custom, base, inpaint = (networks(home / name) for name in ("custom", "base", "inpaint"))
    for name, tensor in found["unet"].items():
        c, b, i = (model["unet"][name].double() for model in (custom, base, inpaint))
        if name == FIRST:
            assert torch.equal(tensor[:, 4:].double(), i[:, 4:])
            i = i[:, :4]
        shared = tensor[:, :4] if name == FIRST else tensor
        assert torch.allclose(shared.double(), c + i - b, rtol=0, atol=1e-6), name
    for component in ("vae", "text_encoder"):
        for name, tensor in found[component].items():
            assert torch.equal(tensor, custom[component][name]), name


def test_a_difference_in_the_wrong_channels_is_seen(home, tmp_path, sabotage):
    """Broken on purpose: the difference is added to the last channels instead of the first ones."""
    zeros_first = merging._widened

    def zeros_last(weight, channels):
        return zeros_first(weight, channels).flip(1)

    sabotage(merging, "_widened", zeros_last)
    with pytest.raises(AssertionError):
        test_every_tensor_is_custom_and_inpaint_without_base(home, tmp_path)


def test_layouts_and_dtypes_may_differ(home, tmp_path):
    convert(home / "base", tmp_path / "base.safetensors", dtype="fp16", progress=False)
    convert(home / "inpaint", tmp_path / "inpaint", dtype="bf16", progress=False)
    configs = home / "custom"
    to_inpainting(
        home / "custom.safetensors",
        tmp_path / "merged.safetensors",
        base=tmp_path / "base.safetensors",
        inpaint=tmp_path / "inpaint",
        config=configs,
        progress=False,
    )
    found = load_file(tmp_path / "merged.safetensors")
    models = load_file(home / "custom.safetensors"), load_file(tmp_path / "base.safetensors")
    inpaint = networks(tmp_path / "inpaint")["unet"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in ("out.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        custom, base = (model[PREFIX + name].float() for model in models)
        assert torch.equal(found[PREFIX + name], inpaint[name] + (custom - base)), name


def test_the_written_file_tells_its_three_sources(home, tmp_path):
    merge(home, tmp_path / "merged.safetensors", custom="custom", config=home / "custom")
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == "custom + inpaint - base"
    assert metadata["family"] == "sd15-inpainting"
    assert len(metadata["source_sha256"].split("\n")) == 5  # custom's three networks, and two UNets


@pytest.fixture(scope="module")
def others(tiny, vocabulary, home):
    """Folders of models that do not fit to those of `home`."""
    families = {
        "sd2": for_text_to_image(as_sd2(tiny)),
        "sd2-inpaint": as_sd2(tiny),
        "sd2-v": for_text_to_image(as_sd2(tiny, "v")),
        "narrow": for_text_to_image(replace(tiny, unet=small(tiny).unet)),
    }
    for name, family in families.items():
        save_diffusers(home / name, random_pipeline(family, vocabulary))
    return home


@pytest.mark.parametrize(
    ("sources", "code", "words"),
    [
        ({"base": "sd2"}, "CKPT_MISMATCH", "Stable Diffusion 2"),
        ({"base": "narrow"}, "CKPT_MISMATCH", "base differs from custom in"),
        ({"base": "inpaint"}, "CKPT_CHANNELS", "base has 9 input channels"),
        ({"inpaint": "base"}, "CKPT_CHANNELS", "inpaint has 4 input channels"),
        ({"custom": "inpaint"}, "CKPT_CHANNELS", "custom has 9 input channels"),
        ({"custom": "sd2-v", "base": "sd2", "inpaint": "sd2-inpaint"}, "CKPT_MISMATCH", "predicts v"),
    ],
)
def test_models_that_do_not_fit(others, tmp_path, sources, code, words):
    with pytest.raises(CheckpointError) as caught:
        merge(others, tmp_path / "merged", **sources)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_base_and_inpaint_come_together(home, tmp_path):
    with pytest.raises(SettingError) as caught:
        to_inpainting(home / "custom", tmp_path / "merged", base=home / "base")
    assert caught.value.code == "SETTING_MERGE"


def test_a_sum_that_half_precision_cannot_hold_leaves_nothing(home, tmp_path):
    held = load_file(home / "inpaint.safetensors")
    held[PREFIX + "out.2.bias"] += 7e4
    save_file(held, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError) as caught:
        to_inpainting(
            home / "custom",
            tmp_path / "merged.safetensors",
            base=home / "base",
            inpaint=tmp_path / "large.safetensors",
            dtype="fp16",
            progress=False,
        )
    assert caught.value.code == "CKPT_OVERFLOW"
    assert os.listdir(tmp_path) == ["large.safetensors"]


def test_the_command_writes_what_the_function_writes(home, tmp_path):
    sources = ["--base", str(home / "base"), "--inpaint", str(home / "inpaint")]
    done = CliRunner().invoke(main, ["merge", str(home / "custom"), str(tmp_path / "a.safetensors"), *sources])
    assert done.exit_code == 0, done.output
    assert "a.safetensors: 0.0" in done.output
    merge(home, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    done = CliRunner().invoke(main, ["merge", str(home / "custom"), str(tmp_path / "c"), *sources[:2]])
    assert done.exit_code == 3
    assert "both, or neither" in done.output
