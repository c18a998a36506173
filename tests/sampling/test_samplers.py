from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from sdinpaint.errors import NumericError, SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.sampling import SAMPLERS, Conditioning, Denoiser, find_spacing, samplers, schedule, schedules

# diffusers under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIG = SD15_INPAINT.schedule
TRAINED = schedules.train_sigmas(CONFIG)
NO_TEXT = Conditioning(torch.zeros(1, 1, 1))
SHAPE = (2, 4, 5, 6)


def unit_noise(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def replay(draws):
    """noise(x) that returns the recorded draws one after the other."""
    remaining = iter(draws)
    return lambda x: next(remaining).to(x.dtype)


def stub_eps(x, t):
    """A nonlinear noise prediction that mixes pixels and depends on t."""
    t = torch.as_tensor(t).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(0.8 * x + 0.2 * x.roll(1, -1) - 0.1 * x.roll(1, 1) + torch.sin(t / 150))


def stub_denoiser(dtype, rounded_t=False):
    def unet(x, t, context, vector, control=None):
        return stub_eps(x, t.round() if rounded_t else t)

    return Denoiser(unet, TRAINED, "eps", NO_TEXT, dtype=dtype)


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- DDIM derived on its own, in alphas -----------------------------------------------------------------------------


def ddim_in_alphas(noise, sigmas, eta, draws, std=lambda eta, variance: eta * math.sqrt(variance)):
    """Song et al. 2021, eq. 12 and 16, in VP latents."""
    alphas = [1 / (1 + sigma**2) for sigma in sigmas.tolist()]
    x = noise
    for step, (alpha, alpha_to) in enumerate(itertools.pairwise(alphas)):
        eps = stub_eps(x, schedules.timestep(TRAINED, float(sigmas[step])))
        x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        deviation = std(eta, (1 - alpha_to) / (1 - alpha) * (1 - alpha / alpha_to))
        x = math.sqrt(alpha_to) * x0 + math.sqrt(max(0.0, 1 - alpha_to - deviation**2)) * eps
        x = x + deviation * draws[step]
    return x


def ddim_error(steps, eta, spacing, **derivation):
    sigmas = schedule("ddim", spacing, CONFIG, steps)
    draws = [unit_noise(100 + step) for step in range(steps)]
    x = schedules.start(unit_noise(0), sigmas)
    x = samplers.ddim(stub_denoiser(torch.float64), x, sigmas, eta=eta, noise=replay(draws))
    return relative(schedules.finish(x, sigmas), ddim_in_alphas(unit_noise(0), sigmas, eta, draws, **derivation))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 7, 10, 25, 45])
def test_ddim_is_euler_in_sigma_space(steps, eta, spacing):
    assert ddim_error(steps, eta, spacing) < 1e-12


def test_a_wrong_eta_is_caught():
    assert ddim_error(10, 0.5, "leading", std=lambda eta, variance: math.sin(eta) * math.sqrt(variance)) > 1e-3
    assert ddim_error(10, 0.5, "leading", std=lambda eta, variance: math.sqrt(eta * variance)) > 1e-3
    assert ddim_error(10, 0.5, "leading", std=lambda eta, variance: eta * variance) > 1e-3


# --- data whose exact denoiser is known ------------------------------------------------------------------------------

MEAN, DEVIATION = 0.3, 0.7


def gaussian_denoise(x, sigma):
    """E[x0 | x] for x0 ~ N(MEAN, DEVIATION^2)."""
    return MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (x - MEAN)


def gaussian_solution(x, sigma, sigma_to):
    """The probability-flow ODE's exact end for that denoiser."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + sigma_to**2) / (DEVIATION**2 + sigma**2))


def measured_order(sampler):
    """The power of the step size with which a sampler's error falls, from 40 to 80 to 160 steps."""
    high, low = 10.0, 0.1
    x = high * unit_noise(1)
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp()
        exact = gaussian_solution(x, float(sigmas[0]), float(sigmas[-1]))
        errors.append(relative(sampler(gaussian_denoise, x, sigmas), exact))
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def overshooting_2m(denoise, x, sigmas):
    """DPM-Solver++ 2M with the factor 1/2 forgotten."""
    last = None
    for sigma, sigma_to in itertools.pairwise(sigmas.tolist()):
        x0 = denoise(x, sigma)
        target = x0 if last is None else x0 + (x0 - last[1]) * math.log(sigma / sigma_to) / math.log(last[0] / sigma)
        last = sigma, x0
        x = target + sigma_to / sigma * (x - target)
    return x


