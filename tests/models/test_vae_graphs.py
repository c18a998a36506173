"""A decoder's captured graphs, with one that replays by calling from its own tensors; on a GPU see test_step_gpu.py."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import close
from recordings import draw

from sdinpaint.models import VAE
from sdinpaint.models.guarded_vae import GuardedVAE
from sdinpaint.sampling.graphs import KEPT, Graphs


@pytest.fixture(scope="module")
def vae(tiny):
    torch.manual_seed(0)
    return VAE(tiny.vae).eval().requires_grad_(False)


def test_one_captured_graph_serves_all_images_of_a_size(vae, replays):
    guarded, graphs = GuardedVAE(vae), Graphs(True)
    for seed in (1, 2):
        latents = draw(seed, 2, 4, 4, 3)
        assert close(guarded.decode(latents, graphs=graphs), vae.decode(latents))
    assert replays.made == 1
    guarded.decode(draw(3, 1, 4, 3, 4), graphs=graphs)
    assert replays.made == 2


def test_the_latest_sizes_are_kept(vae, replays):
    guarded, graphs = GuardedVAE(vae), Graphs(True)
    for width in range(1, KEPT + 3):
        guarded.decode(draw(1, 1, 4, 2, width), graphs=graphs)
    assert len(graphs._captured) == KEPT


def test_new_weights_are_captured_anew(vae, replays):
    other, graphs, latents = copy.deepcopy(vae), Graphs(True), draw(1, 1, 4, 4, 3)
    before = GuardedVAE(other).decode(latents, graphs=graphs)
    other.load_state_dict({name: 0.9 * value for name, value in other.state_dict().items()}, assign=True)
    after = GuardedVAE(other).decode(latents, graphs=graphs)
    assert close(after, other.decode(latents))
    assert not close(after, before, 0.1)
    assert replays.made == 2


def hooked(vae):
    vae.decoder.mid.register_forward_hook(lambda layer, given, out: 1.1 * out)


def trained(vae):
    vae.requires_grad_(True)


def replaced(vae):
    vae.decode = lambda latents: 1 + type(vae).decode(vae, latents)


@pytest.mark.parametrize("change", [hooked, trained, replaced])
def test_what_is_not_plain_is_called(vae, replays, change):
    other, graphs, latents = copy.deepcopy(vae), Graphs(True), draw(1, 1, 4, 4, 3)
    change(other)
    found = GuardedVAE(other).decode(latents, graphs=graphs)
    assert replays.made == 0
    assert close(found.detach(), other.decode(latents).detach())
    assert found.requires_grad == (change is trained)


def test_strips_and_encoding_are_not_captured(vae, replays):
    guarded, latents = GuardedVAE(vae), draw(1, 1, 4, 17, 4)
    assert close(guarded.decode(latents, tile=16, graphs=Graphs(True)), vae.decode(latents))
    guarded.decode(latents, graphs=Graphs(False))
    guarded.encode(draw(1, 1, 3, 16, 16))
    assert replays.made == 0
