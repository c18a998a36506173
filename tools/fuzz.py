"""Feed damaged and hostile files to a reader, and say which it neither reads nor refuses as it should.

    python tools/fuzz.py archive --minutes 60
    python tools/fuzz.py all --minutes 5

A file is a failure where its reader raises anything but an `SdInpaintError`, takes more than 2 s, or lets the memory of
the process grow by more than 600 MB. Each failure is written to the folder fuzz-failures/, to be read again with
`--file PATH`. The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from sdinpaint_weights.folder import open_folder_component
from sdinpaint_weights.reader import open_weights

from sdinpaint.errors import SdInpaintError
from sdinpaint.masks.picking import by_label
from sdinpaint.paths import read_json
from sdinpaint.text.vocabulary import END, START, clip_layout, read_vocabulary

SECONDS, MEGABYTES = 2.0, 600
HANGS = 120.0
"""Seconds by the clock, on a machine that may have other work; SECONDS are those of the processor."""
STRAYS = Path("fuzz-failures")
KEYS = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight", "ids")
NUMBERS = (0, 1, 2, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES = (None, True, -1, 0.5, 1e308, 2**70, "", "x" * 5000, "\x1b[2J", "\ud800", [], {}, [[]], [0, -1], {"": {}})
MERGES = [("a", "b"), ("ab", "c</w>"), ("d", "e</w>")]

Rng = random.Random
Mutate = Callable[[Rng, bytes], bytes]


class TooLong(BaseException):
    """A reader did not end in time; no reader catches it."""


@dataclass(frozen=True)
class Target:
    """A reader, with good files for it, and the ways to spoil them that know their form."""

    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    mutators: tuple[Mutate, ...]
    name: str = "file"


@dataclass(frozen=True)
class Failure:
    """A file that a reader did not take as it should."""

    target: str
    number: int
    why: str
    content: bytes


# Ways to spoil a file


def flip_bytes(rng: Rng, content: bytes) -> bytes:
    """Change, remove, insert or copy a few bytes."""
    spoiled = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(spoiled) + 1)
        size = rng.choice((1, 1, 1, 2, 4, 8, 16))
        if (action := rng.randrange(5)) == 0:
            spoiled[at : at + 1] = rng.randbytes(1)
        elif action == 1:
            del spoiled[at : at + size]
        elif action == 2:
            spoiled[at:at] = rng.randbytes(size)
        elif action == 3:
            source = rng.randrange(len(spoiled) + 1)
            spoiled[at : at + size] = spoiled[source : source + size]
        elif at < len(spoiled):
            spoiled[at] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def cut(rng: Rng, content: bytes) -> bytes:
    """Cut the end off."""
    return content[: rng.randrange(len(content) + 1)]


def put_number(rng: Rng, content: bytes) -> bytes:
    """Write a number near a limit over some bytes."""
    form = rng.choice(("<H", "<I", "<Q", ">I", ">Q"))
    number = struct.pack(form, rng.choice(NUMBERS) % 256 ** struct.calcsize(form))
    at = rng.randrange(max(1, len(content) - len(number)))
    return content[:at] + number + content[at + len(number) :]


def repeat(rng: Rng, content: bytes) -> bytes:
    """Repeat a piece many times, up to a megabyte."""
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.choice((1, 2, 3, 5, 8, 13, 40))] or b" "
    return content[:start] + piece * rng.randrange(1, 1_000_000 // len(piece)) + content[start:]


def change_json(rng: Rng, content: bytes) -> bytes:
    """Change, remove or add a value somewhere in a JSON text, or leave it where it is none."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return flip_bytes(rng, content)
    return json.dumps(_changed(rng, table)).encode()


def _changed(rng: Rng, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if (action := rng.randrange(5)) == 0:
            return {name: item for name, item in value.items() if name != key}
        if action == 1:
            return value | {rng.choice((*value, "", "__metadata__", "x" * 2000, "\x07")): value[key]}
        return value | {key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at]), *value[at + rng.randrange(2) :]]
    return rng.choice((*JSON_VALUES, *NUMBERS))


