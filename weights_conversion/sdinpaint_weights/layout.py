"""Which layout, family and components some weights are, told from names and shapes alone. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sdinpaint_weights.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

FOREIGN = (
    (
        r"lora_(unet|te\d?|transformer)_|.*\.lora[._](up|down|A|B|linear_layer)\.|.*\.(hada_w1_a|lokr_w1)",
        "lora",
        "a LoRA",
    ),
    (r"(image_proj|ip_adapter)\.", "ip-adapter", "an IP-Adapter"),
    (r"emb_params$|string_to_param\.|clip_[lg]$|<[^>]*>$", "textual inversion", "a textual-inversion embedding"),
    (r".*\.motion_modules\.", "motion module", "an AnimateDiff motion module"),
    (r"(.*\.)?joint_blocks\.|transformer_blocks\.\d+\.attn\.add_k_proj\.", "sd3", "an SD3 checkpoint"),
    (r"(.*\.)?double_blocks\.|single_transformer_blocks\.", "flux", "a Flux checkpoint"),
    (r"transformer\.resblocks\.\d", "openclip text", "an OpenCLIP text encoder"),
)
"""(pattern of a name that nothing else has, layout, what it is); the first that matches decides."""

WHOLE = 3  # UNet, VAE and text encoder
EMA_PREFIX = "model_ema."
EMA_UNET = f"{EMA_PREFIX}diffusion_model"


class Mark(NamedTuple):
    """A component is there if a name is `prefix` and then something that matches `pattern`."""

    component: str
    naming: str
    prefix: str
    pattern: str
    family: str = ""
    """The family that this alone tells."""


MARKS = (
    Mark("unet", "ldm", "model.diffusion_model.", r"(input_blocks|middle_block|output_blocks)\."),
    Mark("vae", "ldm", "first_stage_model.", r"(encoder|decoder)\."),
    Mark("text_encoder", "ldm", "cond_stage_model.transformer.", r"(text_model|embeddings|encoder)\.", "sd1"),
    Mark("text_encoder", "ldm", "cond_stage_model.model.", r"(transformer|token_embedding)\.", "sd2"),
    Mark("text_encoder", "ldm", "conditioner.embedders.0.", r"(transformer|model)\.", "sdxl"),
    Mark("text_encoder_2", "ldm", "conditioner.embedders.1.", r"model\.", "sdxl"),
    Mark("controlnet", "ldm", "control_model.", r"(input_blocks|zero_convs|input_hint_block)\."),
    Mark("unet", "ldm", EMA_PREFIX, r"diffusion_model(input_blocks|middle_block|output_blocks)"),
    # Names without a prefix: the file is one component.
    Mark("controlnet", "ldm", "", r"(zero_convs|input_hint_block)\."),
    Mark("controlnet", "diffusers", "", r"controlnet_(cond_embedding|down_blocks|mid_block)\."),
    Mark("unet", "ldm", "", r"(input_blocks|output_blocks)\."),
    Mark("unet", "diffusers", "", r"(down_blocks|mid_block|up_blocks)\."),
    Mark("vae", "ldm", "", r"(encoder|decoder)\.(down|mid|up)\."),
    Mark("vae", "diffusers", "", r"(encoder|decoder)\.(down_blocks|mid_block|up_blocks)\."),
    Mark("text_encoder", "diffusers", "", r"text_model\.(embeddings|encoder)\.|embeddings\.token_|encoder\.layers\."),
)
"""For each component the first mark that is met counts; one without a prefix only where nothing else was met."""

FAMILIES = {
    "sd1": "a Stable Diffusion 1 checkpoint",
    "sd2": "a Stable Diffusion 2 checkpoint",
    "sdxl": "an SDXL checkpoint",
    "unknown": "a checkpoint of no known family",
}
ALONE = {"unet": "a UNet", "vae": "a VAE", "text_encoder": "a text encoder", "controlnet": "a ControlNet"}
CHANNELS = {4: "text to image", 5: "depth to image", 8: "instructed edits", 9: "inpainting"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What some weights are."""

    layout: str
    """"ldm" for a single file of several components; "ldm unet", "diffusers vae", ... for one; or what else it is."""
    family: str
    """"sd1", "sd2", "sdxl" or "unknown"; "sd" for a VAE alone, which is the same in all of them."""
    title: str
    """What it is, for people: "an SDXL checkpoint"."""
    prefixes: Mapping[str, str]
    """Component -> what its names begin with."""
    in_channels: int | None
    """Input channels of the UNet; 9 for inpainting."""
    has_ema: bool
    """Whether averaged weights of the UNet are there."""
    why: tuple[str, ...]
    """The names and shapes from which this was concluded, as sentences."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are there: unet, vae, text_encoder, text_encoder_2, controlnet."""
        return tuple(self.prefixes)

    @property
    def naming(self) -> str:
        """ "ldm" or "diffusers": whose names the components have."""
        return self.layout.partition(" ")[0]

    @property
    def ema_only(self) -> bool:
        """Whether the UNet is there as averaged weights alone."""
        return self.prefixes.get("unet") == EMA_PREFIX


