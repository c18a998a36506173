"""Fixtures that tests of kernels share: the results of kernels that Triton's interpreter ran."""

from __future__ import annotations

import interpreter
import pytest

TOGETHER = (
    "test_add_bias",
    "test_add_layer_norm",
    "test_conv3_add",
    "test_geglu",
    "test_group_norm",
    "test_linear_geglu",
    "test_norm_accuracy",
)
"""Test modules that need the results of one operation each: one process serves them all, and imports torch once."""


@pytest.fixture(scope="session")
def interpreted_together(request):
    """Return by test module what its `interpreted` returns, for those of TOGETHER that take part in this run."""
    selected = {item.module.__name__ for item in request.session.items}
    return interpreter.run(*(name for name in TOGETHER if name in selected))


@pytest.fixture(scope="module")
def found(request, interpreted_together):
    """Return what the `interpreted` of the test's own module returns."""
    return interpreted_together[request.module.__name__]
