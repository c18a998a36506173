"""The digests by which a complete file is told without building a network are those of the networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdinpaint.checkpoints.building import MODELS
from sdinpaint.checkpoints.known_shapes import KNOWN, digest_of, has_known_shapes
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.families import FAMILIES
from sdinpaint.load_options import LoadOptions


@pytest.fixture(scope="module")
def demo():
    return open_checkpoint(LoadOptions(source="demo"))


def test_they_are_those_of_the_networks(demo):
    found = {}
    for family in (*FAMILIES.values(), demo.family):
        for name, config in family.components.items():
            with torch.device("meta"):
                state = MODELS[name](config).state_dict()
            digest = digest_of(config, {key: tuple(value.shape) for key, value in state.items()})
            found.setdefault(digest, f"{name} of {'demo' if family is demo.family else family.name}")
    assert found == KNOWN


def changed(checkpoint, component, **changes):
    part = checkpoint.parts[component]
    return replace(
        checkpoint, parts={**checkpoint.parts, component: replace(part, state=replace(part.state, **changes))}
    )


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_file_that_is_not_complete_is_not_known(demo, component):
    assert has_known_shapes(demo)
    sources = demo.states[component].sources
    first, second = list(sources)[:2]
    missing = {name: source for name, source in sources.items() if name != first}
    exchanged = {**sources, first: sources[second], second: sources[first]}
    for changes in (
        {"sources": missing},
        {"sources": {**sources, "more": sources[first]}},
        {"sources": exchanged},
        {"unexpected": ("more",)},
    ):
        assert not has_known_shapes(changed(demo, component, **changes)), changes.keys()
    assert not has_known_shapes(
        replace(demo, parts={name: demo.parts[name] for name in demo.parts if name != component})
    )


def test_another_configuration_of_the_same_shapes_is_not_known(demo):
    """Its network may have other shapes."""
    family = replace(demo.family, unet=replace(demo.family.unet, linear_projection=True))
    assert not has_known_shapes(replace(demo, family=family))
