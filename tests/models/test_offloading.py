"""Models that are in memory only while they are used: the same images in less memory, whatever happens on the way."""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import as_sdxl, fill, random_pipeline, rewrite, small
from click.testing import CliRunner
from closeness import FLOAT32, apart, close, same_image, same_images
from painting import IMAGE, MASK, random_image
from PIL import Image
from safetensors.torch import save_file
from sdinpaint_kernels import forms
from sdinpaint_kernels.prepacked import _cache
from torch import nn

from sdinpaint import cli
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.loading import load, save_diffusers
from sdinpaint.models import ControlNet, ControlNetConfig, offloading
from sdinpaint.models.offloading import Offloading
from sdinpaint.replaying import replay
from sdinpaint.sampling import schedules
from sdinpaint.sampling.graphs import Graphs

DTYPES = ("float32", "bfloat16")
"""The dtype of the files, which stay mapped while they are used, and one to which weights are cast for each use."""
PROC = Path("/proc/self")
EDGES = 4 * mmap.PAGESIZE
"""At most so much of a weight is on pages that hold something else, too, or is too small for one of its own."""
OPTIONS = {"steps": 2, "seed": 5, "progress": False}
RUNS = {
    "inpaint": lambda pipe: pipe.inpaint(IMAGE, MASK, "a red fox", **OPTIONS),
    "two": lambda pipe: pipe.inpaint(IMAGE, MASK, ["a red fox", "a cube"], batch_size=1, **OPTIONS),
    "strength": lambda pipe: pipe.inpaint(IMAGE, MASK, "a red fox", strength=0.6, fill="noise", **OPTIONS),
    "soft": lambda pipe: pipe.inpaint(IMAGE, MASK * np.float32(0.7), "a red fox", soft=True, **OPTIONS),
    "vary": lambda pipe: pipe.vary(IMAGE, "a red fox", **OPTIONS),
    "outpaint": lambda pipe: pipe.outpaint(random_image(64, 72), "a red fox", right=24, **OPTIONS),
}


