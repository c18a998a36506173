"""Recognise layout, family and components of weights from names and shapes alone. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sdinpaint_weights.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Words = tuple[str, ...]
"""Pieces of names, searched in a text of one name per line; "\\n" stands for the beginning or end of a name."""

EMA_PREFIX = "model_ema."
EMA_UNET = f"{EMA_PREFIX}diffusion_model"


class Mark(NamedTuple):
    """The evidence of a component: a name that begins with `prefix` and then one of `words`."""

    component: str
    naming: str
    """Origin of the names: "ldm" (native), "diffusers" (for text encoders, transformers) or "openclip"."""
    prefix: str
    words: Words
    family: str = ""
    """The family that this mark alone proves; empty where it proves none."""


_UNET = ("input_blocks.", "output_blocks.")
_VAE = ("encoder.", "decoder.")
_DIFFUSERS_UNET = ("down_blocks.", "up_blocks.", "mid_block.")
_DIFFUSERS_VAE = tuple(half + word for half in _VAE for word in _DIFFUSERS_UNET)
_TEXT = ("text_model.", "embeddings.", "encoder.")
_OPENCLIP = ("transformer.resblocks.", "token_embedding.")
_CONTROLNET = ("zero_convs.", "input_hint_block.")
_DIFFUSERS_CONTROLNET = ("controlnet_down_blocks.", "controlnet_cond_embedding.", "controlnet_mid_block.")

MARKS = (
    Mark("unet", "ldm", "model.diffusion_model.", _UNET),
    # Some single files have the networks of diffusers under the official prefixes.
    Mark("unet", "diffusers", "model.diffusion_model.", _DIFFUSERS_UNET),
    Mark("vae", "diffusers", "first_stage_model.", _DIFFUSERS_VAE),
    Mark("vae", "ldm", "first_stage_model.", _VAE),
    Mark("text_encoder", "ldm", "cond_stage_model.transformer.", _TEXT, "sd1"),
    Mark("text_encoder", "openclip", "cond_stage_model.model.", _OPENCLIP, "sd2"),
    Mark("text_encoder", "ldm", "conditioner.embedders.0.transformer.", _TEXT, "sdxl"),
    Mark("text_encoder_2", "openclip", "conditioner.embedders.1.model.", _OPENCLIP, "sdxl"),
    Mark("text_encoder_2", "openclip", "conditioner.embedders.0.model.", _OPENCLIP, "sdxl-refiner"),
    Mark("text_encoder", "ldm", "cond_stage_model.model.", ("text_model.",), "sd2"),
    Mark("text_encoder_2", "ldm", "conditioner.embedders.1.model.", ("text_model.",), "sdxl"),
    Mark("text_encoder_2", "ldm", "conditioner.embedders.1.transformer.", _TEXT, "sdxl"),
    Mark("controlnet", "ldm", "control_model.", (*_CONTROLNET, "input_blocks.")),
    Mark("unet", "ldm", EMA_PREFIX, tuple(f"diffusion_model{word}"[:-1] for word in _UNET)),
    # The components of a diffusers folder in a single file.
    Mark("unet", "diffusers", "unet.", _DIFFUSERS_UNET),
    Mark("vae", "diffusers", "vae.", _VAE),
    Mark("text_encoder", "diffusers", "text_encoder.", _TEXT),
    Mark("text_encoder_2", "diffusers", "text_encoder_2.", _TEXT),
    Mark("controlnet", "diffusers", "controlnet.", _DIFFUSERS_CONTROLNET),
    # Names without a prefix: the file is a single component.
    Mark("controlnet", "ldm", "", _CONTROLNET),
    Mark("controlnet", "diffusers", "", _DIFFUSERS_CONTROLNET),
    Mark("unet", "ldm", "", _UNET),
    Mark("unet", "diffusers", "", _DIFFUSERS_UNET),
    Mark("vae", "ldm", "", ("encoder.down.", "encoder.mid.", "decoder.mid.", "decoder.up.")),
    Mark("vae", "diffusers", "", _DIFFUSERS_VAE),
    Mark(
        "text_encoder", "diffusers", "", ("text_model.", "embeddings.token_embedding.", "encoder.layers.0.self_attn.")
    ),
    Mark("text_encoder", "openclip", "", _OPENCLIP),
)
"""All marks; the first match of a component counts, and marks without a prefix only where no other matched."""

_EMBEDDING = ("\nemb_params\n", "\nstring_to_param.", "\n<", "\nclip_l\n", "\nclip_g\n")
_LORA = (
    *("\nlora_unet_", "\nlora_te", "\nlora_transformer_", ".lora_up.", ".lora_down.", ".lora_A.", ".lora_B."),
    *(".lora.up.", ".lora.down.", "_lora.up.", "_lora.down.", ".lora_linear_layer."),
)
ADDITIONS = (
    ("control-lora", "a Control-LoRA, a ControlNet as differences from a UNet", ("\nlora_controlnet\n",)),
    ("lora", "a LoHa, a kind of LoRA", (".hada_w1_a",)),
    ("lora", "a LoKr, a kind of LoRA", (".lokr_w1",)),
    ("lora", "a LoRA", _LORA),
    ("ip-adapter", "an IP-Adapter", ("\nimage_proj.", "\nip_adapter.")),
    ("t2i-adapter", "a T2I-Adapter", ("body.0.block1.", "body.0.in_conv.", "body.0.resnets.0.block1.")),
    ("textual inversion", "a textual-inversion embedding", _EMBEDDING),
    ("motion module", "an AnimateDiff motion module", (".motion_modules.",)),
    ("lllite", "a ControlNet-LLLite", ("\nlllite_",)),
    ("brushnet", "a BrushNet", ("\nbrushnet_",)),
    ("upscaler", "an upscaler such as ESRGAN", ("RRDB_trunk.", ".rdb1.", ".RDB1.", "conv_first.", "body.0.weight\n")),
    ("safety checker", "a safety checker", ("\nconcept_embeds\n", "\nsafety_checker.")),
)
"""Adapters and other additions to a checkpoint: (layout, title, words that occur in no other kind of file)."""

MODELS = (
    ("controlnet union", "a ControlNet-Union, several in one", ("control_add_embedding.", "spatial_ch_projs.")),
    ("dit controlnet", "a ControlNet of SD3 or Flux", ("\ncontrolnet_blocks.", "controlnet_x_embedder.")),
    ("flux", "a Flux checkpoint", ("double_blocks.", "single_transformer_blocks.")),
    ("sd3", "an SD3 checkpoint", ("joint_blocks.", ".attn.add_k_proj.")),
    ("video", "a Stable Video Diffusion checkpoint", (".time_stack.", ".temporal_transformer_blocks.")),
    ("cascade", "a Stable Cascade checkpoint", ("clip_txt_mapper.", "clip_txt_pooled_mapper.")),
    ("vq", "a model with a VQ autoencoder", ("quantize.embedding.weight\n",)),
    ("tiny vae", "a tiny autoencoder (TAESD)", ("encoder.layers.0.weight\n", "decoder.layers.0.weight\n")),
    ("t5", "a T5 text encoder", (".SelfAttention.",)),
)
"""Models that are not supported: (layout, title, words that occur in no other kind of file)."""

FAMILIES = {
    "sd1": "a Stable Diffusion 1 checkpoint",
    "sd2": "a Stable Diffusion 2 checkpoint",
    "sdxl": "an SDXL checkpoint",
    "sdxl-refiner": "the SDXL refiner",
    "unknown": "a checkpoint of no known family",
}
"""Family -> title of a complete checkpoint."""
NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL", "sdxl-refiner": "the SDXL refiner"}
ALONE = {
    "unet": "a UNet",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "text_encoder_2": "a second text encoder",
    "controlnet": "a ControlNet",
}
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
"""Width of the text embeddings that a released UNet takes -> its family."""
TOKEN_TABLE = ("token_embedding.weight\n",)
LATENT_CHANNELS = 4
TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
"""Width of a text encoder alone -> its family; CLIP-L, 768 wide, is also the first one of SDXL."""
CHANNELS = {4: "text to image", 5: "depth to image", 7: "upscaling", 8: "instruction-based editing", 9: "inpainting"}
"""Input channels of a UNet -> its task."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The result of `identify`: layout, family and components of some weights."""

    layout: str
    """"ldm" for a single file of several components; "ldm unet", "diffusers vae", ... for one; or another kind."""
    family: str
    """"sd1", "sd2", "sdxl", "sdxl-refiner" or "unknown"; "sd" for a VAE alone, which is the same in all of them, and
    "sd1" for CLIP-L alone, which is also SDXL's first text encoder."""
    title: str
    """Description for people, e.g. "an SDXL checkpoint"."""
    marks: Mapping[str, Mark]
    """Component -> the mark that it was recognised by, with the prefix and the origin of its names."""
    in_channels: int | None
    """Input channels of the UNet, 9 for inpainting; None without a UNet."""
    has_ema: bool
    """True where there are averaged (EMA) weights of the UNet."""
    why: tuple[str, ...]
    """The names and shapes that prove it, as sentences."""

    @property
    def prefixes(self) -> dict[str, str]:
        """Return {component: prefix of its names}."""
        return {component: mark.prefix for component, mark in self.marks.items()}

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components found: unet, vae, text_encoder, text_encoder_2, controlnet."""
        return tuple(self.marks)

    @property
    def naming(self) -> str:
        """Return the origin of the first component's names: "ldm", "diffusers" or "openclip"."""
        return self.layout.partition(" ")[0]

    @property
    def ema_only(self) -> bool:
        """Tell whether the only weights of the UNet are averaged (EMA) ones."""
        return self.prefixes.get("unet") == EMA_PREFIX


