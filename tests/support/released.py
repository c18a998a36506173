"""Names, shapes and dtypes of the released files, and small random tensors under the same names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from places import DATA
from sdinpaint_weights.dtypes import STORED
from sdinpaint_weights.keymap import Edit
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import native_state
from sdinpaint_weights.weights import Entry, Weights

INVENTORIES = DATA / "inventories"
CONVERTED = "diffusers_from_ldm"
openclip_mistakes = pytest.mark.parametrize(
    ("name", "wrong", "seen"),
    [
        ("STACKED", {"q_proj": Edit.K_ROWS, "k_proj": Edit.Q_ROWS, "v_proj": Edit.V_ROWS}, "[qk]_proj"),
        ("PROJECTION", ("text_projection", Edit.AS_IS), "text_projection"),
    ],
)
"""Mistakes in the names of OpenCLIP: rows of q and k exchanged, and a projection that is not transposed."""
NAMES = sorted(path.name.removesuffix(".json.gz") for path in INVENTORIES.iterdir() if CONVERTED not in path.name)

SINGLE_FILES = {
    "sd15_base": "sd15_base.ldm",
    "sd15_inpainting": "sd15_inpainting.ldm",
    "sd2_inpainting": "sd2_inpainting.ldm",
    "sd2_v_768": "sd2_v_768.ldm",
    "sdxl_base": "sdxl_base.sgm",
    "sdxl_inpainting": "sdxl_inpainting.sgm",
}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "controlnet": "control_model."}
TEXT_ENCODERS = {
    "sd15": "sd15_base.diffusers.text_encoder_no_position_ids",
    "sd2": "sd2_inpainting.diffusers.text_encoder_no_position_ids",
    "sdxl": "sdxl_base.diffusers.text_encoder_no_position_ids",
}


def read(name):
    return json.loads(gzip.decompress((INVENTORIES / f"{name}.json.gz").read_bytes()))


def shapes_of(name):
    return {key: tuple(shape) for key, (shape, _) in read(name).items()}


def inventory(name):
    """Weights without bytes."""
    entries = {key: Entry(None, 0, STORED[kind], tuple(shape), ()) for key, (shape, kind) in read(name).items()}
    return Weights(Path(f"{name}.safetensors"), "safetensors", entries)


def claim(weights, component, **options):
    return native_state(weights, component, identify(weights.shapes()), **options)


def native_shapes(component, model):
    """Native names and shapes by their definition, from a released file that has them but for the prefix."""
    if component == "text_encoder":
        return shapes_of(TEXT_ENCODERS[model.partition("_")[0]])
    if component == "text_encoder_2":
        return shapes_of("sdxl_base.diffusers.text_encoder_2")
    prefix = PREFIXES[component]
    file = "control_v11p_sd15_inpaint.cldm" if component == "controlnet" else SINGLE_FILES[model]
    return {key.removeprefix(prefix): shape for key, shape in shapes_of(file).items() if key.startswith(prefix)}


def small(size):
    """A small size for a large one; equal for equal sizes, mostly different for different ones."""
    return size if size < 10 else 2 + size % 11


def random_tensors(shapes, seed=0):
    """A few random numbers for each name, of the rank that it has."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn([small(size) for size in shape], generator=generator) for name, shape in shapes.items()}