def test_samplers_converge_at_their_order():
    assert measured_order(samplers.euler) == pytest.approx([1, 1], abs=0.05)
    assert measured_order(samplers.ddim) == pytest.approx([1, 1], abs=0.05)
    assert measured_order(samplers.dpmpp_2m) == pytest.approx([2, 2], abs=0.1)
    assert measured_order(overshooting_2m) != pytest.approx([2, 2], abs=0.5)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
def test_a_run_turns_noise_into_the_data(name, spacing):
    sigmas = schedule(name, spacing, CONFIG, 200)
    x = schedules.start(unit_noise(2, (1, 4, 64, 64)), sigmas)
    latents = schedules.finish(SAMPLERS[name].run(gaussian_denoise, x, sigmas), sigmas)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(latents.std()) == pytest.approx(DEVIATION, rel=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0, 3.0])
def test_fresh_noise_leaves_the_noise_level_alone(eta):
    """Data that is one point: x stays MEAN + sigma * N(0, 1), however much of the noise is replaced."""
    generator = torch.Generator().manual_seed(3)
    sigmas = torch.tensor([8.0, 4.0, 3.0, 0.5], dtype=torch.float64)
    x = MEAN + 8.0 * torch.randn(1, 4, 160, 160, generator=generator)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    x = samplers.euler_ancestral(lambda x, sigma: torch.full_like(x, MEAN), x, sigmas, eta=eta, noise=noise)
    count = x.numel()
    assert float(x.mean()) == pytest.approx(MEAN, abs=5 * 0.5 / math.sqrt(count))
    assert float(x.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * count))


# --- the contract ----------------------------------------------------------------------------------------------------

SIGMAS = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_keeps_its_dtype_and_is_not_changed_in_place(name):
    x = unit_noise(4, dtype=torch.float32)
    before = x.clone()
    out = SAMPLERS[name].run(gaussian_denoise, x, SIGMAS, eta=0)
    assert out.dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_to_zero_ends_at_the_last_prediction(name):
    seen = []

    def on_step(step, x, x0):
        seen.append((step, x, x0))
        return "ignored"

    draws = [unit_noise(step) for step in range(3)]
    out = SAMPLERS[name].run(
        gaussian_denoise, unit_noise(4), SIGMAS, eta=SAMPLERS[name].eta, noise=replay(draws), on_step=on_step
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert out is seen[-1][1]
    assert torch.equal(out, seen[-1][2])


def test_noise_is_drawn_once_a_step_where_it_counts():
    drawn_for = []

    def noise(x):
        drawn_for.append(x.shape)
        return torch.zeros_like(x)

    samplers.euler_ancestral(gaussian_denoise, unit_noise(5), SIGMAS, noise=noise)
    assert drawn_for == [SHAPE, SHAPE]  # the last step, to sigma 0, needs none
    samplers.euler(gaussian_denoise, unit_noise(5), SIGMAS, noise=noise)
    assert len(drawn_for) == 2


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.stochastic])
def test_eta_needs_noise_before_anything_runs(name):
    def denoise(x, sigma):
        pytest.fail("the run began")

    with pytest.raises(SettingError) as caught:
        SAMPLERS[name].run(denoise, unit_noise(6), SIGMAS, eta=0.5)
    assert caught.value.code == "SETTING_NOISE"
    for eta in (-0.1, math.nan, math.inf):
        with pytest.raises(SettingError) as caught:
            SAMPLERS[name].run(denoise, unit_noise(6), SIGMAS, eta=eta, noise=torch.randn_like)
        assert caught.value.code == "SETTING_ETA"


