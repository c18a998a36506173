"""Map the names in a file to native names; every key belongs to a component, or to the list of dropped ones.

Native names are those of the official single files without the component's prefix: LDM's for UNet, VAE and ControlNet,
and those of transformers (with `text_model.`) for text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdinpaint_weights.edits import apply, fits, shape_after
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.keymap import TABLES_FOR, Edit, renamed
from sdinpaint_weights.layout import EMA_UNET, Layout
from sdinpaint_weights.openclip import openclip_table_for
from sdinpaint_weights.weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdinpaint_weights.spool import Convert

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
"""Buffers of the noise schedule, which follow from three numbers.

Source: register_schedule in ldm/models/diffusion/ddpm.py.
"""
DROPPED_BEGINNINGS = ("model_ema.", "loss.", "first_stage_model.loss.", "denoiser.")
"""Prefixes of averaged (EMA) weights, and of tensors that only training needs."""
DROPPED_ENDS = frozenset({"position_ids", "logit_scale", "v_pred", "ztsnr"})
"""Last words of dropped keys: the constant positions 0..76, a scale of CLIP's training loss, marks of the training."""
OTHER_HALF = ("vision_model.", "visual_projection.", "visual.")
"""Prefixes of CLIP's image encoder."""
SD2_LAST_BLOCK = "text_model.encoder.layers.23."
"""OpenCLIP's last block, which diffusers and some files omit: SD2 was trained on the hidden states before it."""

EXAMPLES = 5
_CONVOLUTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
_EMA_WORD = re.compile(
    r"(?:input|output)_blocks|middle_block|time_embed|label_emb|in_layers|emb_layers|out_layers|skip_connection"
    r"|transformer_blocks|attn[12]|to_(?:q|k|v|out)|norm[123]?|proj_in|proj_out|proj|ff|net|conv|op|out|weight|bias|\d+"
)

Held = tuple[tuple[str, Edit], ...]
"""The native names that a tensor of a file contains, each with the edit that extracts it."""


class Source(NamedTuple):
    """The origin of a native tensor: a key of the file, and the edit to apply to its tensor."""

    key: str
    edit: Edit = Edit.AS_IS


