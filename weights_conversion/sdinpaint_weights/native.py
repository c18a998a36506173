"""From names in a file to native names, with every key claimed: by a component, or by the list of what is dropped.

The native name is that of the official single files without the component's prefix: LDM's for UNet and VAE,
transformers' (with `text_model.`) for the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.finite import is_finite, nonfinite_error
from sdinpaint_weights.keymap import renamed, unet_table_for, vae_table_for
from sdinpaint_weights.layout import EMA_UNET, Layout, require_family
from sdinpaint_weights.weights import Weights

TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "Text encoder"}
DROPPED = re.compile(
    # the schedule, which follows from three numbers; ldm/models/diffusion/ddpm.py register_schedule
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_(variance|log_variance_clipped)"
    r"|posterior_mean_coef[12]|lvlb_weights|logvar|scale_factor|denoiser\..*"
    # averaged weights, and what was only there for training
    r"|model_ema\..*|(first_stage_model\.)?loss\..*"
    # the row 0..76, and the parts of CLIP beside the text encoder's states
    r"|(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?)|(vision_model|visual_projection)\..*"
)
"""Keys that no model needs, with their prefix."""

EXAMPLES = 5
_CONVOLUTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
_EMA_WORD = re.compile(
    r"(?:input|output)_blocks|middle_block|time_embed|label_emb|in_layers|emb_layers|out_layers|skip_connection"
    r"|transformer_blocks|attn[12]|to_(?:q|k|v|out)|norm[123]?|proj_in|proj_out|proj|ff|net|conv|op|out|weight|bias|\d+"
)


@dataclass(frozen=True)
class Source:
    """Where a native tensor comes from; `as_convolution`: a Linear (C, C) that is a 1 x 1 convolution here."""

    key: str
    as_convolution: bool = False


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
            name: self.weights.shape(source.key) + (1, 1) * source.as_convolution
            for name, source in self.sources.items()
        }


def native_state(weights: Weights, component: str, layout: Layout, *, ema: bool = False) -> NativeState:
    """The component "unet", "vae" or "text_encoder" of a file whose layout is `identify(weights.shapes())`.

    `ema` takes the UNet's averaged weights; a file that holds no others gives them in any case, with a note.

    Raises: CheckpointError when the component or its averaged weights are missing, or when weights are integers.
    """
    path = weights.path
    if component not in layout.prefixes:
        found = f"{layout.title}: it holds no {TITLES.get(component, component)}"
        raise CheckpointError("CKPT_NO_COMPONENT", path, found, hint="give a file that does, or add one that has it")
    if component == "text_encoder" and layout.naming == "ldm":
        require_family(layout, path, ("sd1",))
    if component == "unet" and ema and not layout.has_ema:
        hint = "load the plain weights: ema=False"
        raise CheckpointError("CKPT_NO_EMA", path, "no averaged (EMA) weights of the UNet", hint=hint)
    averaged = component == "unet" and (ema or layout.ema_only)
    prefix = EMA_UNET if averaged else layout.prefixes[component]
    keys = [key for key in weights if key.startswith(prefix)]
    dropped = [key for key in keys if DROPPED.fullmatch(key) and not averaged]
    wanted = {key: key[len(prefix) :] for key in keys if averaged or not DROPPED.fullmatch(key)}
    rename = _ema_name if averaged else _renamer(component, layout.naming, list(wanted.values()))
    sources: dict[str, Source] = {}
    unexpected = []
    for key, name in wanted.items():
        native = rename(name)
        if native is None:
            unexpected.append(key)
        elif native in sources:
            found = f"{sources[native].key!r} and {key!r} are the same tensor {native!r}"
            raise CheckpointError("CKPT_DUPLICATE_KEY", path, found, hint="remove one of them")
        else:
            sources[native] = Source(key, bool(_CONVOLUTION.fullmatch(native)) and len(weights.shape(key)) == 2)
    _refuse_integers(weights, sources)
    note = "the file holds averaged (EMA) weights of the UNet only, and they are used"
    notes = (note,) if averaged and layout.ema_only else ()
    return NativeState(component, weights, sources, tuple(unexpected), tuple(dropped), weights.notes + notes)


def outside_keys(weights: Weights, layout: Layout) -> tuple[str, ...]:
    """Keys that belong to no component and are on no list; merged files carry such, and a caller may warn once."""
    prefixes = tuple(layout.prefixes.values())
    return tuple(key for key in weights if not key.startswith(prefixes) and not DROPPED.fullmatch(key))


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
    on_tensor: Callable[[str], None] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Native name -> tensor on the CPU, one after the other; `on_tensor` is told each name, for a progress bar.

    With the stored dtype (or None) the tensors are views of the mapped file; `Weights.tensor` says what that means.
    With another one, peak memory is the result and one tensor as stored.

    Raises: CheckpointError for damaged bytes, and for NaN and infinity unless they are allowed.
    """
    tensors = {}
    for name, source in state.sources.items():
        tensor = state.weights.tensor(source.key, dtype)
        if not (allow_nonfinite or is_finite(tensor)):
            raise nonfinite_error(state.weights.path, source.key, tensor, state.weights.tensor(source.key))
        tensor = tensor[:, :, None, None] if source.as_convolution else tensor
        tensors[name] = tensor.contiguous()
        if on_tensor is not None:
            on_tensor(name)
    return tensors


def _renamer(component: str, naming: str, names: list[str]) -> Callable[[str], str | None]:
    if component == "text_encoder":
        return lambda name: name if name.startswith("text_model.") else f"text_model.{name}"
    if naming == "ldm":
        return lambda name: name
    table = (unet_table_for if component == "unet" else vae_table_for)(names)
    return lambda name: renamed(name, table)


def _ema_name(joined: str) -> str | None:
    """LitEma takes the dots out of names; each word and number of the UNet's is known, so they can be put back."""
    words = _EMA_WORD.findall(joined)
    if "".join(words) != joined:
        return None
    # Two numbers in a row: the second one, the part of a block, has one digit.
    name = ".".join(words)
    return re.sub(r"(put_blocks\.\d+|label_emb\.\d+)(\d)(?=\.)", r"\1.\2", name)


def _refuse_integers(weights: Weights, sources: Mapping[str, Source]) -> None:
    integers = [source.key for source in sources.values() if not weights.dtype(source.key).is_floating_point]
    if integers:
        kind = str(weights.dtype(integers[0])).removeprefix("torch.")
        found = f"{len(integers)} weights are {kind} numbers, e.g. {integers[0]}: quantised without their scales"
        hint = "give the checkpoint before it was quantised"
        raise CheckpointError("CKPT_INTEGER_WEIGHTS", weights.path, found, expected="floating point", hint=hint)
