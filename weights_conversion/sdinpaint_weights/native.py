"""From names in a file to native names, with every key claimed: by a component, or by the list of what is dropped.

The native name is that of the official single files without the component's prefix: LDM's for UNet, VAE and ControlNet,
transformers' (with `text_model.`) for the text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdinpaint_weights.edits import apply, fits, shape_after
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.finite import is_finite, nonfinite_error, stays_finite
from sdinpaint_weights.keymap import TABLES_FOR, Edit, renamed
from sdinpaint_weights.layout import EMA_UNET, Layout
from sdinpaint_weights.openclip import openclip_table_for
from sdinpaint_weights.weights import Weights

TITLES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Second text encoder",
    "controlnet": "ControlNet",
}
# fmt: off
SCHEDULE = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor",
})
# fmt: on
"""What follows from three numbers. Source: register_schedule in ldm/models/diffusion/ddpm.py."""
DROPPED_BEGINNINGS = ("model_ema.", "loss.", "first_stage_model.loss.", "denoiser.")
"""Averaged weights, and what was only there for training."""
DROPPED_ENDS = frozenset({"position_ids", "logit_scale"})
"""The row 0..76, and what CLIP was trained with."""
OTHER_HALF = ("vision_model.", "visual_projection.", "visual.")
"""CLIP's other half, beside its text encoder."""
SD2_LAST_BLOCK = "text_model.encoder.layers.23."
"""SD2 was trained on the states before OpenCLIP's last block, which diffusers and some fine-tuned files leave out."""

EXAMPLES = 5
_CONVOLUTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
_EMA_WORD = re.compile(
    r"(?:input|output)_blocks|middle_block|time_embed|label_emb|in_layers|emb_layers|out_layers|skip_connection"
    r"|transformer_blocks|attn[12]|to_(?:q|k|v|out)|norm[123]?|proj_in|proj_out|proj|ff|net|conv|op|out|weight|bias|\d+"
)

Held = tuple[tuple[str, Edit], ...]
"""The native names that a file's tensor holds, each with the edit that takes it out."""


class Source(NamedTuple):
    """Where a native tensor comes from: a key of the file, and the edit of what is there."""

    key: str
    edit: Edit = Edit.AS_IS


@dataclass(frozen=True)
class NativeState:
    """One component of a file under native names; nothing of it is read yet."""

    component: str
    weights: Weights
    sources: Mapping[str, Source]
    unexpected: tuple[str, ...]
    """Keys within the component's prefix that no table knows."""
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    """What was chosen on the caller's behalf, as sentences."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every native tensor."""
        return {
            name: shape_after(source.edit, [self.weights.shape(source.key)]) for name, source in self.sources.items()
        }


def native_state(weights: Weights, component: str, layout: Layout, *, ema: bool = False) -> NativeState:
    """One of the components of a file whose layout is `identify(weights.shapes())`.

    `ema` takes the UNet's averaged weights; a file that holds no others gives them in any case, with a note.

    Raises: CheckpointError when the component or its averaged weights are missing, or when weights are integers.
    """
    path = weights.path
    if component not in layout.marks:
        found = f"{layout.title}: it holds no {TITLES.get(component, component)}"
        raise CheckpointError("CKPT_NO_COMPONENT", path, found, hint="give a file that does, or add one that has it")
    if component == "unet" and ema and not layout.has_ema:
        hint = "load the plain weights: ema=False"
        raise CheckpointError("CKPT_NO_EMA", path, "no averaged (EMA) weights of the UNet", hint=hint)
    averaged = component == "unet" and (ema or layout.ema_only)
    prefix = EMA_UNET if averaged else layout.marks[component].prefix
    names = {key: key[len(prefix) :] for key in weights if key.startswith(prefix)}
    dropped = [] if averaged else [key for key, name in names.items() if _is_dropped(key, name)]
    for key in dropped:
        del names[key]
    held = _ema_held if averaged else _translator(component, layout.marks[component].naming, names.values())
    unused = _unused(component, layout.family)
    sources: dict[str, Source] = {}
    unexpected = []
    for key, name in names.items():
        shape = weights.shape(key)
        parts = [(native, _edit(native, edit, shape)) for native, edit in held(name)]
        if not all(fits(edit, shape) for _, edit in parts) or not parts:
            unexpected.append(key)
        elif parts[0][0].startswith(unused):
            dropped.append(key)
        else:
            _add(sources, key, parts, path)
    _refuse_integers(weights, sources)
    note = "the file holds averaged (EMA) weights of the UNet only, and they are used"
    notes = (note,) if averaged and layout.ema_only else ()
    return NativeState(component, weights, sources, tuple(unexpected), tuple(dropped), weights.notes + notes)


def outside_keys(weights: Weights, layout: Layout) -> tuple[str, ...]:
    """Keys that belong to no component and are on no list; merged files carry such, and a caller may warn once."""
    prefixes = tuple(layout.prefixes.values())
    return tuple(key for key in weights if not key.startswith(prefixes) and not _is_dropped(key, key))


