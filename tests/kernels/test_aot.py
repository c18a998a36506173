"""Compiled for GPUs of two generations, without one: do the kernels fit, and do they load 16 bytes at a time?"""

from __future__ import annotations

import itertools

import aot
import pytest
import torch
from sdinpaint_kernels.group_norm import Plan
from sdinpaint_kernels.group_norm import launch as launch_group_norm


@pytest.fixture(autouse=True)
def cache(tmp_path, environment):
    """Compile into a folder that is not left behind."""
    environment(TRITON_CACHE_DIR=tmp_path)


def representative(operation):
    """Return the released models' kernels with different tiles, for the fewest and most channels."""
    found = {}
    for told, (launch, _) in aot.distinct(operation, aot.shapes(operation)).items():
        constants = dict(told.constants)
        key = told.kernel, told.options, constants.get("SLOTS") == 1
        key += tuple(constants.get(name) for name in ("INNER", "ROWS", "WIDTH"))
        size = constants.get("SLOTS", 0), constants.get("SILU", False), len(told.signature) - len(told.constants)
        found.setdefault(key, {}).setdefault(constants.get("C", 0), []).append((size, launch))
    extremes = [alike[channels] for alike in found.values() for channels in {min(alike), max(alike)}]
    return [max(launches, key=lambda one: one[0])[1] for launches in extremes]


OPERATIONS = ("group_norm", "geglu", "add_layer_norm", "add_bias")
LAUNCHES = [launch for operation in OPERATIONS for launch in representative(operation)]


def named(launch):
    constants = dict(aot.source(launch).constants)
    sizes = [str(constants[name]) for name in ("C", "CPG", "INNER", "ROWS", "WIDTH", "SLOTS") if name in constants]
    return "-".join([launch.kernel.__name__, *sizes])


@pytest.mark.parametrize(
    ("launch", "capability"),
    list(zip(LAUNCHES, itertools.cycle(aot.CAPABILITIES))),  # every kernel for each, though not in every size
    ids=lambda one: one if isinstance(one, int) else named(one),
)
def test_it_fits_and_loads_wide(launch, capability):
    found = aot.resources(aot.compile_for(launch, capability))
    assert not aot.excess(found, capability), found
    if launch.kernel.__name__ == "merge":
        return  # it reads a few numbers
    tile = launch.arguments["ROWS"] * launch.arguments.get("WIDTH", launch.arguments.get("COLUMNS"))
    vectors = tile // (8 * 32 * found["warps"])  # of 16 bytes, for each thread
    assert found["loads128"] >= vectors, found
    assert found["stores128"] >= vectors or "out" not in launch.arguments, found


def launched(channels, groups, cut):
    x = aot.empty(2, channels, 512, 1).to(memory_format=torch.channels_last)
    weight = aot.empty(channels)
    with aot.recording("group_norm_kernel") as launches:
        launch_group_norm(x, groups, weight, weight, 1e-5, True, None, cut)
    return aot.resources(aot.compile_for(launches[0], 90))


def test_unaligned_channels_would_be_noticed():
    """Rows of 10 channels start at multiples of 20 bytes: no wide load is possible."""
    assert launched(10, 1, Plan(1, 16, 64, 1, 4, one_pass=False))["loads128"] == 0


def test_a_tile_too_large_would_be_noticed():
    assert aot.excess(launched(128, 32, Plan(32, 128, 256, 1, 4, one_pass=True)), 90)


def test_the_committed_table_has_every_kernel_of_the_released_models():
    rows = aot.committed()
    kept = {(row["kernel"], row["sm"], *sorted(row["constants"].items())) for row in rows}
    for operation in aot.LAUNCHERS:
        for told in aot.distinct(operation, aot.shapes(operation)):
            constants = sorted((name, value) for name, value in told.constants if value is not None)
            assert kept >= {(told.kernel, capability, *constants) for capability in aot.CAPABILITIES}
    assert all(row["stack"] == row["local"] == 0 for row in rows)
