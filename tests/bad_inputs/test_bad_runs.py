"""Tests of what goes wrong during a run: no wrong image, and the next run is as good as ever."""

from __future__ import annotations

import threading
from itertools import count

import numpy as np
import pytest
import torch
from builders import UNET_FILE, VAE_FILE, rewrite
from closeness import same_image, same_images
from refusals import MASK, NAN, inpaint, load, refused

from sdinpaint import SdInpaintWarning
from sdinpaint.errors import CheckpointError, NumericError


@pytest.mark.parametrize("step", [0, 2])
def test_a_unet_that_fails_gives_no_image(pipe, step):
    calls = count()
    hook = pipe.unet.register_forward_hook(lambda module, given, out: out * NAN if next(calls) == step else out)
    with hook, pytest.raises(NumericError) as caught:
        inpaint(pipe, steps=4)
    assert caught.value.code == "NUMERIC_NOT_FINITE"
    assert f"at step {step + 1} of 4" in caught.value.found
    assert "float32" in caught.value.hint


@pytest.mark.parametrize(("half", "code"), [("encode", "NUMERIC_ENCODE"), ("decode", "NUMERIC_DECODE")])
def test_an_autoencoder_that_fails_gives_no_image(pipe, half, code):
    norm = (pipe.vae.encoder if half == "encode" else pipe.vae.decoder).norm_out
    with norm.register_forward_hook(lambda module, given, out: out / 0), pytest.raises(NumericError) as caught:
        inpaint(pipe)
    assert caught.value.code == code
    assert caught.value.subject == "vae"
    assert "vae=" in caught.value.hint


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_an_autoencoder_that_overflows_runs_again_in_float32(folder, half):
    def louder(tensors):
        name = f"{half}r.conv_in.weight"  # norms bring the size down again, so that float32 has no trouble
        return tensors | {name: tensors[name] * (30_000 / float(tensors[name].abs().max()))}

    rewrite(folder / VAE_FILE, louder)
    pipe = load(folder, dtype="float16")
    with pytest.warns(SdInpaintWarning, match=rf"overflowed in torch\.float16; the image is {half}d in float32"):
        found = inpaint(pipe).image
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float16}
    expected = np.asarray(inpaint(load(folder)).image).astype(int)
    assert np.abs(expected - found).mean() < 12  # of 255; a black image is 128 away
    assert np.asarray(found)[MASK].std() > 20


class Stop(Exception):
    pass


def test_a_callback_that_raises(pipe, usual):
    def stop(step, x, x0):
        raise Stop

    with pytest.raises(Stop):
        inpaint(pipe, steps=3, on_step=stop)
    assert np.array_equal(inpaint(pipe).image, usual)


def test_one_pipeline_in_many_threads(pipe):
    jobs = [
        {"steps": 1 + i % 4, "sampler": name, "seed": i}
        for i, name in enumerate(("ddim", "euler", "euler_ancestral", "dpmpp_2m") * 2)
    ]
    alone = [np.asarray(inpaint(pipe, **job).image) for job in jobs]
    together = [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def work(index):
        ready.wait()
        together[index] = np.asarray(inpaint(pipe, **jobs[index]).image)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_images(alone, together)


def test_a_file_that_was_cut_after_loading_is_told_by_the_next_load(folder, usual):
    pipe = load(folder, dtype="bfloat16")  # nothing stays mapped
    content = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(content[:-5])
    inpaint(pipe)
    refused(CheckpointError, "CKPT_TRUNCATED", lambda: load(folder), folder / UNET_FILE)
    (folder / UNET_FILE).write_bytes(content)
    assert same_image(inpaint(load(folder)).image, usual)
