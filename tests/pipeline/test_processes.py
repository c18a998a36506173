"""Pipelines and results in other processes and threads, and as copies: pickled, forked, spawned, deep-copied."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from closeness import same_image, same_images
from painting import IMAGE, MASK, inpaint, pixels, random_image
from PIL import Image

import sdinpaint
from sdinpaint import Mask
from sdinpaint.errors import SettingError

SECONDS = 120
OPTIONS = {"steps": 2, "seed": 5, "progress": False}
NOISE = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(0))


class Named(pickle.Unpickler):
    """Notes the modules that a pickle names."""

    def __init__(self, stream):
        super().__init__(stream)
        self.modules = set()

    def find_class(self, module, name):
        self.modules.add(module)
        return super().find_class(module, name)


def same(one, other):
    return all((pixels(a) == pixels(b)).all() for a, b in zip(one.images, other.images, strict=True))


@pytest.fixture
def files(tmp_path):
    """An image and its mask, as files."""
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * MASK).save(tmp_path / "mask.png")
    return str(tmp_path / "image.png"), str(tmp_path / "mask.png")


INPUTS = {
    "paths": lambda image, mask: (image, Path(mask)),
    "images that are not read yet": lambda image, mask: (Image.open(image), Image.open(mask)),
    "arrays": lambda image, mask: (IMAGE, MASK),
    "tensors": lambda image, mask: (torch.from_numpy(IMAGE).permute(2, 0, 1) / 127.5 - 1, torch.from_numpy(MASK)),
    "a Mask": lambda image, mask: (IMAGE, Mask.open(mask)),
}
RUNS = {
    "inpaint": (lambda pipe: pipe.inpaint(IMAGE, MASK, "a fox", **OPTIONS), lambda pipe: (pipe.inpaint, IMAGE, MASK)),
    "vary": (lambda pipe: pipe.vary(IMAGE, "a fox", **OPTIONS), lambda pipe: (pipe.vary, IMAGE)),
    "outpaint": (lambda pipe: pipe.outpaint(IMAGE, "a fox", right=16, **OPTIONS), lambda pipe: (pipe.outpaint, IMAGE)),
    "several": (
        lambda pipe: pipe.inpaint([IMAGE, random_image(64, 72, seed=1)], MASK, "a", **OPTIONS | {"seed": [1, 2]}),
        lambda pipe: (pipe.inpaint, [IMAGE, random_image(64, 72, seed=1)], MASK),
    ),
}
every_run = pytest.mark.parametrize(("run", "call"), RUNS.values(), ids=list(RUNS))


# Results


@pytest.mark.parametrize("given", INPUTS.values(), ids=list(INPUTS))
def test_a_result_is_pickled_whatever_it_was_made_of(given, pipe, files):
    image, mask = given(*files)
    result = inpaint(pipe, image, mask)
    again = pickle.loads(pickle.dumps(result))
    assert same(again, result)
    assert same(again, inpaint(pipe))


@every_run
def test_a_pickled_result_tells_all_that_it_told(run, call, pipe, tmp_path):
    result = run(pipe)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(result))))
    assert same(again, result)
    for name in ("seeds", "scores", "reports", "crops", "settings"):
        assert getattr(again, name) == getattr(result, name)
    assert (pixels(again.sheet()) == pixels(result.sheet())).all()
    for name, one in {"before": result, "after": again}.items():
        one.save(tmp_path / f"{name}.png")
    for before, after in zip(sorted(tmp_path.glob("before*")), sorted(tmp_path.glob("after*")), strict=True):
        assert before.read_bytes() == after.read_bytes()


@every_run
def test_a_pickled_result_says_how_it_is_made_again(run, call, pipe):
    result = run(pipe)
    again = pickle.loads(pickle.dumps(result))
    for attempt in (again.again, lambda: again.best_of(2), lambda: again.best_of(1)):
        with pytest.raises(SettingError) as caught:
            attempt()
        assert caught.value.code == "SETTING_NO_PIPELINE"
        method, *inputs = call(pipe)
        assert f"pipe.{method.__name__}(image" in caught.value.hint
        assert "**result.settings" in caught.value.hint
    assert same(method(*inputs, **again.settings, progress=False), result)


def test_a_pickled_result_is_small_and_holds_no_model(pipe):
    result = inpaint(pipe, noise=NOISE)
    pickled = pickle.dumps(result)
    item = result.repainted[0].item
    images = sum(array.nbytes for array in (IMAGE, pixels(result.image).astype(np.uint8), item.mask.array, item.hole))
    assert len(pickled) < images + NOISE.nbytes + 10_000
    assert len(pickled) < len(pickle.dumps(pipe)) / 2
    named = Named(io.BytesIO(pickled))
    assert torch.equal(named.load().repainted[0].item.noise, NOISE)
    # nor a tensor, whose memory in another process ends with the process that made it
    assert {module.partition(".")[0] for module in named.modules} <= {
        "sdinpaint",
        "numpy",
        "PIL",
        "copyreg",
        "builtins",
    }
    assert not [module for module in named.modules if module.startswith("sdinpaint.models")]


def test_a_deep_copy_has_images_of_its_own_and_the_same_pipeline(pipe):
    result = inpaint(pipe)
    before = pixels(result.image)
    for other in (copy.deepcopy(result), copy.deepcopy(pickle.loads(pickle.dumps(result)))):
        other.image.paste((0, 0, 0), (0, 0, 72, 64))
        assert other.settings["seed"] == 5
        assert (pixels(result.image) == before).all()
    copied = copy.deepcopy(result)
    for other in (copied, copy.copy(result)):
        assert same(other.again(), result)


def test_again_needs_no_file_and_no_array_any_more(pipe, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = inpaint(pipe, "image.png", "mask.png")
    extended = pipe.outpaint("image.png", "a fox", left=8, **OPTIONS)
    array, mask, noise = IMAGE.copy(), MASK.copy(), NOISE.clone()
    of_arrays = inpaint(pipe, array, mask, noise=noise)
    array[:], mask[:], noise[:] = 0, True, 0
    for file in files:
        Path(file).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for one in (result, extended, of_arrays):
        assert same(one.again(), one)
        assert one.again().settings == one.settings
    manifest = result.again().settings["manifest"]
    assert (manifest["image"]["path"], manifest["mask"]["path"]) == ("image.png", "mask.png")
    assert result.best_of(2).settings["manifest"]["mask"]["path"] == "mask.png"


# Pipelines


@pytest.fixture(scope="module")
def folder(tiny, vocabulary, tmp_path_factory):
    """A small model whose files hold another dtype than it computes in."""
    model = tmp_path_factory.mktemp("small") / "model"
    sdinpaint.save_diffusers(model, random_pipeline(small(tiny), vocabulary), torch.float16)
    return model


@pytest.fixture(scope="module")
def plain(folder):
    return sdinpaint.load(folder, progress=False)


@pytest.fixture(scope="module")
def offloaded(folder):
    return sdinpaint.load(folder, offload=True, progress=False)


@pytest.fixture(params=["plain", "offloaded"])
def loaded(request):
    return request.getfixturevalue(request.param)


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copied_pipeline_makes_the_same_images(copied, loaded):
    fresh = copied(loaded)
    expected = inpaint(loaded)
    used = copied(loaded)
    for other in (fresh, used):
        assert same_images(inpaint(other).images, expected.images)
        assert other.dtype == loaded.dtype
        assert (other.offloading is None) == (loaded.offloading is None)
        assert other.unet is not loaded.unet
    assert same_images(inpaint(loaded).images, expected.images)
    assert not same_images(inpaint(loaded, prompt="a cube").images, expected.images)


def test_a_pickled_pipeline_has_weights_of_its_own(pipe):
    """A change of the copy's weights leaves the first one as it is."""
    expected, other = inpaint(pipe), pickled(pipe)
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.zero_()
    assert same(inpaint(pipe), expected)
    assert not same(inpaint(other), expected)


