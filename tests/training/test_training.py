"""Training: the loop resumes where it was, the autoencoder starts well, and each stage does what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from closeness import close
from torch import nn

from sdinpaint.models import VAE
from sdinpaint.training import autoencoder, inpainting, loop
from sdinpaint.training.__main__ import main
from sdinpaint.training.loop import Trainer, learning_rate
from sdinpaint.training.scenes import EMPTY_CAPTIONS


def psnr(output, target):
    return float(-10 * (((output - target) / 2) ** 2).mean().log10())


def small_autoencoder():
    torch.manual_seed(0)
    return VAE(autoencoder.CONFIG)


def toy_loss(module):
    def loss(step):
        torch.manual_seed(step)
        x = torch.randn(8, 3)
        value = ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()
        return value, {"loss": value.item()}

    return loss


def toy_run(folder, stops):
    """Train to each of `stops` in turn, every time with a new trainer on the same folder."""
    for stop in stops:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        trainer = Trainer(module, folder, steps=40, peak_lr=0.1)
        trainer.steps = stop
        trainer.fit(toy_loss(module), progress=False)
    return trainer


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, substitute):
    substitute(loop, learning_rate=lambda step, steps, peak: peak)
    whole = toy_run(tmp_path / "whole", [40])
    parts = toy_run(tmp_path / "parts", [13, 14, 40])
    for name, value in whole.module.state_dict().items():
        assert close(value, parts.module.state_dict()[name])
        assert close(whole.ema[name], parts.ema[name])
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]


def test_an_interrupted_run_keeps_its_state(tmp_path):
    module = nn.Linear(3, 1)
    loss = toy_loss(module)

    def interrupted(step):
        if step == 7:
            raise KeyboardInterrupt
        return loss(step)

    with pytest.raises(KeyboardInterrupt):
        Trainer(module, tmp_path, steps=40, peak_lr=0.1).fit(interrupted, progress=False)
    assert Trainer(nn.Linear(3, 1), tmp_path, steps=40, peak_lr=0.1).step == 7
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_learning_rate_rises_stays_and_falls_to_zero():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100:700] == [1.0] * 600
    assert rates[850] == pytest.approx(0.5)
    assert rates[1000] == 0


def test_the_autoencoder_starts_as_an_average():
    images = autoencoder.drawn_images(np.random.default_rng(0), 4)
    averages = nn.functional.avg_pool2d(images, 8)
    vae = small_autoencoder()
    with torch.no_grad():
        random_latents = vae.encode(images)[:, :3] / vae.config.scaling_factor
        autoencoder.start_as_average(vae)
        latents = vae.encode(images)[:, :3] / vae.config.scaling_factor

    def similarity(a, b):
        flat = [x.transpose(0, 1).flatten(1) - x.transpose(0, 1).flatten(1).mean(1, keepdim=True) for x in (a, b)]
        return nn.functional.cosine_similarity(*flat).min().item()

    assert similarity(latents, averages) > 0.8
    assert similarity(random_latents, averages) < 0.5


@torch.no_grad()
def test_normalised_latents_have_unit_variance_and_the_same_reconstruction():
    vae = small_autoencoder()
    autoencoder.start_as_average(vae)
    images = autoencoder.drawn_images(np.random.default_rng(1), 32)
    before = vae.decode(vae.encode(images[:4]))
    _, std_before = vae.posterior(images[:4])
    latents_before = vae.encode(images)
    autoencoder.normalise(vae, images)
    mean, std = vae.posterior(images)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert (mean.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert (vae.decode(mean[:4]) - before).abs().max() < 1e-4
    # the posterior's deviation is rescaled with its mean
    ratio = (std[:4] / std_before) / (1 / latents_before.std((0, 2, 3)))[:, None, None]
    assert (ratio - 1).abs().max() < 1e-3


def test_reconstruction_loss_sees_colour():
    grey = torch.zeros(1, 3, 16, 16)
    red, white = grey.clone(), grey + 0.2
    red[:, 0] = 0.6  # the same brightness as `white`
    assert autoencoder.reconstruction_loss(red, grey) > 3 * autoencoder.reconstruction_loss(white, grey)
    assert autoencoder.reconstruction_loss(red, red) == 0


def test_examples_are_what_their_captions_say():
    rng = np.random.default_rng(0)
    examples = [inpainting.example(rng) for _ in range(300)]
    full = sum(bool(one.hole.all()) for one in examples) / len(examples)
    empty = sum(one.caption in EMPTY_CAPTIONS for one in examples) / len(examples)
    assert all(one.hole.any() for one in examples)
    assert 0.005 < full < 0.1
    assert 0.1 < empty < 0.4


def test_both_stages_train_and_export(tmp_path):
    vae = autoencoder.train(tmp_path / "autoencoder", steps=2, batch=2, progress=False)
    unet, text = inpainting.train(tmp_path / "inpainting", vae, steps=2, batch=2, bank=4, progress=False)
    assert all(bool(p.isfinite().all()) for model in (unet, text, vae) for p in model.parameters())
    assert unet.config.in_channels == 9
    assert text.config.vocab_size == inpainting.vocabulary().vocab_size


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--device", "hpu"), 5, "this torch is built without it"),
        (("--device", "gpu"), 5, "expected: 'cpu', 'cuda'"),
        (("--steps", "-1"), 2, "not in the range"),
        ((), 5, "Not a directory"),
    ],
)
def test_what_training_cannot_use_ends_with_a_sentence(tmp_path, options, code, said):
    (tmp_path / "file").touch()
    outcome = CliRunner().invoke(main, ["--out", str(tmp_path / "file"), *options])
    assert outcome.exit_code == code
    assert said in outcome.output
    assert "Traceback" not in outcome.output
