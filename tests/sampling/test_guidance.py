"""Guidance: its formula, its rescaling against diffusers, the steps in which it is on, and conditions of any length."""

from __future__ import annotations

import pickle

import pytest
import torch
from closeness import close

from sdinpaint.errors import SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.sampling import Conditioning, Denoiser, Guidance, guide, rescale_guidance, schedules, stack

TRAINED = schedules.train_sigmas(SD15_INPAINT.schedule)
SIGMAS = schedules.leading(TRAINED, 10, end=0.0)


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


UNCOND, COND = draw(0, 3, 4, 6, 5), 2 * draw(1, 3, 4, 6, 5) + 0.3


def attention_unet(x, t, context, vector, control):
    """One attention from latents to context: what a longer context could change."""
    queries = x[:, :4].flatten(2).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(queries, context, context)
    return out.transpose(1, 2).reshape(len(context), 4, *x.shape[2:])


def counted(sizes):
    def unet(x, t, context, vector, control):
        sizes.append(len(context))
        return attention_unet(x, t, context, vector, control)

    return unet


@pytest.mark.peer
@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(phi):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided = guide(UNCOND, COND, 7.5)
    assert close(rescale_guidance(COND, guided, phi), rescale_noise_cfg(guided, COND, guidance_rescale=phi))
    guider = Guidance(7.5, rescale=phi)
    assert close(guider(UNCOND, COND, 7.5), rescale_noise_cfg(guided, COND, guidance_rescale=phi))


def test_rescaling_fully_gives_each_image_the_deviation_of_the_unguided_prediction():
    rescaled = rescale_guidance(COND, guide(UNCOND, COND, 12.0), 1.0)
    assert torch.allclose(rescaled.flatten(1).std(1), COND.flatten(1).std(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    [
        (0, 1, range(10)),
        (0.2, 0.7, range(2, 7)),
        (0, 0.5, range(5)),
        (0.55, 1, range(6, 10)),
        (0.25, 0.75, range(3, 7)),
    ],
)
def test_a_step_is_guided_within_its_share_of_the_run(start, end, guided):
    sizes = []
    text = Conditioning(draw(2, 1, 5, 4)), Conditioning(draw(3, 1, 5, 4))
    options = {"guidance_start": start, "guidance_end": end, "sigmas": SIGMAS}
    denoise = Denoiser(counted(sizes), TRAINED, "eps", *text, **options)
    each = [Denoiser(attention_unet, TRAINED, "eps", text[0], uncond) for uncond in (None, text[1])]
    x = draw(4, 2, 4, 6, 5)
    for step, sigma in enumerate(SIGMAS[:-1].tolist()):
        assert torch.equal(denoise(x, sigma), each[step in guided](x, sigma))
    assert sizes == [4 if step in guided else 2 for step in range(10)]


def test_a_second_evaluation_within_a_step_is_guided_as_the_first():
    guidance = Guidance(start=0.5)
    first, second = SIGMAS[5:7].tolist()
    assert guidance.is_on(first, SIGMAS)
    assert guidance.is_on((first + second) / 2, SIGMAS)
    assert not guidance.is_on(float(SIGMAS[4]) * 0.999, SIGMAS)


@pytest.mark.parametrize(("short", "long"), [(3, 3), (3, 6), (4, 6), (1, 5)])
def test_conditions_of_any_lengths_meet(short, long):
    """Repeated keys change no attention: each half is what it is alone."""
    cond, uncond = Conditioning(draw(5, 1, short, 4)), Conditioning(draw(6, 1, long, 4))
    x = draw(7, 2, 4, 6, 5)
    alone = [Denoiser(attention_unet, TRAINED, "eps", one)(x, 2.0) for one in (uncond, cond)]
    assert close(Denoiser(attention_unet, TRAINED, "eps", cond, uncond)(x, 2.0), guide(*alone, 7.5))
    assert close(Denoiser(attention_unet, TRAINED, "eps", uncond, cond)(x, 2.0), guide(*alone[::-1], 7.5))


def test_stacked_conditions_are_one_after_the_other():
    both = stack([Conditioning(draw(8, 2, 3, 4), draw(9, 2, 5)), Conditioning(draw(10, 1, 2, 4), draw(11, 1, 5))])
    assert both.context.shape == (3, 6, 4)
    assert torch.equal(both.context[:2, :3], both.context[:2, 3:])
    assert torch.equal(both.vector, torch.cat([draw(9, 2, 5), draw(11, 1, 5)]))


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("SETTING_GUIDANCE", {"guidance_scale": float("inf")}),
        ("SETTING_GUIDANCE_RESCALE", {"guidance_rescale": 1.5}),
        ("SETTING_GUIDANCE_START", {"guidance_start": -0.1}),
        ("SETTING_GUIDANCE_END", {"guidance_end": 2}),
        ("SETTING_GUIDANCE_START", {"guidance_start": 0.5, "guidance_end": 0.5}),
    ],
)
def test_guidance_out_of_bounds_is_refused(pipe, code, options):
    text = Conditioning(draw(2, 1, 5, 4))
    with pytest.raises(SettingError) as caught:
        Denoiser(attention_unet, TRAINED, "eps", text, text, **options)
    assert caught.value.code == code
    with pytest.raises(SettingError) as caught:
        pipe.vary(torch.zeros(1, 3, 64, 64), "a fox", progress=False, **options)
    assert caught.value.code == code


