"""The attention kernel compiled for GPUs that are not here, at every shape of the released models."""

from __future__ import annotations

import aot
import pytest

KERNELS = aot.distinct("attention", aot.shapes("attention"))
LEAST_SHARED = 99 * 1024
"""Shared memory of the smallest GPUs from Ampere on (8.6, 8.9); their code takes as much as 8.0's."""


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
@pytest.mark.parametrize("told", KERNELS, ids=lambda told: "-".join(str(value) for _, value in told.constants))
def test_every_shipped_kernel_fits_its_gpu_and_uses_its_tensor_cores(told, capability):
    found = aot.resources(aot.compile_for(KERNELS[told][0], capability))
    assert aot.excess(found, capability) == []
    assert capability >= 90 or found["shared"] <= LEAST_SHARED
    assert found["HGMMA" if capability >= 90 else "HMMA"] > 0
    assert found["loads128"] >= 2 / 3 * found["loads"]  # the last 16 keys are too few for wide loads
    assert found["async_copies"] > 0 or dict(told.constants)["WHOLE"]
