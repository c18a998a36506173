"""Support for processes that fork after torch has computed."""

from __future__ import annotations

import functools
import os

import torch

__all__ = ["let_children_compute"]


@functools.cache
def let_children_compute() -> None:
    """Make forked child processes compute on one thread, because they would deadlock on several.

    A fork does not copy OpenMP's threads. The child's OpenMP still counts on them once the parent has used them, so
    that every larger operation of torch would wait for them.
    Source: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378 (libgomp), and torch's own data loader.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
