"""Values and libraries: what goes by several names, what is said of what is missing, and that noise is put back."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled

from sdinpaint.checks import dtype_name, find_device, quietly, require_extra
from sdinpaint.errors import SettingError


def test_what_is_missing_is_named_with_the_extra_to_install():
    assert require_extra("json", extra="mask", what="Mask.grow").loads("1") == 1
    with pytest.raises(SettingError) as caught:
        require_extra("no_such_library.part", extra="mask", what="Mask.grow")
    assert caught.value.code == "SETTING_EXTRA"
    assert (caught.value.subject, caught.value.hint) == ("Mask.grow", "pip install 'sdinpaint[mask]'")
    assert "no_such_library" in caught.value.found


@pytest.mark.peer
@pytest.mark.parametrize("fails", [False, True])
def test_libraries_are_quiet_meanwhile_and_as_before_after_that(fails):
    import diffusers
    import transformers

    def state():
        logs = [library.utils.logging for library in (diffusers, transformers)]
        return [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs], are_progress_bars_disabled()

    before = state()
    try:
        with quietly(diffusers, transformers):
            assert are_progress_bars_disabled()
            assert state()[0] == [(50, False)] * 2
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert state() == before


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("float32", ["float32", "fp32", "single", "FP32", torch.float32]),
        ("float16", ["float16", "fp16", "half", torch.half, "torch.float16"]),
        ("bfloat16", ["bfloat16", "bf16", "BF16", torch.bfloat16]),
    ],
)
def test_a_dtype_goes_by_many_names(name, names):
    assert {dtype_name(each) for each in names} == {name}


@pytest.mark.parametrize(
    ("said", "hint"), [("floa32", "'float32'"), ("bf61", "'bf16'"), (torch.int8, "half"), (3, "half")]
)
def test_another_dtype_is_refused_with_the_closest_name(said, hint):
    with pytest.raises(SettingError) as caught:
        dtype_name(said)
    assert caught.value.code == "SETTING_DTYPE"
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("gpu", "'gpu'"),
        ("", "''"),
        ("cuda:x", "'cuda:x'"),
        ("meta", "'meta': tensors there have no values"),
        *((name, f"{name!r}: this torch is built without it") for name in ("mps", "xla", "hpu", "vulkan", "xpu")),
        (3, "'3': a int"),
        (None, None),
        ("cpu", None),
        (torch.device("cpu"), None),
    ],
)
def test_devices(device, found):
    if found is None:
        assert find_device(device).type in ("cpu", "cuda")
        return
    with pytest.raises(SettingError) as caught:
        find_device(device)
    assert caught.value.code == "SETTING_DEVICE"
    assert caught.value.found in (found, f"{device!r}: this torch is built without CUDA")
    assert len(str(caught.value)) < 300
