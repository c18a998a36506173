"""Tell from names and shapes what an adapter file is, and of which family of models. Standard library only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sdinpaint_weights.adapter_names import EMBEDDING, algorithm_of, split_key

__all__ = ["CONTROL_LORA", "EMBEDDINGS", "IP_ADAPTER", "LORA", "AdapterLayout", "adapter_layout", "family_of"]
__all__ += ["foreign_kind", "other_family_of"]

Shapes = Mapping[str, tuple[int, ...]]

LORA, EMBEDDINGS, IP_ADAPTER, CONTROL_LORA = "lora", "textual inversion", "ip-adapter", "control-lora"
FOREIGN = (
    ("ADAPTER_KIND", "a Control-LoRA, a ControlNet of low rank, which is not read", re.compile(r"lora_controlnet$")),
    ("ADAPTER_KIND", "an IP-Adapter, for image prompts", re.compile(r"(?:image_proj|ip_adapter)\.")),
    (
        "ADAPTER_FAMILY",
        "a LoRA of Flux, SD 3 or another transformer",
        re.compile(
            r"transformer\."
            r"|(?:base_model\.model\.)?(?:diffusion_model\.)?(?:double_|single_|joint_|transformer_)\w*blocks"
            r"|lora_(?:unet_(?:double|single|joint)_blocks|transformer_|te3_)"
        ),
    ),
    ("ADAPTER_FAMILY", "a LoRA of a prior (Kandinsky, Stable Cascade)", re.compile(r"lora_prior_")),
)
"""Files of no algorithm or family that is read: error code, what they are in words, and the keys that tell them."""

UNET_STEM = re.compile(
    r"(?:^|[._])(?:down|up|mid|input|output|middle)_blocks?|add_embedding|label_emb|conv_in|conv_out|conv_norm_out|time_emb|(?:^|[._])out[._][02]$"
)
TEXT_STEM = re.compile(r"text_model|text_encoder|lora_te|clip_[lgh]")
SECOND_TEXT = re.compile(r"lora_te2_|text_encoder_2|clip_g\b")
CROSS = re.compile(r"attn2[._](?:processor[._])?to_[kv]$")
DEEP = re.compile(r"transformer_blocks[._](\d+)")
XL_ONLY = re.compile(r"label_emb|add_embedding")
FOUR_LEVELS = re.compile(
    r"(?:down|up)_blocks[._]3[._]|down_blocks[._]0[._]attentions|(?:input|output)_blocks[._](?:9|1\d)[._]"
    r"|input_blocks[._][12][._]1[._]"
)
"""Matches modules that SD 1 and 2 have, with four levels and attention at the first, and SDXL has not."""
CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text embeddings -> family."""
TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
"""Width of a text encoder -> family; SDXL's first one has SD 1's, so the UNet is asked first."""


@dataclass(frozen=True)
class AdapterLayout:
    """The result of `adapter_layout`."""

    kind: str
    """LORA, EMBEDDINGS, IP_ADAPTER or CONTROL_LORA."""
    family: str
    """"sd1", "sd2", "sdxl" or "unknown"."""
    modules: Mapping[str, int]
    """"unet", "text encoder" -> number of modules that have parts in the file."""
    algorithms: Mapping[str, int]
    """Algorithm -> number of modules."""
    ranks: Mapping[int, int]
    """Rank -> number of modules."""
    embeddings: Mapping[str, int]
    """Name of an embedding -> number of its vectors."""


def adapter_layout(shapes: Shapes) -> AdapterLayout | None:
    """Tell what an adapter file is.

    Args:
        shapes: key -> shape of every tensor.

    Returns:
        Kind, family and contents; None where the file is no adapter.
    """
    if any(key.endswith("lora_controlnet") for key in shapes):
        return AdapterLayout(CONTROL_LORA, family_of(shapes), {}, {}, {}, {})
    if any(key.startswith(("image_proj.", "ip_adapter.")) for key in shapes):
        return AdapterLayout(IP_ADAPTER, _family_of_image_prompts(shapes), {}, {}, {}, {})
    modules: dict[str, set[str]] = {}
    for key in shapes:
        for stem, part in split_key(key):
            if UNET_STEM.search(stem) or TEXT_STEM.search(stem):
                modules.setdefault(stem, set()).add(part)
                break
    kinds = {stem: kind for stem, parts in modules.items() if (kind := algorithm_of(parts))}
    held = {key for key in shapes for stem, _ in split_key(key) if stem in kinds}
    inside = _embeddings(shapes)
    if kinds and len(held) + sum(bool(EMBEDDING.fullmatch(key)) for key in shapes) >= len(shapes) / 2:
        named = Counter("text encoder" if TEXT_STEM.search(stem) else "unet" for stem in kinds)
        ranks = Counter(_ranks(shapes))
        return AdapterLayout(LORA, family_of(shapes), named, Counter(kinds.values()), ranks, inside)
    alone = _embedding_alone(shapes)
    if alone is None:
        return None
    family, counts = alone
    return AdapterLayout(EMBEDDINGS, family, {}, {}, {}, counts)