def identify(shapes: Shapes) -> Layout:
    """Recognise weights from names and shapes; nothing is raised where they are not recognised.

    Args:
        shapes: name in the file -> shape.

    Returns:
        Layout, family and components, with the reasons; the family may be "unknown".
    """
    text = "\n".join(["", *(name for name in shapes if "\n" not in name), ""])
    met = _marks_met(text, shapes)
    whole = "unet" in met and "vae" in met  # then a stray tensor of an adapter does not decide
    for layout, title, words in (*(() if whole else ADDITIONS), *MODELS):
        name = _find(text, words)
        if name is not None:
            return _other(layout, title, f"{_say(shapes, name)}: {title}")
    if not met:
        plural = "" if len(shapes) == 1 else "s"
        return _other("unknown", f"not a Stable Diffusion checkpoint: {len(shapes)} tensor{plural}, none known")
    marks = {component: mark for component, (mark, _) in met.items()}
    why = [f"{_say(shapes, name)}: {ALONE[component]}" for component, (_, name) in met.items()]
    family = _family(text, shapes, marks, why)
    component, mark = next(iter(marks.items()))
    alone = len(marks) == 1
    return Layout(
        layout=mark.naming + (f" {component.removesuffix('_encoder')}" if alone else ""),
        family=family,
        title=_title_alone(component, family, shapes, mark.prefix) if alone else FAMILIES[family],
        marks=marks,
        in_channels=_in_channels(shapes, marks, why),
        has_ema=f"\n{EMA_UNET}" in text,
        why=tuple(why),
    )


