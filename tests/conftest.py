"""Fixtures of several test files: a small family, its vocabulary, the released files' names, shapes and settings."""

from __future__ import annotations

import ctypes
import gc
import gzip
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from builders import for_text_to_image, random_pipeline, small
from hub_server import serve
from huggingface_hub import constants
from places import DATA
from recordings import Replay
from sdinpaint_kernels import heap
from sdinpaint_weights.dtypes import STORED
from sdinpaint_weights.weights import Entry, Weights

from sdinpaint.families import SD15_INPAINT
from sdinpaint.sampling import graphs
from sdinpaint.text.tokenizer import train_tokenizer

pytest_plugins = ["costs", "patching"]

gc.disable()  # until all tests are collected


def keep_memory(size):
    """Let glibc keep freed memory up to a size for the next test: the kernel takes long to map large memory anew."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
            libc.mallopt(option, size)


keep_memory(1 << 30)
heap._libc = lambda: None  # so that the library leaves that setting alone


@pytest.fixture
def freed_memory():
    """Give memory back to the system when it is freed, and what other tests have freed."""
    keep_memory(1 << 17)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    yield
    keep_memory(1 << 30)


def pytest_collection_finish(session):
    """Keep the garbage collector from visiting modules and tests, which live to the end, again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Keep it from visiting what tests imported, too, from the next test file on."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let go of them again: libraries look for leaks when the process ends."""
    gc.unfreeze()


CORPUS = [
    f"a {colour} {shape} on the {side}" for colour in ("red", "blue") for shape in ("fox", "cube") for side in "ab"
]


@pytest.fixture(scope="session")
def inventory():
    """inventory(name) -> Weights without bytes: names, shapes and dtypes of a released file."""

    def read(name):
        table = json.loads(gzip.decompress((DATA / "inventories" / f"{name}.json.gz").read_bytes()))
        entries = {key: Entry(None, 0, STORED[kind], tuple(shape), ()) for key, (shape, kind) in table.items()}
        return Weights(Path(name), "safetensors", entries)

    return read


@pytest.fixture(scope="session")
def released():
    """The JSON tables of the released inpainting model by component."""
    return json.loads((DATA / "released_configs.json").read_text())


@pytest.fixture(scope="session")
def vocabulary():
    """A Tokenizer of some 530 tokens."""
    return train_tokenizer(CORPUS, 540)


@pytest.fixture(scope="session")
def tiny(vocabulary):
    """An inpainting family with SD1's structure, in which no two sizes that might be confused are equal."""
    unet = replace(
        SD15_INPAINT.unet,
        model_channels=24,
        channel_mult=(1, 2, 3),
        transformer_depth=(1, 1, 0),
        context_dim=28,
        num_heads=3,
        norm_groups=4,
    )
    vae = replace(
        SD15_INPAINT.vae, channels=10, channel_mult=(1, 2, 3, 4), num_res_blocks=1, norm_groups=5, scaling_factor=0.21
    )
    text = replace(
        SD15_INPAINT.text, vocab_size=vocabulary.vocab_size, width=28, mlp_width=44, num_layers=3, num_heads=7
    )
    return replace(SD15_INPAINT, unet=unet, vae=vae, text=text, size=64)


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    """A small random pipeline of 9 channels."""
    return random_pipeline(small(tiny), vocabulary)


@pytest.fixture(scope="module")
def four_channels(tiny, vocabulary):
    """One of 4, which is not shown the mask."""
    return random_pipeline(for_text_to_image(small(tiny)), vocabulary)


@pytest.fixture(params=["nine channels", "four channels"])
def either(request, pipe, four_channels):
    """Both kinds, one after the other."""
    return pipe if request.param == "nine channels" else four_channels


@pytest.fixture
def unet_batches(pipe):
    """A list that takes the size of what every call of the UNet puts out."""
    sizes = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    yield sizes
    hook.remove()


@pytest.fixture
def replays(substitute):
    """Graphs as on a GPU -> the class that counts what was captured."""
    Replay.made = 0
    substitute(graphs, CapturedGraph=Replay, _capturable=lambda tensors: True)
    return Replay


@pytest.fixture
def own_cache(monkeypatch, tmp_path, environment, substitute):
    """An empty cache of the hub, nobody logged in, and no way off this machine."""
    abroad, resolve = [], socket.getaddrinfo

    def resolve_here(host, *args, **options):
        if host not in ("127.0.0.1", "localhost"):
            abroad.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    environment(NO_PROXY="127.0.0.1,localhost", HF_TOKEN=None, HUGGING_FACE_HUB_TOKEN=None, HF_HUB_OFFLINE=None)
    # huggingface_hub read these from the environment when it was imported
    paths = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token")}
    substitute(constants, **paths, HF_HUB_DISABLE_TELEMETRY=True)
    yield tmp_path / "cache"
    assert abroad == []


@pytest.fixture
def hub(own_cache, environment):
    """A hub on this machine, without any model yet."""
    with serve() as running:
        environment(HF_ENDPOINT=running.url)
        yield running
