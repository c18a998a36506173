"""ControlNets against diffusers' over the same random weights: the model, and whole runs; each guard seen to fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from painting import unrounded
from peers import fill, ours, pipeline_twin
from PIL import Image
from torch import nn

from sdinpaint.checkpoints.control_config import HINT_WIDTHS
from sdinpaint.checkpoints.diffusers_configs import controlnet_json
from sdinpaint.families import SD15
from sdinpaint.loading import load
from sdinpaint.models import ControlNet, ControlNetConfig
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.pipeline import patch_sampling
from sdinpaint.pipeline.control import Control

# numpy 2 says it of diffusers
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

TOLERANCE = 1e-4
HINT, RESIDUAL = 1000.0, 0.3
"""Factors of the last layers: activations shrink on the way through the hint's block, and an image has to count."""
TIMES = (1.0, 413.75, 999.0)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def controlnet_twin(config):
    """diffusers' ControlNet with random weights; its zero convolutions are not zero either."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        model = ControlNetModel.from_config(controlnet_json(config))
    fill(model.to_empty(device="cpu").eval(), 4)
    with torch.no_grad():
        model.controlnet_cond_embedding.conv_out.weight.mul_(HINT)
        for layer in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            layer.weight.mul_(RESIDUAL)
    return model


def pair(config):
    theirs = controlnet_twin(config)
    return theirs, ours(ControlNet, config, "controlnet", theirs)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def config(tiny):
    return ControlNetConfig(unet=replace(tiny.unet, in_channels=4), hint_widths=(5, 7, 11, 13))


@pytest.fixture(scope="module")
def models(config):
    return pair(config)


def difference(theirs, mine, height=6, width=10):
    unet = mine.config.unet
    x, context = draw(1, len(TIMES), 4, height, width), draw(2, len(TIMES), 11, unet.context_dim)
    hint = torch.rand(len(TIMES), 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(3))
    hint[:, :, : 4 * height] = -1
    t = torch.tensor(TIMES)
    down, middle = theirs(x, t, context, hint, return_dict=False)
    found = mine(x, mine.hint_features(hint), t, context)
    return largest(found, [*down, middle])


def largest(found, expected):
    """The largest absolute difference, of residuals that are of a size at which it means something."""
    assert all(0.02 < float(one.std()) < 20 for one in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_small_model(models):
    assert difference(*models) <= TOLERANCE


def test_full_width():
    """The released model's own sizes, once."""
    config = ControlNetConfig(unet=SD15.unet, hint_widths=HINT_WIDTHS)
    theirs, mine = pair(config)
    assert sum(weight.numel() for weight in mine.parameters()) == 361_279_120
    # 361 M numbers deep, float32 differs by 0.4 to 1.0 times the tolerance from CPU to CPU
    assert difference(theirs, mine, 8, 8) <= 2 * TOLERANCE


def test_a_small_one_for_sdxl(config):
    """It is told the image's size, its heads and projections are others, and the first level has no attention."""
    unet = replace(
        config.unet,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 1, 2),
        middle_depth=2,
        num_heads=None,
        head_dim=8,
        linear_projection=True,
        vector_dim=20 + 6 * 256,
    )
    theirs, mine = pair(replace(config, unet=unet))
    x, context, pooled = draw(1, 2, 4, 6, 10), draw(2, 2, 11, unet.context_dim), draw(3, 2, 20)
    ids = torch.tensor([[64, 72, 0, 8, 128, 512], [1024, 768, 16, 0, 64, 64]])
    t, hint = torch.tensor([7.0, 907.5]), draw(4, 2, 3, 48, 80)
    told = {"text_embeds": pooled, "time_ids": ids}
    *down, middle = theirs(x, t, context, hint, added_cond_kwargs=told, return_dict=False)
    vector = torch.cat([pooled, timestep_embedding(ids.flatten(), 256).view(2, -1)], dim=1)
    found = mine(x, mine.hint_features(hint), t, context, vector)
    assert largest(found, [*down[0], middle]) <= TOLERANCE
    assert largest(mine(x, mine.hint_features(hint), t, context, 0 * vector), [*down[0], middle]) > 10 * TOLERANCE