def require_family(layout: Layout, subject: object, families: tuple[str, ...]) -> None:
    """Check that weights are of one of some families.

    Args:
        layout: the result of `identify`.
        subject: the file that the error names.
        families: names of the families allowed.

    Raises:
        CheckpointError: they are of another family; the error says which, and why.
    """
    if layout.family in families:
        return
    found = layout.title + "".join(f"\n  because {sentence}" for sentence in layout.why)
    expected = " or ".join(FAMILIES.get(family, "a VAE") for family in families)
    raise CheckpointError("CKPT_WRONG_FAMILY", subject, found, expected=expected, hint="give another file")


def _other(layout: str, title: str, *why: str) -> Layout:
    return Layout(layout=layout, family="unknown", title=title, marks={}, in_channels=None, has_ema=False, why=why)


def _marks_met(text: str, shapes: Shapes) -> dict[str, tuple[Mark, str]]:
    """Return {component: (its mark, the first name that matched it)}."""
    met: dict[str, tuple[Mark, str]] = {}
    for mark in MARKS:
        if mark.component in met or (met and not mark.prefix):
            continue
        name = _find(text, (f"\n{mark.prefix}{word}" for word in mark.words))
        if name is not None:
            second = mark.component == "text_encoder" and not mark.prefix and _is_second(text, shapes)
            met["text_encoder_2" if second else mark.component] = mark, name
    return met


def _is_second(text: str, shapes: Shapes) -> bool:
    """Tell whether a text encoder alone is SDXL's second one: by its width, or at other widths by its projection."""
    width = _text_width(text, shapes)
    return TEXT_WIDTHS[width] == "sdxl" if width in TEXT_WIDTHS else "text_projection.weight" in shapes


