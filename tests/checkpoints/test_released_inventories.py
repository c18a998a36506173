"""Every released file's inventory, built: nothing missing, unexpected, misshapen or unclaimed in any of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from released import NAMES, claim, inventory
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import outside_keys

from sdinpaint.checkpoints.building import MODELS
from sdinpaint.checkpoints.control_config import controlnet_config
from sdinpaint.families import SD2_INPAINT, SD2_V, SD15, SD15_INPAINT, SDXL, SDXL_INPAINT

FAMILIES = {
    "sd15_inpainting": SD15_INPAINT,
    "sd15_base": SD15,
    "sd2_inpainting": SD2_INPAINT,
    "sd2_v_768": SD2_V,
    "sdxl_inpainting": SDXL_INPAINT,
    "sdxl_base": SDXL,
}


def row(name, change=dict):
    """How many tensors are missing, unexpected, misshapen and unclaimed, over all parts of a file."""
    weights = inventory(name)
    layout = identify(weights.shapes())
    family = FAMILIES.get(name.partition(".")[0], SD15)
    counts = [0, 0, 0, len(outside_keys(weights, layout))]
    for component in layout.components:
        state = claim(weights, component)
        found = change(state.shapes())
        configs = dict(family.components)
        if component == "controlnet":
            configs[component] = controlnet_config(state.shapes(), {}, family.unet, Path(name))
        with torch.device("meta"):
            expected = {
                key: tuple(value.shape) for key, value in MODELS[component](configs[component]).state_dict().items()
            }
        counts[0] += len(expected.keys() - found.keys())
        counts[1] += len(found.keys() - expected.keys()) + len(state.unexpected)
        counts[2] += sum(found[key] != expected[key] for key in found.keys() & expected.keys())
        claimed = {source.key for source in state.sources.values()}.union(state.dropped, state.unexpected)
        prefix = layout.prefixes[component]
        counts[3] += len([key for key in weights if prefix and key.startswith(prefix) and key not in claimed])
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_over_or_lacking(name):
    assert row(name) == [0, 0, 0, 0]


def test_there_is_one_of_every_released_file():
    assert len(NAMES) == 53


def test_a_difference_would_be_counted():
    def change(shapes):
        _, second, *rest = shapes
        return {**{key: shapes[key] for key in rest}, second: (1, 2, 3), "odd.weight": (1,)}

    assert row("sdxl_inpainting.diffusers.unet", change) == [1, 1, 1, 0]