# Broken on purpose: the model


def hint_after_its_zero_convolution(net):
    forward = net.forward

    def broken(x, features, *rest):
        first, *others = forward(x, 0 * features, *rest)
        return [first + features, *others]

    net.forward = broken


def without(index):
    return lambda net: net.input_hint_block.__setitem__(index, nn.Identity())


def swapped(net):
    net.zero_convs[1], net.zero_convs[2] = net.zero_convs[2], net.zero_convs[1]


def no_last_convolution(net):
    net.middle_block_out = nn.Identity()


BROKEN_MODELS = {
    "no SiLU behind the hint's first convolution": without(1),
    "no SiLU before the hint's last convolution": without(13),
    "a SiLU at the end of the hint": lambda net: net.input_hint_block.append(nn.SiLU()),
    "hint after its zero convolution": hint_after_its_zero_convolution,
    "zero convolutions exchanged": swapped,
    "no convolution behind the middle": no_last_convolution,
    "no SiLU in the time's embedding": lambda net: net.time_embed.__setitem__(1, nn.Identity()),
}


@pytest.mark.parametrize("broken", list(BROKEN_MODELS))
def test_a_broken_model_is_seen(models, broken):
    theirs, mine = models
    mine = copy.deepcopy(mine)
    BROKEN_MODELS[broken](mine)
    assert difference(theirs, mine) > 10 * TOLERANCE


# Whole runs: the image before it is rounded

PROMPT, NEGATIVE = "a red fox on the a", "a blue cube"
STEPS, RUN_TOLERANCE = 10, 3e-4
RANGE = {"control_scale": 0.7, "control_start": 0.2, "control_end": 0.6}


def image_and_mask(height=64, width=72):
    rows, columns = np.mgrid[:height, :width] / 64
    waves = [0.5 + 0.4 * np.sin(5 * rows + 3 * columns * shift + shift) for shift in range(3)]
    mask = np.zeros((height, width), np.uint8)
    mask[13:45, 22:57] = 255
    return Image.fromarray((255 * np.stack(waves, -1)).astype(np.uint8)), Image.fromarray(mask)


def hint():
    """Make the hint as the model card of control_v11p_sd15_inpaint does."""
    image, mask = image_and_mask()
    values = np.asarray(image).astype(np.float32) / 255
    values[np.asarray(mask).astype(np.float32) / 255 > 0.5] = -1
    return torch.from_numpy(values).permute(2, 0, 1)[None]