@pytest.fixture(scope="module")
def model(tiny, vocabulary, tmp_path_factory):
    """A folder of float32 weights."""
    folder = tmp_path_factory.mktemp("model")
    save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def controlnet(tiny, tmp_path_factory):
    """A file."""
    unet = replace(small(tiny).unet, in_channels=4)
    net = fill(ControlNet(ControlNetConfig(unet=unet, hint_widths=(4, 6, 8, 10))), 7)
    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file({f"control_model.{name}": weight for name, weight in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module", params=DTYPES)
def both(request, model):
    """One model twice: there all the time, and offloaded."""
    return [
        load(model, device="cpu", dtype=request.param, offload=offload, progress=False) for offload in (False, True)
    ]


def models(pipe):
    return [one for one in (pipe.unet, pipe.vae, pipe.controlnet, *pipe.condition.encoders) if one is not None]


def homes(pipe):
    return [[(weight.data_ptr(), weight.dtype) for weight in model.parameters()] for model in models(pipe)]


def in_float32(pipe):
    """A copy of a pipeline whose models are all there."""
    wide = copy.deepcopy(pipe)
    for model in models(wide):
        model.float()
    return wide


@pytest.fixture(scope="module")
def exact(both):
    """Return the model in float32, there all the time."""
    return in_float32(both[0])


def same(found, expected, exact):
    """Tell whether images of one dtype differ by less than it is away from float32, of which `exact` are."""
    if all(map(same_image, expected.images, exact.images)):
        return same_images(found.images, expected.images)
    each = zip(found.images, expected.images, exact.images, strict=True)
    return all(apart(one, other) <= apart(other, wide) for one, other, wide in each)


@pytest.fixture
def events(substitute):
    """A list that takes (True, model) for each that comes, and (False, model) for each that leaves."""
    found, known = [], {}
    enter, leave = Offloading._enter, Offloading._leave

    def entering(self, model, weights):
        before, known[weights[0]] = self._uses[weights[0]], model
        enter(self, model, weights)
        if before == 0:
            found.append((True, model))

    def leaving(self, weights):
        leave(self, weights)
        if self._uses[weights[0]] == 0:
            found.append((False, known[weights[0]]))

    substitute(Offloading, _enter=entering, _leave=leaving)
    return found


# The same images


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_images_are_the_same(both, exact, run):
    plain, offloaded = both
    before = homes(offloaded)
    assert same(run(offloaded), run(plain), run(exact))
    assert homes(offloaded) == before
    assert plain.offloading is None
    assert (offloaded.device, offloaded.dtype) == (plain.device, plain.dtype)


def test_images_that_are_not_the_same_are_seen(both, exact):
    """Another prompt, and weights of which one layer did not come."""
    plain, offloaded = both
    expected, wide = RUNS["inpaint"](plain), RUNS["inpaint"](exact)
    assert not same(offloaded.inpaint(IMAGE, MASK, "a cube", **OPTIONS), expected, wide)
    broken = copy.deepcopy(plain)
    broken.unet.middle_block[0].out_layers[3].weight.zero_()
    assert not same(RUNS["inpaint"](broken), expected, wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_controlnet_too(model, controlnet, events, dtype):
    plain, offloaded = (
        load(model, controlnet=controlnet, device="cpu", dtype=dtype, offload=offload, progress=False)
        for offload in (False, True)
    )
    assert same(*(RUNS["inpaint"](pipe) for pipe in (offloaded, plain, in_float32(plain))))
    events.clear()  # at first its fingerprint was taken, too
    RUNS["inpaint"](offloaded)
    assert sum(model is offloaded.controlnet for _, model in events) == 2


def test_and_the_two_text_encoders_of_sdxl(tiny, vocabulary, tmp_path):
    save_diffusers(tmp_path, random_pipeline(as_sdxl(tiny), vocabulary))
    plain, offloaded = (load(tmp_path, device="cpu", offload=offload, progress=False) for offload in (False, True))
    assert same_images(RUNS["inpaint"](offloaded).images, RUNS["inpaint"](plain).images)


def test_one_level_down_everything_brings_what_it_needs(both, exact):
    found = []
    for pipe in (*both, exact):
        known = pipe.encode_image(IMAGE, MASK)
        cond, uncond = pipe.encode_prompts(["a red fox", ""])
        denoise = pipe.denoiser(known, cond, uncond)
        x0 = denoise(schedules.start(known.latents, torch.tensor([2.0, 0.0], dtype=torch.float64)), 2.0)
        with pipe.using(pipe.vae):
            again = pipe.vae.decode(x0.to(pipe.dtype))
        found.append((known.masked_latents, cond.context, x0, pipe.decode(x0), again))
    for plain, offloaded, wide in zip(*found, strict=True):
        assert close(offloaded, plain, FLOAT32 + float((plain.double() - wide).norm() / wide.norm()))


def test_replaying_and_saving_know_no_difference(both, exact, tmp_path):
    plain, offloaded = both
    made = RUNS["inpaint"](plain)
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    made.save(tmp_path / "out.png")
    again = replay(tmp_path / "out.png", offloaded, image=IMAGE).result
    assert same(again, made, RUNS["inpaint"](exact))
    assert RUNS["inpaint"](offloaded).settings == made.settings
    for name, pipe in (("plain", plain), ("offloaded", offloaded)):
        save_diffusers(tmp_path / name, pipe)
    files = [(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("plain", "offloaded")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_threads_share_what_is_there(both, exact):
    plain, offloaded = both
    expected, before = RUNS["inpaint"](plain), homes(offloaded)
    found = []
    threads = [threading.Thread(target=lambda: found.append(RUNS["inpaint"](offloaded))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    wide = RUNS["inpaint"](exact)
    assert all(same(one, expected, wide) for one in found)
    assert homes(offloaded) == before


def test_a_copy_is_offloaded_too(both, exact):
    plain, offloaded = both
    copied = copy.deepcopy(offloaded)
    assert not set(models(copied)) & set(models(offloaded))
    assert same(*(RUNS["inpaint"](pipe) for pipe in (copied, plain, exact)))


# When they are there


def test_they_come_one_after_the_other_and_the_unet_stays_through_all_steps(both, events):
    offloaded = both[1]
    RUNS["inpaint"](offloaded)
    events.clear()  # at first its fingerprint was taken, too
    RUNS["inpaint"](offloaded)
    text, vae, unet = offloaded.text, offloaded.vae, offloaded.unet
    assert events == [(comes, model) for model in (vae, text, unet, vae) for comes in (True, False)]


def test_steps_of_a_soft_mask_keep_the_autoencoder(both, events):
    offloaded = both[1]
    RUNS["soft"](offloaded)
    assert [model for comes, model in events if comes][-3:] == [offloaded.unet, offloaded.vae, offloaded.vae]


def test_a_failed_run_leaves_all_models_offloaded(both, sabotage, substitute):
    offloaded = both[1]
    before = homes(offloaded)
    with pytest.raises(ZeroDivisionError):
        offloaded.inpaint(IMAGE, MASK, "a red fox", on_step=lambda step, x, x0: 1 // 0, **OPTIONS)
    assert homes(offloaded) == before
    moved = offloading._moved

    def half_way(weights, device, dtype):
        yield next(moved(weights, device, dtype))
        raise MemoryError

    sabotage(offloading, "_moved", half_way)
    substitute(Offloading, _is_ready=lambda self, weight: False)
    with pytest.raises(MemoryError):
        RUNS["inpaint"](offloaded)
    assert homes(offloaded) == before
    assert not any(offloaded.offloading._uses.values())


def test_no_graph_is_captured_of_offloaded_models(model, replays):
    """A recording holds the addresses of weights."""
    for offload, count in ((False, 2), (True, 0)):  # UNet, and VAE decoder
        replays.made = 0
        pipe = load(model, device="cpu", offload=offload, progress=False)
        RUNS["inpaint"](pipe)
        assert replays.made == count


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu(model, controlnet, dtype):
    options = {"controlnet": controlnet, "device": "cuda", "progress": False}
    exact = RUNS["inpaint"](load(model, **options, dtype="float32"))
    options["dtype"] = dtype
    plain = load(model, **options)
    plain.graphs = plain.control_graphs = Graphs(False)  # whose kernels may be others
    expected = RUNS["inpaint"](plain)
    del plain
    gc.collect()
    before = torch.cuda.memory_allocated()
    offloaded = load(model, **options, offload=True)
    assert torch.cuda.memory_allocated() == before
    weights, seen = sum(weight.nbytes for weight in offloaded.unet.parameters()), []
    found = offloaded.inpaint(
        IMAGE, MASK, "a red fox", on_step=lambda *_: seen.append(next(offloaded.vae.parameters()).is_cuda), **OPTIONS
    )
    assert same(found, expected, exact)
    assert seen == [False, False]
    assert {weight.device.type for model in models(offloaded) for weight in model.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() - before < weights / 10


# What it gives back


@pytest.fixture(scope="module")
def larger(tiny, vocabulary, tmp_path_factory):
    """A folder of float16 weights, of which those of the UNet are beyond what C's allocator ever keeps."""
    unet = replace(tiny.unet, model_channels=72, channel_mult=(1, 2, 3), num_res_blocks=1)
    folder = tmp_path_factory.mktemp("larger")
    save_diffusers(folder, random_pipeline(replace(small(tiny), unet=unet), vocabulary), torch.float16)
    return folder


def watched(folder, dtype):
    """The UNet's weights, and what is resident in a step and after it: (bytes mapped from its file, of no file)."""
    pipe = load(folder, device="cpu", dtype=dtype, offload=True, progress=False)
    seen, trim = [], getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def look(*_):
        gc.collect()
        trim(0)  # what malloc keeps of freed memory is in use by nobody
        seen.append((mapped(f"{folder.name}/unet/diffusion_pytorch_model.safetensors"), own()))

    for _ in range(2):  # at first, code is loaded
        pipe.inpaint(IMAGE, MASK, "a red fox", steps=1, seed=1, progress=False, on_step=look)
        look()
    return list(pipe.unet.parameters()), seen[-2], seen[-1]


def mapped(name):
    """Resident bytes of the mapped file whose path ends so."""
    sizes, inside = 0, False
    for line in (PROC / "smaps").read_text().splitlines():
        field, *rest = line.split()
        if "-" in field:
            inside = rest[-1].endswith(name)
        elif inside and field == "Rss:":
            sizes += int(rest[0]) * 1024
    return sizes


def own():
    """Resident bytes of no file."""
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def require_given_back(folder):
    weights, (during, _), (after, _) = watched(folder, "float16")
    # those of self-attention lie in a block of their own meanwhile
    assert during >= 0.9 * sum(weight.nbytes for weight in weights)
    assert after <= sum(min(weight.nbytes, EDGES) for weight in weights) < during / 5


def test_pages_of_the_file_are_given_back(larger):
    require_given_back(larger)


def test_pages_that_are_not_released_are_detected(larger, sabotage):
    """Broken on purpose."""
    sabotage(offloading, "release", lambda weight: False)
    with pytest.raises(AssertionError):
        require_given_back(larger)


def require_cast_given_back(folder):
    weights, (mapped_during, own_during), (_, own_after) = watched(folder, "float32")
    total = sum(2 * weight.nbytes for weight in weights)
    assert {weight.dtype for weight in weights} == {torch.float16}
    assert own_during - own_after > 0.9 * total
    assert mapped_during < total / 10


def test_what_was_cast_is_given_back_and_no_page_of_the_file_is_held_beside_it(larger):
    require_cast_given_back(larger)


def test_cast_weights_that_are_not_released_are_detected(larger, sabotage):
    """Broken on purpose."""
    sabotage(Offloading, "_leave", lambda self, weights: None)
    with pytest.raises(AssertionError):
        require_cast_given_back(larger)


def test_nothing_is_kept_beside_weights_that_are_not_there(larger, substitute):
    substitute(forms, ranked=lambda *_: ["tiles"])
    pipe = load(larger, device="cpu", offload=True, progress=False)
    convs = {module.weight for module in pipe.unet.modules() if isinstance(module, nn.Conv2d)}
    held = []
    pipe.inpaint(
        random_image(128, 128),
        np.ones((128, 128), bool),
        "a fox",
        on_step=lambda *_: held.append(kept(convs)),
        **OPTIONS,
    )
    assert held[0] == held[1] > 0
    assert kept(convs) == 0


def kept(weights):
    return sum(weight in _cache for weight in weights)


def by_an_optimizer(model):
    """In place, by one step of gradient descent."""
    weights = list(model.parameters())
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = 0.01 * weight.detach().sign()
    torch.optim.SGD(weights, lr=1.0).step()
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)


def through_data(model):
    for weight in model.parameters():
        weight.data.mul_(1.01)


def through_numpy(model):
    for weight in model.parameters():
        values = weight.detach().float().mul(1.01).to(weight.dtype)
        weight.detach().view(torch.uint8).numpy()[:] = values.view(torch.uint8).numpy()


def by_another_state(model):
    model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()})


def by_other_parameters(model):
    model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)


def once(pipe):
    return pipe.inpaint(IMAGE, MASK, "a red fox", **OPTIONS | {"steps": 1})


WRITERS = [by_an_optimizer, through_data, through_numpy, by_another_state, by_other_parameters]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_to_weights_in_use_is_kept(model, dtype, write):
    """Whether they are mapped from the file while they are used, or cast from it."""
    plain, offloaded = (
        load(model, device="cpu", dtype=dtype, offload=offload, progress=False) for offload in (False, True)
    )
    before = once(offloaded)
    for pipe in (plain, offloaded):
        with pipe.using(pipe.unet), torch.no_grad() if write is not by_an_optimizer else nullcontext():
            write(pipe.unet)
    expected, wide = once(plain), once(in_float32(plain))
    for _ in range(2):
        assert same(once(offloaded), expected, wide)
    assert not same(before, expected, wide)


@pytest.mark.parametrize("write", WRITERS[:-1], ids=lambda write: write.__name__)
def test_what_is_written_to_weights_between_uses_is_kept(model, write):
    plain, offloaded = (load(model, device="cpu", offload=offload, progress=False) for offload in (False, True))
    for pipe in (plain, offloaded):
        with torch.no_grad() if write is not by_an_optimizer else nullcontext():
            write(pipe.unet)
    expected, wide = once(plain), once(in_float32(plain))
    for _ in range(2):
        assert same(once(offloaded), expected, wide)


def test_a_check_that_always_agrees_loses_what_was_written(model, sabotage):
    """Broken on purpose."""
    sabotage(offloading, "unchanged", lambda contents, weights: [True] * len(weights))
    offloaded = load(model, device="cpu", dtype="bfloat16", offload=True, progress=False)
    before = RUNS["inpaint"](offloaded)
    with offloaded.using(offloaded.unet):
        through_data(offloaded.unet)
    wide = RUNS["inpaint"](load(model, device="cpu", dtype="float32", progress=False))
    assert same(RUNS["inpaint"](offloaded), before, wide)


# What is refused, and the command


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_value_is_refused(model, value):
    with pytest.raises(SettingError) as caught:
        load(model, device="cpu", offload=value)
    assert caught.value.code == "SETTING_OFFLOAD"


def test_weights_that_the_dtype_cannot_hold_are_refused_at_once_in_the_same_words(tiny, vocabulary, tmp_path):
    save_diffusers(tmp_path, random_pipeline(small(tiny), vocabulary))
    name = "mid_block.resnets.0.conv1.weight"
    rewrite(
        tmp_path / "unet/diffusion_pytorch_model.safetensors",
        lambda held: held | {name: torch.where(held[name] == held[name].max(), 1e5, held[name])},
    )
    said = []
    for offload in (False, True):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, device="cpu", dtype="float16", offload=offload, progress=False)
        said.append(str(caught.value))
    assert caught.value.code == "CKPT_OVERFLOW"
    assert said[0] == said[1]
    load(tmp_path, device="cpu", dtype="bfloat16", offload=True, progress=False)


def test_the_command_makes_the_same_image(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    Image.fromarray(255 * MASK.astype(np.uint8)).save(tmp_path / "mask.png")
    given = ["inpaint", str(tmp_path / "image.png"), "-m", str(tmp_path / "mask.png"), "-p", "a red circle", "-q"]
    given += ["--model", "demo", "--steps", "1", "-s", "1", "--device", "cpu"]
    for name, more in (("plain", []), ("offloaded", ["--offload"])):
        result = CliRunner().invoke(cli.main, [*given, "-o", str(tmp_path / f"{name}.png"), *more])
        assert result.exit_code == 0, result.output
    assert same_image(*(Image.open(tmp_path / f"{name}.png") for name in ("plain", "offloaded")))
