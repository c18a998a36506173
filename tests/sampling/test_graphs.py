"""Tests of what is captured and when, with a graph that replays by calling; on a GPU see test_step_gpu.py."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from builders import fill, small
from closeness import close
from recordings import draw

from sdinpaint.errors import SdInpaintWarning, SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import UNet
from sdinpaint.sampling import Conditioning, Denoiser, graphs, schedules
from sdinpaint.sampling.graphs import KEPT, Graphs


def product(varying, constant):
    return varying[0] * constant[0] + varying[-1]


def numbers(*values):
    return tuple(torch.tensor([value]) for value in values)


def test_a_function_is_recorded_once_for_each_key_and_shape(replays):
    found = Graphs(True)
    seven = numbers(7.0)
    for value in (1.0, 2.0, 3.0):
        assert found("a", product, numbers(value), seven).item() == 8 * value
    assert replays.made == 1
    for other in (torch.ones(2), torch.ones(1, 1), torch.ones(1, dtype=torch.float64)):
        found("a", product, (other,), seven)
    found("b", product, numbers(1.0), seven)
    found("a", product, numbers(1.0, 2.0), seven)
    assert replays.made == 6


def test_constants_are_those_of_the_call(replays):
    found = Graphs(True)
    each = [numbers(7.0), numbers(9.0)]
    values = [found("a", product, numbers(1.0), each[which]).item() for which in (0, 1, 1, 0)]
    assert values == [8, 10, 10, 8]
    assert replays.made == 1


def test_the_latest_recordings_are_kept(replays):
    found = Graphs(True)
    for key in range(KEPT + 1):
        found(str(key), product, numbers(1.0), numbers(1.0))
        found("0", product, numbers(1.0), numbers(1.0))
    assert replays.made == KEPT + 1
    found("1", product, numbers(1.0), numbers(1.0))
    assert replays.made == KEPT + 2


def test_threads_wait_for_each_other(replays):
    found, wrong = Graphs(True), []

    def work(factor):
        constant = numbers(factor)
        for value in range(200):
            if found("a", product, numbers(float(value)), constant).item() != value * (factor + 1):
                wrong.append((factor, value))

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2.0, 3.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_step_that_cannot_be_captured_runs_eagerly(replays, failing):
    failing(graphs, "CapturedGraph", RuntimeError("operation not permitted when stream is capturing\nand more"))
    found = Graphs(True)
    with pytest.warns(SdInpaintWarning, match=r"launched one by one: operation not permitted .* capturing$"):
        assert found("a", product, numbers(2.0), numbers(3.0)).item() == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found("a", product, numbers(2.0), numbers(3.0)).item() == 8


def test_on_a_cpu_nothing_is_recorded():
    found = Graphs(True)
    x = torch.ones(1, requires_grad=True)
    found("a", product, (x,), numbers(3.0)).backward()
    assert x.grad.item() == 4


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("1", True), ("0", False)])
def test_the_switch(replays, value, enabled, environment):
    environment(**{graphs.SWITCH: value})
    Graphs()("a", product, numbers(2.0), numbers(3.0))
    assert replays.made == int(enabled)


def test_a_switch_that_is_neither_is_refused(environment):
    environment(**{graphs.SWITCH: "off"})
    with pytest.raises(SettingError) as caught:
        Graphs()
    assert caught.value.code == "SETTING_GRAPH"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_is_empty(replays, duplicate):
    found = Graphs(True)
    found("a", product, numbers(2.0), numbers(3.0))
    other = duplicate(found)
    assert other.enabled
    other("a", product, numbers(2.0), numbers(3.0))
    assert replays.made == 2


# The step of a UNet


TRAINED = schedules.train_sigmas(SD15_INPAINT.schedule)


@pytest.fixture(scope="module")
def unet(tiny):
    return fill(UNet(small(tiny).unet), 3).eval().requires_grad_(False)


def denoisers(unet, found):
    """Two that differ in all that a recording takes in: text, image and guidance."""
    return [
        Denoiser(
            unet,
            TRAINED,
            "eps",
            *(Conditioning(draw(seed + half, 1, 7, unet.config.context_dim)) for half in (0, 1)),
            guidance_scale=scale,
            extra=((draw(seed, 1, 1, 6, 5) > 0).float(), draw(seed + 1, 1, 4, 6, 5)),
            graphs=found,
        )
        for seed, scale in ((10, 7.5), (20, 3.0))
    ]


def test_one_recording_serves_all_steps_of_all_runs(unet, replays):
    x = [draw(seed, 1, 4, 6, 5) for seed in range(4)]
    turns = [(0, x[0], 9.0), (1, x[1], 9.0), (1, x[2], 0.4), (0, x[3], 2.0), (1, x[0], 2.0)]
    plain, recorded = denoisers(unet, None), denoisers(unet, Graphs(True))
    for which, given, sigma in turns:
        assert close(recorded[which](given, sigma), plain[which](given, sigma))
    assert replays.made == 1


@pytest.mark.parametrize(
    "change",
    [
        {"extra": None},
        {"guidance_scale": 1},
        {"dtype": torch.float64},
        {"control": True},
        {"context": 8},
        {"batch": 2},
        {"size": (6, 6)},
    ],
)
def test_another_kind_of_step_is_recorded_anew(unet, replays, change):
    found = Graphs(True)
    denoisers(unet, found)[0](draw(1, 1, 4, 6, 5), 2.0)
    size, tokens, batch = change.get("size", (6, 5)), change.get("context", 7), change.get("batch", 1)
    net = unet
    if "extra" in change:
        net = fill(UNet(replace(unet.config, in_channels=4)), 3).requires_grad_(False)
    if "dtype" in change:
        net = copy.deepcopy(unet).double()
    options = {"extra": (torch.ones(1, 1, *size), draw(3, 1, 4, *size)), **change}
    options = {name: options[name] for name in ("extra", "guidance_scale", "dtype") if name in options}
    if "control" in change:
        options["control"] = lambda x, *given: residuals(unet, len(x), size)
    texts = [Conditioning(draw(seed, 1, tokens, unet.config.context_dim)) for seed in (4, 5)]
    given = draw(2, batch, 4, *size)
    each = [Denoiser(net, TRAINED, "eps", *texts, **options, graphs=graphs) for graphs in (found, None)]
    recorded, plain = (denoise(given, 2.0) for denoise in each)
    assert close(recorded, plain)
    assert replays.made == 2


def residuals(unet, batch, size):
    shapes = []
    hooks = [
        stage.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1:]))
        for stage in (*unet.input_blocks, unet.middle_block)
    ]
    unet(draw(0, 1, 9, *size), torch.zeros(1), draw(1, 1, 7, unet.config.context_dim))
    for hook in hooks:
        hook.remove()
    return [draw(seed, batch, *shape) for seed, shape in enumerate(shapes)]


def test_new_weights_are_recorded_anew(unet, replays):
    found, x = Graphs(True), draw(1, 1, 4, 6, 5)
    before = denoisers(unet, found)[0](x, 2.0)
    other = copy.deepcopy(unet)
    other.load_state_dict({name: 0.9 * value for name, value in unet.state_dict().items()}, assign=True)
    after = denoisers(other, found)[0](x, 2.0)
    assert close(after, denoisers(other, None)[0](x, 2.0))
    assert not close(after, before, 0.1)
    assert replays.made == 2


def test_a_function_that_prepares_nothing_is_never_recorded(unet, replays):
    text = Conditioning(draw(1, 1, 7, unet.config.context_dim))
    extra = (torch.ones(1, 1, 6, 5), draw(3, 1, 4, 6, 5))
    Denoiser(unet.forward, TRAINED, "eps", text, text, extra=extra, graphs=Graphs(True))(draw(2, 1, 4, 6, 5), 2.0)
    assert replays.made == 0
