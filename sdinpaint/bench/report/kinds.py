"""The kind of the processor that rows were measured on: the machine's own, or one that the environment pretends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from sdinpaint_kernels import cpu_kinds

__all__ = ["PRETENDED", "kind_of", "kind_rank", "measured_kind"]

PRETENDED = " (pretended)"
ATEN = "ATEN_CPU_CAPABILITY"
VARIABLES = (cpu_kinds.VARIABLE, cpu_kinds.ONEDNN, ATEN, "MKL_ENABLE_INSTRUCTIONS")
"""The environment variables that keep this package, oneDNN, torch and MKL from the processor's widest instructions."""
CAPABILITIES = {"amx_bf16": "AVX512", "avx512_bf16": "AVX512", "avx512": "AVX512", "avx2": "AVX2"}
"""Kind -> what torch's own loops use on such a processor, by `torch.backends.cpu.get_cpu_capability`."""


def measured_kind() -> dict[str, object]:
    """Describe the kind of this machine's processor, as the environment of a row has it.

    Returns:
        `kind`. Where instructions that the processor has are not used: `pretended`, its `own_kind`, and
        `pretended_by`, the environment variables that say so.
    """
    kind, own = cpu_kinds.cpu_kind(), _own_kind()
    lowered = ATEN in os.environ and torch.backends.cpu.get_cpu_capability() != CAPABILITIES.get(own)
    if kind == own and not lowered:
        return {"kind": kind}
    said = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    return {"kind": kind, "pretended": True, "own_kind": own, "pretended_by": said}


def kind_of(row: Mapping[str, Any]) -> str:
    """Name the processor kind of a row.

    Args:
        row: a row of the suite.

    Returns:
        A name such as "avx512_bf16" or "avx2 (pretended)"; "" for rows of a GPU, and for those that name none.
    """
    found = row.get("environment", {})
    if str(row["device"]).startswith("cuda") or "kind" not in found:
        return ""
    return f"{found['kind']}{PRETENDED * found.get('pretended', False)}"


def kind_rank(kind: str) -> tuple[bool, int]:
    """Order kinds: those that machines had before those that were pretended, and the widest instructions first.

    Args:
        kind: from `kind_of`.

    Returns:
        A key to sort by.
    """
    name = kind.removesuffix(PRETENDED)
    return name != kind, cpu_kinds.KINDS.index(name) if name in cpu_kinds.KINDS else len(cpu_kinds.KINDS)


def _own_kind() -> str:
    tests = cpu_kinds.TESTS.items()
    return next((kind for kind, test in tests if getattr(torch.cpu, test)()), cpu_kinds.KINDS[-1])
