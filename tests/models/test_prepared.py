"""A step of a UNet with precomputed conditioning gives the numbers of a plain call: what is shared and packed, too.

Conditioning is precomputed for captured CUDA graphs, here with one that replays by calling.
"""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from builders import fill
from closeness import close

from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, UNet, fused
from sdinpaint.models.layers import repeated
from sdinpaint.models.unet import CrossAttention, ResBlock, SelfAttention
from sdinpaint.models.weights import joined, pack
from sdinpaint.sampling import Conditioning, Denoiser, schedules
from sdinpaint.sampling.graphs import Graphs

pytestmark = pytest.mark.usefixtures("replays")

TRAINED = schedules.train_sigmas(SD15_INPAINT.schedule)
SIGMA = 1.7
TINY = 1e-6
"""Beside twice the plain step's own error."""

SD1 = replace(
    SD15_INPAINT.unet,
    model_channels=24,
    channel_mult=(1, 2, 3),
    transformer_depth=(1, 1, 0),
    context_dim=28,
    num_heads=3,
    norm_groups=4,
)
SD2 = replace(SD1, num_heads=None, head_dim=8, linear_projection=True)
SDXL = replace(SD2, channel_mult=(1, 2), transformer_depth=(0, 2), middle_depth=2, vector_dim=22)
CONFIGS = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unets():
    """A random UNet of each kind."""
    return {name: fill(UNet(config), 3).eval().requires_grad_(False) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def unet(request, unets):
    return unets[request.param]


def condition(unet, batch, seed):
    width = unet.config.vector_dim
    return Conditioning(draw(seed, batch, 11, 28), None if width is None else draw(seed + 50, batch, width))


def residuals(unet, batch, size):
    """Return residuals as a ControlNet adds them, for each input block and the middle."""
    shapes = []
    hooks = [
        stage.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1:]))
        for stage in (*unet.input_blocks, unet.middle_block)
    ]
    width = unet.config.vector_dim
    unet(draw(0, 1, 9, *size), torch.zeros(1), draw(1, 1, 11, 28), None if width is None else draw(2, 1, width))
    for hook in hooks:
        hook.remove()
    return [0.3 * draw(seed, batch, *shape) for seed, shape in enumerate(shapes)]


def double(given):
    """Return the value in float64, at any depth."""
    if isinstance(given, torch.Tensor):
        return given.double()
    if isinstance(given, Conditioning):
        return Conditioning(given.context.double(), None if given.vector is None else given.vector.double())
    return [double(one) for one in given]


class Case:
    """One step: the images, the texts and the ControlNet."""

    def __init__(self, unet, batch=2, size=(7, 5), guided=True, controlled=False):
        self.unet, self.x = unet, SIGMA * draw(10, batch, 4, *size)
        self.extra = [(draw(11, batch, 1, *size) > 0).float(), draw(12, batch, 4, *size)]
        self.texts = [condition(unet, batch, 13), condition(unet, batch, 14) if guided else None]
        self.residuals = residuals(unet, len(self.x) * (2 if guided else 1), size) if controlled else None

    def step(self, unet, precise=False):
        """x0 by a UNet, or by a function called as one."""
        change = double if precise else lambda given: given
        added = None if self.residuals is None else change(self.residuals)
        denoise = Denoiser(
            unet,
            TRAINED,
            "eps",
            *(None if text is None else change(text) for text in self.texts),
            extra=change(self.extra),
            control=None if added is None else lambda *given: added,
            dtype=torch.float64 if precise else torch.float32,
            graphs=Graphs(True),
        )
        return denoise(change(self.x), SIGMA)

    def errors(self, step):
        """Return the errors of `step` and of the plain step, against float64."""
        exact = self.step(copy.deepcopy(self.unet).double().forward, precise=True)
        return [float((out - exact).norm() / exact.norm()) for out in (step, self.step(self.unet.forward))]