def identify(shapes: Shapes) -> Layout:
    """What these names and shapes are; never fails: "unknown" is an answer as well."""
    met = _marks_met(shapes)
    whole = len(met) >= WHOLE  # then a stray tensor of something else is junk, and does not decide
    for pattern, layout, title in () if whole else FOREIGN:
        name = next((name for name in shapes if re.match(pattern, name)), None)
        if name is not None:
            return _other(layout, title, f"{_say(shapes, name)}: {title}")
    if not met:
        plural = "" if len(shapes) == 1 else "s"
        return _other("unknown", f"not a Stable Diffusion checkpoint: {len(shapes)} tensor{plural}, none known")
    components = [mark.component for mark, _ in met]
    why = [f"{_say(shapes, name)}: {ALONE.get(mark.component, mark.component)}" for mark, name in met]
    family = _family(shapes, met, why)
    only = ALONE.get(components[0], components[0]) if len(components) == 1 else ""
    return Layout(
        layout=met[0][0].naming + (f" {components[0].removesuffix('_encoder')}" if only else ""),
        family=family,
        title=f"{only} alone" if only else FAMILIES[family],
        prefixes={mark.component: mark.prefix for mark, _ in met},
        in_channels=_in_channels(shapes, components, why),
        has_ema=any(name.startswith(EMA_UNET) for name in shapes),
        why=tuple(why),
    )


def require_family(layout: Layout, subject: object, families: tuple[str, ...]) -> None:
    """Refuse, by its name, what is of none of these families.

    Raises: CheckpointError.
    """
    if layout.family in families:
        return
    found = layout.title + "".join(f"\n  because {sentence}" for sentence in layout.why)
    expected = " or ".join(FAMILIES.get(family, "a VAE") for family in families)
    raise CheckpointError("CKPT_WRONG_FAMILY", subject, found, expected=expected, hint="give another file")


def _other(layout: str, title: str, *why: str) -> Layout:
    return Layout(layout=layout, family="unknown", title=title, prefixes={}, in_channels=None, has_ema=False, why=why)


def _marks_met(shapes: Shapes) -> list[tuple[Mark, str]]:
    met: dict[str, tuple[Mark, str]] = {}
    for mark in MARKS:
        if mark.component in met or (met and not mark.prefix):
            continue
        pattern = re.compile(re.escape(mark.prefix) + f"({mark.pattern})")
        name = next((name for name in shapes if pattern.match(name)), None)
        if name is not None:
            met[mark.component] = (mark, name)
    return list(met.values())


def _family(shapes: Shapes, met: list[tuple[Mark, str]], why: list[str]) -> str:
    """The one family that all the evidence tells; the evidence is added to `why`."""
    votes = {mark.family for mark, _ in met if mark.family}
    why += [f"{mark.prefix}* is the text encoder of {mark.family.upper()}" for mark, _ in met if mark.family]
    projection = _first(shapes, r".*\.proj_in\.weight|.*proj_inweight")
    sizes = _first(shapes, r"(.*\.)?(label_emb\.0\.0|add_embedding\.linear_1)\.weight|.*label_emb00weight")
    if sizes:
        votes.add("sdxl")
        why.append(f"{_say(shapes, sizes)}: a UNet that is told the picture's size, as in SDXL")
    elif projection:
        convolution = len(shapes[projection]) == 4
        votes.add("sd1" if convolution else "sd2")
        why.append(f"{_say(shapes, projection)}: {'a convolution, as in SD1' if convolution else 'linear, as in SD2'}")
    components = [mark.component for mark, _ in met]
    if components == ["vae"]:
        return "sd" if _latent_channels(shapes) == 4 else "unknown"
    if components == ["text_encoder"] and not votes:
        votes.add(_family_of_text(shapes, why))
    return votes.pop() if len(votes) == 1 else "unknown"


def _family_of_text(shapes: Shapes, why: list[str]) -> str:
    """A transformers text encoder alone; only the widths of the released ones tell more than "CLIP"."""
    table = _first(shapes, r"(text_model\.)?embeddings\.token_embedding\.weight")
    width = shapes[table][-1] if table and shapes[table] else 0
    family = {1024: "sd2", 1280: "sdxl"}.get(width, "sd1")
    if table:
        why.append(f"{_say(shapes, table)}: {width} wide, as in {family.upper()}")
    return family


def _in_channels(shapes: Shapes, components: list[str], why: list[str]) -> int | None:
    name = _first(shapes, r"(model\.diffusion_model\.)?(input_blocks\.0\.0|conv_in)\.weight") or _first(
        shapes, rf"{EMA_UNET}input_blocks00weight"
    )
    if "unet" not in components or name is None or len(shapes[name]) != 4:
        return None
    channels = shapes[name][1]
    why.append(f"{_say(shapes, name)}: {channels} input channels, {CHANNELS.get(channels, 'of no known use')}")
    return channels


def _latent_channels(shapes: Shapes) -> int:
    name = _first(shapes, r"(first_stage_model\.)?decoder\.conv_in\.weight")
    return shapes[name][1] if name and len(shapes[name]) == 4 else 0


def _first(shapes: Shapes, pattern: str) -> str | None:
    compiled = re.compile(f"(?:{pattern})$")
    return next((name for name in shapes if compiled.match(name)), None)


def _say(shapes: Shapes, name: str) -> str:
    return f"{name} {shapes[name]}"
