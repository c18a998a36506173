from __future__ import annotations

import math

import pytest
import torch
from closeness import close

from sdinpaint.errors import SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.sampling import (
    SAMPLERS,
    Conditioning,
    Denoiser,
    Known,
    blend_known,
    find_spacing,
    restore_known,
    samplers,
    schedule,
    schedules,
)

# diffusers under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIG = SD15_INPAINT.schedule
TRAINED = schedules.train_sigmas(CONFIG)
B, H, W = 3, 4, 5


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def text(seed, batch=B, width=7, vector=False):
    return Conditioning(draw(seed, batch, 6, width), draw(seed + 50, batch, 9) if vector else None)


def box_mask(batch=B):
    mask = torch.zeros(batch, 1, H, W)
    mask[:, :, 1:3, 2:] = 1
    return mask


class StubUNet:
    """eps that mixes every channel, t, context and vector, and remembers its inputs."""

    def __init__(self):
        self.inputs = []

    def __call__(self, x, t, context, vector=None, control=None):
        self.inputs.append((x, t, context, vector))
        told = context.mean((1, 2)) + (0 if vector is None else vector.mean(1)) + torch.sin(t / 150).to(x.dtype)
        mixed = x[:, :4] + 0.2 * x[:, :4].roll(1, -1) + 0.3 * x.mean(1, keepdim=True) * torch.sign(x[:, -1:])
        return torch.tanh(mixed + told[:, None, None, None])


# --- what the UNet is fed --------------------------------------------------------------------------------------------


def conditioning_faults(inputs, mask, masked_latents):
    """How far the last five channels of every UNet input are from the mask and the masked latents."""
    expected = torch.cat([mask, masked_latents], dim=1)
    return max(float((x[:, 4:] - expected).abs().max()) for x in inputs)


def recorded_run(name, spacing):
    """The UNet inputs of a 6-step run, and the sigmas."""
    unet, mask, masked_latents = StubUNet(), box_mask(), draw(1, B, 4, H, W)
    denoise = Denoiser(unet, TRAINED, "eps", text(2), extra=(mask, masked_latents))
    sigmas = schedule(name, spacing, CONFIG, 6)
    path = [schedules.start(draw(0, B, 4, H, W), sigmas)]
    SAMPLERS[name].run(
        denoise,
        path[0],
        sigmas,
        eta=SAMPLERS[name].eta,
        noise=torch.randn_like,
        on_step=lambda i, x, x0: path.append(x),
    )
    return [x for x, *_ in unet.inputs], path, sigmas, mask, masked_latents


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "karras"])
def test_only_the_noisy_channels_are_scaled(name, spacing):
    inputs, path, sigmas, mask, masked_latents = recorded_run(name, spacing)
    assert conditioning_faults(inputs, mask, masked_latents) == 0
    for fed, x, sigma in zip(inputs, path, sigmas.tolist(), strict=False):
        assert fed.shape == (B, 9, H, W)
        assert torch.allclose(fed[:, :4], x / math.sqrt(1 + sigma**2), rtol=1e-6, atol=0)


def test_wrong_conditioning_is_caught():
    inputs, _, sigmas, mask, masked_latents = recorded_run("euler", "leading")
    scaled = [x / math.sqrt(1 + sigma**2) for x, sigma in zip(inputs, sigmas.tolist(), strict=False)]
    swapped = [x[:, [0, 1, 2, 3, 5, 6, 7, 8, 4]] for x in inputs]
    first = [x[:, [4, 5, 6, 7, 8, 0, 1, 2, 3]] for x in inputs]
    for broken in (scaled, swapped, first):
        assert conditioning_faults(broken, mask, masked_latents) > 0.1


def test_a_four_channel_model_gets_four_channels():
    unet = StubUNet()
    Denoiser(unet, TRAINED, "eps", text(2))(draw(0, B, 4, H, W), 3.0)
    assert unet.inputs[0][0].shape == (B, 4, H, W)


def test_t_is_the_training_index():
    unet = StubUNet()
    denoise = Denoiser(unet, TRAINED, "eps", text(2), text(3))
    for index in (0, 501, 999):
        denoise(draw(0, B, 4, H, W), float(TRAINED[index]))
        t = unet.inputs[-1][1]
        assert t.shape == (2 * B,)
        assert t.dtype == torch.float32
        assert t.tolist() == [index] * (2 * B)


def test_the_unet_runs_in_its_dtype_and_x_keeps_its_own():
    unet = StubUNet()
    extra = (box_mask(), draw(1, B, 4, H, W))
    cond, uncond = text(2, vector=True), text(3, vector=True)
    denoise = Denoiser(unet, TRAINED, "eps", cond, uncond, extra=extra, dtype=torch.bfloat16)
    assert denoise(draw(0, B, 4, H, W), 2.0).dtype == torch.float32
    x, _, context, vector = unet.inputs[0]
    assert x.dtype == context.dtype == vector.dtype == torch.bfloat16