def foreign_kind(shapes: Shapes) -> tuple[str, str] | None:
    """Tell whether a file is an adapter of an algorithm or a family that is not read.

    Args:
        shapes: key -> shape of every tensor.

    Returns:
        The error's code, and what it is in words; None for all others.
    """
    return next(((code, what) for code, what, key in FOREIGN if any(map(key.match, shapes))), None)


def family_of(shapes: Shapes) -> str:
    """Tell the family that an adapter was made for, from the blocks and widths that only one family has.

    Args:
        shapes: key -> shape of every tensor.

    Returns:
        "sd1", "sd2" or "sdxl"; "unknown" where nothing tells.
    """
    stems = {stem for key in shapes for stem, _ in split_key(key)}
    if any(SECOND_TEXT.search(stem) or XL_ONLY.search(stem) for stem in stems):
        return "sdxl"
    if any(int(number) > 0 for stem in stems for number in DEEP.findall(stem) if not TEXT_STEM.search(stem)):
        return "sdxl"
    cross = _widths(shapes, CROSS)
    found = {CONTEXT[width] for width in cross if width in CONTEXT}
    if len(found) == 1:
        return found.pop()
    text = {TEXT_WIDTHS[width] for width in _widths(shapes, TEXT_STEM) if width in TEXT_WIDTHS}
    levels = any(FOUR_LEVELS.search(stem) for stem in stems)
    if text == {"sd2"} or (text == {"sd1"} and levels):
        return text.pop()
    return "unknown"


def other_family_of(shapes: Shapes, family: str) -> str | None:
    """Tell the family that an adapter was made for, where it is another one.

    Args:
        shapes: key -> shape of every tensor.
        family: the family of the model: "sd1", "sd2" or "sdxl".

    Returns:
        "sd1", "sd2", "sdxl", or the title of several; None where it may be the family of the model.
    """
    found = family_of(shapes)
    if found == "unknown" and family == "sdxl" and any(FOUR_LEVELS.search(key) for key in shapes):
        return "Stable Diffusion 1 or 2"
    return None if found in (family, "unknown") else found


def _widths(shapes: Shapes, stem_of: re.Pattern[str]) -> set[int]:
    """Return the widths of the inputs of some modules, where a part tells them."""
    inputs = ("down", "hada_w1_b", "hada_w2_b", "diff", "b2")
    return {
        shape[1]
        for key, shape in shapes.items()
        if len(shape) > 1
        for stem, part in split_key(key)
        if part in inputs and stem_of.search(stem)
    }


def _ranks(shapes: Shapes) -> Iterator[int]:
    """Yield the rank of each module of low rank."""
    rows = {"down": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "b2": 0}
    for key, shape in shapes.items():
        found = next((part for _, part in split_key(key) if part in rows), None)
        if found is not None and shape:
            yield shape[rows[found]]


def _embeddings(shapes: Shapes) -> dict[str, int]:
    """Return the embeddings within a LoRA file with the number of their vectors."""
    found = {}
    for key, shape in shapes.items():
        if (match := EMBEDDING.fullmatch(key)) and len(shape) > 0:
            found[match["name"]] = shape[0] if len(shape) > 1 else 1
    return found


def _embedding_alone(shapes: Shapes) -> tuple[str, dict[str, int]] | None:
    """Return the family and the vectors of a textual inversion's file; None for another file."""
    vectors = {key: shape for key, shape in shapes.items() if len(shape) in (1, 2) and shape[-1] in TEXT_WIDTHS}
    names = {key.rpartition("string_to_param.")[2] for key in vectors}
    if not vectors or len(shapes) > len(vectors) + 2 or any("." in name for name in names):
        return None
    counts = {key: shape[0] if len(shape) == 2 else 1 for key, shape in vectors.items()}
    if {"clip_l", "clip_g"} & vectors.keys():
        return "sdxl", counts
    widths = {shape[-1] for shape in vectors.values()}
    return TEXT_WIDTHS[widths.pop()] if len(widths) == 1 else "unknown", counts


def _family_of_image_prompts(shapes: Shapes) -> str:
    """Tell the family of an IP-Adapter from the width of the image tokens, which is that of text embeddings."""
    widths = {shape[1] for key, shape in shapes.items() if key.endswith("to_k_ip.weight") and len(shape) == 2}
    return CONTEXT.get(widths.pop(), "unknown") if len(widths) == 1 else "unknown"
