"""Helpers of the tests of the CPU's forms."""

from __future__ import annotations

from sdinpaint_kernels import forms


def choose(substitute, *names):
    """Let every operation run by the first of these forms that takes the call."""
    substitute(forms, ranked=lambda *_: names)