def test_dpmpp_2m_takes_no_eta():
    with pytest.raises(SettingError) as caught:
        samplers.dpmpp_2m(gaussian_denoise, unit_noise(6), SIGMAS, eta=1.0, noise=torch.randn_like)
    assert caught.value.code == "SETTING_ETA"
    assert not SAMPLERS["dpmpp_2m"].stochastic


@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [1.0, 1.0], [1.0, 2.0], [math.inf, 1.0], [math.nan, 1.0], [2.0, math.nan, 1.0], [1.0, -0.1]]
)
@pytest.mark.parametrize("sampler", [samplers.euler, samplers.dpmpp_2m])
def test_sigmas_must_fall(sampler, sigmas):
    with pytest.raises(SettingError) as caught:
        sampler(gaussian_denoise, unit_noise(6), torch.tensor(sigmas, dtype=torch.float64))
    assert caught.value.code == "SETTING_SIGMAS"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampler", [samplers.euler, samplers.dpmpp_2m])
def test_a_prediction_that_is_not_finite_stops_the_run(sampler, bad):
    finished = []

    def denoise(x, sigma):
        x0 = gaussian_denoise(x, sigma)
        if sigma == 4.0:
            x0[0, 1, 2, 3] = bad
        return x0

    with pytest.raises(NumericError) as caught:
        sampler(denoise, unit_noise(7), SIGMAS, on_step=lambda step, x, x0: finished.append(step))
    assert caught.value.code == "NUMERIC_NOT_FINITE"
    assert "step 2 of 3" in caught.value.found
    assert caught.value.found.startswith("1 of 240 ")
    assert finished == [0]


def test_what_on_step_raises_ends_the_run():
    def on_step(step, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        samplers.euler(gaussian_denoise, unit_noise(7), SIGMAS, on_step=on_step)


# --- diffusers, step by step -----------------------------------------------------------------------------------------


def peer_scheduler(name, spacing):
    import diffusers

    kind, extra = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    }[name]
    if spacing == "karras":
        spacing, extra = "linspace", {"use_karras_sigmas": True}
    return kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing,
        **extra,
    )


def peer_path(peer, name, steps, noise, eta):
    """diffusers' x after every step, in its own scale, from `noise`."""
    peer.set_timesteps(steps)
    generator = torch.Generator().manual_seed(11)
    options = {"ddim": {"eta": eta, "generator": generator}, "euler_ancestral": {"generator": generator}}.get(name, {})
    x = noise * peer.init_noise_sigma
    path = []
    for t in peer.timesteps:
        eps = stub_eps(peer.scale_model_input(x, t), t)
        x = peer.step(eps, t, x, return_dict=False, **options)[0]
        path.append(x)
    return path


def our_path(name, spacing, steps, noise, eta, draw_dtype=torch.float32):
    """Our x after every step from the same noise, in the peer's scale: DDIM and DPM-Solver keep unit variance."""
    sigmas = schedule(name, spacing, CONFIG, steps)
    generator = torch.Generator().manual_seed(11)
    unit = name in {"ddim", "dpmpp_2m"}
    path = []

    def on_step(step, x, x0):
        path.append(x / (math.hypot(1, float(sigmas[step + 1])) if unit else 1))

    SAMPLERS[name].run(
        # diffusers hands DPM-Solver rounded timesteps for its karras sigmas
        stub_denoiser(noise.dtype, rounded_t=(name, spacing) == ("dpmpp_2m", "karras")),
        schedules.start(noise, sigmas, unit_variance=find_spacing(name, spacing).unit_variance),
        sigmas,
        eta=eta,
        noise=lambda x: torch.randn(x.shape, generator=generator, dtype=draw_dtype).to(x.dtype),
        on_step=on_step,
    )
    return path


PEER_RUNS = [
    *(("ddim", "leading", eta) for eta in (0.0, 0.5, 1.0)),
    *(("euler", spacing, 0.0) for spacing in ("leading", "linspace", "trailing", "karras")),
    *(("euler_ancestral", spacing, 1.0) for spacing in ("leading", "linspace", "trailing")),
    *(("dpmpp_2m", spacing, 0.0) for spacing in ("leading", "linspace", "trailing", "karras")),
]


