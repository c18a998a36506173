"""ControlNets without a peer: names and shapes as released, every layout, the steps in which they are asked, errors."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import fill, for_text_to_image, random_pipeline, rewrite_json, save_lightning, single_file, small
from click.testing import CliRunner
from closeness import same_image
from PIL import Image
from safetensors.torch import save_file
from sdinpaint_weights.keymap import controlnet_table_for, inverse, renamed
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, native_state

from sdinpaint import cli
from sdinpaint.checkpoints.control_config import HINT_WIDTHS, controlnet_config
from sdinpaint.checkpoints.diffusers_configs import controlnet_json
from sdinpaint.errors import CheckpointError, ImageError, SettingError
from sdinpaint.families import SD2, SD15, SD15_INPAINT, SDXL
from sdinpaint.images.files import read_settings
from sdinpaint.loading import load, save_diffusers
from sdinpaint.models import ControlNet, ControlNetConfig
from sdinpaint.pipeline.control import inpaint_hint
from sdinpaint.sampling import schedules

HERE = Path("here")
RELEASED = ("control_v11p_sd15_inpaint.cldm", "control_v11p_sd15_inpaint.diffusers", "control_sd15_full_v10.ldm")
RANGE = {"control_scale": 0.7, "control_start": 0.3, "control_end": 0.7}
IMAGE = np.random.default_rng(1).integers(0, 256, (64, 72, 3), dtype=np.uint8)
MASK = np.zeros((64, 72), bool)
MASK[13:45, 22:57] = True


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(config):
    with torch.device("meta"):
        return ControlNet(config)


# Names and shapes


@pytest.mark.parametrize("name", RELEASED)
def test_the_model_is_that_of_the_released_files(inventory, name):
    weights = inventory(name)
    state = native_state(weights, "controlnet", identify(weights.shapes()))
    config = controlnet_config(state.shapes(), {}, SD15_INPAINT.unet, HERE)
    assert config == ControlNetConfig(unet=SD15.unet, hint_widths=HINT_WIDTHS)
    model = on_meta(config)
    check_complete(state, shapes_of(model))
    assert state.shapes() == shapes_of(model)
    assert state.unexpected == ()
    assert len(shapes_of(model)) == 340
    assert sum(weight.numel() for weight in model.parameters()) == 361_279_120


def test_another_model_does_not_fit(inventory):
    weights = inventory(RELEASED[0])
    state = native_state(weights, "controlnet", identify(weights.shapes()))
    good = ControlNetConfig(unet=SD15.unet, hint_widths=HINT_WIDTHS)
    for config, complaint in (
        (replace(good, hint_widths=(16, 32, 96)), "unexpected"),
        (replace(good, hint_widths=(16, 32, 96, 128)), "misshapen"),
        (replace(good, unet=SD15_INPAINT.unet), "input_blocks.0.0.weight: (320, 4, 3, 3) in the file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_complete(state, shapes_of(on_meta(config)))
        assert complaint in caught.value.found


@pytest.mark.parametrize("family", [SD15, SD2, SDXL], ids=lambda family: family.name)
def test_sizes_are_read_off_the_shapes(family):
    config = ControlNetConfig(unet=family.unet, hint_widths=(16, 32, 96, 256))
    assert controlnet_config(shapes_of(on_meta(config)), {}, family.unet, HERE) == config
    assert controlnet_config(shapes_of(on_meta(config)), controlnet_json(config), family.unet, HERE) == config


@pytest.mark.parametrize(
    ("given", "wanted", "words"),
    [
        (SD2, SD15_INPAINT, ("Stable Diffusion 2: text embeddings 1024", "Stable Diffusion 1: text embeddings 768")),
        (SDXL, SD15_INPAINT, ("SDXL: text embeddings 2048", "Stable Diffusion 1: text embeddings 768")),
        (SD15, SDXL, ("Stable Diffusion 1: text embeddings 768", "SDXL: text embeddings 2048")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_one_of_another_family_is_refused_by_name(given, wanted, words):
    shapes = shapes_of(on_meta(ControlNetConfig(unet=given.unet, hint_widths=HINT_WIDTHS)))
    with pytest.raises(CheckpointError) as caught:
        controlnet_config(shapes, {}, wanted.unet, HERE)
    assert caught.value.code == "CKPT_MISMATCH"
    assert words[0] in caught.value.found
    assert words[1] in caught.value.expected


# Small ones


@pytest.fixture(scope="module")
def family(tiny):
    return small(tiny)


@pytest.fixture(scope="module")
def net(family):
    config = ControlNetConfig(unet=replace(family.unet, in_channels=4), hint_widths=(5, 7, 11, 13))
    net = fill(ControlNet(config), 7).eval().requires_grad_(False)
    net.input_hint_block[14].weight.mul_(300)  # an image's trace fades on its way through the hint's block
    return net


@pytest.fixture(scope="module")
def model(family, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    save_diffusers(folder, random_pipeline(family, vocabulary))
    return folder


@pytest.fixture(scope="module")
def plain(model):
    return load(model, device="cpu", progress=False)


def controlled(pipe, net):
    pipe = copy.copy(pipe)
    pipe.controlnet = net
    return pipe


@pytest.fixture(scope="module")
def pipe(plain, net):
    return controlled(plain, net)


@pytest.fixture(scope="module", params=["nine channels", "four channels"])
def either(request, pipe, family, vocabulary, net):
    if request.param == "nine channels":
        return pipe
    return controlled(random_pipeline(for_text_to_image(family), vocabulary), net)


def inpaint(pipe, image=IMAGE, mask=MASK, prompt="a red fox", **options):
    return pipe.inpaint(image, mask, prompt, **{"steps": 3, "seed": 5, "progress": False} | options)


def levels(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


# Files in every layout


def diffusers_names(net):
    state = net.state_dict()
    table = inverse(controlnet_table_for(state))
    return {renamed(name, table): tensor.contiguous() for name, tensor in state.items()}


def write_folder(folder, net):
    folder.mkdir(parents=True)
    save_file(diffusers_names(net), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(controlnet_json(net.config)))


def prefixed(net):
    return {f"control_model.{name}": tensor for name, tensor in net.state_dict().items()}


def write(kind, folder, net, plain):
    match kind:
        case "v1.1 .pth":
            torch.save(prefixed(net), folder / "control.pth")
            return folder / "control.pth"
        case "without prefix":
            save_file(net.state_dict(), folder / "control.safetensors")
            return folder / "control.safetensors"
        case "v1.0, with a whole model":
            save_file(
                {name: tensor.contiguous() for name, tensor in (single_file(plain) | prefixed(net)).items()},
                folder / "control.safetensors",
            )
            return folder / "control.safetensors"
        case "training checkpoint":
            save_lightning(folder / "control.ckpt", prefixed(net))
            return folder / "control.ckpt"
        case "folder":
            write_folder(folder / "control", net)
            return folder / "control"
        case _:
            write_folder(folder / "pipeline/controlnet", net)
            return folder / "pipeline"


KINDS = (
    *("v1.1 .pth", "without prefix", "v1.0, with a whole model", "training checkpoint"),
    *("folder", "folder of a pipeline"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_loads(model, plain, net, tmp_path, kind):
    path = write(kind, tmp_path, net, plain)
    found = load(model, controlnet=path, device="cpu", progress=False).controlnet
    assert found.config == net.config
    assert not found.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_it_comes_in_the_dtype_of_the_others(model, net, tmp_path):
    write_folder(tmp_path / "control", net)
    half = load(model, controlnet=tmp_path / "control", device="cpu", dtype="bfloat16", progress=False)
    assert {weight.dtype for weight in half.controlnet.parameters()} == {torch.bfloat16}
    found = inpaint(half, guidance_scale=2).image
    assert np.array_equal(np.asarray(found)[~MASK], IMAGE[~MASK])


def refused(error, code, call):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def test_a_file_without_one(model):
    error = refused(CheckpointError, "CKPT_NO_COMPONENT", lambda: load(model, controlnet=model, device="cpu"))
    assert "controlnet" in str(error)


def test_one_of_another_width(model, net, tmp_path):
    unet = replace(net.config.unet, context_dim=20)
    write_folder(tmp_path / "control", fill(ControlNet(replace(net.config, unet=unet)), 1))
    error = refused(CheckpointError, "CKPT_MISMATCH", lambda: load(model, controlnet=tmp_path / "control"))
    assert "text embeddings 20 wide" in error.found
    assert "text embeddings 28 wide" in error.expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("controlnet_conditioning_channel_order", "bgr"), ("global_pool_conditions", True), ("flip_sin_to_cos", False)],
)
def test_one_that_computes_otherwise(model, net, tmp_path, name, value):
    write_folder(tmp_path / "control", net)
    rewrite_json(tmp_path / "control/config.json", **{name: value})
    error = refused(CheckpointError, "CKPT_NOT_BUILT", lambda: load(model, controlnet=tmp_path / "control"))
    assert error.found == f"controlnet: {name} is {json.dumps(value)}".replace('"', "'")


def test_a_damaged_one(model, net, tmp_path):
    state = net.state_dict()
    state["zero_convs.3.0.weight"] = state.pop("zero_convs.2.0.weight")[:, :4].contiguous()
    save_file(state, tmp_path / "control.safetensors")
    error = refused(CheckpointError, "CKPT_KEYS", lambda: load(model, controlnet=tmp_path / "control.safetensors"))
    assert "ControlNet: 1 missing, e.g. zero_convs.2.0.weight; 1 misshapen" in error.found


# The steps in which it is asked


class Asked(ControlNet):
    """Remembers what it was asked."""

    def forward(self, x, features, t, context, vector=None):
        assert len(x) == len(features) == len(t) == len(context)
        self.asked.append((x, features))
        return super().forward(x, features, t, context, vector)

    def hint_features(self, hint):
        made = super().hint_features(hint)
        self.hints.append((hint, made))
        return made


@pytest.fixture
def asked(net):
    recording = copy.deepcopy(net)
    recording.__class__, recording.asked, recording.hints = Asked, [], []
    return recording


@pytest.mark.parametrize("count", [1, 3, 10, 50])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.2, 0.6), (0.5, 0.51), (0, 0.05), (0.95, 1), (0.3, 0.3001)])
def test_a_controlnet_is_active_in_the_steps_of_its_range(count, start, end):
    sigmas = torch.linspace(14, 0.03, count + 1, dtype=torch.float64)
    for i in range(count):
        expected = not (i / count < start or (i + 1) / count > end)  # as diffusers says it
        between = (float(sigmas[i]) + float(sigmas[i + 1])) / 2
        for sigma in (float(sigmas[i]), between):
            assert schedules.is_between(sigmas, sigma, start, end) == expected


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 10),
        (RANGE, 4),
        ({"control_start": 0.5}, 5),
        ({"control_end": 0.05}, 0),
        ({"strength": 0.6, **RANGE}, 2),
        ({"control_scale": 0}, 0),
        ({"guidance_scale": 1}, 10),
    ],
    ids=str,
)
def test_the_controlnet_runs_in_these_steps_alone(either, asked, options, steps):
    inpaint(controlled(either, asked), [IMAGE] * 2, steps=10, **options)
    assert len(asked.asked) == steps
    assert len(asked.hints) == min(steps, 1)
    for x, features in asked.asked:
        copies = 1 if "guidance_scale" in options else 2
        assert x.shape == (2 * copies, 4, 8, 9)
        assert torch.equal(features, torch.cat([asked.hints[0][1]] * copies))


def test_the_hint(pipe, asked):
    image, mask = IMAGE[:, :70], MASK[:, :70]
    inpaint(controlled(pipe, asked), image, mask)
    ((hint, _),) = asked.hints
    assert hint.shape == (1, 3, 64, 72)
    found = hint[0, :, :, :70].permute(1, 2, 0).numpy()
    assert np.abs(found[~mask] - image[~mask] / 255).max() < 1e-6
    assert (found[mask] == -1).all()
    assert hint[0, :, :, 70].equal(hint[0, :, :, 68])  # reflected as the image is


def test_a_hint_of_ones_own_is_not_masked(pipe, asked):
    own = np.random.default_rng(2).integers(0, 256, IMAGE.shape, dtype=np.uint8)
    tensor = torch.from_numpy(own).permute(2, 0, 1) / 127.5 - 1
    results = [inpaint(controlled(pipe, asked), control_image=one).image for one in (own, Image.fromarray(own), tensor)]
    for hint, _ in asked.hints:
        assert np.abs(hint[0].permute(1, 2, 0).numpy() - own / 255).max() < 1e-6
    assert np.array_equal(results[0], results[1])
    assert levels(results[0], results[2]) <= 1
    assert levels(results[0], inpaint(pipe).image) > 1


def test_inpaint_hint():
    image = torch.tensor([-1.0, 0.0, 1.0, 0.5]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    hole = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    assert inpaint_hint(image, hole)[0, 2].flatten().tolist() == [0, -1, 1, -1]


# Images


def test_a_new_one_changes_nothing(either, net):
    untrained = copy.deepcopy(net)
    for layer in (*untrained.zero_convs, untrained.middle_block_out):
        layer[0].weight.zero_(), layer[0].bias.zero_()
    without = controlled(either, None)
    assert same_image(inpaint(controlled(either, untrained)).image, inpaint(without).image)
    assert levels(inpaint(either).image, inpaint(without).image) > 1


def test_scale_0_and_an_empty_range_change_nothing(either):
    expected = inpaint(controlled(either, None)).image
    for options in ({"control_scale": 0}, {"control_end": 0.01}):
        assert np.array_equal(inpaint(either, **options).image, expected)


def test_what_lies_under_the_mask_is_not_seen(pipe):
    other = np.where(MASK[..., None], 255 - IMAGE, IMAGE)
    assert np.array_equal(inpaint(pipe).image, inpaint(pipe, other).image)


def test_known_pixels_stay_bit_for_bit(either):
    assert np.array_equal(np.asarray(inpaint(either).image)[~MASK], IMAGE[~MASK])


def test_an_item_of_a_batch_is_its_single_run(either):
    images = [IMAGE, 255 - IMAGE, IMAGE[:, :67]]
    masks = [MASK, MASK, MASK[:, :67]]
    hints = [255 - image for image in images]
    together, listed = (
        inpaint(either, images, masks, control_image=hints, seed=[1, 2, 3], batch_size=batch_size, **RANGE).images
        for batch_size in (None, 1)
    )
    for i, image in enumerate(images):
        alone = inpaint(either, image, masks[i], control_image=hints[i], seed=i + 1, **RANGE).image
        assert levels(together[i], alone) <= 1
        assert same_image(listed[i], alone)


def test_settings_replay_the_run(pipe):
    first = inpaint(pipe, **RANGE)
    assert RANGE.items() <= first.settings.items()
    assert np.array_equal(pipe.inpaint(IMAGE, MASK, **first.settings, progress=False).image, first.image)


def test_without_one_no_settings_of_it(plain):
    assert not any(name.startswith("control") for name in inpaint(plain).settings)


def test_vary_does_not_ask_it(pipe, asked):
    controlled(pipe, asked).vary(IMAGE, "a red fox", steps=2, seed=1, progress=False)
    assert asked.asked == asked.hints == []


# What is refused


@pytest.mark.parametrize(
    "options", [{"control_scale": 0.5}, {"control_start": 0.1}, {"control_end": 0.9}, {"control_image": IMAGE}], ids=str
)
def test_settings_for_one_that_is_not_there(plain, options):
    error = refused(SettingError, "SETTING_NO_CONTROLNET", lambda: inpaint(plain, **options))
    assert error.subject == next(iter(options))
    assert "controlnet=PATH" in error.hint


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("control_scale", [float("nan"), float("inf"), None, "1", True]),
        ("control_start", [-0.1, 1.1, None, 1.0]),
        ("control_end", [-0.1, 1.1, None]),
    ],
)
def test_settings_out_of_bounds(pipe, name, values):
    for value in values:
        error = refused(SettingError, f"SETTING_{name.upper()}", lambda: inpaint(pipe, **{name: value}))  # noqa: B023
        assert error.subject == name


def test_a_range_the_wrong_way_round(pipe):
    call = refused(SettingError, "SETTING_CONTROL_START", lambda: inpaint(pipe, control_start=0.6, control_end=0.4))
    assert "0.6, and control_end is 0.4" in call.found


def test_a_hint_that_is_no_image_of_that_size(pipe):
    error = refused(ImageError, "IMAGE_CONTROL_SIZE", lambda: inpaint(pipe, control_image=IMAGE[:, :64]))
    assert error.found == "64 rows, 64 columns"
    assert error.expected == "64 rows, 72 columns"
    assert refused(ImageError, "IMAGE_TYPE", lambda: inpaint(pipe, control_image=7)).subject == "control_image"
    refused(SettingError, "SETTING_COUNTS", lambda: inpaint(pipe, [IMAGE] * 3, control_image=[IMAGE] * 2))


def test_on_the_command_line(model, net, tmp_path):
    """The ControlNet is loaded and asked as it is from Python."""
    write_folder(tmp_path / "control", net)
    image, mask, own, out = (tmp_path / f"{name}.png" for name in ("image", "mask", "own", "out"))
    Image.fromarray(IMAGE).save(image), Image.fromarray(MASK).save(mask), Image.fromarray(255 - IMAGE).save(own)
    given = [*("inpaint", image, "--mask", mask, "--prompt", "a red fox", "--model", model, "--out", out)]
    given += ["--steps", 10, "--seed", 5, "--device", "cpu", "--control-image", own]
    given += [word for name, value in RANGE.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = CliRunner().invoke(cli.main, [str(word) for word in given])
    assert done.exit_code == 3
    assert "--controlnet PATH" in done.output
    assert not out.exists()
    done = CliRunner().invoke(cli.main, [str(word) for word in [*given, "--controlnet", tmp_path / "control"]])
    assert done.exit_code == 0, done.output
    pipe = load(model, controlnet=tmp_path / "control", device="cpu", progress=False)
    expected = inpaint(pipe, control_image=255 - IMAGE, steps=10, **RANGE).image
    assert same_image(Image.open(out), expected)
    assert not same_image(Image.open(out), inpaint(pipe, steps=10, **RANGE).image)
    assert RANGE.items() <= read_settings(out).items()
