"""From a file or folder of released weights to a pipeline. With `inspecting`, all that knows `sdinpaint_weights`."""

from __future__ import annotations

from pathlib import Path

import torch
from sdinpaint_weights.export import write_diffusers
from sdinpaint_weights.native import check_range, load_tensors

from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.opening import CONTROLNET, find_dtype, open_checkpoint
from sdinpaint.checks import switch
from sdinpaint.checks import whole_number as whole_setting
from sdinpaint.errors import SettingError, warn
from sdinpaint.families import TOKENIZERS, Prediction
from sdinpaint.models.offloading import Offloading
from sdinpaint.models.weights import release
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.progress import progress_bar
from sdinpaint.text.finding import find_tokenizer
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["load", "save_diffusers"]

MAX_TILE = 2**16


def load(
    source: str | Path,
    *,
    config: str | Path | None = None,
    vae: str | Path | None = None,
    controlnet: str | Path | None = None,
    base: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    tile: int | None = None,
    prediction: Prediction | None = None,
    ema: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Pipeline:
    """Load a Stable Diffusion 1, 2 or XL checkpoint: a .safetensors or .ckpt file, a diffusers folder, a model of the
    hub ("owner/name", or "owner/name:FILE" for one file of it), or "demo".

    config: a folder in the diffusers layout whose JSON files tell what a single file cannot (heads, activation,
    schedule). vae: another autoencoder, file or folder. controlnet: a ControlNet, file or folder. base: a model that
    supplies what `source` lacks, where that is a UNet alone, or a VAE. tokenizer: a Tokenizer, or a folder or file that
    holds CLIP's vocabulary. prediction: "eps" or "v", where nothing in the checkpoint tells, or tells wrongly. device:
    the GPU where there is one. dtype: float32 on a CPU, float16 on a GPU. ema: the averaged weights of the UNet.
    variant: "fp16" for files such as diffusion_pytorch_model.fp16.safetensors. revision: a branch, tag or commit of
    `source` on the hub. local_files_only: nothing is fetched; what the hub's cache holds is used.
    offload: keep each model as its file holds it, and bring it to `device` and `dtype` while it is used. The pictures
    are the same; it takes less memory and more time. tile: the autoencoder works in bands of tile * tile pixels, and
    differs by rounding; 0: all at once; by default bands from 1024 * 1024 pixels on.
    Weights that are stored in `dtype` stay mapped to their file, which must not change while they are in use.
    Raises: CheckpointError, TokenizerError, SettingError.
    """
    device = _device(device)
    dtype, offload = _dtype(dtype, device), switch("offload", offload)
    tile = None if tile is None else whole_setting("tile", tile, 0, MAX_TILE)
    checkpoint = open_checkpoint(
        source,
        config=config,
        vae=vae,
        controlnet=controlnet,
        base=base,
        prediction=prediction,
        ema=ema,
        variant=variant,
        revision=revision,
        local_files_only=local_files_only,
        progress=progress,
    )
    for note in checkpoint.notes:
        warn(f"{checkpoint.path}: {note}")
    models = checkpoint.build()
    home, rows = checkpoint.parts["text_encoder"].model, checkpoint.family.text.vocab_size
    tokenizer = find_tokenizer(tokenizer, home, rows, offline=local_files_only or None)
    states = checkpoint.states
    total = sum(len(state.sources) for state in states.values())
    # plain tensors, whatever the caller's mode: they serve inside of inference mode and outside
    with (
        torch.inference_mode(False),
        progress_bar(total, f"load {checkpoint.path.name}", " tensors", show=progress) as bar,
    ):
        for name, model in models.items():
            tensors = load_tensors(states[name], None if offload else dtype, lambda _: bar.update())
            model.load_state_dict(tensors, strict=True, assign=True)
            model.eval().requires_grad_(False)
            if offload:
                check_range(states[name], tensors, dtype)
                for weight in tensors.values():
                    release(weight)
            else:
                model.to(device)  # which also lays weights out as they are best there
    offloading = Offloading(device, dtype, models.values()) if offload else None
    control = models.pop(CONTROLNET, None)
    unet, autoencoder, *texts = models.values()
    return Pipeline(
        checkpoint.family,
        unet,
        autoencoder,
        texts,
        tokenizer,
        controlnet=control,
        source=str(source),
        offloading=offloading,
        tile=tile,
    )


def save_diffusers(folder: str | Path, pipe: Pipeline, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as a diffusers folder, which diffusers' own pipelines load too.

    Raises: CheckpointError.
    """
    folder, condition = Path(folder), pipe.condition
    models = dict(zip(pipe.family.components, (pipe.unet, pipe.vae, *condition.encoders), strict=True))
    with pipe.using(*models.values()):
        states = {name: model.state_dict() for name, model in models.items()}
        write_diffusers(folder, states, diffusers_configs(pipe.family), dtype)
    for name, tokenizer in zip(TOKENIZERS, condition.tokenizers, strict=False):
        tokenizer.save(folder / name)


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
    return find_dtype(dtype)
