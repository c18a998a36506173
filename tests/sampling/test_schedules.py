from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdinpaint.errors import SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.sampling import SAMPLERS, find_spacing, schedule, schedules

# diffusers under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIG = SD15_INPAINT.schedule
TRAINED = schedules.train_sigmas(CONFIG)
EVERY_SPACING = [(sampler, spacing) for sampler, found in SAMPLERS.items() for spacing in found.spacings]
STEPS = [1, 2, 3, 7, 10, 25, 30, 45, 48, 50, 61, 100, 333, 499, 500, 501, 998, 999, 1000]


def timesteps(sampler, spacing, steps):
    return [schedules.timestep(TRAINED, sigma) for sigma in schedule(sampler, spacing, CONFIG, steps)[:-1].tolist()]


def steps_run(sigmas):
    return len(sigmas) - 1


def test_train_sigmas_follow_their_definition():
    roots = [
        math.sqrt(CONFIG.beta_start) + t / 999 * (math.sqrt(CONFIG.beta_end) - math.sqrt(CONFIG.beta_start))
        for t in range(1000)
    ]
    for t in (0, 1, 17, 500, 999):
        alpha = math.exp(math.fsum(math.log1p(-root * root) for root in roots[: t + 1]))
        assert float(TRAINED[t]) == pytest.approx(math.sqrt((1 - alpha) / alpha), rel=1e-11)
    assert TRAINED.dtype == torch.float64
    assert TRAINED.shape == (1000,)
    assert bool((TRAINED.diff() > 0).all())


@pytest.mark.parametrize(("sampler", "spacing"), EVERY_SPACING)
def test_every_schedule_falls_strictly_and_has_its_end_point(sampler, spacing):
    for steps in STEPS:
        sigmas = schedule(sampler, spacing, CONFIG, steps)
        assert sigmas.shape == (steps + 1,)
        assert sigmas.dtype == torch.float64
        assert sigmas.device.type == "cpu"
        assert bool((sigmas.diff() < 0).all()), steps
        assert float(sigmas[0]) <= float(TRAINED[-1])
        assert float(sigmas[-2]) >= float(TRAINED[0])
        above_first = float(sigmas[-2]) > float(TRAINED[0])
        assert float(sigmas[-1]) == (float(TRAINED[0]) if sampler == "ddim" and above_first else 0)


def test_end_at_zero_belongs_to_the_family():
    ends = dataclasses.replace(CONFIG, end_at_zero=True)
    assert float(schedule("ddim", None, CONFIG, 10)[-1]) == float(TRAINED[0])
    assert float(schedule("ddim", None, ends, 10)[-1]) == 0
    assert torch.equal(schedule("ddim", None, CONFIG, 10)[:-1], schedule("ddim", None, ends, 10)[:-1])


def test_known_timesteps():
    assert timesteps("ddim", "leading", 4) == [751, 501, 251, 1]
    assert timesteps("ddim", "leading", 45)[0] == 969
    assert timesteps("ddim", "linspace", 4) == [999, 666, 333, 0]
    assert timesteps("ddim", "trailing", 4) == [999, 749, 499, 249]
    assert timesteps("ddim", "trailing", 7) == [999, 856, 713, 570, 428, 285, 142]
    assert timesteps("dpmpp_2m", "leading", 4) == [801, 601, 401, 201]
    assert timesteps("dpmpp_2m", "linspace", 4) == [999, 749, 500, 250]
    assert timesteps("euler", "linspace", 1) == [999]
    assert timesteps("euler", "linspace", 3) == pytest.approx([999, 499.5, 0], abs=1e-2)
    sigmas = schedule("euler", "leading", CONFIG, 20)
    assert float(sigmas[0]) == pytest.approx(11.03, abs=5e-3)
    assert float(schedules.start(torch.ones(1), sigmas)) == pytest.approx(11.07, abs=5e-3)


def test_the_default_spacing_of_each_sampler_is_one_it_has():
    for name, sampler in SAMPLERS.items():
        assert torch.equal(schedule(name, None, CONFIG, 12), schedule(name, sampler.spacing, CONFIG, 12))


def test_karras_is_linear_in_the_seventh_root():
    sigmas = schedules.karras(TRAINED, 9)
    roots = sigmas[:-1] ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[0].expand(8), rtol=0, atol=1e-12)
    assert float(sigmas[0]) == float(TRAINED[-1])
    assert float(sigmas[-2]) == float(TRAINED[0])


def test_steps_offset_moves_leading_alone_and_stays_in_range():
    plain = dataclasses.replace(CONFIG, steps_offset=0)
    assert not torch.equal(schedule("ddim", "leading", plain, 10), schedule("ddim", "leading", CONFIG, 10))
    assert torch.equal(schedule("ddim", "trailing", plain, 10), schedule("ddim", "trailing", CONFIG, 10))
    assert timesteps("ddim", "leading", 1000) == list(range(999, -1, -1))


def test_timestep_is_exact_where_trained_and_log_linear_between():
    assert [schedules.timestep(TRAINED, sigma) for sigma in TRAINED.tolist()] == list(range(1000))
    for t in (0, 400, 998):
        between = math.sqrt(float(TRAINED[t]) * float(TRAINED[t + 1]))
        assert schedules.timestep(TRAINED, between) == pytest.approx(t + 0.5, abs=1e-9)
    assert schedules.timestep(TRAINED, 0.0) == 0
    assert schedules.timestep(TRAINED, 1e4) == 999