@dataclass(frozen=True)
class NativeState:
    """One component of a file under native names, before any tensor is read."""

    component: str
    weights: Weights
    sources: Mapping[str, Source]
    unexpected: tuple[str, ...]
    """Keys with the component's prefix that are in no table."""
    dropped: tuple[str, ...]
    """Keys with the component's prefix that no model needs."""
    notes: tuple[str, ...]
    """Sentences about choices that the caller may want to know of."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {native name: shape}, without reading tensors."""
        return {
            name: shape_after(source.edit, [self.weights.shape(source.key)]) for name, source in self.sources.items()
        }

    def converted(self, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
        """Return {native name: shape} of the tensors that are stored in another dtype, without reading tensors.

        Args:
            dtype: the dtype that is asked for.

        Returns:
            The shapes.
        """
        shapes = self.shapes()
        return {name: shapes[name] for name, source in self.sources.items() if self.weights.dtype(source.key) != dtype}


def native_state(weights: Weights, component: str, layout: Layout, *, ema: bool = False) -> NativeState:
    """Map one component of a file to native names.

    Args:
        weights: the opened file.
        component: "unet", "vae", "text_encoder", "text_encoder_2" or "controlnet".
        layout: the result of `identify(weights.shapes())`.
        ema: take the UNet's averaged weights. A file without any others gives them in any case, with a note.

    Returns:
        The component; no tensor has been read.

    Raises:
        CheckpointError: the component or its averaged weights are missing, two keys are the same tensor, or weights are
            integers.
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
    """List the keys that belong to no component and are not known to be dropped; merged files have such keys.

    Args:
        weights: the opened file.
        layout: the result of `identify(weights.shapes())`.

    Returns:
        The keys.
    """
    prefixes = tuple(layout.prefixes.values())
    return tuple(key for key in weights if not key.startswith(prefixes) and not _is_dropped(key, key))


def check_complete(state: NativeState, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a component has exactly the names and shapes of a model, without reading tensors.

    Args:
        state: the component.
        expected: the model's native name -> shape.

    Raises:
        CheckpointError: counts the missing, misshapen and unexpected tensors, and names the first five of each.
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
            expected=f"the {len(expected)} tensors of its configuration",
            hint="give the configuration that belongs to the file, or fetch the file again",
        )


def load_tensors(
    state: NativeState,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[str], object] | None = None,
    *,
    allow_nonfinite: bool = False,
    convert: Convert | None = None,
) -> dict[str, Tensor]:
    """Read a component's tensors.

    In the stored dtype the tensors are views of the mapped file; see `Weights.tensor`. In another one, peak memory is
    the result and a single stored tensor.

    Args:
        state: the component.
        dtype: dtype of the result; None keeps each tensor's own.
        on_tensor: called with each native name when it is read, for a progress bar.
        allow_nonfinite: accept NaN and infinity.
        convert: converts tensors that are stored in another dtype, into memory by default.

    Returns:
        Native name -> tensor on the CPU.

    Raises:
        CheckpointError: bytes are damaged, values are not finite in `dtype`, or weights are zero throughout.
    """
    from sdinpaint_weights.finite import blank_error, is_blank, is_finite, nonfinite_error, stays_finite
    from sdinpaint_weights.spool import in_memory

    convert = convert or in_memory
    tensors: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, source in state.sources.items():
        names.setdefault(source.key, []).append(name)
    stays = [key for key in names if dtype in (None, state.weights.dtype(key))]
    casts = names.keys() - set(stays)
    # Views are checked many at a time: each check releases the GIL for milliseconds, in which other threads run.
    for run in [*state.weights.runs(stays), *([key] for key in names if key in casts)]:
        finite = allow_nonfinite or (len(run) > 1 and is_finite(state.weights.run(run)))
        for key in run:
            stored = state.weights.tensor(key)
            wanted = dtype or stored.dtype
            if not (finite or (is_finite(stored) and stays_finite(stored, wanted))):
                raise nonfinite_error(state.weights.path, key, stored.to(wanted), stored)
            for name in names[key]:
                tensor = apply(state.sources[name].edit, [stored])
                tensors[name] = convert(name, tensor, wanted) if key in casts else tensor.contiguous()
                if is_blank(state.component, name, tensors[name]):
                    raise blank_error(state.weights.path, key, tensors[name])
                if on_tensor is not None:
                    on_tensor(name)
            if key in casts:
                state.weights.release(key)
    return tensors


def check_range(state: NativeState, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Check that a component's finite tensors stay finite in another dtype.

    Args:
        state: the component, which gives the names in the file.
        tensors: native name -> tensor.
        dtype: the dtype to cast to.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    from sdinpaint_weights.finite import nonfinite_error, stays_finite

    for name, tensor in tensors.items():
        if not stays_finite(tensor, dtype):
            raise nonfinite_error(state.weights.path, state.sources[name].key, tensor.to(dtype), tensor)


def _is_dropped(key: str, name: str) -> bool:
    """Tell whether no model needs a key; `name` is the key without its component's prefix."""
    return (
        key in SCHEDULE
        or key.startswith(DROPPED_BEGINNINGS)
        or name.startswith(OTHER_HALF)
        or key.rpartition(".")[2] in DROPPED_ENDS
    )


def _unused(component: str, family: str) -> tuple[str, ...]:
    """Return prefixes of native names that files may have and our models do not."""
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
    """Return a function from a name without its prefix to the native tensors in it, none for an unknown name."""
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
    """Return the edit of a tensor: some files store the VAE's 1 x 1 convolutions as matrices."""
    return Edit.CONVOLUTION if len(shape) == 2 and _CONVOLUTION.fullmatch(native) else edit


def _ema_held(joined: str) -> Held:
    """Put back the dots that LitEma removes from names, by the UNet's known words and numbers."""
    words = _EMA_WORD.findall(joined)
    if "".join(words) != joined:
        return ()
    # Of two consecutive numbers the second one, a layer within a block, has one digit.
    return _held(re.sub(r"(put_blocks\.\d+|label_emb\.\d+)(\d)(?=\.)", r"\1.\2", ".".join(words)))


def _refuse_integers(weights: Weights, sources: Mapping[str, Source]) -> None:
    integers = [source.key for source in sources.values() if not weights.stored_dtype(source.key).is_floating_point]
    if integers:
        kind = weights.stored_dtype(integers[0])
        found = f"{len(integers)} tensors are {kind}, e.g. {integers[0]}: quantised, and without their scales"
        hint = "give the checkpoint as it was before quantisation"
        raise CheckpointError("CKPT_INTEGER_WEIGHTS", weights.path, found, expected="floating point", hint=hint)
