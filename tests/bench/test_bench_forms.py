"""Every form of an operation is measured at the sizes of a model, and the table is written of the rows."""

from __future__ import annotations

import importlib
import json

import pytest
from click.testing import CliRunner

from sdinpaint import cli
from sdinpaint.bench import forms, kernels
from sdinpaint.bench.cases import Case
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.errors import SettingError

GIVEN = {"family": "demo", "checkpoint": str(DEMO), "dtype": "float32", "stored": None, "device": "cpu"}
SIZE = {"size": 64, "steps": 1, "rounds": 1, "quick": True}


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SHORTEST", 1e-9)
        patch.setattr("sdinpaint.bench.roofline.peak_flops", lambda dtype, device: 1e12)
        patch.setattr("sdinpaint.bench.roofline.peak_bandwidth", lambda device: 1e10)
        return list(forms.measure_forms(Case(**GIVEN, **SIZE), ()))


def test_every_form_of_every_operation_is_measured_once_at_each_size(rows):
    keys = [(row["operation"], *row["sizes"], row["system"]) for row in rows]
    assert len(keys) == len(set(keys))
    for operation in forms.MEASURED:
        known = importlib.import_module(f"sdinpaint_kernels.{operation}").FORMS
        found = {row["system"] for row in rows if row["operation"] == operation}
        assert found == known.keys() - {"blocks"}  # which are in bfloat16 alone


def test_errors_are_those_of_float32(rows):
    assert all(0 < row["error"] < 2e-6 for row in rows)
    assert all(row["p50"] > 0 and row["count"] > 0 for row in rows)


def test_a_wrong_form_has_a_large_error_and_is_not_chosen(rows, substitute):
    conv3 = importlib.import_module("sdinpaint_kernels.conv3")
    packed = conv3.FORMS["packed"]
    wrong = packed._replace(run=lambda *given: packed.run(*given) * 1.001)
    substitute(conv3, FORMS={"plain": conv3.FORMS["plain"], "packed": wrong})
    substitute(kernels, SHORTEST=1e-9)
    substitute(forms, MEASURED=("conv3",))
    found = list(forms.measure_forms(Case(**GIVEN, **SIZE), ()))
    assert {row["error"] > 1e-4 for row in found if row["system"] == "packed"} == {True}
    [dtypes] = forms.fastest(found).values()
    assert set(dtypes["float32"]["conv3"].values()) == {"plain"}


def test_the_table_is_written_of_the_rows(rows, tmp_path):
    (tmp_path / "forms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms.write_table(tmp_path / "forms.jsonl", tmp_path / "forms.json")
    [(kind, dtypes)] = json.loads((tmp_path / "forms.json").read_text()).items()
    assert kind == rows[0]["kind"]
    assert dtypes["float32"].keys() == set(forms.MEASURED)


def test_other_parts_and_devices_are_refused():
    done = CliRunner().invoke(cli.main, ["bench", "step", "--choose"])
    assert done.exit_code == 2
    assert "--choose belongs to the part kernels, not to step" in done.output
    with pytest.raises(SettingError, match="cpu"):
        list(forms.measure_forms(Case(**GIVEN | {"device": "cuda"}, **SIZE), ()))