@settings(deadline=None)
@given(st.floats(0.01, 30), st.floats(0.01, 30))
def test_timestep_rises_with_sigma(one, other):
    low, high = sorted((one, other))
    assert schedules.timestep(TRAINED, low) <= schedules.timestep(TRAINED, high)


def test_start_and_finish():
    noise = torch.randn(2, 4, 3, 5)
    latents = torch.randn(2, 4, 3, 5)
    sigmas = torch.tensor([3.0, 0.75], dtype=torch.float64)
    assert torch.equal(schedules.start(noise, sigmas), noise * math.sqrt(10))
    assert torch.equal(schedules.start(noise, sigmas, unit_variance=False), noise * 3)
    assert torch.equal(schedules.start_from(latents, noise, sigmas), latents + 3 * noise)
    assert torch.equal(schedules.finish(noise, sigmas), noise / 1.25)
    assert schedules.start(noise, sigmas).dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [(50, 0.58, 29), (100, 0.29, 29), (50, 1.0, 50), (50, 0.9999, 49), (30, 0.5, 15), (30, 0.01, 1), (1, 0.3, 1)],
)
def test_strength_runs_the_steps_it_says(steps, strength, expected):
    sigmas = schedules.trailing(TRAINED, steps)
    cut = schedules.for_strength(sigmas, strength)
    assert steps_run(cut) == expected
    assert torch.equal(cut, sigmas[steps - expected :])


def miscounted(count_steps):
    """How many fractions k / n do not run k steps."""
    return sum(count_steps(n, k / n) != k for n in range(1, 151) for k in range(1, n + 1))


def test_every_whole_number_of_steps_can_be_asked_for():
    assert miscounted(lambda n, strength: steps_run(schedules.for_strength(torch.arange(n + 1), strength))) == 0
    assert miscounted(lambda n, strength: int(n * strength)) > 0  # truncation, the mistake this guards against


@pytest.mark.parametrize("strength", [0, -0.1, 1.0001, math.nan, math.inf])
def test_strength_outside_its_range_is_refused(strength):
    with pytest.raises(SettingError) as caught:
        schedules.for_strength(TRAINED.flip(0), strength)
    assert caught.value.code == "SETTING_STRENGTH"


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "30", None])
@pytest.mark.parametrize("spacing", [schedules.leading, schedules.linspace, schedules.trailing, schedules.karras])
def test_steps_outside_their_range_are_refused(spacing, steps):
    with pytest.raises(SettingError) as caught:
        spacing(TRAINED, steps)
    assert caught.value.code == "SETTING_STEPS"


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(SettingError) as caught:
        schedule("eular", None, CONFIG, 10)
    assert caught.value.code == "SETTING_SAMPLER"
    assert "dpmpp_2m" in caught.value.expected
    assert "'euler'" in caught.value.hint
    with pytest.raises(SettingError) as caught:
        schedule("euler", "karas", CONFIG, 10)
    assert caught.value.code == "SETTING_SPACING"
    assert "karras" in caught.value.hint


def peer_schedule(sampler, spacing, steps):
    """diffusers' timesteps, sigmas (None for DDIM) and initial noise scale."""
    import diffusers

    kind, extra = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    }[sampler]
    if spacing == "karras":
        extra = {"use_karras_sigmas": True}
    peer = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="linspace" if spacing == "karras" else spacing,
        **extra,
    )
    peer.set_timesteps(steps)
    return peer.timesteps.double(), getattr(peer, "sigmas", None), float(peer.init_noise_sigma)


# Where t is fractional diffusers reads linspace's sigmas off linearly, and karras' t off float32 sigmas.
FRACTIONAL = {schedules.linspace: 0.05, schedules.karras: 5e-3}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [pair for pair in EVERY_SPACING if pair not in {("ddim", "karras"), ("euler_ancestral", "karras")}],
)
def test_schedules_are_diffusers(sampler, spacing):
    whole_t_only = (sampler, spacing) == ("dpmpp_2m", "karras")  # diffusers rounds t here, though not the sigmas
    for steps in [*range(2, 130), 250, 333, 500, 998]:
        t, sigmas, scale = peer_schedule(sampler, spacing, steps)
        ours = schedule(sampler, spacing, CONFIG, steps)
        # numpy.arange gives diffusers one step too many, at t = -1, for some trailing counts such as 61
        assert len(t) == steps or (spacing == "trailing" and t[-1] == -1)
        found = torch.tensor(timesteps(sampler, spacing, steps), dtype=torch.float64)
        atol = 0.51 if whole_t_only else FRACTIONAL.get(find_spacing(sampler, spacing).sigmas, 0)
        assert torch.allclose(found, t[:steps], rtol=0, atol=atol), steps
        if sigmas is not None:
            assert torch.allclose(ours[:steps], sigmas[:steps].double(), rtol=2e-5, atol=0), steps  # float32 cumprod
            assert float(ours[-1]) == float(sigmas[-1])
        start = schedules.start(torch.ones(1), ours, unit_variance=find_spacing(sampler, spacing).unit_variance)
        ours_scale = float(start) / (math.hypot(1, float(ours[0])) if sampler in {"ddim", "dpmpp_2m"} else 1)
        assert ours_scale == pytest.approx(scale, rel=1e-5)


@pytest.mark.peer
def test_ddim_goes_to_the_next_timestep_of_its_list():
    """diffusers steps to t - 1000 // steps, which for trailing and 45 steps is not where the next step starts."""
    t, _, _ = peer_schedule("ddim", "trailing", 45)
    assert timesteps("ddim", "trailing", 45) == t.tolist()
    assert any(here - 1000 // 45 != following for here, following in itertools.pairwise(t.tolist()))
