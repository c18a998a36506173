"""Adding adapters to a pipeline: all that computes sees them at once, and what was there comes back bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from builders import as_sdxl, random_pipeline, small
from safetensors.torch import save_file
from sdinpaint_kernels import prepacked
from torch import nn

import sdinpaint
from sdinpaint.adapters import stack
from sdinpaint.errors import AdapterError, SdInpaintWarning, SettingError
from sdinpaint.loading import load, save_diffusers
from sdinpaint.models import weights as layout
from sdinpaint.provenance.fingerprints import weights_of
from sdinpaint.sampling import Known

RANK, ALPHA = 3, 1.5
STARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def low_rank(pipe, path, *, seed=0, networks=("unet", "text_encoder"), size=0.2, dora=False):
    """Write a LoRA of kohya's names for all linear layers and convolutions; return the differences by weight."""
    draw = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for network in networks:
        for target in stack.targets_of(network, layers(pipe.networks[network])):
            weight = pipe.networks[network].get_submodule(target.module).weight
            down = size * torch.randn(RANK, *weight.shape[1:], generator=draw)
            up = size * torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=draw)
            name = target.name if network == "unet" else target.module
            key = STARTS[network] + name.replace(".", "_")
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(ALPHA),
            }
            delta = ALPHA / RANK * (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape)
            if dora:
                rows = 1 + torch.rand(len(weight), *[1] * (weight.ndim - 1), generator=draw)
                tensors[f"{key}.dora_scale"] = rows
                v = weight.double() + delta
                axes = list(range(1, v.ndim))
                delta = rows.double() * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True) - weight.double()
            deltas[network, f"{target.module}.weight"] = delta
    save_file(tensors, path)
    return deltas


def layers(network):
    return [name for name, one in network.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]


def weights(pipe):
    return {
        (name, key): weight.detach().clone()
        for name, network in pipe.networks.items()
        for key, weight in network.named_parameters()
    }


def same(pipe, before):
    return all(torch.equal(weight, before[key]) for key, weight in weights(pipe).items())


@pytest.fixture
def pipe(tiny, vocabulary):
    """A small random pipeline of its own for each test."""
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture
def file(pipe, tmp_path):
    """A LoRA for it."""
    low_rank(pipe, tmp_path / "fox.safetensors")
    return tmp_path / "fox.safetensors"


@pytest.fixture
def saved(pipe, tmp_path):
    """Save that pipeline as a folder, from which it is loaded with its weights mapped."""
    save_diffusers(tmp_path / "model", pipe)
    return tmp_path / "model"


def step(pipe):
    """Return the output of everything that has a weight that adapters change: prompts, then a denoising step."""
    draw = torch.Generator().manual_seed(1)
    x, masked = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    known = Known(torch.ones(1, 1, 8, 8), masked)
    uncond, cond = pipe.encode_prompts(["", "a red fox"])
    return pipe.denoiser(known, cond, uncond, guidance_scale=3.0)(x, 2.0)


# The sum


def test_weights_are_those_from_before_plus_the_difference_and_come_back_bit_for_bit(pipe, tmp_path):
    before = weights(pipe)
    deltas = low_rank(pipe, tmp_path / "a.safetensors")
    lora = pipe.add_lora(tmp_path / "a.safetensors", 0.7)
    assert (lora.name, lora.weight, lora.kinds) == ("a", 0.7, {"lora": len(deltas)})
    assert lora.modules == {name: sum(key[0] == name for key in deltas) for name in ("text_encoder", "unet")}
    for key, weight in weights(pipe).items():
        wanted = before[key].double() + 0.7 * deltas.get(key, 0)
        assert torch.allclose(weight.double(), wanted, rtol=2e-7, atol=2e-7), key
    pipe.remove_lora("a")
    assert same(pipe, before)
    assert not pipe.loras


