"""The roofline of this machine: the shortest time for an amount of arithmetic and memory traffic, at measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sdinpaint_kernels  # noqa: F401 - registers the operations that are counted below
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdinpaint.bench.timing import timed

__all__ = ["Roofline", "flop_count", "peak_bandwidth", "peak_flops"]

Shape = torch.Size

SECONDS = 0.2
"""Seconds for which calls of each size are repeated."""
LONG = 0.05
"""Seconds of a call after which no larger one is tried: it would not be faster, and some dtypes are very slow."""
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
"""Sides of the square matrices that are multiplied."""
MAPS = {"cpu": (8, 16, 32, 64), "cuda": (32, 64, 128, 256)}
"""Height and width of the convolved feature maps, two of 320 channels."""
COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of the copied memory: several times the size of the caches."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The arithmetic and memory traffic of a piece of work, and the shortest time that the machine needs for them."""

    flops: int
    """Operations of the plain formula; an algorithm with fewer may take less time than the roofline."""
    bytes: int
    """Bytes read and written once, from memory; work in caches may take less. 0 where arithmetic alone counts."""
    dtype: torch.dtype
    device: str

    @property
    def seconds(self) -> float:
        """The time of the arithmetic or of the traffic, whichever is longer."""
        arithmetic = self.flops / peak_flops(self.dtype, self.device) if self.flops else 0.0
        return max(arithmetic, self.bytes / peak_bandwidth(self.device) if self.bytes else 0.0)

    def percent(self, seconds: float) -> float:
        """Compute the percentage of the roofline that a measured time reaches.

        Args:
            seconds: the measured time.

        Returns:
            100 where the work took no longer than the roofline.
        """
        return 100 * self.seconds / seconds


def flop_count(call: Callable[[], object]) -> int:
    """Count the operations of the matrix products and convolutions of one call, two for each multiplication.

    On the meta device nothing is computed, and convolutions count by the plain formula; on a CPU sdinpaint may use an
    algorithm with fewer products.

    Args:
        call: is run once.

    Returns:
        The number of operations.
    """
    with FlopCounterMode(display=False, custom_mapping=ALSO_PRODUCTS) as counter:
        call()
    return int(counter.get_total_flops())


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Measure the rate of the fastest large matrix product or 3 x 3 convolution, once for each number of threads.

    Args:
        dtype: of the operands.
        device: where it is measured.

    Returns:
        Operations per second.
    """
    return _peak_flops(dtype, device, torch.get_num_threads())


def peak_bandwidth(device: str) -> float:
    """Measure the memory bandwidth of a large copy, once for each number of threads.

    Args:
        device: where it is measured.

    Returns:
        Bytes per second, read and written.
    """
    return _peak_bandwidth(device, torch.get_num_threads())


def _attention(q: Shape, k: Shape, *_: object, **options: object) -> int:
    """Count torch's attention over (B, heads, N, D) and (B, heads, M, D)."""
    return 4 * q.numel() * k[2]


def _our_attention(q: Shape, k: Shape, *_: object, **options: object) -> int:
    """Count the attention of sdinpaint_kernels over (B, N, heads, D) and (B, M, heads, D)."""
    return 4 * q.numel() * k[1]


def _linear(x: Shape, weight: Shape, *_: object, **options: object) -> int:
    """Count oneDNN's linear layer over (..., C) and (O, C)."""
    return 2 * x.numel() * weight[0]


def _batched(a: Shape, b: Shape, *_: object, **options: object) -> int:
    """Count a product of (B, N, K) and (B, K, M), also where the dtype of the output is given."""
    return 2 * a.numel() * b[2]


ALSO_PRODUCTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.bmm: _batched,
    torch.ops.sdinpaint.attention: _our_attention,
}
"""Operations that torch's counter does not know, or fails on."""
if torch.backends.mkldnn.is_available():
    ALSO_PRODUCTS[torch.ops.mkldnn._linear_pointwise] = _linear


@cache
@torch.inference_mode()
def _peak_flops(dtype: torch.dtype, device: str, threads: int) -> float:
    kind, generator = torch.device(device).type, torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def product(side: int) -> Callable[[], Tensor]:
        a, b = draw(side, side), draw(side, side)
        return lambda: a @ b

    def convolution(side: int) -> Callable[[], Tensor]:
        image, kernel = (
            draw(*shape).contiguous(memory_format=torch.channels_last)
            for shape in ((2, 320, side, side), (320, 320, 3, 3))
        )
        return lambda: F.conv2d(image, kernel, padding=1)

    return max(_best_rate(map(product, SIDES[kind]), device), _best_rate(map(convolution, MAPS[kind]), device))


@cache
def _peak_bandwidth(device: str, threads: int) -> float:
    source = torch.ones(COPIED[torch.device(device).type], dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _best_rate(calls: Iterable[Callable[[], object]], device: str) -> float:
    """Measure the best rate of calls of growing size, up to the first that takes longer than LONG."""
    best = 0.0
    for call in calls:
        flops = flop_count(call)  # also the first run, which is slower
        seconds = _fastest(call, device)
        best = max(best, flops / seconds)
        if seconds > LONG:
            break
    return best


def _fastest(call: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of the calls that fit into SECONDS, at least two."""
    run, end = timed(call, device), time.perf_counter() + SECONDS
    best = run()
    while True:
        best = min(best, run())
        if time.perf_counter() > end:
            return best