@pytest.mark.parametrize("begun", [False, True])
def test_showing_another_mask(begun):
    """It is a denoiser of its own, built with that mask; only what follows from the text is shared."""
    unet, x = StubUNet(), draw(0, B, 4, H, W)
    masks = box_mask(), 1 - box_mask()
    extras = [(mask, draw(seed, B, 4, H, W)) for seed, mask in enumerate(masks, 1)]
    denoise, other = (Denoiser(unet, TRAINED, "eps", text(2), text(3), extra=extra) for extra in extras)
    before = [one(x, 2.0) for one in (denoise, other)]
    assert not torch.allclose(*before, atol=1e-3)
    fresh = denoise if begun else Denoiser(unet, TRAINED, "eps", text(2), text(3), extra=extras[0])
    shown = fresh.showing(extras[1])
    assert torch.equal(shown(x, 2.0), before[1])
    assert torch.equal(fresh(x, 2.0), before[0])
    assert torch.equal(shown.showing(extras[0])(x, 2.0), before[0])
    assert conditioning_faults([unet.inputs[-1][0][:B]], *extras[0]) == 0


# --- what its output means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_eps_and_v_give_back_the_clean_latents(sigma):
    x0, noise = draw(5, B, 4, H, W, dtype=torch.float64), draw(6, B, 4, H, W, dtype=torch.float64)
    alpha, deviation = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    outputs = {"eps": noise, "v": alpha * noise - deviation * x0}
    for prediction, output in outputs.items():
        denoise = Denoiser(
            lambda x, t, c, v, control, out=output: out, TRAINED, prediction, text(2), dtype=torch.float64
        )
        assert torch.allclose(denoise(x0 + sigma * noise, sigma), x0, rtol=0, atol=1e-12)
    mistaken = Denoiser(lambda x, t, c, v, control: outputs["eps"], TRAINED, "v", text(2), dtype=torch.float64)
    assert not torch.allclose(mistaken(x0 + sigma * noise, sigma), x0, rtol=0, atol=1e-3)


def test_guidance_is_one_batch_of_uncond_then_cond():
    unet, x = StubUNet(), draw(0, B, 4, H, W)
    cond, uncond = text(2, vector=True), text(3, vector=True)
    mask, masked_latents = box_mask(), draw(1, B, 4, H, W)
    guided = Denoiser(unet, TRAINED, "eps", cond, uncond, guidance_scale=7.5, extra=(mask, masked_latents))(x, 2.0)
    assert len(unet.inputs) == 1
    fed, _, context, vector = unet.inputs[0]
    assert torch.equal(context, torch.cat([uncond.context, cond.context]))
    assert torch.equal(vector, torch.cat([uncond.vector, cond.vector]))
    assert torch.equal(fed[:B], fed[B:])
    one, other = (Denoiser(unet, TRAINED, "eps", only, extra=(mask, masked_latents))(x, 2.0) for only in (uncond, cond))
    assert torch.allclose(guided, one + 7.5 * (other - one), rtol=0, atol=1e-5)
    assert not torch.allclose(guided, other + 7.5 * (one - other), rtol=0, atol=1e-2)


def test_guidance_is_computed_in_the_dtype_of_x():
    output = draw(9, 2 * B, 4, H, W, dtype=torch.bfloat16)
    x = draw(0, B, 4, H, W)
    denoise = Denoiser(lambda x, t, c, v, control: output, TRAINED, "eps", text(2), text(3), dtype=torch.bfloat16)
    uncond, cond = output.float().chunk(2)
    assert torch.equal(denoise(x, 2.0), x - 2.0 * (uncond + 7.5 * (cond - uncond)))


@pytest.mark.parametrize(("uncond", "scale", "batch"), [(3, 7.5, 2 * B), (3, 1, B), (3, 0.0, 2 * B), (None, 7.5, B)])
def test_no_guidance_costs_half(uncond, scale, batch):
    unet = StubUNet()
    negative = None if uncond is None else text(uncond)
    denoise = Denoiser(unet, TRAINED, "eps", text(2), negative, guidance_scale=scale)
    x0 = denoise(draw(0, B, 4, H, W), 2.0)
    assert len(unet.inputs[0][0]) == batch
    if batch == B:
        assert torch.equal(x0, Denoiser(unet, TRAINED, "eps", text(2))(draw(0, B, 4, H, W), 2.0))


# --- batches ---------------------------------------------------------------------------------------------------------


