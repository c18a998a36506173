"""Kill programs at random moments, and count what is broken, missing or left behind.

The tests do so some dozens of times. Hundreds of times, for each kind of output, or for the signals of a terminal:

    python tests/support/killing.py --kills 500 png mask convert_folder
    python tests/support/killing.py --signals 200 SIGINT
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from sdinpaint_weights.atomic import atomic_folder
from sdinpaint_weights.export import write_json
from sdinpaint_weights.strays import is_temporary
from sdinpaint_weights.stream import Item, write_stream

import sdinpaint
from sdinpaint.checkpoints.opening import DEMO
from sdinpaint.images.files import save_png
from sdinpaint.masks import Mask

DTYPES = (torch.float16, torch.bfloat16)
RUN = ["inpaint", "scene.png", "--mask=scene-mask.png", "--prompt=a ball", "--model=demo", "--steps=10"]
RUN += ["--out=out.png", "--sheet=new/sheet.jpg", "--device=cpu"]
INPUTS = {"scene.png", "scene-mask.png"}
MOST_SECONDS = 120


def _image(path: Path, version: int) -> None:
    image = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 100))
    save_png(image.rotate(180 * version), path, {"version": version})


def _mask(path: Path, version: int) -> None:
    Mask.box((200, 300), (10, 10, 50 + version, 50)).save(path)


def _file(path: Path, version: int) -> None:
    items = [Item(name, torch.float32, (100, 100), lambda: torch.full((100, 100), version)) for name in "abc"]
    write_stream(path, items, {})


def _folder(path: Path, version: int) -> None:
    with atomic_folder(path) as folder:
        _file(folder / "unet" / "model.safetensors", version)
        write_json(folder / "model_index.json", {"version": version})


def _convert(path: Path, version: int) -> None:
    sdinpaint.convert(DEMO / "vae", path, dtype=DTYPES[version], overwrite=True, progress=False)


def _save_diffusers(path: Path, version: int) -> None:
    sdinpaint.save_diffusers(path, _demo(), DTYPES[version])


@cache
def _demo() -> sdinpaint.Pipeline:
    return sdinpaint.load("demo", device="cpu", progress=False)


KINDS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "png": ("a.png", _image),
    "jpeg": ("a.jpg", _image),
    "webp": ("a.webp", _image),
    "mask": ("a.png", _mask),
    "file": ("a.safetensors", _file),
    "folder": ("a", _folder),
    "convert_file": ("a.safetensors", _convert),
    "convert_folder": ("a", _convert),
    "save_diffusers": ("a", _save_diffusers),
}
"""Kind of output -> name of its target, and a function that writes one of two versions of it."""


@dataclass
class Found:
    """The findings after some kills."""

    kills: int = 0
    broken: int = 0
    """The number of targets that were neither of the two versions."""
    looks: int = 0
    gone: int = 0
    """The number of looks, while they were written, at which there was no target."""
    left: int = 0
    """The number of temporaries right after a kill."""
    strays: int = 0
    """The number of temporaries after the next write."""


def kill_writers(kind: str, folder: Path, kills: int, seed: int = 0) -> Found:
    """Kill forked processes that write two versions of one target in turns, each at a random moment.

    Args:
        kind: one of KINDS.
        folder: an empty folder.
        kills: the number of processes.
        seed: of the moments.

    Returns:
        The findings.
    """
    (name, write), chance, found = KINDS[kind], random.Random(seed), Found()
    target, whole, durations = folder / name, set(), []
    for version in (0, 1, 0, 1):
        started = time.perf_counter()
        write(target, version)
        durations.append(time.perf_counter() - started)
        whole.add(_digest(target))
    assert len(whole) == 2, "the versions are not always the same, or do not differ"
    for _ in range(kills):
        process = _start_writer(write, target)
        until = time.perf_counter() + chance.uniform(0, 3 * min(durations))
        while time.perf_counter() < until:
            found.looks += 1
            found.gone += not target.exists()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found.kills += 1
        found.broken += _digest(target) not in whole
        found.left += _temporaries(folder)
        write(target, 1)
        found.strays += _temporaries(folder)
    return found


def _start_writer(write: Callable[[Path, int], None], target: Path) -> int:
    """Fork a process that writes until it is killed, and wait until it has written once: it may be slow to start."""
    listens, tells = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            write(target, 0)
            os.write(tells, b"1")
            while True:
                write(target, 1)
                write(target, 0)
        finally:
            os._exit(1)  # nothing of the process that was forked may run again
    os.close(tells)
    with open(listens, "rb", buffering=0) as told:
        ready, _, _ = select.select([told], [], [], MOST_SECONDS)
        assert ready, f"the writer has written nothing within {MOST_SECONDS} s"
        assert told.read(1), "the writer failed"
    return process


def _digest(target: Path) -> str:
    files = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    parts = (f"{path.relative_to(target)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return "\n".join(parts)


def _temporaries(folder: Path) -> int:
    return sum(is_temporary(path.name) for path in folder.rglob("*"))


def make_scene(folder: Path) -> None:
    """Write the inputs of RUN.

    Args:
        folder: where they are written.
    """
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(folder / "scene.png")
    Image.linear_gradient("L").resize((128, 128)).point(lambda level: 255 * (level > 127)).save(
        folder / "scene-mask.png"
    )


def start(folder: Path, arguments: list[str] = RUN, sigint: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    """Start the command line.

    Args:
        folder: its current folder.
        arguments: those of the command line.
        sigint: SIG_DFL as a shell gives it to a job in the foreground, SIG_IGN as to one in the background.

    Returns:
        The process.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "sdinpaint", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),  # noqa: PLW1509 - no other way to set what is inherited
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def await_handlers(process: subprocess.Popen[str]) -> None:
    """Wait until the command line handles signals; before, Python itself is starting, and answers with a traceback.

    Args:
        process: the process.
    """
    while process.poll() is None:
        state = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").partition("SigCgt:")[2]
        if int(state.split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def interrupt(
    number: signal.Signals,
    folder: Path,
    times: int,
    seed: int = 0,
    arguments: list[str] = RUN,
    wait: Callable[[subprocess.Popen[str]], object] = lambda _: None,
) -> Counter[str]:
    """Send a signal to runs of the command line, to each at a random moment from its start to its end.

    Args:
        number: the signal.
        folder: a folder with the inputs of RUN.
        times: the number of runs.
        seed: of the moments.
        arguments: those of the command line.
        wait: waits for the start of a process.

    Returns:
        Exit codes, and "traceback", "several lines", "no line" and "stray", with the number of runs of each.
    """
    chance, found = random.Random(seed), Counter[str]()
    durations = []
    for _ in range(2):  # the first one may read the disk
        began = time.perf_counter()
        _, said = start(folder, arguments).communicate(timeout=MOST_SECONDS)
        durations.append(time.perf_counter() - began)
    longest = min(durations)
    usual = len(said.splitlines())
    for _ in range(times):
        for path in {*folder.rglob("*")}:
            if path.is_file() and path.name not in INPUTS:
                path.unlink()
        process, moment = start(folder, arguments), chance.uniform(0, longest)
        wait(process)
        time.sleep(moment)
        process.send_signal(number)
        _, said = process.communicate(timeout=MOST_SECONDS)
        found[f"exit code {process.returncode}"] += 1
        if "Traceback" in said or "Exception ignored" in said or "Error" in said:
            found["traceback"] += 1
            sys.stderr.write(f"after {moment:.3f} of {longest:.3f} s:\n{said}\n")
        elif len(said.splitlines()) > usual + 1:
            found["several lines"] += 1
        elif process.returncode == 128 + number and not said.endswith("no unfinished file is left\n"):
            found["no line"] += 1
        found["stray"] += _temporaries(folder)
        for path in folder.rglob("*.png"):
            Image.open(path).load()
    return found


def main() -> None:
    """Print the findings of each kind, or of a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="kills of each kind")
    parser.add_argument("--signals", type=int, metavar="N", help="send the signals that are named to N runs each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments")
    parser.add_argument("names", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; or SIGINT, SIGTERM")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of the threads of the other
    for name in given.names or (("SIGINT", "SIGTERM") if given.signals else KINDS):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            if given.signals:
                make_scene(Path(folder))
                found = str(dict(interrupt(signal.Signals[name], Path(folder), given.signals, given.seed)))
            else:
                found = str(kill_writers(name, Path(folder), given.kills, given.seed))
        sys.stdout.write(f"{name}: {found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
