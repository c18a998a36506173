"""The kind of the processor, and the table that names the fastest form of an operation for each."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdinpaint_kernels import cpu_kinds, forms

from sdinpaint.bench.forms import MEASURED, fastest, written
from sdinpaint.bench.report.rows import latest

ROWS = Path(__file__).parents[2] / "benchmarks/results/forms.jsonl"


@pytest.fixture
def kind(monkeypatch):
    """kind(**environment) -> the kind that it gives."""

    def find(**environment):
        for name in (cpu_kinds.VARIABLE, cpu_kinds.ONEDNN):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return cpu_kinds.cpu_kind.__wrapped__()

    return find


@pytest.fixture
def supports(monkeypatch):
    """supports(*kinds): the processor has the instructions of these, and of no others."""

    def pretend(*kinds):
        for name, test in cpu_kinds.TESTS.items():
            monkeypatch.setattr(torch.cpu, test, lambda name=name: name in kinds)

    return pretend


@pytest.mark.parametrize("own", range(len(cpu_kinds.KINDS)))
def test_the_kind_is_the_widest_instruction_set(kind, supports, own):
    supports(*cpu_kinds.KINDS[own:])
    assert kind() == cpu_kinds.KINDS[own]


@pytest.mark.parametrize(("limit", "found"), [*cpu_kinds.HIGHEST.items(), ("avx2", "avx2"), ("AVX512_CORE_AMX", None)])
def test_it_is_no_wider_than_onednn_may_use(kind, supports, limit, found):
    supports(*cpu_kinds.KINDS)
    assert kind(ONEDNN_MAX_CPU_ISA=limit) == (found or "amx_bf16")
    supports("avx2")
    assert cpu_kinds.KINDS.index(kind(ONEDNN_MAX_CPU_ISA=limit)) >= cpu_kinds.KINDS.index("avx2")


def test_the_environment_names_another_kind(kind, supports):
    supports("avx2")
    assert kind(SDINPAINT_CPU_KIND="avx512") == "avx512"
    with pytest.raises(ValueError, match=r"SDINPAINT_CPU_KIND is 'epyc'; expected one of amx_bf16, .*, other"):
        kind(SDINPAINT_CPU_KIND="epyc")


def test_another_processor_is_of_no_kind(kind, monkeypatch):
    monkeypatch.setattr(cpu_kinds.platform, "machine", lambda: "arm64")
    assert kind() == "other"


# The table


def test_the_table_follows_from_the_rows():
    assert forms.TABLE.read_text() == written(fastest(latest([ROWS])))


def test_its_forms_exist_and_its_rows_are_of_kinds():
    for kind, dtypes in json.loads(forms.TABLE.read_text()).items():
        assert kind in cpu_kinds.KINDS
        for operations in dtypes.values():
            assert operations.keys() == set(MEASURED)
            for operation, rows in operations.items():
                known = importlib.import_module(f"sdinpaint_kernels.{operation}").FORMS
                assert all(forms.PLAIN in row.split() and set(row.split()) <= known.keys() for row in rows.values())


def row(sizes, system, ms, error, **more):
    of = {"kind": "avx2", "dtype": "float32", "operation": "conv3"}
    return {**of, "sizes": sizes, "system": system, "p50": ms, "error": error, **more}


def test_the_fastest_comes_first_and_what_is_inexact_not_at_all():
    rows = [
        row([3, 4, 64], "plain", 2.0, 1e-7),
        row([3, 4, 64], "packed", 1.0, 2e-7),
        row([3, 4, 64], "tiles", 0.5, 1e-6),
        row([3, 4, 64], "product", 3.0, 1e-7),
    ]
    assert fastest(rows) == {"avx2": {"float32": {"conv3": {"3 4 64": "packed plain product"}}}}


def test_a_form_that_takes_more_memory_has_to_be_much_faster():
    """28 MB more, at 0.7 ms each, and 6% for noise."""
    for ms, found in ((27.5, "plain tiles"), (27.3, "tiles plain")):
        rows = [row([1000, 1000, 64], "plain", 50.0, 1e-7), row([1000, 1000, 64], "tiles", ms, 1e-7)]
        assert fastest(rows)["avx2"]["float32"]["conv3"]["1000 1000 64"] == found


@pytest.mark.parametrize(
    ("sizes", "found"), [((320, 320, 8192), 0), ((300, 300, 9000), 0), ((640, 640, 2048), 1), ((960, 640, 512), 1)]
)
def test_the_nearest_sizes_count(sizes, found):
    assert forms.nearest(sizes, [(320, 320, 8192), (640, 640, 2048)]) == found


def test_a_kind_that_nobody_measured_takes_what_cannot_lose(substitute):
    substitute(forms, _table=dict)
    forms.ranked.cache_clear()
    assert forms.ranked("avx2", "float32", "conv3", (3, 4, 64)) == forms.SAFE
    forms.ranked.cache_clear()


def test_sizes_without_end_are_not_all_remembered():
    assert forms.ranked.cache_info().maxsize == forms.RANKED


def test_a_process_may_pretend_another_kind():
    program = "from sdinpaint_kernels.cpu_kinds import cpu_kind; print(cpu_kind())"
    environment = {"SDINPAINT_CPU_KIND": "avx2", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "avx2\n"
