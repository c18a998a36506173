"""The memory that a run takes at least, compared with what is free, before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from sdinpaint.errors import OutOfMemoryError
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.pipeline.settings import Settings

__all__ = ["free_bytes", "require_memory"]

AT_LEAST = 60
"""Numbers for each channel of the first level and latent cell that a step of the UNet keeps at a time.

A step of SD 1.5 at 512 x 512 was measured at 127 in float32 and 146 in bfloat16; half of that is certain.
"""
SYSTEM, PROCESS = Path("/proc/meminfo"), Path("/proc/self/status")
GROUP = Path("/sys/fs/cgroup")


def require_memory(pipe: LatentDiffusion, sizes: Iterable[tuple[int, int]], settings: Settings) -> None:
    """Refuse a run that certainly does not fit into memory.

    Args:
        pipe: the models, which are in memory already.
        sizes: height and width in pixels of what the model sees of each image.
        settings: settings of the run, resolved.

    Raises:
        OutOfMemoryError: it says what the run takes at least, what is free, and what to lower.
    """
    free = free_bytes(pipe.device)
    if free is None:
        return
    guided = 1 if settings.guidance_scale == 1 else 2
    for (height, width), count in Counter(sizes).items():
        images = min(count, settings.batch_size or count)
        cells = -(-height // 8) * -(-width // 8) * images * guided
        needed = AT_LEAST * pipe.family.unet.model_channels * cells * pipe.dtype.itemsize
        if needed > free:
            several = f"{images} images at a time" if images > 1 else "one image"
            found = f"{several}, of {height} rows and {width} columns: at least {_amount(needed)} are needed"
            hint = 'take a smaller image, crop="auto", batch_size=1 or dtype="bfloat16", or close other programs'
            raise OutOfMemoryError("OUT_OF_MEMORY", "run", f"{found}, and {_amount(free)} are free", hint=hint)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still have, with what the system would move to its swap file.

    Args:
        device: whose memory.

    Returns:
        Bytes; None where that is not known.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu" or not SYSTEM.exists():
        return None
    import resource  # noqa: PLC0415 - other systems than those with /proc have none

    free = [_field(SYSTEM, "MemAvailable") + _field(SYSTEM, "SwapFree")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _field(PROCESS, "VmSize"))
    with suppress(OSError, ValueError):  # no group, or none with a limit
        limit, used = (int((GROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return max(0, min(free))


def _field(file: Path, name: str) -> int:
    """Read bytes from a file of /proc, such as "VmSize"; 0 where there is no such line."""
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
