"""Facts for a bug report: versions, devices, memory, and the files that are found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from sdinpaint_kernels import backend

from sdinpaint.checkpoints.inspecting import inspect
from sdinpaint.errors import SdInpaintError, TokenizerError
from sdinpaint.sampling.graphs import SWITCH, Graphs
from sdinpaint.text.finding import CACHED_FILES, PACKAGE_FILES, VARIABLE, find_tokenizer
from sdinpaint.version import __version__

__all__ = ["examine"]

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "huggingface_hub")
MEMORY = Path("/proc/meminfo")
DRIVER = Path("/proc/driver/nvidia/version")


def examine() -> dict[str, str]:
    """Examine this machine; nothing is loaded or fetched.

    Returns:
        Subject -> one line about it, in the order to print.
    """
    return {
        "sdinpaint": f"{__version__} in {Path(__file__).parents[1]}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in PACKAGES},
        "CUDA": torch.version.cuda or "this torch is built for CPUs",
        "CPU": _cpu(),
        "GPU": _gpu(),
        "kernels": _kernels(),
        "CUDA graphs": _graphs(),
        "driver": DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.is_file() else "no NVIDIA driver found",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": _free_memory(),
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
        "CLIP vocabulary": _vocabulary(),
        "demo checkpoint": _demo(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        return backend.cpu_report()
    except ValueError as error:  # a variable that names no kind
        return str(error)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        found.append(f"{card.name}, compute capability {card.major}.{card.minor}, {memory}")
    return "; ".join(found)


def _kernels() -> str:
    """Say which backend runs which operations, the operations of one backend together."""
    names: dict[str, list[str]] = {}
    for operation, choice in backend.report().items():
        names.setdefault(choice, []).append(operation)
    return "; ".join(f"{', '.join(group)} in {choice}" for choice, group in names.items())


def _graphs() -> str:
    """Say which steps are captured as CUDA graphs."""
    if not torch.cuda.is_available():
        return "none: there is no GPU that torch can use"
    if not Graphs().enabled:
        return f"none: {SWITCH}=0"
    return "of every UNet and ControlNet but those that are hooked, wrapped, compiled, adapted or offloaded"


def _free_memory() -> str:
    if not MEMORY.is_file():
        return "unknown on this system"
    rows = dict(line.split(":", 1) for line in MEMORY.read_text(encoding="utf-8").splitlines())
    free, total = (int(rows[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _vocabulary() -> str:
    try:
        find_tokenizer(offline=True)
    except TokenizerError as error:
        return f"{error.found}; the vocabulary of a model's own folder is used where it has one"
    return os.environ.get(VARIABLE) or next(_vocabulary_files())


def _vocabulary_files() -> Iterator[str]:
    """Yield the vocabulary files that exist where `find_tokenizer` looks beyond the variable and the model."""
    for repository, name in CACHED_FILES:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            yield cached
    for package, name in PACKAGE_FILES.items():
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            if Path(location, name).is_file():
                yield str(Path(location, name))


def _demo() -> str:
    try:
        report = inspect("demo")
    except SdInpaintError as error:
        return f"not usable: {error.found}"
    return report.problem or f"included, {sum(report.parameters.values()):,} parameters"