@pytest.mark.peer
@pytest.mark.parametrize(("name", "spacing", "eta"), PEER_RUNS)
@pytest.mark.parametrize("steps", [7, 10, 25, 45])
def test_every_step_is_diffusers_within_float32(name, spacing, eta, steps):
    noise = unit_noise(0, dtype=torch.float32)
    peers = peer_path(peer_scheduler(name, spacing), name, steps, noise, eta)
    ours = our_path(name, spacing, steps, noise, eta)
    exact = our_path(name, spacing, steps, noise.double(), eta)
    assert len(peers) == len(ours) == steps
    for peer, our, ref in zip(peers, ours, exact, strict=True):
        scale = float(ref.abs().max())
        theirs = float((peer - ref).abs().max())
        assert theirs < 4e-6 * scale  # float32 tables of sigmas, good to 1.3e-5, and float32 steps
        assert float((our - ref).abs().max()) <= 2 * theirs + 1e-6 * scale


@pytest.mark.peer
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [7, 10, 25, 45])
def test_ddim_is_diffusers_in_float64(steps, eta):
    peer = peer_scheduler("ddim", "leading")
    peer.alphas_cumprod = 1 / (1 + TRAINED**2)
    peer.final_alpha_cumprod = peer.alphas_cumprod[0]
    noise = unit_noise(0)
    peers = peer_path(peer, "ddim", steps, noise, eta)
    ours = our_path("ddim", "leading", steps, noise, eta, draw_dtype=torch.float64)
    assert max(relative(our, peer) for our, peer in zip(ours, peers, strict=True)) < 1e-11


@pytest.mark.peer
def test_a_wrong_convention_is_seen_against_diffusers():
    noise = unit_noise(0, dtype=torch.float32)
    peers = peer_path(peer_scheduler("dpmpp_2m", "linspace"), "dpmpp_2m", 10, noise, 0.0)
    for name, spacing in (("dpmpp_2m", "leading"), ("ddim", "linspace")):
        assert relative(our_path(name, spacing, 10, noise, 0.0)[-1], peers[-1]) > 1e-3
    sigmas = schedule("euler", "linspace", CONFIG, 10)
    peers = peer_path(peer_scheduler("euler", "linspace"), "euler", 10, noise, 0.0)
    x = samplers.euler(stub_denoiser(torch.float32), schedules.start(noise, sigmas), sigmas)
    assert relative(x, peers[-1]) > 1e-4  # sqrt(1 + sigma^2) where diffusers starts at sigma


@pytest.mark.peer
def test_diffusers_own_wrong_spacings_are_not_copied():
    """999 leading steps: diffusers' DPM-Solver asks for t = 1000, visits one sigma twice and returns NaN."""
    noise = unit_noise(0, (1, 4, 2, 2), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peers = peer_path(peer_scheduler("dpmpp_2m", "leading"), "dpmpp_2m", 999, noise, 0.0)
    assert not bool(torch.isfinite(peers[-1]).all())
    assert bool(torch.isfinite(our_path("dpmpp_2m", "leading", 999, noise, 0.0)[-1]).all())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("predicted", [None, 0.5, torch.zeros(2, 2), torch.zeros(SHAPE).to_sparse()], ids=str)
def test_a_denoiser_of_another_shape_is_refused(name, predicted):
    with pytest.raises(SettingError, match="denoise"):
        SAMPLERS[name].run(lambda x, sigma: predicted, unit_noise(1), SIGMAS, eta=0.0)


def test_a_noise_of_another_shape_is_refused():
    with pytest.raises(SettingError, match="noise"):
        samplers.euler(gaussian_denoise, unit_noise(1), SIGMAS, eta=1.0, noise=lambda x: x[:1, :1])


def test_sigmas_in_any_sequence():
    expected = samplers.euler(gaussian_denoise, unit_noise(1), SIGMAS)
    for given in (SIGMAS.tolist(), SIGMAS.numpy()):
        assert torch.equal(samplers.euler(gaussian_denoise, unit_noise(1), given), expected)