def test_an_interval_needs_the_noise_levels_of_the_run():
    text = Conditioning(draw(2, 1, 5, 4))
    denoise = Denoiser(attention_unet, TRAINED, "eps", text, text, guidance_end=0.5)
    with pytest.raises(SettingError, match="sigmas=") as caught:
        denoise(draw(4, 2, 4, 6, 5), 2.0)
    assert caught.value.code == "SETTING_GUIDANCE_START"


def test_the_settings_of_a_run_reach_the_denoiser(pipe, unet_batches):
    image, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    run = {"steps": 4, "seed": 3, "progress": False, "guidance_rescale": 0.5}
    result = pipe.inpaint(image, mask, "a fox", guidance_start=0.25, guidance_end=0.75, **run)
    assert unet_batches == [1, 2, 2, 1]
    assert result.settings["guidance_rescale"] == 0.5
    assert (result.settings["guidance_start"], result.settings["guidance_end"]) == (0.25, 0.75)
    assert result.again().image == result.image
    assert pipe.inpaint(image, mask, "a fox", **run).image != result.image


def test_sources_go_through_stacking_slicing_and_processes():
    both = Conditioning(draw(18, 2, 3, 4), None, ((draw(19, 2, 2, 4), 0.5),))
    again = pickle.loads(pickle.dumps(both))
    assert torch.equal(again.others[0][0], both.others[0][0])
    stacked = stack([both[:1], both[1:]])
    assert torch.equal(stacked.others[0][0], both.others[0][0])
    assert stacked.others[0][1] == 0.5
    with pytest.raises(SettingError, match="weights of one source"):
        stack([both, Conditioning(both.context, None, ((both.context, 0.25),))])


def test_a_condition_without_a_source_is_not_changed_by_that_of_the_other():
    """Its own half of the batch gets a source of zeros, to which attention without a bias gives zeros."""
    with_source = Conditioning(draw(18, 1, 3, 4), None, ((draw(19, 1, 2, 4), 0.5),))
    alone = Conditioning(draw(20, 1, 3, 4))
    x = draw(21, 2, 4, 6, 5)

    def unet(x, t, context, vector, control):
        sources = [(context, 1.0)] if isinstance(context, torch.Tensor) else context
        return sum(weight * attention_unet(x, t, source, vector, control) for source, weight in sources)

    both = Denoiser(unet, TRAINED, "eps", with_source, alone)(x, 2.0)
    expected = guide(*(Denoiser(unet, TRAINED, "eps", one)(x, 2.0) for one in (alone, with_source)), 7.5)
    assert close(both, expected)
