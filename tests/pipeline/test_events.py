"""Events: what listeners are told of a run, and how they change or stop it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from painting import MASK, inpaint, pixels

import sdinpaint
from sdinpaint.errors import Cancelled, SdInpaintError, SdInpaintWarning, SettingError
from sdinpaint.pipeline.events import Reporter, event_bars

TWO_HOLES = np.zeros_like(MASK)
TWO_HOLES[4:20, 4:20] = TWO_HOLES[44:60, 48:68] = True


def listened(pipe, **options):
    events = []
    inpaint(pipe, on_event=events.append, **options)
    return events


def test_a_run_is_told_from_its_first_stage_to_its_last(pipe):
    events = listened(pipe)
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("encode", 0, 1),
        ("encode", 1, 1),
        *[("denoise", done, 3) for done in range(4)],
        ("decode", 0, 1),
        ("decode", 1, 1),
    ]
    shares = [event.share for event in events]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert [event.seconds_left == 0 for event in events] == [event is events[-1] for event in events]
    assert all(event.index == (0,) and event.region == 0 for event in events)


def test_steps_carry_the_predicted_image(pipe):
    seen = []
    events = listened(pipe, on_step=lambda step, x, x0: seen.append(x0))
    carried = [event.x0 for event in events if event.x0 is not None]
    assert [torch.equal(one, other) for one, other in zip(carried, seen, strict=True)] == [True] * 3
    assert pipe.decode(carried[-1]).shape == (1, 3, 64, 72)


def test_batches_and_regions_say_which_images_they_are(pipe):
    events = listened(pipe, seed=[1, 2, 3], batch_size=2)
    assert list(dict.fromkeys(event.index for event in events)) == [(0, 1), (2,)]
    assert [round(event.share * 12) for event in events if event.x0 is not None] == [2, 4, 6, 9, 10, 11]
    events = listened(pipe, mask=TWO_HOLES, regions="each")
    assert list(dict.fromkeys(event.region for event in events)) == [0, 1]
    assert events[-1].share == 1


def test_the_time_left_falls_to_nothing(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("sdinpaint.pipeline.events.time.monotonic", lambda: next(clock))
    events = []
    report = Reporter([events.append], 4)
    report("denoise", 0, 4, [0])
    for step in range(4):
        report("denoise", step + 1, 4, [0], x0=torch.zeros(1))
    assert [event.seconds_left for event in events] == pytest.approx([None, 30, 20, 10, 0])


def test_on_step_may_return_other_latents(pipe):
    kept = []

    def replaced(step, x, x0):
        kept.append(x)
        return torch.zeros_like(x, dtype=torch.float64) if step == 2 else None

    result = inpaint(pipe, on_step=replaced, paste_back=False, sampler="euler")
    grey = pipe.decode(torch.zeros(1, 4, 8, 9))
    levels = ((grey[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert np.abs(pixels(result.image) - levels).max() <= 1
    assert np.array_equal(pixels(inpaint(pipe, on_step=lambda *_: True).image), pixels(inpaint(pipe).image))


@pytest.mark.parametrize(
    "changed",
    [
        torch.zeros(1, 4, 2, 2),
        np.zeros((1, 4, 8, 9)),
        torch.zeros(1, 4, 8, 9, dtype=torch.int64),
        torch.zeros(1, 4, 8, 9, device="meta"),
        torch.full((1, 4, 8, 9), torch.nan),
        torch.full((1, 4, 8, 9), 1e300, dtype=torch.float64),
        torch.zeros(1, 4, 8, 9).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(4, 8, 9)] * 2, layout=torch.jagged),
        {"latents": torch.zeros(1, 4, 8, 9)},
        (torch.zeros(1, 4, 8, 9), None),
    ],
    ids=[
        *("shape", "numpy", "whole numbers", "meta", "NaN", "too large", "sparse", "nested"),
        *("dict, as diffusers takes it", "tuple"),
    ],
)
def test_other_things_than_latents_are_refused(pipe, changed):
    with pytest.raises(SettingError, match="latents") as caught:
        inpaint(pipe, on_step=lambda *_: changed)
    assert (caught.value.code, caught.value.subject) == ("SETTING_ON_STEP", "on_step")


async def later(*_):
    """Return nothing, once somebody waits for it."""


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_callback_that_would_have_to_be_awaited_is_refused(pipe):
    with pytest.raises(SettingError, match="a coroutine was returned"):
        inpaint(pipe, on_step=later)


def spoilt(x):
    x.fill_(torch.nan)


def cut(x):
    x.data = torch.zeros(1, 4, 2, 2)


@pytest.mark.parametrize("change", [spoilt, cut])
@pytest.mark.parametrize("last", [0, 2])
def test_latents_that_were_spoilt_in_place_are_refused(pipe, change, last):
    def on_step(step, x, x0):
        if step == last:
            change(x)

    with pytest.raises(SettingError, match="on_step") as caught:
        inpaint(pipe, steps=3, on_step=on_step)
    assert caught.value.code == "SETTING_ON_STEP"


@pytest.mark.parametrize("by", ["on_step", "on_event"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
def test_a_preview_may_scale_its_latents_in_place(pipe, sampler, by):
    watch = {
        "on_step": lambda step, x, x0: x0.zero_() is None,
        "on_event": lambda event: event.x0 is not None and event.x0.zero_() is None,
    }
    usual = inpaint(pipe, sampler=sampler, steps=4).image
    assert np.array_equal(pixels(inpaint(pipe, sampler=sampler, steps=4, **{by: watch[by]}).image), pixels(usual))


@pytest.mark.parametrize("by", ["on_step", "on_event"])
def test_weights_that_a_callback_changes_are_told(pipe, by):
    weight = next(pipe.unet.parameters())

    def change(*_):
        with torch.no_grad():
            weight.mul_(1.01)

    before = weight.detach().clone()
    try:
        with pytest.warns(SdInpaintWarning, match="weights were changed"):
            inpaint(pipe, **{by: change})
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_the_reason_of_a_cancelled_run_may_be_any_value():
    assert str(Cancelled(3)) == "run: 3"


@pytest.mark.parametrize("by", ["on_step", "on_event"])
def test_a_callback_stops_a_run(pipe, by):
    called = []

    def stop(*given):
        called.append(given)
        if len(called) == 2:
            raise Cancelled

    with pytest.raises(Cancelled) as caught:
        inpaint(pipe, **{by: stop})
    assert len(called) == 2
    assert isinstance(caught.value, SdInpaintError)
    assert caught.value.code == "CANCELLED"
    assert inpaint(pipe).images  # nothing is left behind


def test_loading_tells_of_its_tensors():
    events = []
    pipe = sdinpaint.load("demo", device="cpu", progress=False, on_event=events.append)
    assert {event.stage for event in events} == {"load"}
    total = sum(len(model.state_dict()) for model in (pipe.unet, pipe.vae, pipe.text))
    assert [event.done for event in events] == list(range(total + 1))
    assert events[-1].share == 1


def test_bars_are_drawn_from_events(stderr):
    shown = stderr(terminal=True)
    with event_bars("inpaint") as draw:
        report = Reporter([draw], 6)
        for _ in range(2):
            for step in range(4):
                report("denoise", step, 3, [0], x0=None if step == 0 else torch.zeros(1))
    assert shown.getvalue().count("inpaint: 100%") == 2
    assert "3/3" in shown.getvalue()
