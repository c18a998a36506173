"""Gradients where a caller asks for them: through every step by name, and inside of a run's callback."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from closeness import close
from painting import IMAGE, MASK
from recordings import draw

from sdinpaint.errors import SettingError
from sdinpaint.sampling import Conditioning, samplers, schedules


@pytest.fixture
def trained(pipe):
    """A copy whose weights take gradients."""
    pipe = copy.deepcopy(pipe)
    for model in (pipe.unet, pipe.vae, pipe.text):
        model.requires_grad_(True)
    return pipe


def gradients(model):
    return sum(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in model.parameters())


def test_latents_of_an_image_serve_in_a_loss_and_carry_gradients(trained):
    known = trained.encode_image(IMAGE, MASK)
    (known.latents.square().mean() + known.masked_latents.square().mean()).backward()
    assert gradients(trained.vae.encoder) == len(list(trained.vae.encoder.parameters()))


def test_text_embeddings_carry_gradients(trained):
    (said,) = trained.encode_prompts(["a red fox"])
    said.context.square().mean().backward()
    assert gradients(trained.text) == len(list(trained.text.parameters()))


def test_the_decoder_passes_gradients_to_latents_in_strips_too(trained):
    images = []
    for tile in (None, 16):
        trained.tile = tile
        latents = draw(1, 1, 4, 16, 16).requires_grad_(True)
        images.append(trained.decode(latents))
        images[-1].square().mean().backward()
        assert latents.grad.abs().sum() > 0
    assert torch.allclose(*images)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_steps_pass_gradients_to_everything_that_they_are_given(trained, guidance_scale):
    known = trained.encode_image(IMAGE, MASK)
    cond, uncond = trained.encode_prompts(["a red fox", ""])
    context = cond.context.detach().requires_grad_(True)
    sigmas = schedules.linspace(trained.train_sigmas, 3)
    denoise = trained.denoiser(known, Conditioning(context), uncond, guidance_scale=guidance_scale, sigmas=sigmas)
    x = draw(1, *known.masked_latents.shape).requires_grad_(True)
    out = samplers.euler(denoise, x * float(sigmas[0]), sigmas)
    trained.decode(schedules.finish(out, sigmas)).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert context.grad.abs().sum() > 0
    assert gradients(trained.unet) == len(list(trained.unet.parameters()))
    assert gradients(trained.vae.encoder) > 0


def test_a_gradient_is_that_of_float64(pipe):
    """Against finite differences, in float64."""
    pipe = copy.deepcopy(pipe)
    pipe.unet.double()
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise = pipe.denoiser(known, *said)
    x = draw(1, *known.masked_latents.shape).double().requires_grad_(True)
    along = draw(2, *x.shape).double()
    denoise(x, 2.0).sin().sum().backward()
    with torch.no_grad():
        ahead, behind = (denoise(x + h * along, 2.0).sin().sum() for h in (1e-5, -1e-5))
    assert float((x.grad * along).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-5)


def test_a_callback_may_ask_for_gradients(pipe):
    """Guidance by what the decoded image shows."""
    pipe, seen = copy.deepcopy(pipe), []

    def look(step, x, x0):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            latents = x0.detach().requires_grad_(True)
            pipe.decode(latents).mean().backward()
            weight = torch.ones(1, requires_grad=True)
            (x * weight).sum().backward()  # what is handed out serves in a graph
        seen.append((latents.grad.abs().sum(), weight.grad))

    pipe.inpaint(IMAGE, MASK, "a red fox", steps=2, seed=1, progress=False, on_step=look)
    assert len(seen) == 2
    assert all(one > 0 and other.abs() > 0 for one, other in seen)


@pytest.mark.parametrize("name", ["inpaint", "vary", "outpaint"])
def test_runs_build_no_graph_and_hand_out_plain_tensors(trained, name):
    seen = []
    given = {"steps": 2, "seed": 1, "progress": False, "on_step": lambda step, x, x0: seen.extend([x, x0])}
    run = {
        "inpaint": lambda: trained.inpaint(IMAGE, MASK, "a red fox", **given),
        "vary": lambda: trained.vary(IMAGE, "a red fox", **given),
        "outpaint": lambda: trained.outpaint(IMAGE, "a red fox", right=8, **given),
    }[name]
    run()
    assert seen
    assert not any(one.requires_grad or one.is_inference() for one in seen)


def test_training_the_unet_changes_the_image(trained):
    options = {"steps": 2, "seed": 1, "progress": False}
    before = np.asarray(trained.inpaint(IMAGE, MASK, "a red fox", **options).image).astype(int)
    known, said = trained.encode_image(IMAGE, MASK), trained.encode_prompts(["a red fox", ""])
    steps = torch.optim.AdamW(trained.unet.parameters(), lr=1e-2)
    for _ in range(3):
        steps.zero_grad()
        denoise = trained.denoiser(known, *said, guidance_scale=1)
        (denoise(draw(1, *known.masked_latents.shape), 2.0) - known.latents.detach()).square().mean().backward(
            retain_graph=True
        )
        steps.step()
        known, said = trained.encode_image(IMAGE, MASK), trained.encode_prompts(["a red fox", ""])
    after = np.asarray(trained.inpaint(IMAGE, MASK, "a red fox", **options).image).astype(int)
    assert np.abs(after - before).max() > 1


# Samplers from elsewhere


@pytest.mark.parametrize(
    "sigma",
    [5.0, 5, np.float32(5), torch.tensor(5.0), torch.tensor([5.0]), torch.full((2,), 5.0), torch.tensor(5.0).double()],
    ids=["float", "int", "numpy", "()", "(1,)", "(B,)", "float64"],
)
@pytest.mark.filterwarnings("error")
def test_a_sigma_comes_in_every_form_that_samplers_use(pipe, sigma):
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise, x = pipe.denoiser(known, *said), 5 * draw(1, 2, *known.masked_latents.shape[1:])
    with torch.no_grad():
        assert close(denoise(x, sigma), denoise(x, 5.0))
        assert not close(denoise(x, sigma), denoise(x, 5.1))
    if isinstance(sigma, torch.Tensor):
        assert denoise(x, sigma.clone().requires_grad_(True)).shape == x.shape


def test_different_sigmas_for_the_items_of_a_batch_are_refused(pipe):
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise, x = pipe.denoiser(known, *said), draw(1, 2, *known.masked_latents.shape[1:])
    for sigma in (torch.tensor([1.0, 2.0]), torch.ones(3), torch.empty(0)):
        with pytest.raises(SettingError) as caught:
            denoise(x, sigma)
        assert caught.value.code == "SETTING_SIGMA"


@torch.no_grad()
def test_heun_as_k_diffusion_writes_it_runs_unchanged(pipe):
    """Karras et al. 2022, algorithm 2 without churn: sigmas in float32 on the device, one for each item."""
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise = pipe.denoiser(known, *said)
    sigmas = (
        schedules.karras(pipe.train_sigmas, 4).float()
        if hasattr(schedules, "karras")
        else schedules.linspace(pipe.train_sigmas, 4).float()
    )
    x = draw(1, 2, *known.masked_latents.shape[1:]) * sigmas[0]
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        d = (x - denoise(x, sigmas[i] * ones)) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - denoise(x_2, sigmas[i + 1] * ones)) / sigmas[i + 1]
            x = x + (d + d_2) / 2 * dt
    assert torch.isfinite(x).all()
    assert float(x.std()) > 0
