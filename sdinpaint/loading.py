"""From a file or folder of released weights to a pipeline. With `inspecting`, all that knows `sdinpaint_weights`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sdinpaint_weights.atomic import atomic_folder, keep_others
from sdinpaint_weights.export import write_diffusers
from sdinpaint_weights.files import Watched
from sdinpaint_weights.native import check_range, load_tensors
from sdinpaint_weights.spool import spool
from sdinpaint_weights.stream import not_written

from sdinpaint.checkpoints.building import build, find_dtype, own_tokenizer
from sdinpaint.checkpoints.converting import check_apart
from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.checkpoints.opening import CONTROLNET, DEMO, open_checkpoint
from sdinpaint.checks import check_call, check_path, check_switch, find_device
from sdinpaint.errors import CheckpointError, SettingError, explaining_memory, warn
from sdinpaint.families import TOKENIZERS, Prediction
from sdinpaint.keywords import knowing_keywords
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.load_options import LoadOptions
from sdinpaint.models.offloading import Offloading
from sdinpaint.models.weights import release
from sdinpaint.pipeline.events import Event, Listener, event_bars
from sdinpaint.pipeline.pipeline import Pipeline
from sdinpaint.text.finding import find_tokenizer
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["load", "save_diffusers"]


@explaining_memory()
@knowing_keywords()
def load(
    source: str | Path | LoadOptions,
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
    mmap: bool = True,
    loras: Sequence[Any] = (),
    embeddings: Sequence[Any] = (),
    progress: bool = True,
    on_event: Listener | None = None,
) -> Pipeline:
    """Load a Stable Diffusion 1, 2 or XL checkpoint.

    Weights that are stored in `dtype` stay mapped to their file, which must not change while they are in use: a run
    after that is refused.

    Args:
        source: a .safetensors or .ckpt file, a diffusers folder, a model of the hub ("owner/name", or
            "owner/name:FILE" for one file of it), "demo"; or `LoadOptions` in place of all options.
        config: a folder in the diffusers layout whose JSON files tell what a single file cannot: heads, activation,
            schedule.
        vae: another VAE, file or folder.
        controlnet: a ControlNet, file or folder.
        base: a model that supplies the components that `source` lacks, where that is a UNet alone, or a VAE.
        tokenizer: a Tokenizer, or a folder or file that holds CLIP's vocabulary.
        device: device that computes; the GPU by default, where there is one.
        dtype: dtype that the models compute in; float32 on a CPU and float16 on a GPU by default.
        offload: keep each model as its file holds it, and bring it to `device` and `dtype` while it is used. The images
            are the same; it takes less memory and more time.
        tile: the VAE works on row strips of tile * tile pixels, which changes images by rounding alone; 0 never does,
            None from 1024 * 1024 pixels on.
        prediction: what the UNet predicts, "eps" or "v", where nothing in the checkpoint tells, or tells wrongly.
        ema: take the averaged weights of the UNet.
        variant: a variant of the files, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
        revision: a branch, tag or commit of `source` on the hub.
        local_files_only: fetch nothing, and use what the hub's cache holds.
        mmap: False reads weights into memory in place of mapping the file, for drives that change or vanish.
        loras: LoRAs to add: files, (file, weight), (file, weight, text_weight), or `LoraOption`s; see `add_lora`.
        embeddings: textual inversions to add: files, or (file, token); see `add_embedding`.
        progress: show bars in a terminal or a notebook.
        on_event: called with an `Event` of the stage "load" for every tensor.

    Returns:
        The pipeline, whose `loaded` holds these options.

    Raises:
        CheckpointError: the checkpoint cannot be found, understood or loaded.
        TokenizerError: CLIP's vocabulary is not found, or does not fit.
        SettingError: an option is of the wrong type or out of its bounds.
        AdapterError: a LoRA or an embedding does not fit the model.
        OutOfMemoryError: memory does not suffice.
    """
    given = locals()  # every argument by its name
    del given["progress"], given["on_event"]
    options, progress = LoadOptions(**given), check_switch("progress", progress)
    check_call("on_event", on_event)
    if isinstance(source, LoadOptions):
        if beside := [name for name in options.given if name != "source"]:
            found, hint = "given beside LoadOptions", "put it into them: dataclasses.replace(options, ...)"
            raise SettingError("SETTING_SOURCE", beside[0], found, expected="LoadOptions alone", hint=hint)
        options = source
    device = find_device(options.device)
    dtype = _dtype(options.dtype, device)
    checkpoint = open_checkpoint(options, progress=progress)
    for note in checkpoint.notes:
        warn(f"{checkpoint.path}: {note}")
    models = build(checkpoint)
    home, rows = checkpoint.parts["text_encoder"].model, checkpoint.family.text.vocab_size
    vocabulary = options.tokenizer or own_tokenizer(checkpoint)
    tokenizer = find_tokenizer(vocabulary, home, rows, offline=options.local_files_only or None)
    states = checkpoint.states
    files = {file for state in states.values() for file in state.weights.files}
    for file in files:
        file.may_map = options.mmap
    total = sum(len(state.sources) for state in states.values())
    done = 0
    # plain tensors, whatever the caller's mode: they serve inside of inference mode and outside
    with (
        torch.inference_mode(False),
        event_bars(f"load {checkpoint.path.name}", " tensors", show=progress) as bars,
    ):

        def tell(tensors: int) -> None:
            nonlocal done
            done += tensors
            for listen in filter(None, (bars, on_event)):
                listen(Event("load", done, total, done / total))

        tell(0)
        for name, model in models.items():
            wanted = None if options.offload else dtype
            # elsewhere than on a CPU they are copied to the device
            stays = wanted is not None and device.type == "cpu" and options.mmap
            with spool(states[name].converted(dtype) if stays else {}, dtype) as convert:
                tensors = load_tensors(states[name], wanted, lambda _: tell(1), convert=convert)
            model.load_state_dict(tensors, strict=True, assign=True)
            model.eval().requires_grad_(False)
            if options.offload:
                check_range(states[name], tensors, dtype)
                for weight in tensors.values():
                    release(weight)
            else:
                model.to(device)  # which also lays weights out as they are best there
    offloading = Offloading(device, dtype, models.values()) if options.offload else None
    control = models.pop(CONTROLNET, None)
    unet, autoencoder, *texts = models.values()
    pipe = Pipeline(
        checkpoint.family,
        unet,
        autoencoder,
        texts,
        tokenizer,
        controlnet=control,
        source=str(options.source),
        offloading=offloading,
        tile=options.tile,
        loaded=options,
        mapped=Watched(files),
    )
    for lora in options.loras:
        pipe.add_option(lora, progress=progress)
    for file, token in options.embeddings:
        pipe.add_embedding(file, token)
    return pipe


@knowing_keywords()
def save_diffusers(folder: str | Path, pipe: LatentDiffusion, dtype: str | torch.dtype | None = None) -> None:
    """Write a pipeline as a diffusers folder, which diffusers' own pipelines load too.

    A folder of that name is replaced in one step when the new one is complete; what else is in it is kept.

    Args:
        folder: the folder, which is made if need be.
        pipe: the pipeline.
        dtype: dtype of the files, or its name; each tensor keeps its own by default.

    Raises:
        CheckpointError: the folder cannot be written.
        SettingError: the pipeline was loaded from there.
    """
    target, dtype = Path(check_path("folder", folder)), None if dtype is None else find_dtype(dtype)
    if not isinstance(pipe, LatentDiffusion):
        raise SettingError("SETTING_PIPE", "pipe", f"a {type(pipe).__name__}", expected="a Pipeline")
    condition = pipe.condition
    if pipe.loaded is not None:
        check_apart(target, (DEMO if place == "demo" else place for place in pipe.loaded.places))
    models = dict(zip(pipe.family.components, (pipe.unet, pipe.vae, *condition.encoders), strict=True))
    try:
        with pipe.using(*models.values()), atomic_folder(target) as new:
            states = {name: model.state_dict() for name, model in models.items()}
            write_diffusers(new, states, diffusers_configs(pipe.family), dtype)
            for name, tokenizer in zip(TOKENIZERS, condition.tokenizers, strict=False):
                tokenizer.save(new / name)
            keep_others(target, new)
    except CheckpointError:
        raise
    except OSError as error:
        raise not_written(target, error) from error


def _dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    return find_dtype(dtype)