def test_one_pipeline_in_several_threads(loaded):
    expected = [inpaint(loaded, seed=seed).image for seed in range(4)]
    start = threading.Barrier(4)

    def run(seed):
        start.wait()
        return inpaint(loaded, seed=seed).image

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(run, range(4)))
    assert same_images(made, expected)
    assert not same_images(made[1:], expected[:-1])


def test_several_pipelines_in_several_threads(tiny, vocabulary):
    pipes = [random_pipeline(small(tiny), vocabulary, seed) for seed in range(3)]
    expected = [inpaint(pipe).image for pipe in pipes]
    with ThreadPoolExecutor(3) as pool:
        made = [result.image for result in pool.map(inpaint, pipes)]
    assert same_images(made, expected)
    assert not same_images(made[1:], expected[:-1])


def test_a_spawned_process_takes_a_pipeline_and_returns_a_result(offloaded, environment):
    environment(OMP_NUM_THREADS=1)
    expected = inpaint(offloaded)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(inpaint, offloaded).result(SECONDS)
    # the process is gone, and with it all that it shared
    assert same_image(result.image, expected.image)
    assert result.settings["manifest"]["weights"] == expected.settings["manifest"]["weights"]
    assert same_image(inpaint(offloaded).image, expected.image)


FORKS = """
import os, select, sys
import numpy as np, sdinpaint, torch
from closeness import same_image
from painting import inpaint

def in_fork(pipe):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.write(writes, np.asarray(inpaint(pipe()).image).tobytes())
        os._exit(0)
    os.close(writes)
    if not select.select([reads], [], [], 30)[0]:
        os.kill(child, 9)
        raise SystemExit("the child hangs")
    with open(reads, "rb") as stream:
        return np.frombuffer(stream.read(), np.uint8).reshape(64, 72, 3)

assert torch.get_num_threads() == 2
children = [in_fork(lambda: sdinpaint.load("demo", progress=False))]
pipe = sdinpaint.load("demo", progress=False)
children.append(in_fork(lambda: pipe))
expected = inpaint(pipe).image
children.append(in_fork(lambda: pipe))
assert torch.get_num_threads() == 2
print([same_image(child, expected) for child in children])
"""


def test_forked_processes_before_and_after_loading_and_a_run():
    """With two threads: one alone never waits for another."""
    two = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    environment = os.environ | two | {"PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(
        [sys.executable, "-c", FORKS], check=False, capture_output=True, text=True, env=environment, timeout=SECONDS
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""  # such as of the tokenizers' parallelism
    assert eval(made.stdout) == [True] * 3