@pytest.fixture(scope="module", params=[9, 4], ids=["nine channels", "four channels"])
def pipes(request, tiny, models, vocabulary, tmp_path_factory):
    """diffusers' pipeline, and ours as loaded from the two folders that diffusers saved."""
    from diffusers import StableDiffusionControlNetInpaintPipeline

    folder = tmp_path_factory.mktemp("pipes")
    vocabulary.save(folder / "vocabulary")
    family = replace(tiny, unet=replace(tiny.unet, in_channels=request.param))
    plain = pipeline_twin(family, folder / "vocabulary")
    with torch.no_grad():
        plain.vae.decoder.conv_out.weight.mul_(0.25)  # so that few pixels are clamped to black or white
    plain.save_pretrained(folder / "pipeline")
    models[0].save_pretrained(folder / "controlnet")
    theirs = StableDiffusionControlNetInpaintPipeline(
        **plain.components, controlnet=models[0], requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    mine = load(folder / "pipeline", controlnet=folder / "controlnet", device="cpu", progress=False)
    assert mine.controlnet.config == models[1].config
    return theirs, mine


def run_theirs(theirs, strength=1.0, guidance_scale=7.5, control_image=None, **options):
    names = {"control_scale": "controlnet_conditioning_scale"}
    names |= {name: name.replace("control", "control_guidance") for name in ("control_start", "control_end")}
    image, mask = image_and_mask()
    return theirs(
        PROMPT,
        image,
        mask,
        hint() if control_image is None else control_image,
        negative_prompt=NEGATIVE,
        height=image.height,
        width=image.width,
        num_inference_steps=STEPS,
        strength=strength,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **{names[name]: value for name, value in options.items()},
    ).images


def run_ours(mine, **options):
    """Return the image in [0, 1] before it is rounded to 8 bits."""
    options = {"steps": STEPS, "seed": 7, "cover": "nearest", "progress": False, **options}  # as diffusers has it
    with unrounded() as decoded:
        mine.inpaint(*image_and_mask(), PROMPT, NEGATIVE, **options)
    return decoded[0]


@pytest.fixture(scope="module")
def expected(pipes):
    """Return what diffusers makes of the same options, which runs once for each."""
    made = {}

    def run(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = run_theirs(pipes[0], **options)
            assert made[key].std() > 0.05
            assert ((made[key] > 0) & (made[key] < 1)).float().mean() > 0.9
        return made[key]

    return run


@pytest.mark.parametrize(
    "options", [{"control_scale": 1.0}, RANGE, {"strength": 0.6, **RANGE}, {"guidance_scale": 1.0, **RANGE}], ids=str
)
def test_runs(pipes, expected, options):
    assert (run_ours(pipes[1], **options) - expected(**options)).abs().max() <= RUN_TOLERANCE


def test_a_hint_of_ones_own(pipes):
    theirs, mine = pipes
    values = np.random.default_rng(1).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    tensor = torch.from_numpy(values).permute(2, 0, 1)[None] / 255
    found = run_ours(mine, control_image=values, **RANGE)
    assert (found - run_theirs(theirs, control_image=tensor, **RANGE)).abs().max() <= RUN_TOLERANCE
    assert (found - run_ours(mine, **RANGE)).abs().max() > 10 * RUN_TOLERANCE


# Broken on purpose: the run


def another_hint(change):
    return lambda sabotage: sabotage(patch_sampling, "inpaint_hint", change)


def bound(**changes):
    """Bind the ControlNet otherwise: change(its option, the sigmas) -> the option."""

    def apply(sabotage):
        def build(net, hint, sigmas, **options):
            changed = {name: change(options[name]) for name, change in changes.items()}
            return Control(net, hint, sigmas, **{**options, **changed})

        sabotage(patch_sampling, "Control", build)

    return apply


BROKEN_RUNS = {
    "0 where it is repainted": another_hint(lambda image, hole: (image / 2 + 0.5) * (hole < 0.5)),
    "the whole image": another_hint(lambda image, hole: image / 2 + 0.5),
    "-1 to 1": another_hint(lambda image, hole: torch.where(hole >= 0.5, -1.0, image)),
    "-1 where it is kept": another_hint(lambda image, hole: torch.where(hole < 0.5, -1.0, image / 2 + 0.5)),
    "from one step earlier": bound(start=lambda start: start - 1 / STEPS),
    "from one step later": bound(start=lambda start: start + 1 / STEPS),
    "to one step earlier": bound(end=lambda end: end - 1 / STEPS),
    "to one step later": bound(end=lambda end: end + 1 / STEPS),
    "all steps": bound(start=lambda _: 0.0, end=lambda _: 1.0),
    "scale twice": bound(scale=lambda scale: scale**2),
    "no ControlNet": bound(scale=lambda _: 0),
}


@pytest.mark.parametrize("pipes", [9], indirect=True)
@pytest.mark.parametrize("broken", list(BROKEN_RUNS))
def test_a_broken_run_is_seen(pipes, expected, broken, sabotage):
    right = expected(**RANGE)
    BROKEN_RUNS[broken](sabotage)
    assert (run_ours(pipes[1], **RANGE) - right).abs().max() > 2 * RUN_TOLERANCE