def guided_run(order, name="dpmpp_2m"):
    """A run over the batch items in `order`."""
    cond, uncond = text(2), text(3)
    mask, masked_latents = box_mask(), draw(1, B, 4, H, W)
    denoise = Denoiser(
        StubUNet(),
        TRAINED,
        "eps",
        Conditioning(cond.context[order]),
        Conditioning(uncond.context[order]),
        extra=(mask[order], masked_latents[order]),
    )
    sigmas = schedule(name, None, CONFIG, 6)
    x = SAMPLERS[name].run(denoise, schedules.start(draw(0, B, 4, H, W)[order], sigmas), sigmas)
    return schedules.finish(x, sigmas)


def test_permuting_a_batch_permutes_the_result():
    together = guided_run([0, 1, 2])
    assert torch.allclose(guided_run([2, 0, 1]), together[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    for item in range(B):
        assert torch.allclose(guided_run([item]), together[[item]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-5, atol=1e-2)


def test_conditions_of_one_serve_a_batch():
    x, mask, masked_latents = draw(0, B, 4, H, W), box_mask(1), draw(1, 1, 4, H, W)
    one = Denoiser(StubUNet(), TRAINED, "eps", text(2, 1), text(3, 1), extra=(mask, masked_latents))
    spread = [Conditioning(text(seed, 1).context.expand(B, -1, -1)) for seed in (2, 3)]
    full = (mask.expand(B, -1, -1, -1), masked_latents.expand(B, -1, -1, -1))
    assert close(one(x, 2.0), Denoiser(StubUNet(), TRAINED, "eps", *spread, extra=full)(x, 2.0))


@pytest.mark.parametrize(
    ("code", "build"),
    [
        ("SETTING_CONDITIONS", lambda: Denoiser(StubUNet(), TRAINED, "eps", text(2), text(3, width=8))),
        ("SETTING_CONDITIONS", lambda: Denoiser(StubUNet(), TRAINED, "eps", text(2, 1), text(3, 3))),
        ("SETTING_CONDITIONS", lambda: Denoiser(StubUNet(), TRAINED, "eps", text(2, vector=True), text(3))),
        ("SETTING_BATCH", lambda: Denoiser(StubUNet(), TRAINED, "eps", text(2, 2))(draw(0, B, 4, H, W), 1.0)),
        ("SETTING_GUIDANCE", lambda: Denoiser(StubUNet(), TRAINED, "eps", text(2), guidance_scale=math.nan)),
        ("SETTING_PREDICTION", lambda: Denoiser(StubUNet(), TRAINED, "epsilon", text(2))),
    ],
)
def test_conditions_that_do_not_fit_are_refused(code, build):
    with pytest.raises(SettingError) as caught:
        build()
    assert caught.value.code == code


# --- a 4-channel model keeps the known area --------------------------------------------------------------------------


def known_latents(mask=None, dtype=torch.float64):
    latents = draw(8, B, 4, H, W, dtype=dtype)
    return Known((box_mask() if mask is None else mask).to(dtype), torch.zeros_like(latents), latents)


def blended_run(name, known, strength, noise):
    sigmas = schedules.for_strength(schedule(name, None, CONFIG, 9), strength)
    denoise = Denoiser(StubUNet(), TRAINED, "eps", text(2), text(3), dtype=torch.float64)
    x = schedules.start(noise, sigmas) if strength == 1 else schedules.start_from(known.latents, noise, sigmas)
    draws = iter([draw(20 + step, B, 4, H, W, dtype=torch.float64) for step in range(9)])
    x = SAMPLERS[name].run(
        blend_known(denoise, known, noise, sigmas), x, sigmas, eta=SAMPLERS[name].eta, noise=lambda x: next(draws)
    )
    return restore_known(schedules.finish(x, sigmas), known)


def blended_after_every_step(name, known, strength, noise, late=0):
    """Run one step at a time, each followed by the blend; `late`: noise it for the step before."""
    sigmas = schedules.for_strength(schedule(name, None, CONFIG, 9), strength)
    denoise = Denoiser(StubUNet(), TRAINED, "eps", text(2), text(3), dtype=torch.float64)
    x = schedules.start(noise, sigmas) if strength == 1 else schedules.start_from(known.latents, noise, sigmas)
    draws = iter([draw(20 + step, B, 4, H, W, dtype=torch.float64) for step in range(9)])
    for step in range(len(sigmas) - 1):
        x = samplers.euler(denoise, x, sigmas[step : step + 2], eta=SAMPLERS[name].eta, noise=lambda x: next(draws))
        last = step == len(sigmas) - 2
        x = schedules.finish(x, sigmas) if last else x
        kept = known.latents if last else known.latents + sigmas[step + 1 - late] * noise
        x = (1 - known.mask) * kept + known.mask * x
    return x


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_blending_equals_blending_after_every_step(name, strength):
    known, noise = known_latents(), draw(0, B, 4, H, W, dtype=torch.float64)
    ours = blended_run(name, known, strength, noise)
    assert torch.allclose(ours, blended_after_every_step(name, known, strength, noise), rtol=0, atol=1e-12)
    late = blended_after_every_step(name, known, strength, noise, late=1)
    assert not torch.allclose(ours, late, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_is_kept_exactly(name):
    noise = draw(0, B, 4, H, W, dtype=torch.float64)
    known = known_latents()
    kept = blended_run(name, known, 1.0, noise)
    assert torch.equal(torch.where(known.mask == 0, kept, 0), torch.where(known.mask == 0, known.latents, 0))
    assert not torch.allclose(kept * known.mask, known.latents * known.mask, rtol=0, atol=1e-2)
    everything = known_latents(mask=torch.zeros(B, 1, H, W))
    assert torch.equal(blended_run(name, everything, 1.0, noise), everything.latents)


def test_a_full_mask_blends_nothing():
    sigmas = schedule("euler", None, CONFIG, 5)
    x = schedules.start(draw(0, B, 4, H, W, dtype=torch.float64), sigmas)
    denoise = Denoiser(StubUNet(), TRAINED, "eps", text(2), dtype=torch.float64)
    blended = blend_known(denoise, known_latents(mask=torch.ones(B, 1, H, W)), x, sigmas)
    assert torch.equal(samplers.euler(blended, x, sigmas), samplers.euler(denoise, x, sigmas))


def test_blending_needs_the_latents_of_the_image():
    x, known = draw(0, B, 4, H, W), Known(box_mask(), torch.zeros(B, 4, H, W))
    for build in (lambda: blend_known(lambda x, s: x, known, x, TRAINED.flip(0)), lambda: restore_known(x, known)):
        with pytest.raises(SettingError) as caught:
            build()
        assert caught.value.code == "SETTING_KNOWN_LATENTS"


# --- diffusers' whole inpainting pipeline ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer_parts():
    """Small random UNets of 4 and 9 channels, and a VAE that the pipeline asks for and does not use."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unets = {
        channels: UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval()
        for channels in (4, 9)
    }
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )
    return unets, vae


def peer_scheduler(name, spacing):
    import diffusers

    kind, extra = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    }[name]
    return kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing,
        **extra,
    )


@pytest.mark.peer
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    ("name", "spacing", "eta"),
    [
        ("ddim", "leading", 0.0),
        ("ddim", "leading", 1.0),
        ("euler", "trailing", 0.0),
        ("euler_ancestral", "leading", 1.0),
        ("dpmpp_2m", "linspace", 0.0),
    ],
)
@torch.no_grad()
def test_a_run_is_diffusers_inpainting(peer_parts, name, spacing, eta, strength, channels):
    from diffusers import StableDiffusionInpaintPipeline

    unets, vae = peer_parts
    unet = unets[channels]
    cond, uncond = Conditioning(draw(2, 1, 6, 12)), Conditioning(draw(3, 1, 6, 12))
    pixel_mask = torch.zeros(1, 1, 64, 64)
    pixel_mask[:, :, 16:48, 24:] = 1
    known = Known(pixel_mask[:, :, ::8, ::8], draw(1, 1, 4, 8, 8), draw(8, 1, 4, 8, 8))
    pipe = StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=peer_scheduler(name, spacing),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=cond.context,
        negative_prompt_embeds=uncond.context,
        image=known.latents,
        mask_image=pixel_mask,
        masked_image_latents=known.masked_latents,
        height=64,
        width=64,
        num_inference_steps=10,
        strength=strength,
        guidance_scale=5.0,
        eta=eta,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    sigmas = schedules.for_strength(schedule(name, spacing, CONFIG, 10), strength)
    x = schedules.start_from(known.latents, noise, sigmas)
    if strength == 1:
        x = schedules.start(noise, sigmas, unit_variance=find_spacing(name, spacing).unit_variance)
    denoise = Denoiser(
        lambda x, t, context, vector, control: unet(x, t, encoder_hidden_states=context).sample,
        TRAINED,
        "eps",
        cond,
        uncond,
        guidance_scale=5.0,
        extra=(known.mask, known.masked_latents) if channels == 9 else None,
    )
    if channels == 4:
        denoise = blend_known(denoise, known, noise, sigmas)
    x = SAMPLERS[name].run(denoise, x, sigmas, eta=eta, noise=lambda x: torch.randn(x.shape, generator=generator))
    ours = schedules.finish(x, sigmas)
    ours = restore_known(ours, known) if channels == 4 else ours
    assert float((ours - theirs).abs().max()) < 5e-6 * float(theirs.abs().max())
