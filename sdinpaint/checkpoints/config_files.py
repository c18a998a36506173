"""Check the configuration files of a checkpoint: that they exist, that they fit its weights, and what they are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sdinpaint.checkpoints.built_values import TABLES
from sdinpaint.checkpoints.sources import Component
from sdinpaint.checkpoints.yaml_files import words_beside
from sdinpaint.errors import CheckpointError
from sdinpaint.families import TEXT_ENCODERS, TOKENIZERS, Family, TextConfig
from sdinpaint.paths import Json, read_json

__all__ = ["config_notes", "refuse_last_block", "refuse_other_controlnets", "require_configs"]
__all__ += ["tokenizer_configs"]


def require_configs(parts: Mapping[str, Component], places: Mapping[str, Path], scheduler: Json | None = None) -> None:
    """Refuse a folder without the configuration of a component: its heads, scaling and schedule have no shape.

    Args:
        parts: the components.
        places: the file or folder that each one comes from; a file has no configuration by nature.
        scheduler: scheduler_config.json of the UNet's model; None where it is not needed.

    Raises:
        CheckpointError: names the file that is missing.
    """
    missing = [
        (places[name], f"{name}/config.json")
        for name, part in parts.items()
        if places[name].is_dir() and not part.config
    ]
    if scheduler is not None and not scheduler and parts["unet"].model is not None:
        missing.append((places["unet"], "scheduler/scheduler_config.json"))
    for place, file in missing:
        found = f"no {file}, or an empty one"
        hint = "fetch it again, or give a folder of configurations: config=FOLDER"
        raise CheckpointError("CKPT_NO_CONFIG", place, found, expected="the file beside the weights", hint=hint)


POOLING = ("model", "params", "global_average_pooling")
"""Place of the switch of ControlNets whose residuals are averaged over the image, such as the one for shuffled images.

Source: lllyasviel/ControlNet-v1-1-nightly cldm/cldm.py
"""


def refuse_other_controlnets(part: Component, place: Path) -> None:
    """Refuse a ControlNet of differences to the weights of its UNet, or one whose residuals are averaged.

    Args:
        part: the ControlNet.
        place: its file or folder.

    Raises:
        CheckpointError: a tensor of it, or the .yaml file beside it, says so.
    """
    markers = [key for key in part.state.weights if key.rpartition(".")[2] == "difference"]
    if markers:
        found = f"a tensor {markers[0]!r}: its weights are stored as differences to those of a UNet"
        hint = "give the ControlNet with its own weights"
        raise CheckpointError("CKPT_NOT_BUILT", place, found, expected="whole weights", hint=hint)
    for file, key, word in words_beside(part.state.weights.path, [POOLING]):
        if word.lower() == "true":
            TABLES["controlnet"].refuse(file, key[-1], word, "False")


def refuse_last_block(part: Component, text: TextConfig, path: Path) -> None:
    """Refuse a configuration that asks for the block behind the hidden states that SD2 was trained on.

    Args:
        part: the text encoder.
        text: its configuration, which counts the layers without that block.
        path: the file or folder that errors name.

    Raises:
        CheckpointError: it asks for more layers, and the file has them.
    """
    layers = part.config.get("num_hidden_layers")
    behind = any(f"layers.{text.num_layers}." in key for key in part.state.dropped)
    if behind and isinstance(layers, int) and layers > text.num_layers:
        TABLES["text_encoder"].refuse(path, "num_hidden_layers", layers, f"{text.num_layers}, as it was trained")


def tokenizer_configs(parts: Mapping[str, Component], configs: Path | None) -> dict[str, tuple[Json, Json]]:
    """Read the files of the tokenizers in the text encoders' model.

    Args:
        parts: the components.
        configs: a folder whose files are used instead of those of the model, where it has them; None without one.

    Returns:
        Name of a tokenizer -> tokenizer_config.json and special_tokens_map.json.

    Raises:
        CheckpointError: a file is no table.
    """
    found: dict[str, tuple[Json, Json]] = {}
    for name, encoder in zip(TOKENIZERS, TEXT_ENCODERS, strict=True):
        if encoder in parts:
            paths = f"{name}/tokenizer_config.json", f"{name}/special_tokens_map.json"
            given = [] if configs is None else [read_json(configs / path) for path in paths]
            settings, specials = given if any(given) else map(parts[encoder].table, paths)
            found[name] = settings, specials
    return found


def config_notes(files: Mapping[str, Json], family: Family, trained: Family) -> Iterator[str]:
    """Say what configuration files hold that nobody knows, or that is rarely meant.

    Args:
        files: path in a diffusers folder -> table.
        family: the configuration that came of them.
        trained: the released family.

    Yields:
        Sentences.
    """
    for name, table in files.items():
        if unknown := TABLES[name.partition("/")[0]].unknown(table):
            shown = ", ".join(repr(key[:50]) for key in unknown[:10]) + ", ..." * (len(unknown) > 10)
            yield f"{name}: what is not known here is ignored: {shown}"
    for name, text, usual in zip(TEXT_ENCODERS, family.texts, trained.texts, strict=False):
        if left_out := text.skip_last - usual.skip_last:
            yield f"{name}/config.json: num_hidden_layers leaves out the last {left_out} of {text.num_layers} layers"
    if family.schedule.clip_range is not None:
        yield (
            f"scheduler/scheduler_config.json: clip_sample lets the sampler ddim clip what it predicts to "
            f"{family.schedule.clip_range:g}, which latents exceed; released models have it false"
        )
