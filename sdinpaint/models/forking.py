"""Processes that fork: their children can compute."""

from __future__ import annotations

import functools
import os

import torch

__all__ = ["let_children_compute"]


@functools.cache
def let_children_compute() -> None:
    """From now on a forked child computes on one thread, where it would wait for ever.

    OpenMP's threads are not copied by a fork, but the child's OpenMP believes in them as soon as the parent has used
    them, and every larger operation of torch waits for them. One thread needs no others.
    Source: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378 (libgomp), and torch's own data loader.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
