from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import aot
import interpreted_attention
import pytest
import torch
from sdinpaint_kernels import attention, backend
from torch.nn.functional import scaled_dot_product_attention

module = importlib.import_module("sdinpaint_kernels.attention")  # the package's attribute is the function
ODD_SHAPES = [(3, 2, 40, 1000, 1000), (1, 3, 160, 65, 333), (2, 5, 64, 77, 231), (1, 1, 8, 1, 1), (2, 3, 120, 130, 154)]


def packed(batch, heads, head_dim, queries, keys, dtype=torch.float16, device="cpu"):
    """Views of one packed projection, or of a packed context."""
    if queries == keys:
        return torch.randn(batch, queries, 3, heads, head_dim, dtype=dtype, device=device).unbind(2)
    q = torch.randn(batch, queries, heads, head_dim, dtype=dtype, device=device)
    return q, *torch.randn(batch, keys, 2, heads, head_dim, dtype=dtype, device=device).unbind(2)


def by_torch(*heads, causal=False):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), is_causal=causal).transpose(1, 2)


# What the kernel computes.


@pytest.fixture(scope="module")
def interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    script = Path(interpreted_attention.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def allowed(case, torch_error):
    """Twice torch's own error and a quarter of the last place: the interpreter does not round to bfloat16 but cuts."""
    dtype = getattr(torch, case.split()[0])
    return 2 * torch_error + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("case", interpreted_attention.CASES)
def test_the_kernel_is_as_exact_as_torch(interpreted, case):
    ours, torchs = interpreted[case]
    assert ours <= allowed(case, torchs)


@pytest.mark.parametrize("case", interpreted_attention.BREAKS)
def test_a_broken_kernel_is_noticed(interpreted, case):
    ours, torchs = interpreted[f"broken {case}"]
    assert not ours <= 10 * allowed(case, torchs)


# How it is launched.


def record(*tensors):
    with aot.recording("attention_kernel") as launches:
        out = module.launch(*tensors)
    (launch,) = launches
    return out, launch


def test_views_of_a_packed_projection_are_not_copied():
    q, k, v = packed(2, 8, 40, 4096, 4096)
    out, launch = record(q, k, v)
    told = launch.arguments
    assert [told[name].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]
    assert (told["Q_TOKEN"], told["Q_HEAD"], told["V_TOKEN"], told["V_HEAD"]) == (960, 40, 960, 40)
    assert (told["OUT_TOKEN"], told["OUT_HEAD"]) == (320, 40)
    assert (told["q_batch"] * 8, told["out_batch"] * 8) == (4096 * 960, 4096 * 320)
    assert (told["queries"], told["keys"], told["out"] is out) == (4096, 4096, True)
    assert launch.grid == (4096 // told["BLOCK_M"], 8, 2)
    assert told["SCALE"] == pytest.approx(math.log2(math.e) / 40**0.5)


def test_a_context_shared_by_the_batch_has_a_batch_stride_of_zero():
    q, k, v = packed(1, 8, 40, 100, 77)
    _, launch = record(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    assert [launch.arguments[f"{name}_batch"] for name in "qkv"] == [0, 0, 0]
    assert launch.grid[2] == 3


@pytest.mark.parametrize(
    ("keys", "tiles"),
    [(77, (64, 16, True)), (64, (64, 0, True)), (16, (16, 0, True)), (3, (16, 0, True)), (90, (64, 32, True))],
)
def test_a_short_context_is_read_whole(keys, tiles):
    told = record(*packed(1, 2, 40, 64, keys))[1].arguments
    assert (told["BLOCK_N"], told["BLOCK_TAIL"], told["WHOLE"]) == tiles


@pytest.mark.parametrize("keys", [4096, 9216, 1024, 2304, 256, 576, 144, 154, 231, 1000])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_tiles_cover_a_long_context_and_what_does_not_fill_one_is_masked(head_dim, keys):
    told = record(*packed(1, 1, head_dim, keys, keys))[1].arguments
    rest = keys % told["BLOCK_N"]
    assert not told["WHOLE"]
    assert told["BLOCK_TAIL"] >= rest
    assert (told["BLOCK_TAIL"] == 0) == (rest == 0)


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (160, (128, 32)), (8, (16, 0)), (24, (32, 0)), (56, (64, 0))],
)
def test_a_head_is_split_rather_than_padded(head_dim, parts):
    assert module._split(head_dim) == parts


def test_one_kernel_serves_every_batch_and_length():
    told = {
        aot.source(record(*packed(batch, 8, 40, tokens, tokens))[1])
        for batch, tokens in product((1, 2, 3), (4096, 9216, 6144, 5120))
    }
    assert len(told) == 1


def test_memory_that_does_not_start_on_16_bytes_goes_to_torch():
    flat = torch.randn(3 * 64 * 80 + 1, dtype=torch.float16)[1:]
    q, k, v = flat.view(3, 1, 64, 2, 40).unbind(0)
    with aot.recording("attention_kernel") as launches:
        out = module.launch(q, k, v)
    assert launches == []
    assert torch.equal(out, by_torch(q, k, v))


# What goes to torch.


@pytest.fixture
def no_obstacle(monkeypatch):
    """Give no_obstacle(owner, *names): functions that look for obstacles find none."""

    def change(owner, *names):
        for name in names:
            monkeypatch.setattr(owner, name, lambda *_: None)

    return change


half = torch.float16
REFUSED = {
    "causal": (packed(1, 2, 40, 8, 8), {"causal": True}),
    "dtype": (packed(1, 2, 40, 8, 8, torch.float64), {}),
    "multiple of 8": (packed(1, 2, 20, 8, 8), {}),
    "up to 160": (packed(1, 1, 512, 8, 8), {}),
    "no keys": (packed(1, 2, 40, 8, 0), {}),
    "strides": (tuple(x.transpose(1, 3) for x in packed(1, 8, 8, 8, 8)), {}),
    "32 bits": (tuple(torch.empty(1, 2**20, 8, 512, dtype=half, device="meta")[..., :40] for _ in range(3)), {}),
    "grid": (packed(2**16, 1, 8, 1, 1), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_calls_that_the_kernel_cannot_take_are_told_apart(reason):
    tensors, settings = REFUSED[reason]
    assert reason in module._obstacle(*tensors, settings.get("causal", False))


@pytest.mark.parametrize("reason", [reason for reason in REFUSED if reason not in {"32 bits", "no keys"}])
def test_calls_that_the_kernel_cannot_take_run_in_torch(reason, no_obstacle):
    no_obstacle(backend, "_call_obstacle", "_machine_obstacle")
    tensors, settings = REFUSED[reason]
    assert torch.equal(attention(*tensors, **settings), by_torch(*tensors, **settings))


def shaped(batch, queries, heads, head_dim):
    """A stand-in for a tensor on a GPU, with what the choice of a kernel looks at."""
    return SimpleNamespace(shape=(batch, queries, heads, head_dim), is_cuda=True, device="cuda:0")


@pytest.mark.parametrize("row", module.FASTER_IN_TORCH)
def test_torch_runs_where_it_was_faster_on_the_gpu_that_was_measured(row, monkeypatch):
    monkeypatch.setattr(module, "_is_measured", lambda device: device == "cuda:0")
    faster = shaped(2, row.queries, row.heads // 2, row.head_dim)
    assert f"{row.torch_us} us, the kernel {row.kernel_us} us" in module._why_torch(faster, faster)
    assert row.torch_us < row.kernel_us
    fewer = (
        shaped(2, row.queries // 2, row.heads // 2, row.head_dim),
        shaped(1, row.queries, row.heads // 2, row.head_dim),
        shaped(2, row.queries, row.heads // 2, row.head_dim + 8),
    )
    assert [module._why_torch(q, q) for q in fewer] == [None] * 3
    assert module._why_torch(faster, shaped(2, 77, row.heads // 2, row.head_dim)) is None
    monkeypatch.setattr(module, "_is_measured", lambda device: False)
    assert module._why_torch(faster, faster) is None


@pytest.mark.parametrize(
    ("capability", "cudnn", "measured"), [((9, 0), 91900, True), ((8, 9), 91900, False), ((9, 0), 91002, False)]
)
def test_what_was_measured_speaks_of_hopper_and_its_cudnn(capability, cudnn, measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    assert module._is_measured.__wrapped__(torch.device("cuda", 0)) is measured


@pytest.mark.parametrize(("asked", "looks"), [("auto", True), ("triton", False), ("torch", False)])
def test_who_asks_for_an_implementation_gets_it_even_where_it_is_slower(asked, looks, monkeypatch, spy):
    looked = spy(module, "_why_torch")
    monkeypatch.setattr(backend, "choose", lambda *_, **told: backend.REQUESTED)
    attention(*packed(1, 2, 40, 8, 8), kernels=asked)
    assert bool(looked) is looks


def test_calls_that_the_kernel_can_take_have_no_obstacle():
    for _, (batch, heads, head_dim, queries, keys, _) in aot.shapes("attention"):
        q = torch.empty(batch, queries, heads, head_dim, dtype=half, device="meta")
        k = torch.empty(batch, keys, heads, head_dim, dtype=half, device="meta")
        assert module._obstacle(q, k, k, False) is None


def test_rows_at_a_time_are_the_same_attention(substitute):
    q, k, v = packed(2, 1, 512, 100, 130, torch.float64)
    substitute(module, ROWS_BYTES=8 * 2 * 130 * 30)  # 30 rows
    assert torch.allclose(module._by_rows(q, k, v), by_torch(q, k, v), rtol=0, atol=1e-13)


# The operation.


def test_the_operation_passes_torchs_own_checks():
    q, k, v = packed(2, 3, 40, 10, 12, torch.float32)
    torch.library.opcheck(module._operation, (q, k, v))


def test_a_compiler_keeps_the_operation(no_obstacle):
    no_obstacle(backend, "_call_obstacle")
    no_obstacle(module, "_obstacle")
    seen = []

    def keep(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    q, k, v = packed(2, 3, 40, 10, 12, torch.float32)
    out = torch.compile(attention, fullgraph=True, backend=keep)(q, k, v)
    assert module._operation in seen
    assert torch.equal(out, by_torch(q, k, v))


def test_gradients_flow_through_torch():
    q, k, v = (x.requires_grad_() for x in packed(1, 2, 8, 5, 7, torch.float64))
    assert torch.autograd.gradcheck(attention, (q, k, v))


# Bad input.


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q, k, v: (q[0], k, v), r"q has shape \(10, 3, 40\) and strides \(360, 40, 1\)"),
        (lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]), r"k has shape \(2, 10, 2, 40\)"),
        (lambda q, k, v: (q, k, v[:, :9]), r"v has shape \(2, 9, 3, 40\)"),
        (lambda q, k, v: (q, k[..., :32], v[..., :32]), r"k has shape \(2, 10, 3, 32\)"),
        (lambda q, k, v: (q[:1], k, v), r"q has shape \(1, 10, 3, 40\)"),
        (lambda q, k, v: (q, k.float(), v), "k has .* torch.float32 on cpu"),
        (lambda q, k, v: (q, k, v.to("meta")), "v has .* torch.float16 on meta"),
    ],
)
def test_what_does_not_fit_together_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        attention(*change(*packed(2, 3, 40, 10, 10)))


@pytest.mark.parametrize("shape", [(0, 2, 8, 4, 4), (2, 0, 8, 4, 4), (2, 2, 8, 0, 4), (2, 2, 0, 4, 4)])
def test_nothing_in_gives_nothing_out(shape):
    q, k, v = packed(*shape)
    assert attention(q, k, v).shape == q.shape


# On a GPU.


def relative_error(out, q, k, v):
    """Return the errors of the last head of the last sample, against float64."""
    q, k, v = (x[-1, :, -1].double() for x in (q, k, v))
    exact = torch.cat([torch.softmax(part @ k.T / q.shape[1] ** 0.5, dim=1) @ v for part in q.split(2048)])
    return float((out[-1, :, -1].double() - exact).norm() / exact.norm())


def distinct_shapes():
    """Return the last of the released models' shapes for each configuration."""
    found = {}
    for _, (batch, heads, head_dim, queries, keys, _) in aot.shapes("attention"):
        found[tuple(module._constants(head_dim, queries, keys).items())] = (batch, heads, head_dim, queries, keys)
    return list(found.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(distinct_shapes(), [torch.bfloat16]), *product(ODD_SHAPES, [torch.float16])]
)
def test_on_a_gpu_the_kernel_is_exact_and_repeatable_and_captured(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "_empty", lambda q, k, v: torch.full(q.shape, torch.nan, dtype=dtype, device="cuda"))
    q, k, v = packed(*shape, dtype, "cuda")
    out = module.launch(q, k, v)
    assert bool(out.isfinite().all())
    assert relative_error(out, q, k, v) <= (1e-3 if dtype == torch.float16 else 1e-2)
    assert torch.equal(out, module.launch(q, k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module.launch(q, k, v)
    q.mul_(-1)
    graph.replay()
    assert torch.equal(captured, module.launch(q, k, v))


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_runs():
    assert backend.choose("attention", torch.empty(0, device="cuda")) == backend.TRITON
    q, k, v = packed(2, 8, 40, 256, 256, torch.float16, "cuda")
    assert torch.equal(attention(q, k, v), module.launch(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("row", module.FASTER_IN_TORCH)
def test_on_a_gpu_what_torch_puts_out_needs_no_copy_to_join_its_heads(row):
    q, k, v = packed(2, row.heads // 2, row.head_dim, row.queries, row.queries, torch.bfloat16, "cuda")
    out = attention(q, k, v, kernels="torch")
    assert out.is_contiguous()
    assert relative_error(out, q, k, v) <= 1e-2


@pytest.mark.gpu
def test_on_a_gpu_a_wide_head_is_exact_in_bounded_memory():
    q, k, v = packed(1, 1, 512, 16384, 16384, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 8 * module.ROWS_BYTES
    assert relative_error(out, q, k, v) <= 1e-2


@pytest.mark.gpu
def test_on_a_gpu_inductor_keeps_the_operation():
    q, k, v = packed(2, 8, 40, 256, 256, torch.float16, "cuda")
    compiled = torch.compile(lambda q, k, v: attention(q * 1.5, k, v) + 1, fullgraph=True)
    assert torch.allclose(compiled(q, k, v), attention(q * 1.5, k, v) + 1, rtol=0, atol=4e-3)