def test_several_adapters_add_up_in_any_order_with_each_difference_from_the_weights_before(pipe, tmp_path):
    before = weights(pipe)
    names = ["a", "b", "c"]
    found = [low_rank(pipe, tmp_path / f"{name}.safetensors", seed=i, dora=i == 1) for i, name in enumerate(names)]
    sums = []
    for order in permutations(range(3)):
        for i in order:
            pipe.add_lora(tmp_path / f"{names[i]}.safetensors", 0.5 + i)
        assert list(pipe.loras) == [names[i] for i in order]
        sums.append(weights(pipe))
        pipe.clear_loras()
        assert same(pipe, before)
    assert all(torch.equal(one[key], sums[0][key]) for one in sums for key in before)
    for key in found[0]:
        wanted = before[key].double() + sum((0.5 + i) * deltas[key] for i, deltas in enumerate(found))
        assert torch.allclose(sums[0][key].double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_weight_can_be_changed_and_removing_one_leaves_the_others(pipe, file, tmp_path):
    low_rank(pipe, tmp_path / "other.safetensors", seed=5)
    before = weights(pipe)
    pipe.add_lora(file)
    alone = weights(pipe)
    pipe.add_lora(tmp_path / "other.safetensors", -0.3)
    pipe.set_lora("fox", weight=0)
    pipe.remove_lora("other")
    assert same(pipe, before)
    assert pipe.set_lora("fox", weight=1).weight == pipe.loras["fox"].weight == 1
    assert same(pipe, alone)


def test_text_weight_and_blocks_have_their_own_factors(pipe, tmp_path):
    before = weights(pipe)
    deltas = low_rank(pipe, tmp_path / "a.safetensors")
    blocks = {"down_blocks": 0.5, "down_blocks.1": 0.25, "text_encoder": 3}
    pipe.add_lora(tmp_path / "a.safetensors", 2, text_weight=0.1, blocks=blocks)
    names = {t.module: t.name for t in stack.targets_of("unet", layers(pipe.unet))}
    for key, delta in deltas.items():
        name = names.get(key[1].removesuffix(".weight"), "")
        factor = 0.3 if key[0] == "text_encoder" else 2.0
        if name.startswith("down_blocks"):
            factor *= 0.25 if name.startswith("down_blocks.1") else 0.5
        changed = weights(pipe)[key].double() - before[key].double()
        assert torch.allclose(changed, factor * delta, rtol=1e-5, atol=1e-6), (key, name)
    pipe.set_lora("a", blocks=None, text_weight=None)
    assert pipe.loras["a"].factor(next(t for t in pipe.loras["a"].file.parts if t.network == "text_encoder")) == 2
    pipe.set_lora("a", text_weight=0, weight=0)
    assert same(pipe, before)


def test_an_adapted_block_takes_the_adapter_off_whatever_happens(pipe, file):
    before = weights(pipe)
    with pipe.adapted(file, 0.5, name="mine") as lora:
        assert list(pipe.loras) == ["mine"] == [lora.name]
        assert not same(pipe, before)
    assert same(pipe, before)
    with pytest.raises(ZeroDivisionError), pipe.adapted(file):
        raise ZeroDivisionError
    assert same(pipe, before)
    with pipe.adapted(file):
        pipe.clear_loras()


def test_a_model_of_two_text_encoders(tiny, vocabulary, tmp_path, monkeypatch):
    xl = random_pipeline(small(as_sdxl(tiny)), vocabulary)
    monkeypatch.setitem(STARTS, "text_encoder", "lora_te1_")
    monkeypatch.setitem(STARTS, "text_encoder_2", "lora_te2_")
    before = weights(xl)
    deltas = low_rank(xl, tmp_path / "a.safetensors", networks=("unet", "text_encoder", "text_encoder_2"))
    xl.add_lora(tmp_path / "a.safetensors")
    for key, weight in weights(xl).items():
        assert torch.allclose(weight.double(), before[key].double() + deltas.get(key, 0), rtol=2e-7, atol=2e-7), key


# Whatever computes


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_equals_a_checkpoint_into_which_the_difference_was_merged(saved, file, tmp_path, offload, dtype):
    """Also after the model was used without: nothing that was made of the old weights is used."""
    adapted = load(saved, dtype=dtype, offload=offload, progress=False)
    first = step(adapted)
    adapted.add_lora(file, 0.8)
    exact = load(saved, dtype=dtype, progress=False)
    exact.add_lora(file, 0.8)
    save_diffusers(tmp_path / "merged", exact)
    merged = load(tmp_path / "merged", dtype=dtype, progress=False)
    assert (step(adapted) - step(merged)).abs().max() <= 1e-6
    assert (step(adapted) - first).abs().max() > 0.01
    adapted.clear_loras()
    assert torch.equal(step(adapted), first)


def test_prepacked_weights_follow(saved, file):
    """Weights of a width that is prepacked, and mapped ones, which their copies replace."""
    pipe = load(saved, progress=False)
    first = step(pipe)
    held = [weight for weight in pipe.unet.parameters() if layout.is_replaced(weight)]
    with pipe.adapted(file):
        changed = step(pipe)
        fresh = copy.deepcopy(pipe)
        assert torch.allclose(changed, step(fresh), atol=2e-6)
        assert all(prepacked._cache.get(weight) is not None for weight in held)
    assert torch.equal(step(pipe), first)


def test_a_denoiser_made_before_sees_it(pipe, file):
    draw = torch.Generator().manual_seed(1)
    x, masked = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    uncond, cond = pipe.encode_prompts(["", "a red fox"])
    given = Known(torch.ones(1, 1, 8, 8), masked), cond, uncond
    denoise = pipe.denoiser(*given)
    first = denoise(x, 2.0)
    pipe.add_lora(file, text_weight=0)
    assert torch.equal(denoise(x, 2.0), pipe.denoiser(*given)(x, 2.0))
    pipe.clear_loras()
    assert torch.equal(denoise(x, 2.0), first)


def test_captured_graphs_are_captured_anew(pipe, file, replays):
    first = step(pipe)
    assert replays.made
    pipe.add_lora(file)
    adapted = step(pipe)
    assert torch.allclose(adapted, step(copy.deepcopy(pipe)), atol=2e-6)
    assert not torch.allclose(adapted, first, atol=1e-2)
    pipe.clear_loras()
    assert torch.equal(step(pipe), first)


def test_it_can_come_and_go_while_an_offloaded_model_is_in_use(saved, file):
    pipe = load(saved, dtype="bfloat16", offload=True, progress=False)
    whole = load(saved, dtype="bfloat16", progress=False)
    first = step(pipe)
    with pipe.using(pipe.unet, *pipe.condition.encoders):
        pipe.add_lora(file)
        whole.add_lora(file)
        assert torch.equal(step(pipe), step(whole))
    assert torch.equal(step(pipe), step(whole))
    with pipe.using(pipe.unet):
        pipe.clear_loras()
        assert torch.equal(step(pipe), first)
    assert torch.equal(step(pipe), first)


def test_a_copy_and_a_pickle_keep_adapters_and_their_removal(saved, file):
    pipe = load(saved, progress=False)
    first = step(pipe)
    pipe.add_lora(file)
    adapted = step(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.allclose(step(other), adapted, atol=2e-6)
        other.remove_lora("fox")
        assert torch.allclose(step(other), first, atol=2e-6)
    assert torch.equal(step(pipe), adapted)


def test_a_moved_model_keeps_adapters_and_their_removal(pipe, file):
    pipe.add_lora(file)
    pipe.unet.double()
    before = weights(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a cast is no edit
        pipe.set_lora("fox", weight=0.5)
        assert not same(pipe, before)
        pipe.clear_loras()
    assert {weight.dtype for weight in pipe.unet.parameters()} == {torch.float64}
    assert torch.isfinite(step(pipe)).all()


def test_controlnet_and_vae_are_not_touched(pipe, file):
    before = copy.deepcopy(pipe.vae.state_dict())
    pipe.add_lora(file)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.vae.state_dict().items())


def test_edits_of_a_changed_weight_are_told_when_they_are_undone(pipe, file):
    before = weights(pipe)
    pipe.add_lora(file)
    with torch.no_grad():
        pipe.unet.out[2].weight[0] = 1
    with pytest.warns(SdInpaintWarning, match=r"1 weights were written to .*: out\.2\.weight"):
        pipe.clear_loras()
    assert same(pipe, before)


# Memory and provenance


def test_originals_stay_in_the_mapped_file_and_other_weights_where_they_were(saved, file, tmp_path):
    pipe = load(saved, progress=False)
    places = {key: one.data_ptr() for key, one in pipe.unet.named_parameters()}
    pipe.add_lora(file)
    kept = {weight: one.original for weight, one in pipe.adapters._kept.items()}
    for key, weight in pipe.unet.named_parameters():
        now = kept[weight].data_ptr() if weight in kept else weight.data_ptr()
        assert now == places[key]
    large = [weight for weight in kept if weight.nbytes >= 1 << 15]
    assert large
    assert all(layout.backed_by_files(large))


def test_fingerprints_are_those_of_the_checkpoint(saved, file):
    for offload in (False, True):
        pipe = load(saved, offload=offload, dtype="bfloat16", progress=False)
        before = weights_of(pipe)
        with pipe.adapted(file):
            assert weights_of(pipe) == before
        assert weights_of(pipe) == before


def test_nothing_is_held_after_removal(pipe, file):
    pipe.add_lora(file)
    pipe.clear_loras()
    gc.collect()
    assert not pipe.adapters._kept


# Refusals


@pytest.mark.parametrize(
    ("add", "code"),
    [
        ({"weight": float("nan")}, "SETTING_WEIGHT"),
        ({"weight": True}, "SETTING_WEIGHT"),
        ({"weight": "1"}, "SETTING_WEIGHT"),
        ({"weight": None}, "SETTING_WEIGHT"),
        ({"text_weight": float("inf")}, "SETTING_WEIGHT"),
        ({"blocks": {"down_blocks.9": 1}}, "ADAPTER_BLOCKS"),
        ({"blocks": {"down_block": 1}}, "ADAPTER_BLOCKS"),
        ({"blocks": {"mid_block": "x"}}, "SETTING_WEIGHT"),
        ({"blocks": 0.5}, "SETTING_WEIGHT"),
        ({"name": ""}, "ADAPTER_NAME"),
        ({"name": "taken"}, "ADAPTER_NAME"),
        ({"weight": 1e40}, "ADAPTER_VALUES"),
    ],
)
def test_arguments_that_cannot_be_meant_change_nothing(pipe, file, add, code):
    pipe.add_lora(file, 0.1, name="taken")
    before = weights(pipe)
    with pytest.raises((AdapterError, SettingError)) as caught:
        pipe.add_lora(file, **add)
    assert caught.value.code == code
    assert same(pipe, before)
    assert list(pipe.loras) == ["taken"]


@pytest.mark.parametrize("call", ["set_lora", "remove_lora", "save_lora"])
def test_an_unknown_name_is_refused_with_those_that_are_there(pipe, file, call):
    pipe.add_lora(file)
    with pytest.raises(AdapterError, match="fox") as caught:
        getattr(pipe, call)("dog", *(["x.safetensors"] if call == "save_lora" else []))
    assert caught.value.code == "ADAPTER_NAME"


def test_an_error_amid_the_sums_changes_nothing(pipe, file, tmp_path, monkeypatch):
    pipe.add_lora(file, 0.3)
    before, calls = weights(pipe), []

    def fail(*given):
        calls.append(given)
        if len(calls) == 9:
            raise MemoryError
        return compute(*given)

    compute = stack.changed_weight
    monkeypatch.setattr(stack, "changed_weight", fail)
    with pytest.raises(sdinpaint.SdInpaintError, match="memory"):
        pipe.set_lora("fox", weight=2)
    assert same(pipe, before)
    assert pipe.loras["fox"].weight == 0.3


def test_pictures_show_it(saved, file):
    pipe = load(saved, progress=False)
    image = np.full((64, 64, 3), 128, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    run = {"prompt": "a red fox", "steps": 2, "seed": 3, "progress": False}
    plain = np.asarray(pipe.inpaint(image, mask, **run).image)
    with pipe.adapted(file):
        adapted = pipe.inpaint(image, mask, **run)
    assert not np.array_equal(np.asarray(adapted.image), plain)
    assert [one["name"] for one in adapted.settings["manifest"]["adapters"]] == ["fox"]
    assert np.array_equal(np.asarray(pipe.inpaint(image, mask, **run).image), plain)


def test_the_name_is_that_of_the_file_or_of_the_folder_that_was_given(pipe, file, tmp_path):
    folder = tmp_path / "style.of.mine"
    folder.mkdir()
    file.rename(folder / "pytorch_lora_weights.safetensors")
    for source, name in (
        (folder, "style.of.mine"),
        (folder / "pytorch_lora_weights.safetensors", "pytorch_lora_weights"),
    ):
        with pipe.adapted(source) as lora:
            assert lora.name == name
