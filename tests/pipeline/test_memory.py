"""Memory that does not suffice: one error in Python and on the command line, whatever raised it first."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from refusals import inpaint

import sdinpaint
from sdinpaint import loading
from sdinpaint.errors import OutOfMemoryError
from sdinpaint.pipeline.memory import free_bytes

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.25 GiB is "
    "free. Process 7 has 138 GiB memory in use."
)
ERRORS = [
    (MemoryError(), "no more memory"),
    (MemoryError("Unable to allocate 16.0 GiB for an array with shape (1073741824, 4)"), "16.0 GiB more cannot be had"),
    (torch.OutOfMemoryError(CUDA), "2.50 GiB more cannot be had, 1.25 GiB are free"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7549 bytes."), "7549 bytes more"),
    (RuntimeError("could not create a primitive"), "no more memory"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "no more memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "no more memory"),
]


def explained(call, says):
    with pytest.raises(OutOfMemoryError, match=says) as caught:
        call()
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.code == "OUT_OF_MEMORY"
    assert "batch_size=1" in error.hint
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


@pytest.mark.parametrize(("raised", "says"), ERRORS)
def test_memory_that_does_not_suffice(pipe, substitute, raised, says):
    def fail(*_, **__):
        raise raised

    hook = pipe.unet.register_forward_hook(fail)
    try:
        explained(lambda: inpaint(pipe), says)
    finally:
        hook.remove()
    inpaint(pipe)
    substitute(loading, open_checkpoint=fail)
    explained(lambda: sdinpaint.load("demo", progress=False), says)


def test_what_really_happens_where_an_image_is_too_large(pipe):
    hook = pipe.unet.register_forward_hook(lambda *_: torch.empty(1 << 55))
    try:
        error = explained(lambda: inpaint(pipe), r"\d+ bytes more")
        assert error.__cause__.__traceback__ is None  # whose frames would hold the tensors of the run
    finally:
        hook.remove()


def test_other_errors_stay_what_they_are(pipe):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    hook = pipe.unet.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            inpaint(pipe)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("options", "batch"),
    [({}, 3), ({"batch_size": 2}, 2), ({"batch_size": 1}, 1), ({"guidance_scale": 1.0}, 1.5), ({"strength": 0}, 0)],
)
def test_a_run_that_cannot_fit_is_refused_before_it_begins(pipe, monkeypatch, forbid, options, batch):
    needed = 60 * pipe.family.unet.model_channels * 4 * 8 * 10 * 2 * batch
    image = np.zeros((64, 80, 3), np.uint8)
    mask = image[..., 0] == 0
    run = lambda: inpaint(pipe, image=[image] * 3, mask=mask, **options)  # noqa: E731
    monkeypatch.setattr("sdinpaint.pipeline.memory.free_bytes", lambda _: needed)
    run()
    monkeypatch.setattr("sdinpaint.pipeline.memory.free_bytes", lambda _: needed - 1)
    if batch:
        forbid(pipe, "sample_latents", "encode_prompts")
        error = explained(run, "64 rows and 80 columns: at least 0.0 GB are needed, and 0.0 GB are free")
        assert "crop" in error.hint


def test_free_memory_is_that_of_the_process_and_its_group(monkeypatch, tmp_path):
    before = free_bytes(torch.device("cpu"))
    assert 1e8 < before < 1e14
    (tmp_path / "memory.max").write_text("5000000000\n")
    (tmp_path / "memory.current").write_text("4999999000\n")
    monkeypatch.setattr("sdinpaint.pipeline.memory.GROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 1e8
