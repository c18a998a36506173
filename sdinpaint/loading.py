"""From a file or folder of released weights to a pipeline. With `inspecting`, all that knows `sdinpaint_weights`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sdinpaint_weights.export import write_diffusers
from sdinpaint_weights.folder import open_folder_component
from sdinpaint_weights.layout import Layout, identify, require_family
from sdinpaint_weights.native import NativeState, check_complete, load_tensors, native_state, outside_keys
from sdinpaint_weights.reader import open_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from sdinpaint.configs import (
    check_fit,
    diffusers_configs,
    schedule_config,
    text_config,
    unet_config,
    vae_config,
    whole_number,
)
from sdinpaint.errors import CheckpointError, SdInpaintWarning, SettingError
from sdinpaint.families import SD15, SD15_INPAINT, Family
from sdinpaint.models import VAE, CLIPText, UNet
from sdinpaint.pipeline import Pipeline
from sdinpaint.text.tokenizer import Tokenizer, find_tokenizer

__all__ = ["Checkpoint", "load", "open_checkpoint", "save_diffusers"]

DEMO = Path(__file__).parent / "demo"
COMPONENTS = ("unet", "vae", "text_encoder")
MAX_JSON = 1_000_000
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Models(NamedTuple):
    """The networks of a checkpoint, in the order of COMPONENTS."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves new parameters unfilled; filling them on the meta device would import 800 modules of torch for nothing."""

    FILLING = frozenset({nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self.FILLING else func(*args, **kwargs)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood, and of which no tensor has been read."""

    path: Path
    states: Mapping[str, NativeState]
    layouts: Mapping[str, Layout]
    family: Family
    outside: tuple[str, ...]
    """Keys that belong to no component."""

    @property
    def folder(self) -> Path | None:
        """The diffusers folder, None for a single file."""
        return self.path if self.path.is_dir() else None

    def build(self) -> Models:
        """The models on the meta device, once every name and shape is known to fit. Raises: CheckpointError."""
        with torch.device("meta"), _WithoutInitialValues():
            models = Models(UNet(self.family.unet), VAE(self.family.vae), CLIPText(self.family.text))
        for component, model in zip(COMPONENTS, models, strict=True):
            shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
            check_complete(self.states[component], shapes)
        check_fit(self.family, self.path)
        return models


def load(
    source: str | Path,
    *,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ema: bool = False,
    variant: str | None = None,
    progress: bool = True,
) -> Pipeline:
    """Load a Stable Diffusion 1 checkpoint: a .safetensors or .ckpt file, a diffusers folder, or "demo".

    config: a folder in the diffusers layout whose JSON files tell what a single file cannot (heads, activation,
    schedule). vae: another autoencoder, file or folder. tokenizer: a Tokenizer, or a folder or file that holds CLIP's
    vocabulary. device: the GPU where there is one. dtype: float32 on a CPU, float16 on a GPU. ema: the averaged weights
    of the UNet. variant: "fp16" for files such as diffusion_pytorch_model.fp16.safetensors.
    Weights that are stored in `dtype` stay mapped to their file, which must not change while they are in use.
    Raises: CheckpointError, TokenizerError, SettingError.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    checkpoint = open_checkpoint(source, config=config, vae=vae, ema=ema, variant=variant)
    if checkpoint.outside:
        examples = ", ".join(checkpoint.outside[:5])
        message = f"{checkpoint.path}: {len(checkpoint.outside)} tensors belong to no model and are ignored: {examples}"
        warnings.warn(message, SdInpaintWarning, stacklevel=2)
    for note in dict.fromkeys(note for state in checkpoint.states.values() for note in state.notes):
        warnings.warn(f"{checkpoint.path}: {note}", SdInpaintWarning, stacklevel=2)
    models = checkpoint.build()
    text = checkpoint.family.text
    tokenizer = find_tokenizer(tokenizer, model_folder=checkpoint.folder, embedding_rows=text.vocab_size)
    total = sum(len(state.sources) for state in checkpoint.states.values())
    # disable=None: silent where the output is no terminal
    with tqdm(
        total=total, desc=f"load {checkpoint.path.name}", unit=" tensors", disable=None if progress else True
    ) as bar:
        for component, model in zip(COMPONENTS, models, strict=True):
            tensors = load_tensors(checkpoint.states[component], dtype, lambda _: bar.update())
            model.load_state_dict(tensors, strict=True, assign=True)
            model.to(device)
    return Pipeline(checkpoint.family, *models, tokenizer, source=str(source))


def open_checkpoint(
    source: str | Path,
    *,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Find and understand a checkpoint, reading only headers. Raises: CheckpointError."""
    path = _existing(source)
    opened = _open_folder(path, ema, variant) if path.is_dir() else _open_file(path, ema, COMPONENTS)
    configs = Path(config) if config is not None else path if path.is_dir() else None
    if configs is not None and not configs.is_dir():
        raise CheckpointError(
            "CKPT_NOT_FOUND", configs, "no such folder", expected="config= names a folder of JSON files"
        )
    jsons = {name: _json(configs, name) for name in (*COMPONENTS, "scheduler")}
    if config is not None and not any(jsons.values()):
        expected = "unet/config.json, vae/config.json, text_encoder/config.json or scheduler/scheduler_config.json"
        raise CheckpointError("CKPT_BAD_CONFIG", config, "a folder with none of the JSON files", expected=expected)
    if vae is not None:
        opened["vae"], jsons["vae"] = _open_vae(Path(vae), variant, jsons["vae"])
    states = {name: state for name, (state, _) in opened.items()}
    layouts = {name: layout for name, (_, layout) in opened.items()}
    outside = outside_keys(states["unet"].weights, layouts["unet"]) if not path.is_dir() else ()
    return Checkpoint(path, states, layouts, _family(states, layouts, jsons, path), outside)


def save_diffusers(folder: str | Path, pipe: Pipeline, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as a diffusers folder that diffusers' StableDiffusionInpaintPipeline loads too.

    Raises: CheckpointError.
    """
    folder, family = Path(folder), pipe.family
    components = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text}
    write_diffusers(
        folder, {name: model.state_dict() for name, model in components.items()}, diffusers_configs(family), dtype
    )
    pipe.tokenizer.save(folder / "tokenizer")


def _family(
    states: Mapping[str, NativeState], layouts: Mapping[str, Layout], jsons: Mapping[str, Mapping[str, Any]], path: Path
) -> Family:
    base = SD15 if layouts["unet"].in_channels == SD15.unet.in_channels else SD15_INPAINT
    shapes = {name: state.shapes() for name, state in states.items()}
    return replace(
        base,
        unet=unet_config(shapes["unet"], jsons["unet"], base.unet, path),
        vae=vae_config(shapes["vae"], jsons["vae"], base.vae, path),
        text=text_config(shapes["text_encoder"], jsons["text_encoder"], base.text, path),
        schedule=schedule_config(jsons["scheduler"], base.schedule, path),
        size=8 * whole_number(jsons["unet"], "sample_size", base.size // 8, path),
    )


Opened = tuple[NativeState, Layout]


def _open_file(path: Path, ema: bool, components: tuple[str, ...]) -> dict[str, Opened]:
    weights = open_weights(path)
    layout = identify(weights.shapes())
    require_family(layout, path, ("sd1",) if "unet" in components else ("sd1", "sd"))
    return {name: (native_state(weights, name, layout, ema=ema and name == "unet"), layout) for name in components}


def _open_folder(path: Path, ema: bool, variant: str | None) -> dict[str, Opened]:
    missing = [name for name in COMPONENTS if not (path / name).is_dir()]
    if missing:
        found = f"a folder without {', '.join(missing)}"
        expected = "a diffusers folder: unet, vae, text_encoder and tokenizer"
        raise CheckpointError("CKPT_NOT_FOUND", path, found, expected=expected, hint="give the model's own folder")
    opened = {}
    for name in COMPONENTS:
        weights = open_folder_component(path / name, variant)
        layout = identify(weights.shapes())
        require_family(layout, path / name, ("sd", "sd1") if name == "vae" else ("sd1",))
        opened[name] = native_state(weights, name, layout, ema=ema and name == "unet"), layout
    return opened


def _open_vae(path: Path, variant: str | None, beside: Mapping[str, Any]) -> tuple[Opened, Mapping[str, Any]]:
    """Another autoencoder: a file, its own folder, or the folder of a model that holds one; and its configuration."""
    path = _existing(path)
    if not path.is_dir():
        return _open_file(path, ema=False, components=("vae",))["vae"], beside
    folder = path / "vae" if (path / "vae").is_dir() else path
    weights = open_folder_component(folder, variant)
    layout = identify(weights.shapes())
    require_family(layout, folder, ("sd",))
    return (native_state(weights, "vae", layout), layout), _json(folder.parent, folder.name)


def _existing(source: str | Path) -> Path:
    path = DEMO if str(source) == "demo" else Path(source)
    if path.exists() or path.is_symlink():
        return path
    hint = "check the path"
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        hint = f"for a model of the hub: hf download {source} --local-dir {path.name}, then load {path.name!r}"
    expected = "a .safetensors or .ckpt file, a diffusers folder, or 'demo'"
    raise CheckpointError("CKPT_NOT_FOUND", source, "no such file or folder", expected=expected, hint=hint)


def _json(folder: Path | None, component: str) -> Mapping[str, Any]:
    """A component's configuration, empty where there is none. Raises: CheckpointError for a file that is no table."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = None if folder is None else folder / component / name
    if path is None or not path.is_file():
        return {}
    hint = "fetch the file again, or remove it to use the family's values"
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError("CKPT_BAD_CONFIG", path, f"{path.stat().st_size} bytes", expected="some lines", hint=hint)
    try:
        table = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("CKPT_BAD_CONFIG", path, f"not JSON: {error}", expected="a table", hint=hint) from error
    if not isinstance(table, dict):
        raise CheckpointError("CKPT_BAD_CONFIG", path, "not a table", expected="a table", hint=hint)
    return table


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError("SETTING_DEVICE", "device", f"{device!r}", expected="'cpu', 'cuda' or 'cuda:1'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no GPU answers"
        raise SettingError("SETTING_DEVICE", "device", f"{device!r}: {reason}", hint="device='cpu'")
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise SettingError("SETTING_DTYPE", "dtype", f"{dtype!r}", expected="float32, float16 or bfloat16")
    return found
