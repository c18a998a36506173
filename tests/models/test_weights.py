"""Whatever is derived from weights is of the present ones, whichever ordinary way torch offers changed them."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import fill, random_pipeline, small
from painting import random_image
from recordings import draw
from torch import nn

from sdinpaint.errors import SdInpaintWarning, SettingError
from sdinpaint.loading import load, save_diffusers
from sdinpaint.models import ControlNet, ControlNetConfig, weights
from sdinpaint.models.weights import Snapshot, all_weights, write
from sdinpaint.pipeline.control import Control
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.provenance.fingerprints import fingerprint, weights_of
from sdinpaint.sampling.graphs import Graphs

RUN = {"steps": 1, "seed": 1, "progress": False}
FACTOR = 1.05
IMAGE, HOLE = random_image(128, 128), np.zeros((128, 128), bool)
HOLE[30:90, 40:100] = True
"""Large enough for prepacked convolutions."""


def in_place(module):
    for weight in module.parameters():
        weight.mul_(FACTOR)


def in_inference_mode(module):
    with torch.inference_mode():
        in_place(module)


def through_data(module):
    for weight in module.parameters():
        weight.data.mul_(FACTOR)


def through_numpy(module):
    for weight in module.parameters():
        values = weight.detach().numpy()
        np.multiply(values, np.float32(FACTOR), out=values)


def one_row_through_data(module):
    """In every weight the second row, or the second number."""
    for weight in module.parameters():
        weight.data[1] *= 1 + 4 * (FACTOR - 1)


def copied_into(module):
    for weight in module.parameters():
        weight.copy_(FACTOR * weight)


def loaded(module):
    module.load_state_dict({name: FACTOR * value for name, value in module.state_dict().items()})


def assigned(module):
    module.load_state_dict({name: FACTOR * value for name, value in module.state_dict().items()}, assign=True)


def data_replaced(module):
    for weight in module.parameters():
        weight.data = FACTOR * weight.data


def parameters_replaced(module):
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(FACTOR * weight.detach(), requires_grad=False))


def by_an_optimizer(module):
    found = list(module.parameters())
    with torch.enable_grad():
        for weight in found:
            weight.requires_grad_(True)
            weight.grad = -(FACTOR - 1) * weight.detach()
    torch.optim.SGD(found, lr=1.0).step()
    for weight in found:
        weight.grad = None
        weight.requires_grad_(False)


def by_our_writer(module):
    write(module, {name: FACTOR * value for name, value in module.state_dict().items()})


WAYS = [
    in_place, in_inference_mode, through_data, through_numpy, one_row_through_data, copied_into, loaded, assigned,
    data_replaced, parameters_replaced, by_an_optimizer, by_our_writer,
]  # fmt: skip
every_way = pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)


@pytest.fixture(scope="module")
def folder(tiny, vocabulary, tmp_path_factory):
    """Files of a pipeline whose UNet is wide enough for prepacked convolutions."""
    unet = replace(tiny.unet, model_channels=264, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,))
    where = tmp_path_factory.mktemp("model")
    save_diffusers(where, random_pipeline(replace(small(tiny), unet=unet), vocabulary))
    return where


@pytest.fixture(params=["mapped", "cast", "copied"])
def pipe(request, folder):
    """Weights in files that are mapped, in memory of their own, or in that of a copy."""
    dtype = torch.bfloat16 if request.param == "cast" else torch.float32
    pipe = load(folder, device="cpu", dtype=dtype, progress=False)
    if request.param == "cast":
        for model in (pipe.unet, pipe.vae, pipe.text):
            model.float()
    return copy.deepcopy(pipe) if request.param == "copied" else pipe


def fresh(pipe):
    """A pipeline of the same numbers from which nothing was ever derived."""
    models = []
    for model in (pipe.unet, pipe.vae, pipe.text):
        other = type(model)(model.config).eval().requires_grad_(False)
        other.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
        models.append(other)
    return Pipeline(pipe.family, *models, pipe.tokenizer)


def pixels(result):
    return np.asarray(result.image).astype(int)


def largest(one, other):
    return np.abs(pixels(one) - pixels(other)).max()


@pytest.fixture(params=["plain", "captured"])
def captured(request):
    return request.param == "captured"


def require_present_weights(pipe, change, times=1):
    before = pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN)
    for _ in range(times):  # the second change meets memory that was written to before
        for part in (pipe.unet, pipe.vae, pipe.text):
            change(part)
        right, after = fresh(pipe), pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN)
        assert largest(after, right.inpaint(IMAGE, HOLE, "a red fox", **RUN)) <= 1
        assert after.settings["manifest"]["weights"] == weights_of(right)
        assert largest(after, before) > 1
        before = after


@every_way
@pytest.mark.parametrize("pipe", ["mapped"], indirect=True)
@torch.no_grad()
def test_a_run_is_of_the_present_weights_and_says_so(pipe, change):
    require_present_weights(pipe, change, times=2 if change is in_place else 1)


@pytest.mark.parametrize("change", [in_place, through_numpy, one_row_through_data], ids=lambda way: way.__name__)
@pytest.mark.parametrize("pipe", ["cast", "copied"], indirect=True)
@torch.no_grad()
def test_weights_changed_in_any_memory_compute(pipe, change):
    require_present_weights(pipe, change)


@pytest.mark.parametrize(
    "change", [in_place, through_data, through_numpy, assigned, parameters_replaced], ids=lambda way: way.__name__
)
@torch.no_grad()
def test_a_captured_run_is_of_the_present_weights(tiny, vocabulary, change, replays):
    pipe = random_pipeline(small(tiny), vocabulary)
    pipe.graphs = Graphs(True)
    require_present_weights(pipe, change)
    assert replays.made > 0


def test_old_prepacked_weights_would_be_seen(folder, sabotage):
    """Broken on purpose."""
    pipe = load(folder, device="cpu", progress=False)
    prepacked = sys.modules["sdinpaint_kernels.prepacked"]
    sabotage(prepacked, "unchanged", lambda *_: [True])
    with pytest.raises(AssertionError), torch.no_grad():
        require_present_weights(pipe, through_data)


@pytest.mark.parametrize(
    ("pipe", "change"),
    [
        *(("mapped", way) for way in (in_place, through_data, through_numpy, assigned)),
        *(("cast", way) for way in (in_place, through_numpy)),
        *(("copied", way) for way in (through_data, assigned)),
    ],
    ids=lambda one: getattr(one, "__name__", one),
    indirect=["pipe"],
)
@torch.no_grad()
def test_steps_are_of_the_present_weights(pipe, change):
    """A denoiser that lives on, as research code has it."""
    known, said = pipe.encode_image(IMAGE, HOLE), pipe.encode_prompts(["a red fox", ""])
    denoise, x = pipe.denoiser(known, *said), draw(1, *known.masked_latents.shape)
    before = denoise(x, 2.0)
    change(pipe.unet)
    after, right = denoise(x, 2.0), fresh(pipe).denoiser(known, *said)(x, 2.0)
    assert float((after - right).norm() / right.norm()) < 1e-5
    assert float((after - before).norm() / before.norm()) > 1e-3


def test_weights_that_change_in_a_run_are_told(pipe):
    def change(step, x, x0):
        with torch.no_grad():
            in_place(pipe.unet)

    with pytest.warns(SdInpaintWarning, match="weights were changed during the run"):
        pipe.inpaint(IMAGE, HOLE, "a red fox", on_step=change, **RUN)


def test_a_manifest_names_the_weights_of_the_run_and_not_those_that_came_after(pipe):
    made = weights_of(pipe)
    result = pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN)
    with torch.no_grad():
        through_data(pipe.unet)
    assert result.settings["manifest"]["weights"] == made
    assert weights_of(pipe)["unet"] == fingerprint(pipe.unet) != made["unet"]


@every_way
@torch.no_grad()
def test_the_float32_copy_of_a_vae_is_of_the_present_weights(tiny, vocabulary, change):
    pipe = random_pipeline(small(tiny), vocabulary)
    pipe.vae.bfloat16().decoder.conv_out.weight.data[0, 0] = 3e38  # overflows in bfloat16
    pipe.vae.decoder.conv_out.weight.data[0, 0, 0, 0] = 1e30
    pipe.vae.decoder.norm_out.bias.data[0] = 3e38
    latents = draw(1, 1, 4, 4, 4)
    with pytest.raises(ArithmeticError), pytest.warns(SdInpaintWarning):
        pipe.decode(latents)
    wide = pipe._guarded_vae._wide[0]
    if change is not through_numpy:  # numpy has no bfloat16
        change(pipe.vae)
        with pytest.raises(ArithmeticError):
            pipe.decode(latents)
        assert pipe._guarded_vae._wide[0] is not wide
    else:
        with pytest.raises(ArithmeticError):
            pipe.decode(latents)
        assert pipe._guarded_vae._wide[0] is wide  # made once as long as nothing changes


@every_way
@torch.no_grad()
def test_a_controlnet_is_of_the_present_weights(tiny, change, request, captured):
    if captured:
        request.getfixturevalue("replays")
    unet = replace(small(tiny).unet, in_channels=4)
    net = fill(ControlNet(ControlNetConfig(unet=unet, hint_widths=(4, 6, 8, 10))), 7).eval().requires_grad_(False)
    hint, sigmas = draw(3, 1, 3, 48, 40), torch.linspace(9, 0, 5, dtype=torch.float64)
    given = draw(1, 2, 4, 6, 5), torch.full((2,), 500.0), draw(2, 2, 7, unet.context_dim), None, 9.0
    control = Control(net, hint, sigmas, graphs=Graphs(captured))
    before = control(*given)
    for part in (net, net.input_hint_block):
        change(part)
        other = ControlNet(net.config).eval().requires_grad_(False)
        other.load_state_dict({name: value.detach().clone() for name, value in net.state_dict().items()})
        after, right = control(*given), Control(other, hint, sigmas)(*given)
        for one, expected, old in zip(after, right, before, strict=True):
            assert torch.allclose(one, expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(one, old)
        before = after


# Snapshots


@every_way
@pytest.mark.parametrize("pipe", ["mapped"], indirect=True)
@torch.no_grad()
def test_a_snapshot_holds_until_something_changes(pipe, change):
    snapshot = Snapshot(all_weights(pipe.unet))
    assert snapshot.holds(all_weights(pipe.unet))
    pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN)
    assert snapshot.holds(all_weights(pipe.unet))
    change(pipe.unet.middle_block[0].emb_layers[1])
    assert not snapshot.holds(all_weights(pipe.unet))
    assert Snapshot(all_weights(pipe.unet)).holds(all_weights(pipe.unet))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.view(-1)[17].add_(1e-7),
        lambda w: w.view(-1)[-1].neg_(),
        lambda w: w.view(-1)[1::2].neg_(),
        lambda w: w.view(-1)[::2].neg_(),
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.view(-1).index_copy_(0, torch.tensor([3, 9]), w.view(-1)[[9, 3]]),
        lambda w: w.copy_(w.roll(1, 1)),
    ],
    ids=["tiny", "last", "odd signs", "even signs", "all signs", "reversed", "two exchanged", "rolled"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 33), (70, 1024), (1100, 1100)])
@torch.no_grad()
def test_a_digest_tells_every_change_of_bits(change, dtype, shape):
    module = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    before, snapshot = module.weight.clone(), Snapshot(all_weights(module))
    change(module.weight.data)
    bits = before.view(torch.uint8), module.weight.view(torch.uint8)  # of which -0 has others than 0
    assert snapshot.holds(all_weights(module)) == torch.equal(*bits)
    module.weight.data.copy_(before)
    assert snapshot.holds(all_weights(module))


@torch.no_grad()
def test_digests_on_a_device_tell_it_too():
    """The sums that a GPU computes, here by the CPU."""
    digests = sys.modules["sdinpaint_kernels.contents"]._device_digests
    tensors = [draw(1, 700, 1024), draw(2, 5, 3), draw(3, 64, 8, 3, 3).contiguous(memory_format=torch.channels_last)]
    before = digests(tensors)
    assert before == digests([one.clone() for one in tensors])
    for index, one in enumerate(tensors):
        one[1] *= 1.001
        after = digests(tensors)
        assert [old == new for old, new in zip(before, after, strict=True)] == [index != at for at in range(3)]
        before = after


def test_writing_checks_names_and_shapes_before_it_writes(pipe):
    layer = pipe.unet.middle_block[0].emb_layers[1]
    before = layer.weight.clone()
    for values in ({"weight": before + 1, "wait": before}, {"weight": before + 1, "bias": before}):
        with pytest.raises(SettingError) as caught:
            write(layer, values)
        assert caught.value.code == "SETTING_WEIGHT"
        assert torch.equal(layer.weight, before)
    write(layer, {"weight": (before + 1).double()})
    assert torch.equal(layer.weight, before + 1)


def test_weights_of_a_file_stay_in_its_pages(folder):
    pipe = load(folder, device="cpu", progress=False)
    layers = [layer for one in pipe.unet.modules() if isinstance(one, weights.Packed) for layer in one.packed()]
    assert layers
    assert all(weights.lies_in(layer.weight, weights.private_maps()) for layer in layers)
    packed = [layer.weight for layer in copy.deepcopy(layers[:3])]
    weights._pack(packed)
    assert weights.joined(packed) is not None
    assert packed[0].data_ptr() % weights.ALIGNED == 0


# Modes and flags


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_that_is_loaded_in_any_mode_serves_in_every_mode(folder, mode):
    with mode():
        pipe = load(folder, device="cpu", progress=False)
    assert not any(weight.is_inference() or weight.requires_grad for weight in pipe.unet.parameters())
    results = []
    for around in (nullcontext, torch.no_grad, torch.inference_mode):
        with around():
            results.append(pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN))
    assert all(largest(one, results[0]) <= 1 for one in results)


def test_a_pipeline_leaves_modules_as_they_are_given(tiny, vocabulary):
    given = random_pipeline(small(tiny), vocabulary)
    models = given.unet, given.vae, given.text
    for model in models:
        model.train()
        model.requires_grad_(True)
    pipe = Pipeline(given.family, *models, given.tokenizer)
    pipe.inpaint(IMAGE, HOLE, "a red fox", **RUN)
    assert all(model.training and all(one.requires_grad for one in model.parameters()) for model in models)