def check_complete(state: NativeState, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare with the names and shapes of the model that is to be loaded; reads nothing.

    Raises: CheckpointError that counts what is missing, misshapen and unexpected, and names the first five of each.
    """
    found = state.shapes()
    complaints = {
        "missing": [name for name in expected if name not in found],
        "misshapen": [
            f"{name}: {found[name]} in the file, {tuple(shape)} expected"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ],
        "unexpected": [name for name in found if name not in expected] + list(state.unexpected),
    }
    sentences = [
        f"{len(names)} {complaint}, e.g. {', '.join(names[:EXAMPLES])}"
        for complaint, names in complaints.items()
        if names
    ]
    if sentences:
        raise CheckpointError(
            "CKPT_KEYS",
            state.weights.path,
            f"{TITLES[state.component]}: {'; '.join(sentences)}",
            expected=f"{len(expected)} tensors, as its configuration says",
            hint="give the configuration that belongs to the file, or fetch the file again",
        )


def load_tensors(
    state: NativeState,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[str], object] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Native name -> tensor on the CPU, one after the other; `on_tensor` is told each name, for a progress bar.

    With the stored dtype (or None) the tensors are views of the mapped file; `Weights.tensor` says what that means.
    With another one, peak memory is the result and one tensor as stored.

    Raises: CheckpointError for damaged bytes, and for NaN and infinity unless they are allowed.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, source in state.sources.items():
        names.setdefault(source.key, []).append(name)
    stays = [key for key in names if dtype in (None, state.weights.dtype(key))]
    casts = names.keys() - set(stays)
    # Views are checked many at a time: each check holds no lock for milliseconds, and other threads go on meanwhile.
    for run in [*state.weights.runs(stays), *([key] for key in names if key in casts)]:
        finite = allow_nonfinite or (len(run) > 1 and is_finite(state.weights.run(run)))
        for key in run:
            tensor = state.weights.tensor(key, dtype)
            if not (finite or is_finite(tensor)):
                raise nonfinite_error(state.weights.path, key, tensor, state.weights.tensor(key))
            for name in names[key]:
                tensors[name] = apply(state.sources[name].edit, [tensor]).contiguous()
                if on_tensor is not None:
                    on_tensor(name)
    return tensors


def check_range(state: NativeState, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse finite native tensors of a component that another dtype cannot hold. Raises: CheckpointError."""
    for name, tensor in tensors.items():
        if not stays_finite(tensor, dtype):
            raise nonfinite_error(state.weights.path, state.sources[name].key, tensor.to(dtype), tensor)


def _is_dropped(key: str, name: str) -> bool:
    """Whether no model needs a key, whose name within its component is `name`."""
    return (
        key in SCHEDULE
        or key.startswith(DROPPED_BEGINNINGS)
        or name.startswith(OTHER_HALF)
        or key.rpartition(".")[2] in DROPPED_ENDS
    )


def _unused(component: str, family: str) -> tuple[str, ...]:
    """Beginnings of native names that a file may have and the model has not."""
    if component != "text_encoder":
        return ()
    return ("text_projection.", SD2_LAST_BLOCK) if family == "sd2" else ("text_projection.",)


def _add(sources: dict[str, Source], key: str, parts: Iterable[tuple[str, Edit]], path: Path) -> None:
    for native, edit in parts:
        if native in sources:
            found = f"{sources[native].key!r} and {key!r} are the same tensor {native!r}"
            raise CheckpointError("CKPT_DUPLICATE_KEY", path, found, hint="remove one of them")
        sources[native] = Source(key, edit)


def _translator(component: str, naming: str, names: Iterable[str]) -> Callable[[str], Held]:
    """A function from a name in the file, without its prefix, to what its tensor holds: nothing if it is unknown."""
    if naming == "openclip":
        table: dict[str, Held] = {}
        for native, (name, edit) in openclip_table_for(names).items():
            table[name] = (*table.get(name, ()), (native, edit))
        return lambda name: table.get(name, ())
    if component.startswith("text_encoder"):
        roots = ("text_model.", "text_projection.")
        return lambda name: _held(name if name.startswith(roots) else f"text_model.{name}")
    if naming == "ldm":
        return _held
    modules = TABLES_FOR[component](names)
    return lambda name: _held(renamed(name, modules))


def _held(native: str | None) -> Held:
    return () if native is None else ((native, Edit.AS_IS),)


def _edit(native: str, edit: Edit, shape: tuple[int, ...]) -> Edit:
    """The VAE's attention is of 1 x 1 convolutions, of which some files have the matrix only."""
    return Edit.CONVOLUTION if len(shape) == 2 and _CONVOLUTION.fullmatch(native) else edit


def _ema_held(joined: str) -> Held:
    """LitEma takes the dots out of names; each word and number of the UNet's is known, so they can be put back."""
    words = _EMA_WORD.findall(joined)
    if "".join(words) != joined:
        return ()
    # Two numbers in a row: the second one, the part of a block, has one digit.
    return _held(re.sub(r"(put_blocks\.\d+|label_emb\.\d+)(\d)(?=\.)", r"\1.\2", ".".join(words)))


def _refuse_integers(weights: Weights, sources: Mapping[str, Source]) -> None:
    integers = [source.key for source in sources.values() if not weights.dtype(source.key).is_floating_point]
    if integers:
        kind = str(weights.dtype(integers[0])).removeprefix("torch.")
        found = f"{len(integers)} weights are {kind} numbers, e.g. {integers[0]}: quantised without their scales"
        hint = "give the checkpoint before it was quantised"
        raise CheckpointError("CKPT_INTEGER_WEIGHTS", weights.path, found, expected="floating point", hint=hint)
