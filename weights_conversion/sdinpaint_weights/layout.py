"""Which layout, family and components some weights are, told from names and shapes alone. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sdinpaint_weights.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Words = tuple[str, ...]
"""Pieces of names; "\\n" is where a name begins or ends, for they are looked for in a text of one name per line."""

EMA_PREFIX = "model_ema."
EMA_UNET = f"{EMA_PREFIX}diffusion_model"


class Mark(NamedTuple):
    """A component is there if a name begins with `prefix` and one of the words."""

    component: str
    naming: str
    """Whose names they are: "ldm" (the native ones), "diffusers" (for text encoders transformers) or "openclip"."""
    prefix: str
    words: Words
    family: str = ""
    """The family that this alone tells."""


_UNET = ("input_blocks.", "output_blocks.")
_VAE = ("encoder.", "decoder.")
_DIFFUSERS_UNET = ("down_blocks.", "up_blocks.", "mid_block.")
_TEXT = ("text_model.", "embeddings.", "encoder.")
_OPENCLIP = ("transformer.resblocks.", "token_embedding.")
_CONTROLNET = ("zero_convs.", "input_hint_block.")
_DIFFUSERS_CONTROLNET = ("controlnet_down_blocks.", "controlnet_cond_embedding.", "controlnet_mid_block.")

MARKS = (
    Mark("unet", "ldm", "model.diffusion_model.", _UNET),
    Mark("vae", "ldm", "first_stage_model.", _VAE),
    Mark("text_encoder", "ldm", "cond_stage_model.transformer.", _TEXT, "sd1"),
    Mark("text_encoder", "openclip", "cond_stage_model.model.", _OPENCLIP, "sd2"),
    Mark("text_encoder", "ldm", "conditioner.embedders.0.transformer.", _TEXT, "sdxl"),
    Mark("text_encoder_2", "openclip", "conditioner.embedders.1.model.", _OPENCLIP, "sdxl"),
    Mark("text_encoder_2", "openclip", "conditioner.embedders.0.model.", _OPENCLIP, "sdxl-refiner"),
    Mark("controlnet", "ldm", "control_model.", (*_CONTROLNET, "input_blocks.")),
    Mark("unet", "ldm", EMA_PREFIX, tuple(f"diffusion_model{word}"[:-1] for word in _UNET)),
    # The parts of a diffusers folder in one file.
    Mark("unet", "diffusers", "unet.", _DIFFUSERS_UNET),
    Mark("vae", "diffusers", "vae.", _VAE),
    Mark("text_encoder", "diffusers", "text_encoder.", _TEXT),
    Mark("text_encoder_2", "diffusers", "text_encoder_2.", _TEXT),
    Mark("controlnet", "diffusers", "controlnet.", _DIFFUSERS_CONTROLNET),
    # Names without a prefix: the file is one component.
    Mark("controlnet", "ldm", "", _CONTROLNET),
    Mark("controlnet", "diffusers", "", _DIFFUSERS_CONTROLNET),
    Mark("unet", "ldm", "", _UNET),
    Mark("unet", "diffusers", "", _DIFFUSERS_UNET),
    Mark("vae", "ldm", "", ("encoder.down.", "encoder.mid.", "decoder.mid.", "decoder.up.")),
    Mark("vae", "diffusers", "", tuple(half + word for half in _VAE for word in _DIFFUSERS_UNET)),
    Mark(
        "text_encoder", "diffusers", "", ("text_model.", "embeddings.token_embedding.", "encoder.layers.0.self_attn.")
    ),
    Mark("text_encoder", "openclip", "", _OPENCLIP),
)
"""For each component the first mark that is met counts; one without a prefix only where nothing else was met."""

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
"""(layout, what it is, words of which no other kind has one): what is used beside a checkpoint, or is junk in one."""

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
"""The same for what is another model as a whole."""

FAMILIES = {
    "sd1": "a Stable Diffusion 1 checkpoint",
    "sd2": "a Stable Diffusion 2 checkpoint",
    "sdxl": "an SDXL checkpoint",
    "sdxl-refiner": "the SDXL refiner",
    "unknown": "a checkpoint of no known family",
}
NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL", "sdxl-refiner": "the SDXL refiner"}
ALONE = {
    "unet": "a UNet",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
    "text_encoder_2": "a second text encoder",
    "controlnet": "a ControlNet",
}
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
"""What the text is to a UNet of each family, as released."""
TOKEN_TABLE = ("token_embedding.weight\n",)
LATENT_CHANNELS = 4
TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
"""What a text encoder alone is; CLIP-L, 768 wide, is also SDXL's first one."""
CHANNELS = {4: "text to image", 5: "depth to image", 7: "upscaling", 8: "instructed edits", 9: "inpainting"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What some weights are."""

    layout: str
    """"ldm" for a single file of several components; "ldm unet", "diffusers vae", ... for one; or what else it is."""
    family: str
    """"sd1", "sd2", "sdxl", "sdxl-refiner" or "unknown"; "sd" for a VAE alone, which is the same in all of them, and
    "sd1" for CLIP-L alone, which is also SDXL's first text encoder."""
    title: str
    """What it is, for people: "an SDXL checkpoint"."""
    marks: Mapping[str, Mark]
    """Component -> the mark by which it was known, with the prefix and the naming of its names."""
    in_channels: int | None
    """Input channels of the UNet; 9 for inpainting."""
    has_ema: bool
    """Whether averaged weights of the UNet are there."""
    why: tuple[str, ...]
    """The names and shapes from which this was concluded, as sentences."""

    @property
    def prefixes(self) -> dict[str, str]:
        """Component -> what its names begin with."""
        return {component: mark.prefix for component, mark in self.marks.items()}

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are there: unet, vae, text_encoder, text_encoder_2, controlnet."""
        return tuple(self.marks)

    @property
    def naming(self) -> str:
        """ "ldm", "diffusers" or "openclip": whose names the first component has."""
        return self.layout.partition(" ")[0]

    @property
    def ema_only(self) -> bool:
        """Whether the UNet is there as averaged weights alone."""
        return self.prefixes.get("unet") == EMA_PREFIX


def identify(shapes: Shapes) -> Layout:
    """What these names and shapes are; never fails: "unknown" is an answer as well."""
    text = "\n".join(["", *(name for name in shapes if "\n" not in name), ""])
    met = _marks_met(text, shapes)
    whole = "unet" in met and "vae" in met  # then a stray tensor of an addition is junk, and does not decide
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
    """Refuse, by its name, what is of none of these families.

    Raises: CheckpointError.
    """
    if layout.family in families:
        return
    found = layout.title + "".join(f"\n  because {sentence}" for sentence in layout.why)
    expected = " or ".join(FAMILIES.get(family, "a VAE") for family in families)
    raise CheckpointError("CKPT_WRONG_FAMILY", subject, found, expected=expected, hint="give another file")


def _other(layout: str, title: str, *why: str) -> Layout:
    return Layout(layout=layout, family="unknown", title=title, marks={}, in_channels=None, has_ema=False, why=why)


def _marks_met(text: str, shapes: Shapes) -> dict[str, tuple[Mark, str]]:
    """{component: (its mark, the first name that met it)}."""
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
    """Whether a text encoder alone is SDXL's second one: by its width, or where no release has it by its projection."""
    width = _text_width(text, shapes)
    return TEXT_WIDTHS[width] == "sdxl" if width in TEXT_WIDTHS else "text_projection.weight" in shapes


def _family(text: str, shapes: Shapes, marks: Mapping[str, Mark], why: list[str]) -> str:
    """The one family that all the evidence tells; the evidence is added to `why`."""
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
    """The family of a UNet or ControlNet: by the width of the text states it reads, or else by its structure."""
    sizes = _find(text, ("label_emb.0.0.weight\n", "add_embedding.linear_1.weight\n", "label_emb00weight\n"))
    projection = _find(text, (".proj_in.weight\n", "proj_inweight\n"))
    context = _find(text, ("attn2.to_k.weight\n", "attn2to_kweight\n"))
    family, sentence = "", ""
    if sizes:
        family, sentence = "sdxl", f"{_say(shapes, sizes)}: a UNet that is told the picture's size, as in SDXL"
    elif projection:
        convolution = len(shapes[projection]) == 4
        family, found = ("sd1", "a convolution, as in SD1") if convolution else ("sd2", "linear, as in SD2")
        sentence = f"{_say(shapes, projection)}: {found}"
    width = shapes[context][-1] if context and shapes[context] else 0
    released = CONTEXT_WIDTHS.get(width, family)
    if sentence and released == family:
        why.append(sentence)
    if context and width in CONTEXT_WIDTHS:
        why.append(f"{_say(shapes, context)}: it reads text states {width} wide, as in {released.upper()}")
    return released


def _family_of_vae(shapes: Shapes, mark: Mark, why: list[str]) -> str:
    """A VAE with the four latent channels of all families is of none in particular."""
    name = f"{mark.prefix}decoder.conv_in.weight"
    channels = _channels(shapes, name)
    if channels != LATENT_CHANNELS and name in shapes:
        why.append(f"{_say(shapes, name)}: {channels} latent channels, not {LATENT_CHANNELS}")
    return "sd" if channels == LATENT_CHANNELS else "unknown"


def _family_of_text(text: str, shapes: Shapes, why: list[str]) -> str:
    """A text encoder alone; only the widths of the released ones tell more than "CLIP"."""
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
        why.append(f"{_say(shapes, name)}: {channels} input channels, {CHANNELS.get(channels, 'of no known use')}")
    return channels


def _channels(shapes: Shapes, name: str) -> int | None:
    """Input channels of a convolution, None if there is none of that name."""
    shape = shapes.get(name, ())
    return shape[1] if len(shape) == 4 else None


def _title_alone(component: str, family: str, shapes: Shapes, prefix: str) -> str:
    channels = _channels(shapes, f"{prefix}decoder.conv_in.weight")
    if component == "vae" and channels not in (None, LATENT_CHANNELS):
        return f"a VAE of {channels} latent channels" + (", as in SD3 and Flux" if channels == 16 else "")
    tells_family = component in ("unet", "controlnet") and family in NAMES
    return f"{ALONE[component]} alone" + (f", of {NAMES[family]}" if tells_family else "")


def _find(text: str, words: Iterable[str]) -> str | None:
    """The first name that has the first of these words that any name has."""
    for word in words:
        at = text.find(word)
        if at >= 0:
            start = text.rfind("\n", 0, at + 1) + 1
            return text[start : text.find("\n", start)]
    return None


def _say(shapes: Shapes, name: str) -> str:
    return f"{name} {shapes[name]}"
