"""A prepared step gives the numbers of the plain UNet: what is computed once, shared, packed and kept is the same."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from builders import fill

from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, UNet, layers
from sdinpaint.models.layers import joined, lay_out, repeated
from sdinpaint.models.unet import CrossAttention, ResBlock, SelfAttention
from sdinpaint.sampling import Conditioning, Denoiser, schedules

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
    """What a ControlNet might add, for each input block and the middle."""
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
    """The same in float64, at any depth."""
    if isinstance(given, torch.Tensor):
        return given.double()
    if isinstance(given, Conditioning):
        return Conditioning(given.context.double(), None if given.vector is None else given.vector.double())
    return [double(one) for one in given]


class Case:
    """One step: the pictures, the texts and the ControlNet."""

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
        )
        return denoise(change(self.x), SIGMA)

    def errors(self, step):
        """Of `step` and of the plain one, against float64."""
        exact = self.step(copy.deepcopy(self.unet).double().forward, precise=True)
        return [float((out - exact).norm() / exact.norm()) for out in (step, self.step(self.unet.forward))]


def as_good(case, step):
    ours, plain = case.errors(step)
    return ours <= 2 * plain + TINY


def close(found, expected):
    """Equal but for the order of sums."""
    return float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Biases of convolutions go with what is added next."""
    monkeypatch.setattr(layers, "adds_bias_apart", lambda x: True)


@pytest.mark.parametrize(("controlled", "laid_out"), [(False, False), (True, True)])
@pytest.mark.parametrize(("batch", "size", "guided"), [(1, (8, 8), True), (2, (7, 5), True), (2, (5, 6), False)])
def test_the_prepared_step_is_the_plain_one(unet, batch, size, guided, controlled, laid_out, request):
    case = Case(unet, batch, size, guided, controlled)
    mine = copy.deepcopy(unet)
    if laid_out:
        request.getfixturevalue("as_on_a_gpu")
        lay_out(mine)
    assert as_good(case, case.step(mine))


# Broken on purpose


def keys_of_another_text(prepared):
    return replace(prepared, kept=prepared.unet.prepare(draw(99, *(4, 11, 28)), prepared.vector).kept)


def keys_and_values_exchanged(prepared):
    return replace(prepared, kept=[kept.flip(0) for kept in prepared.kept])