def as_channels_last(model):
    """Lay weights out as `pack` does on a GPU."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    pack(model)


def as_good(case, step):
    ours, plain = case.errors(step)
    return ours <= 2 * plain + TINY


@pytest.fixture
def as_on_a_gpu(substitute):
    """Biases of convolutions go with what is added next."""
    substitute(fused, adds_bias_apart=lambda x: True)


@pytest.mark.parametrize(("controlled", "laid_out"), [(False, False), (True, True)])
@pytest.mark.parametrize(("batch", "size", "guided"), [(1, (8, 8), True), (2, (7, 5), True), (2, (5, 6), False)])
def test_the_prepared_step_is_the_plain_one(unet, batch, size, guided, controlled, laid_out, request):
    case = Case(unet, batch, size, guided, controlled)
    mine = copy.deepcopy(unet)
    if laid_out:
        request.getfixturevalue("as_on_a_gpu")
        as_channels_last(mine)
    assert as_good(case, case.step(mine))


# Broken on purpose


def keys_of_another_text(prepared):
    return replace(
        prepared, conditioning_cache=prepared.unet.prepare(draw(99, *(4, 11, 28)), prepared.vector).conditioning_cache
    )


def keys_and_values_exchanged(prepared):
    return replace(prepared, conditioning_cache=[one.flip(0) for one in prepared.conditioning_cache])


def halves_exchanged(prepared):
    return replace(prepared, conditioning_cache=[one.roll(len(one[0]) // 2, 1) for one in prepared.conditioning_cache])


def blocks_out_of_order(prepared):
    widths = [block.emb_layers[1].out_features for block in prepared.blocks]
    first, second = next((i, i + 1) for i in range(len(widths)) if widths[i] == widths[i + 1])
    blocks = list(prepared.blocks)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    # embedded in one order, and handed out in another
    other = replace(prepared, blocks=blocks)
    object.__setattr__(other, "embed", prepared.embed)
    object.__setattr__(other, "is_current", prepared.is_current)
    return other


def one_vector_for_both_halves(prepared):
    vector = prepared.vector[: len(prepared.vector) // 2]
    return replace(prepared, vector=vector)


BREAKS = {
    "another text": keys_of_another_text,
    "keys and values exchanged": keys_and_values_exchanged,
    "halves exchanged": halves_exchanged,
    "blocks out of order": blocks_out_of_order,
}


class Broken:
    """A UNet whose preparation goes wrong."""

    def __init__(self, unet, change):
        self.unet, self.change = unet, change

    def prepare(self, context, vector):
        return self.change(self.unet.prepare(context, vector))


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_preparation_is_seen(unet, broken):
    case = Case(unet)
    assert not as_good(case, case.step(Broken(unet, BREAKS[broken])))


def test_halves_with_vectors_of_their_own_are_not_shared(unets):
    case = Case(unets["SDXL"])
    assert not as_good(case, case.step(Broken(unets["SDXL"], one_vector_for_both_halves)))


def test_a_norm_without_its_addend_is_seen(unet, sabotage, monkeypatch):
    norm_silu = fused.norm_silu
    case = Case(unet)
    plain = copy.deepcopy(case.errors(case.step(unet)))
    sabotage(fused, "norm_silu", lambda norm, x, addend=None, **_: norm_silu(norm, x))
    wrong = case.step(unet)
    monkeypatch.undo()  # plain steps, to compare with, use it too
    assert case.errors(wrong)[0] > 100 * plain[0]


# What is shared, kept and computed once


@pytest.fixture
def batches(monkeypatch):
    """A list that takes the name of each fused block that runs and how many rows it puts out."""
    seen = []
    for name in ("res_block", "self_attention", "cross_attention", "addend"):
        whole = getattr(fused, name)

        def noted(*given, name=name, whole=whole):
            out = whole(*given)
            seen.append((name, len(out)))
            return out

        monkeypatch.setattr(fused, name, noted)
    return seen


def test_both_halves_share_what_comes_before_the_text(unets, batches):
    unet = unets["SD1"]
    Case(unet).step(unet)
    blocks = [entry for entry in batches if entry[0] != "addend"]
    assert blocks[:3] == [("res_block", 2), ("self_attention", 2), ("cross_attention", 4)]
    assert {rows for _, rows in blocks[3:]} == {4}


def test_with_vectors_the_first_block_is_not_shared(unets, batches):
    Case(unets["SDXL"]).step(unets["SDXL"])
    assert {rows for name, rows in batches if name != "addend"} == {4}


def test_a_hooked_unet_sees_whole_batches_and_computes_everything_in_every_step(unet, batches):
    seen, case = [], Case(unet)
    denoise = Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra, graphs=Graphs(True))
    before = denoise(case.x, SIGMA)
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: seen.append(len(out)))
        for layer in unet.modules()
        if isinstance(layer, ResBlock | SelfAttention | CrossAttention)
    ]
    denoise(case.x, SIGMA)  # is prepared still, and this replay calls the layers too, unlike a GPU's
    seen.clear()
    after = [denoise(case.x, SIGMA) for _ in range(2)]
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * len(hooks)
    assert set(seen) == {4}
    assert all(close(one, before) for one in after)


def test_the_text_and_the_times_are_looked_at_once(unet, spy):
    case = Case(unet)
    sigmas = schedules.linspace(TRAINED, 5)
    once = Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra, sigmas=sigmas, graphs=Graphs(True))
    each = Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra, graphs=Graphs(True))
    projected, embedded = spy(CrossAttention, "keys_values"), spy(UNet, "embed")

    def counts():
        found = len(projected), len(embedded)
        projected.clear()
        embedded.clear()
        return found

    def run(denoise):
        return [denoise(case.x, sigma) for sigma in sigmas.tolist()[:-1]]

    texts = sum(isinstance(layer, CrossAttention) for layer in unet.modules())
    counts()
    together = run(once)
    assert counts() == (texts, 1)
    run(once)
    assert counts() == (0, 0)
    alone = run(each)
    assert counts() == (texts, 5)
    assert all(close(*pair) for pair in zip(together, alone, strict=True))
    once(case.x, 0.9)  # a noise level that is not one of the run's
    assert counts() == (0, 1)


def test_an_item_of_a_batch_is_its_single_run(unet):
    case = Case(unet, batch=3)
    together = case.step(unet)
    for item in range(3):
        alone = Case(unet, batch=3)
        alone.x, alone.extra = case.x[item : item + 1], [one[item : item + 1] for one in case.extra]
        alone.texts = [
            Conditioning(text.context[item : item + 1], None if text.vector is None else text.vector[item : item + 1])
            for text in case.texts
        ]
        assert close(alone.step(unet), together[item : item + 1])
    assert (together[0] - together[1]).abs().max() > 0.1


def test_one_text_serves_a_batch_of_any_size(unet):
    texts = [condition(unet, 1, seed) for seed in (13, 14)]
    denoise = Denoiser(unet, TRAINED, "eps", *texts, extra=[one[:1] for one in Case(unet).extra], graphs=Graphs(True))
    x = Case(unet).x
    both = denoise(x, SIGMA)
    for item in (slice(0, 1), slice(1, 2)):
        assert close(denoise(x[item], SIGMA), both[item])


def test_two_denoisers_of_one_unet_do_not_mix(unet):
    cases = [Case(unet), Case(unet)]
    cases[1].texts.reverse()
    denoisers = [Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra, graphs=Graphs(True)) for case in cases]
    expected = [case.step(unet) for case in cases]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    in_turn = [denoisers[which](cases[which].x, SIGMA) for which in (0, 1, 0, 1)]
    found = {}

    def work(which):
        for _ in range(4):
            found[which] = denoisers[which](cases[which].x, SIGMA)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, out in (*zip((0, 1, 0, 1), in_turn, strict=True), *found.items()):
        assert close(out, expected[which])


def test_unequal_batches_meet(unets):
    unet = unets["SD1"]
    x, t, context = draw(1, 2, 9, 6, 5), torch.tensor([3.0, 700.0]), draw(2, 4, 11, 28)
    whole = unet(torch.cat([x, x]), torch.cat([t, t]), context)
    assert close(unet(x, t, context), whole)
    with pytest.raises(ValueError, match="a batch of 2 does not divide a batch of 3"):
        unet(x, t, context[:3])
    assert torch.equal(repeated(x, 6), torch.cat([x, x, x]))
    assert repeated(x, 1) is x


def test_the_autoencoder_computes_the_same_where_biases_are_added_apart(sabotage, substitute):
    vae = fill(VAE(replace(SD15_INPAINT.vae, channels=8, norm_groups=4, num_res_blocks=1)), 5).eval()
    latents, image = draw(1, 2, 4, 3, 5), draw(2, 2, 3, 24, 40)
    with torch.no_grad():
        before = vae.decode(latents), vae.encode(image)
        substitute(fused, adds_bias_apart=lambda x: True)
        after = vae.decode(latents), vae.encode(image)
        assert all(close(found, expected) for found, expected in zip(after, before, strict=True))
        sabotage(fused, "bias_of", lambda conv: 0 * conv.bias)
        assert not close(vae.decode(latents), before[0])


# The layout of weights


def attentions(unet):
    return [layer for layer in unet.modules() if isinstance(layer, SelfAttention)]


def packed(unet):
    """Whether the weights of every self-attention are multiplied by at once."""
    return {joined(weights(layer)) is not None for layer in attentions(unet)}


def weights(layer):
    return [one.weight for one in layer.packed()]


@pytest.fixture
def scattered(unet):
    """A copy of a UNet of which no weights lie side by side."""
    mine = copy.deepcopy(unet)
    mine.load_state_dict({name: value.clone() for name, value in mine.state_dict().items()}, assign=True)
    return mine


@pytest.fixture
def arranged(scattered):
    """A copy of a UNet, laid out as for a GPU."""
    mine = copy.deepcopy(scattered)
    as_channels_last(mine)
    return mine


def test_packing_keeps_names_and_values(scattered, arranged):
    before, after = scattered.state_dict(), arranged.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (packed(scattered), packed(arranged)) == ({False}, {True})
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in after.values()}
    assert sum(memory.values()) == sum(weight.nbytes for weight in before.values())
    assert all(layer.to_q.weight.data_ptr() % 64 == 0 for layer in attentions(arranged))


@pytest.mark.parametrize(
    "move",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model.double().float()],
    ids=["copied", "pickled", "cast"],
)
def test_a_model_that_comes_anew_is_packed(scattered, move):
    moved = move(scattered)
    assert packed(moved) == {True}
    assert all(torch.equal(*pair) for pair in zip(moved.parameters(), scattered.parameters(), strict=True))


def changed_in_place(model):
    for weight in model.parameters():
        weight.mul_(0.9)


def assigned(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)


def copied_into(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def one_weight_replaced(model):
    for layer in attentions(model):
        layer.to_k.weight = torch.nn.Parameter(0.9 * layer.to_k.weight, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "stays"),
    [(changed_in_place, True), (copied_into, True), (assigned, False), (one_weight_replaced, False)],
)
def test_changed_weights_are_the_ones_that_count(unet, arranged, change, stays):
    plain = copy.deepcopy(unet)
    change(plain)
    change(arranged)
    assert packed(arranged) == {stays}
    case = Case(plain)
    assert as_good(case, case.step(arranged))
    assert not as_good(case, case.step(unet))


def test_every_part_of_a_joined_weight_has_its_gradient(arranged):
    layer = attentions(arranged)[0].requires_grad_()
    layer(draw(1, 1, 3, layer.to_q.in_features)).square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in weights(layer))


def test_only_what_lies_in_order_is_joined():
    block = draw(1, 9, 4)
    a, b, c = block.split(3)
    assert joined((a, b, c)).data_ptr() == block.data_ptr()
    assert torch.equal(joined((a, b, c)), block)
    for parts in ((a, c), (b, a), (a, b.clone()), (a, b.T.contiguous().T), (a.requires_grad_(), b)):
        assert joined(parts) is None


def test_attention_to_several_sources_is_their_weighted_sum(unet):
    """Each source has a softmax of its own; as hooked layers compute it, and with keys and values prepared."""
    width, dim = unet.config.context_dim, unet.config.vector_dim
    vector = None if dim is None else draw(20, 2, dim)
    one, two = draw(12, 2, 5, width), draw(13, 2, 9, width)
    attend = next(module for module in unet.modules() if isinstance(module, CrossAttention))
    tokens = draw(14, 2, 7, attend.to_q.in_features)
    with torch.no_grad():
        bias = attend.to_out[0].bias
        alone = [attend(tokens, context) - bias for context in (one, two)]
        together = attend(tokens, [(one, 1.0), (two, 0.25)]) - bias
        assert close(together, alone[0] + 0.25 * alone[1])

        x, sources = draw(15, 2, 4, 8, 8), [(one, 1.0), (two, 0.25)]
        extra = draw(16, 2, 1, 8, 8), draw(17, 2, 4, 8, 8)
        fed = torch.cat([x, *extra], 1)
        t = torch.full((2,), 300.0)
        plain = unet(fed, t, sources, vector)
        prepared = unet.prepare(sources, vector)
        found = prepared(fed, prepared.embed(t[:1])[0], prepared.conditioning_cache, None)
        assert close(found, plain)
        assert close(unet(fed, t, [(one, 1.0)], vector), unet(fed, t, one, vector))
        hook = attend.to_k.register_forward_hook(lambda *_: None)
        assert unet.prepare(sources, vector) is None
        assert close(unet(fed, t, sources, vector), plain)
        hook.remove()

        text = Conditioning(one, vector, ((two, 0.25),))
        denoised = Denoiser(unet, TRAINED, "eps", text, extra=extra)(x, 2.0)
        hook = attend.to_k.register_forward_hook(lambda *_: None)
        assert close(Denoiser(unet, TRAINED, "eps", text, extra=extra)(x, 2.0), denoised)
        hook.remove()
        assert not close(Denoiser(unet, TRAINED, "eps", Conditioning(one, vector), extra=extra)(x, 2.0), denoised)
