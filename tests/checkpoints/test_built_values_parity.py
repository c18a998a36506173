"""Values that the released models do not have, against diffusers and transformers over the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import as_sdxl, small
from peers import fill, ours, text_twin, unet_twin, vae_twin

from sdinpaint.checkpoints.diffusers_configs import controlnet_json, diffusers_configs
from sdinpaint.families import SD15, ControlNetConfig
from sdinpaint.models import VAE, CLIPText, ControlNet, UNet
from sdinpaint.models.prepared_unet import timestep_embedding
from sdinpaint.sampling import find_sampler, schedule, schedules

pytestmark = pytest.mark.peer

TOLERANCE = 2e-5
TIMES = torch.tensor([1.0, 413.75, 999.0])
MEAN, STD = (0.1, -0.2, 0.3, 0.05), (0.9, 1.1, 0.8, 1.2)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def difference(theirs, mine):
    """Return the largest difference, in standard deviations; NaN stays NaN."""
    assert 0.05 < float(theirs.std()) < 50
    return float((theirs - mine).abs().max()) / max(1.0, float(theirs.std()))


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


UNETS = [{"freq_shift": 1}, {"freq_shift": 0.5}, {"norm_eps": 0.1}]


@pytest.mark.parametrize("own", UNETS)
def test_unet(tiny, own):
    family = replace(small(tiny), unet=replace(small(tiny).unet, **own))
    theirs = fill(unet_twin(diffusers_configs(family)["unet/config.json"]), 1)
    inputs = draw(1, 3, 9, 6, 10), TIMES, draw(2, 3, 11, family.unet.context_dim)
    expected = theirs(*inputs).sample
    assert difference(expected, ours(UNet, family.unet, "unet", theirs)(*inputs)) < TOLERANCE
    released = ours(UNet, small(tiny).unet, "unet", theirs)
    assert difference(expected, released(*inputs)) > 100 * TOLERANCE


def test_sizes_of_sdxl_are_shifted_too(tiny):
    """diffusers embeds time and sizes by the same settings of the UNet."""
    family = as_sdxl(small(tiny))
    theirs = fill(unet_twin(diffusers_configs(family)["unet/config.json"] | {"freq_shift": 1}), 1)
    numbers = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0])
    assert difference(theirs.add_time_proj(numbers), timestep_embedding(numbers, 14, 1)) < TOLERANCE


@pytest.mark.parametrize("own", UNETS)
def test_controlnet(tiny, own):
    from diffusers import ControlNetModel

    config = ControlNetConfig(unet=replace(small(tiny).unet, in_channels=4, **own), hint_widths=(6, 8, 10, 12))
    with torch.device("meta"):
        model = ControlNetModel.from_config(controlnet_json(config))
    theirs = fill(model.to_empty(device="cpu").eval(), 4)
    theirs.controlnet_cond_embedding.conv_out.weight.mul_(1000)
    mine = ours(ControlNet, config, "controlnet", theirs)
    x, context, hint = draw(1, 3, 4, 8, 8), draw(2, 3, 11, config.unet.context_dim), draw(3, 3, 3, 64, 64)
    expected = theirs(x, TIMES, context, hint, return_dict=False)
    found = mine(x, mine.hint_features(hint), TIMES, context)
    assert difference(expected[1], found[-1]) < TOLERANCE
    for one, other in zip(expected[0], found, strict=False):
        assert difference(one, other) < TOLERANCE


def test_statistics_of_latents(tiny):
    """They are applied as in diffusers' pipelines (pipeline_stable_diffusion_xl_img2img.py); its VAE does not."""
    config = replace(small(tiny).vae, latents_mean=MEAN, latents_std=STD)
    table = diffusers_configs(replace(small(tiny), vae=config))["vae/config.json"]
    theirs = fill(vae_twin(table), 2)
    mine = ours(VAE, config, "vae", theirs)
    mean, std = (torch.tensor(table[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    image, latents, factor = draw(3, 2, 3, 40, 64), draw(4, 2, 4, 6, 10), table["scaling_factor"]
    posterior = theirs.encode(image).latent_dist
    found, spread = mine.posterior(image)
    assert difference((posterior.mean - mean) * factor / std, found) < TOLERANCE
    assert difference(posterior.std * factor / std, spread) < TOLERANCE
    assert difference(theirs.decode(latents * std / factor + mean).sample, mine.decode(latents)) < TOLERANCE


@pytest.mark.parametrize("own", [{"norm_eps": 0.1}, {"skip_last": 1}])
def test_text(tiny, own):
    text = small(tiny).text
    configs = [diffusers_configs(replace(small(tiny), text=one)) for one in (text, replace(text, **own))]
    whole, table = (config["text_encoder/config.json"] for config in configs)
    weights = fill(text_twin(whole), 3)
    theirs = text_twin(table).eval()
    theirs.load_state_dict(weights.state_dict(), strict=False)  # as transformers loads a file with more layers
    mine = ours(CLIPText, replace(text, **own), "text_encoder", weights)
    ids = torch.randint(text.vocab_size, (2, 77), generator=torch.Generator().manual_seed(5))
    expected = theirs(ids).last_hidden_state
    assert difference(expected, mine(ids)) < TOLERANCE
    assert difference(expected, weights(ids).last_hidden_state) > 100 * TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(("clip", "one"), [(None, True), (0.3, False), (1.0, True)])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim(eta, clip, one, prediction):
    """With clip_sample and set_alpha_to_one, the direction of a step is that of the prediction without the clip."""
    from diffusers import DDIMScheduler

    config = replace(SD15.schedule, clip_range=clip, end_at_zero=one, prediction=prediction)
    table = diffusers_configs(replace(SD15, schedule=config))["scheduler/scheduler_config.json"]
    theirs = DDIMScheduler.from_config(table)
    theirs.set_timesteps(7)
    x, generator = draw(1, 2, 4, 6, 8).double(), torch.Generator().manual_seed(2)
    drawn = torch.Generator().manual_seed(2)
    trained = schedules.train_sigmas(config)

    def output(x, t):
        return torch.tanh(1.5 * x + 0.001 * float(t)) - 0.2

    def denoise(x, sigma):
        scaled = x / (1 + sigma**2) ** 0.5
        raw = output(scaled, schedules.timestep(trained, sigma))
        alpha = (1 + sigma**2) ** -0.5
        return x - sigma * raw if prediction == "eps" else alpha * scaled - sigma * alpha * raw

    sampler, sigmas = find_sampler("ddim"), schedule("ddim", None, config, 7)
    noise = lambda x: torch.randn(x.shape, generator=drawn, dtype=x.dtype)  # noqa: E731
    start = schedules.start(x, sigmas)
    found = sampler.run(denoise, start, sigmas, eta=eta, noise=noise, **sampler.options(config))
    for t in theirs.timesteps:
        x = theirs.step(output(x, t), t, x, eta=eta, generator=generator).prev_sample
    assert difference(x, schedules.finish(found, sigmas)) < TOLERANCE
    assert sampler.options(replace(config, clip_range=None)) == {}
    assert find_sampler("euler").options(config) == {}