def change_header(rng: Rng, content: bytes) -> bytes:
    """Change the JSON header of a safetensors file, and mostly keep the length before it true."""
    size = int.from_bytes(content[:8], "little")
    header = change_json(rng, content[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", length % 2**64) + header + content[8 + size :]


OPCODES = (
    *(b"(", b")", b"}", b"]", b"N", b"0", b"1", b"2", b".", b"t", b"\x85", b"\x86", b"\x87", b"l", b"d", b"e", b"a"),
    *(b"s", b"u", b"b", b"R", b"Q", b"\x81", b"\x92", b"\x93", b"\x94", b"o", b"\x8f", b"\x90", b"\x91", b"\x88"),
    *(b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x01\xff", b"\x8b\x04\0\0\0abcd", b"I99\n", b"L7L\n"),
    *(b"U\x01w", b"X\x02\0\0\0ab", b"\x8c\x03abc", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"r\xff\xff\xff\x7f"),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"),
    *(
        b"ctorch\nSize\n",
        b"cnumpy\ndtype\n",
        b"cos\nsystem\n",
        b"(ia\nb\n",
        b"G?\xf0\0\0\0\0\0\0",
        b"\x95\x04\0\0\0\0\0\0\0",
    ),
)


def change_pickle(rng: Rng, content: bytes) -> bytes:
    """Put whole opcodes into a pickle, some of them many times."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(2, max(3, len(content)))
        times = rng.choice((1, 1, 1, 2, 50, 20_000))
        piece = b"".join(rng.choices(OPCODES, k=rng.randint(1, 5))) * times
        content = content[:at] + piece + content[at + rng.choice((0, 0, 1, 2)) :]
    return content


def change_archive(rng: Rng, content: bytes) -> bytes:
    """Write an archive anew: its pickle spoiled, members dropped, compressed, or of other sizes."""
    out, method = io.BytesIO(), rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl") and rng.random() < 0.8:
                data = rng.choice((change_pickle, flip_bytes, cut, repeat))(rng, data)
            elif (chance := rng.random()) < 0.1:
                continue
            elif chance < 0.15:
                data = bytes(rng.randrange(3_000_000))
            new.writestr(zipfile.ZipInfo(name), data, method)  # without the time, so that a seed makes one file
    return out.getvalue()


def change_gzip(rng: Rng, content: bytes) -> bytes:
    """Spoil what a gzip file holds."""
    return gzip.compress(rng.choice((flip_bytes, repeat, cut))(rng, gzip.decompress(content)), 1, mtime=0)


ANY = (flip_bytes, cut, put_number, repeat)

# Good files


def _tensors() -> dict[str, Any]:
    return {KEYS[0]: torch.ones(3, 2), KEYS[1]: torch.ones(4).half(), KEYS[2]: torch.arange(3)}


def _views() -> dict[str, Any]:
    whole = torch.ones(3, 2)
    return {KEYS[0]: whole, KEYS[1]: whole[1:]}


def _saved(legacy: bool) -> list[bytes]:
    made = []
    extras = {"lr": 0.5, "names": ["x", ("y", 2)], "size": torch.Size([1])}
    tensors = _views() if legacy else _tensors()
    for value in (tensors, {"state_dict": tensors, **extras}):
        out = io.BytesIO()
        torch.save(value, out, _use_new_zipfile_serialization=not legacy)
        # an early file names its storage by the address, which differs from run to run
        made.append(re.sub(rb"X.\0\0\0\d{9,20}", b"X\x01\0\0\x007", out.getvalue(), flags=re.DOTALL))
    return made


def _safetensors() -> list[bytes]:
    return [save(_tensors(), {"format": "pt"}), save({"a": torch.ones(2)})]


def _configs() -> list[bytes]:
    values = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64], "act_fn": "silu", "norm_eps": 1e-5}
    return [json.dumps(values).encode(), b"{}"]


def _index() -> list[bytes]:
    return [json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": SHARD, "b": SHARD}}).encode()]


def _vocabularies() -> list[bytes]:
    vocab = clip_layout(MERGES)
    model = {"type": "BPE", "vocab": vocab, "merges": [" ".join(merge) for merge in MERGES]}
    added = [{"content": START, "id": vocab[START]}, {"content": END, "id": vocab[END]}]
    return [json.dumps(vocab).encode(), json.dumps({"model": model, "added_tokens": added}).encode()]


def _merges() -> list[bytes]:
    return ["\n".join(["#version: 0.2", *map(" ".join, MERGES)]).encode()]


# Readers

SHARD = "model-00001-of-00001.safetensors"


def _read_weights(path: Path) -> None:
    weights = open_weights(path)
    for key in weights:
        weights.tensor(key)
    weights.shapes()
    repr(weights)


def _read_index(path: Path) -> None:
    folder = path.parent / "component"
    folder.mkdir(exist_ok=True)
    (folder / SHARD).write_bytes(save({"a": torch.ones(2), "b": torch.ones(1)}))
    path.replace(folder / "model.safetensors.index.json")
    open_folder_component(folder)


def _read_merges(path: Path) -> None:
    (path.parent / "vocab.json").write_bytes(_vocabularies()[0])
    read_vocabulary(path.parent / "vocab.json")


TARGETS = {
    "safetensors": Target(_read_weights, _safetensors, (*ANY, change_header, change_header, change_header)),
    "archive": Target(_read_weights, lambda: _saved(legacy=False), (*ANY, change_archive, change_archive)),
    "legacy": Target(_read_weights, lambda: _saved(legacy=True), (*ANY, change_pickle, change_pickle)),
    "pickle": Target(_read_weights, lambda: [pickle.dumps({"a": 1}, 2)], (*ANY, change_pickle)),
    "json": Target(read_json, _configs, (*ANY, change_json, change_json)),
    "index": Target(_read_index, _index, (*ANY, change_json, change_json)),
    "vocabulary": Target(read_vocabulary, _vocabularies, (*ANY, change_json, change_json), "vocab.json"),
    "merges": Target(_read_merges, _merges, ANY, "merges.txt"),
    "bpe": Target(
        read_vocabulary, lambda: [gzip.compress(text, mtime=0) for text in _merges()], (*ANY, change_gzip), "bpe.txt.gz"
    ),
    "labels": Target(lambda path: by_label(path, 1), lambda: [b"0 1 2\n1 1 0\n", b"1,2\n3,4\n"], ANY, "labels.csv"),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block when it takes much longer than it may."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(target: Target, path: Path) -> str:
    """Read a file, and return what is wrong with how that went; empty where nothing is."""
    peak, begin = _peak(), time.process_time()
    try:
        with limited(HANGS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
    except SdInpaintError:
        pass
    except TooLong:
        return f"more than {HANGS:.0f} s"
    except Exception:
        return traceback.format_exc()
    took, grown = time.process_time() - begin, (_peak() - peak) >> 10
    if took > SECONDS:
        return f"{took:.1f} s"
    return f"{grown} MB more" if grown > MEGABYTES else ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def spoiled(target: Target, seed: int) -> bytes:
    """Return the file of a target that a seed makes."""
    rng = random.Random(seed)
    mutate = rng.choice(target.mutators)
    return mutate(rng, rng.choice(target.seeds()))


def fuzz(name: str, seeds: Iterator[int], folder: Path) -> Iterator[Failure | None]:
    """Read the file of every seed, and yield a failure or None for each.

    Args:
        name: name in `TARGETS`.
        seeds: seeds of the files.
        folder: a folder to write them to.
    """
    target = TARGETS[name]
    for seed in seeds:
        content = spoiled(target, seed)
        (folder / target.name).write_bytes(content)
        why = complaint(target, folder / target.name)
        yield Failure(name, seed, why, content) if why else None


def main() -> None:
    """Read the command line, and exit with 1 where there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1.0, help="time for each target")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first file")
    parser.add_argument("--file", type=Path, help="read this file, and no other")
    options = parser.parse_args()
    if options.file:
        sys.exit(complaint(TARGETS[options.target], options.file) or 0)
    failed = 0
    for name in TARGETS if options.target == "all" else [options.target]:
        failed += _fuzz_for(name, 60 * options.minutes, options.seed)
    sys.exit(1 if failed else 0)


def _fuzz_for(name: str, seconds: float, seed: int) -> int:
    """Fuzz one target for some time; return the number of failures."""
    begin, count, kinds = time.monotonic(), 0, set()
    with tempfile.TemporaryDirectory() as folder:
        for failure in fuzz(name, iter(range(seed, sys.maxsize)), Path(folder)):
            count += 1
            if failure is not None and (kind := re.sub(r"\d+", "", failure.why)) not in kinds:
                kinds.add(kind)
                STRAYS.mkdir(exist_ok=True)
                (STRAYS / f"{name}-{failure.number}").write_bytes(failure.content)
                print(f"{name} {failure.number}: {failure.why}", flush=True)
            if time.monotonic() - begin > seconds:
                break
    rate = count / (time.monotonic() - begin)
    print(f"{name}: {count} files, {rate:.0f} a second, {len(kinds)} kinds of failure", flush=True)
    return len(kinds)


if __name__ == "__main__":
    main()
