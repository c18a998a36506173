"""The kind of the processor: the widest instruction set that torch's libraries may use on it."""

from __future__ import annotations

import functools
import os
import platform

import torch

__all__ = ["KINDS", "cpu_kind"]

KINDS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "other")
"""The kinds, the widest instruction set first."""
VARIABLE = "SDINPAINT_CPU_KIND"
"""The environment variable that names another kind than this machine's."""
ONEDNN = "ONEDNN_MAX_CPU_ISA"
"""The environment variable of oneDNN that keeps it from using wider instructions.

Source: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
"""
HIGHEST = {
    "SSE41": "other",
    "AVX": "other",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_bf16",
    "AVX10_1_512": "avx512_bf16",
}
"""Value of that variable -> the highest kind that it allows; others allow all."""
TESTS = {
    "amx_bf16": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512": "_is_avx512_supported",
    "avx2": "_is_avx2_supported",
}
"""Kind -> the function of `torch.cpu` that asks the processor."""


@functools.cache
def cpu_kind() -> str:
    """Return the kind of this machine's processor, or the one that the environment names.

    Returns:
        One of KINDS.

    Raises:
        ValueError: SDINPAINT_CPU_KIND names none of them.
    """
    if named := os.environ.get(VARIABLE):
        if named not in KINDS:
            raise ValueError(f"the environment variable {VARIABLE} is {named!r}; expected one of {', '.join(KINDS)}")
        return named
    if platform.machine() not in ("x86_64", "AMD64"):
        return "other"
    own = next((kind for kind, test in TESTS.items() if getattr(torch.cpu, test)()), "other")
    allowed = HIGHEST.get(os.environ.get(ONEDNN, "").upper(), KINDS[0])
    return max(own, allowed, key=KINDS.index)
