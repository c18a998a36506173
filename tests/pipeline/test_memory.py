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

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.25 GiB is "
    "free. Process 7 has 138 GiB memory in use."
)
ERRORS = [
    (MemoryError(), "no more memory"),
    (np._core._exceptions._ArrayMemoryError((1 << 30, 4), np.dtype("float32")), "16.0 GiB more cannot be had"),
    (torch.OutOfMemoryError(CUDA), "2.50 GiB more cannot be had, 1.25 GiB are free"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7549 bytes."), "7549 bytes more"),
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