def _family(text: str, shapes: Shapes, marks: Mapping[str, Mark], why: list[str]) -> str:
    """Return the family that all evidence agrees on, and add the evidence to `why`."""
    votes = {mark.family for mark in marks.values() if mark.family}
    why += [f"{mark.prefix}* is the text encoder of {mark.family.upper()}" for mark in marks.values() if mark.family]
    if list(marks) == ["vae"]:
        return _family_of_vae(shapes, marks["vae"], why)
    if not votes and set(marks) <= {"text_encoder", "text_encoder_2"}:
        return _family_of_text(text, shapes, why)
    unet = _family_of_unet(text, shapes, why)
    if unet:
        votes.add(unet)
    return votes.pop() if len(votes) == 1 else "unknown"


def _family_of_unet(text: str, shapes: Shapes, why: list[str]) -> str:
    """Recognise a UNet or ControlNet by the width of the text embeddings it takes, or else by its structure."""
    sizes = _find(text, ("label_emb.0.0.weight\n", "add_embedding.linear_1.weight\n", "label_emb00weight\n"))
    projection = _find(text, (".proj_in.weight\n", "proj_inweight\n"))
    context = _find(text, ("attn2.to_k.weight\n", "attn2to_kweight\n"))
    family, sentence = "", ""
    if sizes:
        family, sentence = "sdxl", f"{_say(shapes, sizes)}: a UNet with size and crop conditioning, as in SDXL"
    elif projection:
        convolution = len(shapes[projection]) == 4
        family, found = ("sd1", "a convolution, as in SD1") if convolution else ("sd2", "linear, as in SD2")
        sentence = f"{_say(shapes, projection)}: {found}"
    width = shapes[context][-1] if context and shapes[context] else 0
    released = CONTEXT_WIDTHS.get(width, family)
    if sentence and released == family:
        why.append(sentence)
    if context and width in CONTEXT_WIDTHS:
        why.append(f"{_say(shapes, context)}: it takes text embeddings {width} wide, as in {released.upper()}")
    return released


def _family_of_vae(shapes: Shapes, mark: Mark, why: list[str]) -> str:
    """Return "sd" for a VAE with four latent channels, which all families share."""
    name = f"{mark.prefix}decoder.conv_in.weight"
    channels = _channels(shapes, name)
    if channels != LATENT_CHANNELS and name in shapes:
        why.append(f"{_say(shapes, name)}: {channels} latent channels, not {LATENT_CHANNELS}")
    return "sd" if channels == LATENT_CHANNELS else "unknown"


def _family_of_text(text: str, shapes: Shapes, why: list[str]) -> str:
    """Recognise a text encoder alone by its width, with SD1 for widths that no release has."""
    table = _find(text, TOKEN_TABLE)
    width = _text_width(text, shapes)
    family = TEXT_WIDTHS.get(width, "sd1")
    if table:
        why.append(f"{_say(shapes, table)}: {width} wide, as in {family.upper()}")
    return family


def _text_width(text: str, shapes: Shapes) -> int:
    table = _find(text, TOKEN_TABLE)
    return shapes[table][-1] if table and shapes[table] else 0


def _in_channels(shapes: Shapes, marks: Mapping[str, Mark], why: list[str]) -> int | None:
    if "unet" not in marks:
        return None
    prefix = marks["unet"].prefix
    names = (f"{prefix}input_blocks.0.0.weight", f"{prefix}conv_in.weight", f"{EMA_UNET}input_blocks00weight")
    name = next((name for name in names if name in shapes), "")
    channels = _channels(shapes, name)
    if channels is not None:
        why.append(f"{_say(shapes, name)}: {channels} input channels, {CHANNELS.get(channels, 'an unknown task')}")
    return channels


def _channels(shapes: Shapes, name: str) -> int | None:
    """Return the input channels of a convolution, None where there is none of that name."""
    shape = shapes.get(name, ())
    return shape[1] if len(shape) == 4 else None


def _title_alone(component: str, family: str, shapes: Shapes, prefix: str) -> str:
    channels = _channels(shapes, f"{prefix}decoder.conv_in.weight")
    if component == "vae" and channels not in (None, LATENT_CHANNELS):
        return f"a VAE of {channels} latent channels" + (", as in SD3 and Flux" if channels == 16 else "")
    tells_family = component in ("unet", "controlnet") and family in NAMES
    return f"{ALONE[component]} alone" + (f", of {NAMES[family]}" if tells_family else "")


def _find(text: str, words: Iterable[str]) -> str | None:
    """Return the first name that contains a word, for the first word that occurs at all."""
    for word in words:
        at = text.find(word)
        if at >= 0:
            start = text.rfind("\n", 0, at + 1) + 1
            return text[start : text.find("\n", start)]
    return None


def _say(shapes: Shapes, name: str) -> str:
    return f"{name} {shapes[name]}"
