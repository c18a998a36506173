"""Attention by blocks of queries on the CPU against float64, and where torch's own runs."""

from __future__ import annotations

import importlib

import interpreter
import pytest
import torch
from forming import choose
from sdinpaint_kernels import attention, attention_blocks, backend

own = importlib.import_module("sdinpaint_kernels.attention")

SHAPES = [(2, 64, 64, 3, 40), (1, 100, 70, 2, 64), (1, 65, 200, 1, 16), (2, 40, 40, 2, 15)]
ROUNDED = 3.5
"""How many times torch's error is allowed: torch keeps scores in float32, here they are rounded to bfloat16."""


def draw(batch, queries, keys, heads, head_dim, spread=1.0):
    """q, k and v in bfloat16."""
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(batch, tokens, heads, head_dim) for tokens in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return (spread * q).bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.fixture(autouse=True)
def small(substitute):
    """So that small inputs are cut into several blocks."""
    substitute(attention_blocks, LEAST=8, MOST=24)
    choose(substitute, "blocks")


@pytest.fixture
def blocks(monkeypatch):
    """Give the list of results of the calls that ran by blocks."""
    if not backend._cpu_supports(torch.bfloat16):
        pytest.skip("runs on CPUs with avx512_bf16 or AMX; on this one torch's own attention runs: see the last test")
    seen = []

    def run(q, k, v):
        seen.append(attention_blocks.by_blocks(q, k, v))
        return seen[-1]

    monkeypatch.setattr(own, "by_blocks", run)
    return seen


def error(given, **options):
    exact = attention(*(one.double() for one in given))
    return interpreter.relative(attention(*given, **options), exact)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_nearly_as_exact_as_torch(shape, spread, blocks):
    given = draw(*shape, spread)
    assert error(given) <= ROUNDED * error(given, kernels="torch")
    assert len(blocks) == 1


def test_it_takes_heads_as_views_of_a_projection(blocks):
    x = torch.randn(2, 64, 3 * 2 * 40).bfloat16()
    given = x.unflatten(-1, (3, 2, 40)).unbind(2)
    assert error(given) <= ROUNDED * error(given, kernels="torch")
    assert blocks[0].shape == (2, 64, 2, 40)


def test_a_shift_of_all_scores_changes_nothing(blocks):
    """Scores far beyond what exp can take, all alike: what is subtracted must be near them."""
    q, k, v = draw(1, 64, 64, 1, 16)
    q[..., 0], k[..., 0] = 40, 100
    assert error((q, k, v)) <= ROUNDED * error((q, k, v), kernels="torch") + 0.02  # scores of 1000 are that coarse
    assert blocks[0] is not None


def test_a_key_out_of_all_proportion_goes_to_torch(blocks):
    q, k, v = draw(1, 64, 64, 1, 16)
    q[..., 0] = 30
    k[:, 5, :, 0] = 60  # not among those that are looked at
    torchs = attention(q, k, v, kernels="torch")
    assert torch.equal(attention(q, k, v), torchs)
    assert blocks == [None]
    assert torch.isfinite(torchs).all()


def test_without_a_look_at_the_keys_it_would_overflow(blocks, sabotage):
    q, k, v = draw(1, 64, 64, 1, 16)
    q[..., 0], k[..., 0] = 40, 100
    sabotage(Tensor := torch.Tensor, "amax", lambda x, **_: Tensor.new_zeros(x, (len(x), 1)))
    attention(q, k, v)
    assert blocks == [None]


PLAIN = {
    "float32": lambda given: tuple(one.float() for one in given),
}


@pytest.mark.parametrize("name", PLAIN)
def test_torch_does_what_would_not_gain(name, blocks):
    given = PLAIN[name](draw(1, 64, 64, 2, 40))
    assert torch.equal(attention(*given), attention(*given, kernels="torch"))
    assert not blocks


def test_torch_runs_where_it_is_requested(blocks, kernel_setting):
    q, k, v = draw(1, 64, 64, 2, 40)
    attention(q, k, v, causal=True)
    attention(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None
    kernel_setting("torch")
    attention(q.detach(), k, v)
    assert not blocks


def test_torch_s_own_runs_where_onednn_has_no_bfloat16(monkeypatch, forbid):
    monkeypatch.setattr(backend, "_cpu_supports", lambda dtype: dtype == torch.float32)
    forbid(own, "by_blocks")
    given = draw(*SHAPES[0])
    assert torch.equal(attention(*given), attention(*given, kernels="torch"))


def test_the_scores_of_a_block_do_not_grow_with_the_keys(blocks, substitute):
    substitute(attention_blocks, SCORES=8 * 200, LEAST=4, MOST=64)
    sizes, product = [], attention_blocks.product

    def measured(x, weight):
        sizes.append(len(x) * len(weight))
        return product(x, weight)

    substitute(attention_blocks, product=measured)
    for keys in (50, 200, 400):
        sizes.clear()
        attention(*draw(1, 300, keys, 1, 16))
        assert max(sizes) <= max(8 * 200, 4 * keys) * torch.get_num_threads()