def halves_exchanged(prepared):
    return replace(prepared, kept=[kept.roll(len(kept[0]) // 2, 1) for kept in prepared.kept])


def blocks_out_of_order(prepared):
    widths = [block.emb_layers[1].out_features for block in prepared.blocks]
    first, second = next((i, i + 1) for i in range(len(widths)) if widths[i] == widths[i + 1])
    blocks = list(prepared.blocks)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    # embedded in one order, and handed out in another
    other = replace(prepared, blocks=blocks)
    object.__setattr__(other, "embed", prepared.embed)
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


def test_a_norm_without_its_addend_is_seen(unet, monkeypatch):
    forward = layers.GroupNorm.forward
    case = Case(unet)
    plain = copy.deepcopy(case.errors(case.step(unet)))
    monkeypatch.setattr(layers.GroupNorm, "forward", lambda self, x, addend=None: forward(self, x))
    wrong = case.step(unet)
    monkeypatch.undo()
    assert case.errors(wrong)[0] > 100 * plain[0]


# What is shared, kept and computed once


def batches(unet, run):
    """How many rows each residual block and each attention puts out, in order."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: seen.append((type(layer).__name__, len(out))))
        for layer in unet.modules()
        if isinstance(layer, ResBlock | SelfAttention | CrossAttention)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_both_halves_share_what_comes_before_the_text(unets):
    unet = unets["SD1"]
    seen = batches(unet, lambda: Case(unet).step(unet))
    assert seen[:3] == [("ResBlock", 2), ("SelfAttention", 2), ("CrossAttention", 4)]
    assert {rows for _, rows in seen[3:]} == {4}


def test_with_vectors_the_first_block_is_not_shared(unets):
    seen = batches(unets["SDXL"], lambda: Case(unets["SDXL"]).step(unets["SDXL"]))
    assert {rows for _, rows in seen} == {4}


def calls_of(unet, names, run):
    """How often the modules whose names end so are called."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *told: seen.append(1))
        for name, layer in unet.named_modules()
        if name.endswith(names)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return len(seen)


def test_the_text_and_the_times_are_looked_at_once(unet):
    case = Case(unet)
    sigmas = schedules.linspace(TRAINED, 5)
    once = Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra, sigmas=sigmas)
    each = Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra)

    def run(denoise):
        return [denoise(case.x, sigma) for sigma in sigmas.tolist()[:-1]]

    texts = sum(isinstance(layer, CrossAttention) for layer in unet.modules())
    blocks = sum(isinstance(layer, ResBlock) for layer in unet.modules())
    assert calls_of(unet, ("attn2.to_k", "attn2.to_v"), lambda: run(once)) == 2 * texts
    assert calls_of(unet, ("time_embed", "emb_layers", "attn2.to_k"), lambda: run(once)) == 0
    assert calls_of(unet, ("emb_layers",), lambda: run(each)) == 5 * blocks
    for together, alone in zip(run(once), run(each), strict=True):
        assert close(together, alone)
    assert calls_of(unet, ("time_embed",), lambda: once(case.x, 0.9)) == 1  # one that was not foreseen


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
    denoise = Denoiser(unet, TRAINED, "eps", *texts, extra=[one[:1] for one in Case(unet).extra])
    x = Case(unet).x
    both = denoise(x, SIGMA)
    for item in (slice(0, 1), slice(1, 2)):
        assert close(denoise(x[item], SIGMA), both[item])


def test_two_denoisers_of_one_unet_do_not_mix(unet):
    cases = [Case(unet), Case(unet)]
    cases[1].texts.reverse()
    denoisers = [Denoiser(unet, TRAINED, "eps", *case.texts, extra=case.extra) for case in cases]
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
    with pytest.raises(ValueError, match="a batch of 2 meets one of 3"):
        unet(x, t, context[:3])
    assert torch.equal(repeated(x, 6), torch.cat([x, x, x]))
    assert repeated(x, 1) is x


def test_the_autoencoder_computes_the_same_where_biases_are_added_apart(monkeypatch):
    vae = fill(VAE(replace(SD15_INPAINT.vae, channels=8, norm_groups=4, num_res_blocks=1)), 5).eval()
    latents, image = draw(1, 2, 4, 3, 5), draw(2, 2, 3, 24, 40)
    with torch.no_grad():
        before = vae.decode(latents), vae.encode(image)
        monkeypatch.setattr(layers, "adds_bias_apart", lambda x: True)
        after = vae.decode(latents), vae.encode(image)
        assert all(close(found, expected) for found, expected in zip(after, before, strict=True))
        monkeypatch.setattr(layers, "bias", lambda conv: 0 * conv.bias)
        assert not close(vae.decode(latents), before[0])


# The layout of weights


def attentions(unet):
    return [layer for layer in unet.modules() if isinstance(layer, SelfAttention)]


def packed(unet):
    """Whether the weights of every self-attention are multiplied by without a copy."""
    return {joined(layer.packed()).data_ptr() == layer.to_q.weight.data_ptr() for layer in attentions(unet)}


@pytest.fixture
def arranged(unet):
    """A copy of a UNet, laid out as for a GPU."""
    mine = copy.deepcopy(unet)
    lay_out(mine)
    return mine


def test_laying_out_keeps_names_and_values(unet, arranged):
    before, after = unet.state_dict(), arranged.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (packed(unet), packed(arranged)) == ({False}, {True})
    convs = [layer for layer in arranged.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in after.values()}
    assert sum(memory.values()) == sum(weight.nbytes for weight in before.values())


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


@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: model.double().float()])
def test_a_moved_model_is_right_without_being_laid_out_again(unet, arranged, move):
    case = Case(unet)
    assert as_good(case, case.step(move(arranged)))


def test_every_part_of_a_joined_weight_has_its_gradient(arranged):
    layer = attentions(arranged)[0].requires_grad_()
    layer(draw(1, 1, 3, layer.to_q.in_features)).square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in layer.packed())


def test_only_what_lies_in_order_is_joined_without_a_copy():
    block = draw(1, 9, 4)
    a, b, c = block.split(3)
    assert joined((a, b, c)).data_ptr() == block.data_ptr()
    assert torch.equal(joined((a, b, c)), block)
    for parts in ((a, c), (b, a), (a, b.clone()), (a, b.T.contiguous().T), (a.requires_grad_(), b)):
        found = joined(parts)
        assert torch.equal(found, torch.cat(parts))
        assert found.data_ptr() != parts[0].data_ptr()
