"""The names and shapes of real LoRA files: each is claimed whole by the models that it was made for."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from builders import write_header
from places import DATA
from sdinpaint_weights.adapter_layout import LORA, adapter_layout, family_of
from sdinpaint_weights.adapter_names import spellings, targets_of
from sdinpaint_weights.files import SourceFile

from sdinpaint.adapters.deltas import require_fit
from sdinpaint.adapters.reading import read_lora
from sdinpaint.errors import AdapterError
from sdinpaint.families import SD2_INPAINT, SD15_INPAINT, SDXL_INPAINT
from sdinpaint.models import CLIPText, UNet

FAMILIES = {family.kind: family for family in (SD15_INPAINT, SD2_INPAINT, SDXL_INPAINT)}
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
INVENTORIES = {
    "sd15_kohya": ("sd1", {"lora": 264}, {32: 264}),
    "sd15_kohya_c3": ("sd1", {"lora": 350}, None),
    "sd15_lcm_lora": ("sd1", {"lora": 278}, {64: 278}),
    "sd15_diffusers_peft": ("sd1", {"lora": 128}, {4: 128}),
    "sd15_diffusers_lora": ("sd1", {"lora": 176}, {4: 176}),
    "sd15_diffusers_processors": ("sd1", {"lora": 128}, {4: 128}),
    "sd15_loha_full": ("sd1", {"loha": 282}, None),
    "sd2_kohya": ("sd2", {"lora": 330}, {32: 330}),
    "sdxl_kohya": ("sdxl", {"lora": 986}, {16: 986}),
    "sdxl_kohya_unet": ("sdxl", {"lora": 722}, {16: 722}),
    "sdxl_lcm_lora": ("sdxl", {"lora": 788}, {64: 788}),
    "sdxl_slider": ("sdxl", {"lora": 280}, {4: 280}),
    "sdxl_diffusers_peft": ("sdxl", {"lora": 736}, {4: 736}),
    "sdxl_lokr_factor16": ("sdxl", {"lokr": 722}, {}),
}
"""Name -> family, number of modules by algorithm, and by rank (None: not one for all)."""


def shapes_of(name):
    table = json.loads(gzip.decompress((DATA / "adapters" / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in table.items()}


@pytest.fixture(scope="module")
def models():
    """The networks of each family in their real sizes, without memory."""
    with torch.device("meta"):
        return {
            kind: dict(zip(NETWORKS, (UNet(family.unet), *map(CLIPText, family.texts)), strict=False))
            for kind, family in FAMILIES.items()
        }


@pytest.fixture(scope="module")
def tables(models):
    """Every spelling of the modules of each family."""
    return {
        kind: spellings(
            target
            for name, network in networks.items()
            for target in targets_of(name, [key for key, one in network.named_modules() if "weight" in one._parameters])
        )
        for kind, networks in models.items()
    }


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """opened(name) -> a file of zeros of these names and shapes, whose digest is not computed."""
    monkeypatch.setattr(SourceFile, "sha256", lambda self: "")
    return lambda name: write_header(tmp_path / f"{name}.safetensors", shapes_of(name))


def test_all_are_tested():
    assert set(INVENTORIES) == {path.name.removesuffix(".json.gz") for path in (DATA / "adapters").iterdir()}


@pytest.mark.parametrize("name", INVENTORIES)
def test_every_key_has_its_module_and_fits_it(models, tables, opened, name):
    kind, kinds, _ = INVENTORIES[name]
    shapes = shapes_of(name)
    file = read_lora(opened(name), tables[kind], kind)
    assert sum(map(len, file.parts.values())) == len(shapes)
    assert not file.skipped
    assert {one: list(file.algorithms.values()).count(one) for one in file.algorithms.values()} == kinds
    for target, parts in file.parts.items():
        module = models[kind][target.network].get_submodule(target.module)
        held = {part: torch.empty(shapes[key], device="meta") for part, key in parts.items() if part != "alpha"}
        alpha = {"alpha": torch.zeros(())} if "alpha" in parts else {}
        require_fit(held | alpha, module.weight, module.bias)


@pytest.mark.parametrize("name", INVENTORIES)
def test_contents_are_told(name):
    kind, kinds, ranks = INVENTORIES[name]
    shapes = shapes_of(name)
    assert family_of(shapes) == kind
    layout = adapter_layout(shapes)
    assert (layout.kind, layout.family, dict(layout.algorithms)) == (LORA, kind, kinds)
    assert sum(layout.modules.values()) == sum(kinds.values())
    if ranks is not None:
        assert dict(layout.ranks) == ranks


@pytest.mark.parametrize("name", INVENTORIES)
def test_other_families_refuse_it_by_name(tables, opened, name):
    kind, path = INVENTORIES[name][0], opened(name)
    for other in FAMILIES:
        unread = {kind, *({"sd1", "sd2"} if kind != "sdxl" else ())}  # their names are the same, and shapes tell
        if other not in unread:
            with pytest.raises(AdapterError) as caught:
                read_lora(path, tables[other], other)
            assert caught.value.code == "ADAPTER_FAMILY"
