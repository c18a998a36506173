"""Names of modules as adapter files spell them, from the names of a model's own modules. Standard library only.

A key of an adapter is a spelling of a module and a suffix, such as `lora_unet_mid_block_attentions_0_proj_in` and
`.lora_down.weight`. Spellings with underscores in place of dots cannot be taken apart, so every spelling of every
module is made beforehand, and whole strings are compared.

Source: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/wrapper.py; huggingface/diffusers
loaders/lora_conversion_utils.py; huggingface/peft utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

from sdinpaint_weights.keymap import inverse, renamed, unet_table_for

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"


class Target(NamedTuple):
    """A module of a model."""

    network: str
    """Its network: "unet", "text_encoder" or "text_encoder_2"."""
    module: str
    """Its name in the official single files, which the networks use."""
    name: str
    """Its name in diffusers; for text encoders with the network's name before it."""


PREFIXES = {
    UNET: ("lora_unet_", "lycoris_", "unet.", "", "base_model.model.", "base_model.model.unet."),
    TEXT: (
        *("lora_te_", "lora_te1_", "lycoris_", "lycoris_text_encoder_", "text_encoder."),
        *("clip_l.", "clip_l.transformer.", "text_encoders.clip_l.transformer."),
        *("clip_h.", "clip_h.transformer.", "text_encoders.clip_h.transformer."),
        *("base_model.model.", "base_model.model.text_encoder."),
    ),
    TEXT_2: (
        *("lora_te2_", "lycoris_text_encoder_2_", "text_encoder_2.", "base_model.model.text_encoder_2."),
        *("clip_g.", "clip_g.transformer.", "text_encoders.clip_g.transformer."),
    ),
}
"""Prefixes of diffusers' names by network; those that end with an underscore have underscores in place of dots."""
OFFICIAL_PREFIXES = ("lora_unet_", "diffusion_model.")
"""Prefixes of the UNet's names in the official single files."""
ALIASES = (
    (re.compile(r"\.(attn[12])\.to_out\.0$"), (r".\1.to_out", r".\1.processor.to_out")),
    (re.compile(r"\.(attn[12])\.to_([qkv])$"), (r".\1.processor.to_\2",)),
    (re.compile(r"\.self_attn\.([qkv])_proj$"), (r".self_attn.to_\1",)),
    (re.compile(r"\.self_attn\.out_proj$"), (r".self_attn.to_out",)),
    (re.compile(r"^text_model\."), ("",)),
)
"""Other names of attention's modules in diffusers of 2023, and of all modules of transformers 5's CLIPTextModel."""

EMBEDDING = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<part>string_to_param\..+|emb_params|clip_[lg])")
"""Matches the tensors of an embedding within a LoRA file."""

_PARTS = {
    "down": r"\.lora_down\.weight|\.lora_A(?:\.[^.]+)?(?:\.weight)?|(?:[._]lora|\.lora_linear_layer)\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(?:\.[^.]+)?(?:\.weight)?|(?:[._]lora|\.lora_linear_layer)\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora)?\.alpha",
    "scale": r"\.scale",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: rf"\.{name}" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{name: rf"\.{name}" for name in ("lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "on_input")},
    **{name: rf"\.{name}(?:\.weight)?" for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft": r"\.(?:oft_blocks|oft_diag|rescale|b?oft_[RrSs](?:\.[^.]+)?(?:\.weight)?)",
    "weight": r"\.weight",  # IA3's vector; last, as the others end with it
}
_STARTS = re.compile(r"\.|_(?=lora\.)")
_SUFFIX = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PARTS.items()))


class Algorithm(NamedTuple):
    """The parts by which an algorithm is told."""

    ways: tuple[frozenset[str], ...]
    """The sets of parts that make a delta."""
    more: frozenset[str] = frozenset()
    """Parts that may be there beside one of the sets."""


BESIDE = frozenset({"alpha", "scale", "dora_scale", "magnitude"})
"""Parts of any algorithm of low rank: the factor of the product, and DoRA's magnitude."""
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_2 = frozenset({"lokr_w2_a", "lokr_w2_b"})
_LOKR = tuple(
    one | two
    for one, two in product(
        (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"})),
        (frozenset({"lokr_w2"}), _LOKR_2, _LOKR_2 | {"lokr_t2"}),
    )
)
ALGORITHMS = {
    "lora": Algorithm((frozenset({"down", "up"}),), BESIDE | {"mid", "diff_b"}),
    "loha": Algorithm((_LOHA, _LOHA | {"hada_t1", "hada_t2"}), BESIDE | {"diff_b"}),
    "lokr": Algorithm(_LOKR, BESIDE | {"diff_b"}),
    "glora": Algorithm((frozenset({"a1", "a2", "b1", "b2"}),), BESIDE | {"bm", "diff_b"}),
    "full": Algorithm((frozenset({"diff"}), frozenset({"diff_b"})), frozenset({"alpha", "diff_b"})),
    "norm": Algorithm((frozenset({"w_norm"}), frozenset({"b_norm"})), frozenset({"b_norm"})),
    "ia3": Algorithm((frozenset({"weight", "on_input"}),), frozenset({"alpha"})),
}
"""The algorithms by name."""


def algorithm_of(parts: Iterable[str]) -> str | None:
    """Tell the algorithm of a module's parts.

    Args:
        parts: names of the parts.

    Returns:
        A key of ALGORITHMS; None where parts are missing, or belong to no algorithm.
    """
    names = frozenset(parts)
    return next(
        (name for name, (ways, more) in ALGORITHMS.items() if any(way <= names <= way | more for way in ways)),
        None,
    )


def targets_of(network: str, modules: Iterable[str]) -> list[Target]:
    """List the modules of a network as targets.

    Args:
        network: "unet", "text_encoder" or "text_encoder_2".
        modules: native names of those modules that have weights.

    Returns:
        The targets, in the same order.
    """
    modules = list(modules)
    if network != UNET:
        return [Target(network, module, f"{network}.{module}") for module in modules]
    table = inverse(unet_table_for(f"{module}.weight" for module in modules))
    return [Target(network, module, renamed(module, table) or module) for module in modules]


def spellings(targets: Iterable[Target]) -> dict[str, Target]:
    """Make the table of every spelling.

    Args:
        targets: the modules of a model.

    Returns:
        Spelling -> module.
    """
    return {spelling: target for target in targets for spelling in _spelled(target)}


def split_key(key: str) -> Iterator[tuple[str, str]]:
    """Take a key apart in every way that a suffix allows, the longest suffix first.

    Args:
        key: the name of a tensor in an adapter file.

    Yields:
        A possible spelling of a module, and the name of the part: "down", "up", "alpha", "hada_w1_a" and so on.
    """
    for start in _STARTS.finditer(key):
        if found := _SUFFIX.fullmatch(key, start.start()):
            yield key[: start.start()], str(found.lastgroup)


def _spelled(target: Target) -> Iterator[str]:
    own = target.name if target.network == UNET else target.module
    for name in _with_aliases(own):
        yield from (_written(prefix, name) for prefix in PREFIXES[target.network])
    if target.network == UNET:
        for name in _with_aliases(target.module):
            yield from (_written(prefix, name) for prefix in OFFICIAL_PREFIXES)


def _with_aliases(name: str) -> Iterator[str]:
    yield name
    for pattern, others in ALIASES:
        for other in others:
            if pattern.search(name):
                yield pattern.sub(other, name)


def _written(prefix: str, name: str) -> str:
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
