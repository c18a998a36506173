"""Masks from models that are prompted with points, a box or words: SAM, SAM 2 and CLIPSeg from transformers.

The preprocessing of images is done here in a few lines, because transformers' processor of SAM 2 needs torchvision.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from sdinpaint.checks import check_number, find_device, quietly, require_extra
from sdinpaint.errors import MaskError, NumericError, SettingError, said
from sdinpaint.hub import is_hub_id
from sdinpaint.masks.reading import Hole
from sdinpaint.masks.segmenting import Point, Rgb, require_box_inside, require_points_inside
from sdinpaint.on_demand import OnDemand

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
else:
    torch, F = OnDemand("torch"), OnDemand("torch.nn.functional")

__all__ = ["Segmenter", "clipseg", "load_segmenter", "sam"]

SAM_CLASSES = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}
"""model_type of a configuration -> class in transformers; the released SAM 2 models have the type sam2_video."""
CLIPSEG_CLASSES = {"clipseg": "CLIPSegForImageSegmentation"}
RELEASED = {
    "sam": "facebook/sam-vit-base",
    "sam2_video": "facebook/sam2.1-hiera-tiny",
    "clipseg": "CIDAS/clipseg-rd64-refined",
}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's red, green and blue, with which all three models were trained."""
CLIPSEG_SIDE = 352
FAILURES = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""Errors that transformers lets through: of the hub, the disk, odd configurations and damaged or other weights."""


@dataclass(frozen=True)
class Segmenter:
    """A segmentation model of transformers, with CLIPSeg's tokenizer and the settings of its image processor."""

    model: Any
    tokenizer: Any = None
    processor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The model_type of its configuration."""
        return self.model.config.model_type if hasattr(self.model, "config") else type(self.model).__name__

    @property
    def side(self) -> int:
        """Height and width of its input in pixels."""
        if self.kind in SAM_CLASSES:
            return self.model.config.prompt_encoder_config.image_size
        size = self.processor.get("size", CLIPSEG_SIDE)
        return size if isinstance(size, int) else size["height"]

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Compute the part of the input that an image takes.

        Args:
            size: (height, width) of the image.

        Returns:
            (height, width) within the input: SAM keeps the aspect ratio, the others stretch the image over the whole
            input.
        """
        if self.kind != "sam":
            return self.side, self.side
        height, width = (max(1, math.floor(edge * self.side / max(size) + 0.5)) for edge in size)
        return height, width

    def pixels(self, rgb: Rgb) -> Tensor:
        """Resize, normalise and pad an image.

        Args:
            rgb: the image, uint8 (H, W, 3).

        Returns:
            The input (1, 3, side, side) on the device of the model; padding at the right and bottom is 0.
        """
        height, width = self.fitted(rgb.shape[:2])
        resized = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR), np.float32)
        mean = np.asarray(self.processor.get("image_mean", MEAN), np.float32)
        std = np.asarray(self.processor.get("image_std", STD), np.float32)
        pixels = torch.from_numpy((resized / 255 - mean) / std).permute(2, 0, 1)[None]
        padded = F.pad(pixels, (0, self.side - width, 0, self.side - height))
        return padded.to(self.model.device, self.model.dtype)


def sam(
    rgb: Rgb,
    model: Segmenter | nn.Module | Path | str,
    points: Sequence[Point] = (),
    keep_points: Sequence[Point] = (),
    box: Sequence[float] | None = None,
    threshold: float = 0.0,
    device: str | None = None,
) -> Hole:
    """Find the object at points or in a box with SAM or SAM 2; of the proposed masks, take the one with the best score.

    Args:
        rgb: the image, uint8 (H, W, 3).
        model: a folder, a hub id, or the result of `load_segmenter`, which saves loading it for every mask.
        points: points (x, y) on the object.
        keep_points: points (x, y) beside it.
        box: (left, top, right, bottom) around the object.
        threshold: logit above which a pixel belongs to the object.
        device: device that computes, such as "cuda"; None for where the model is; one that is loaded is on the CPU.

    Returns:
        The object as a hole (H, W).

    Raises:
        MaskError: there is neither a point nor a box, or one lies outside the image.
        SettingError: `threshold` is no number, or the model cannot be loaded.
        NumericError: the model returns NaN or infinity.

    Source: Kirillov et al. 2023, "Segment Anything"; Ravi et al. 2024, "SAM 2"; transformers SamProcessor.
    """
    size = rgb.shape[:2]
    level = check_number("threshold", threshold, -math.inf, of="Mask.sam")
    if box is None and not np.size(points):
        found, expected = "neither points nor a box", "at least one of them"
        raise MaskError("MASK_NO_PROMPT", "Mask.sam", found, expected=expected, hint="give a point on the object")
    clicks, keep_clicks = (
        require_points_inside(f"Mask.sam: {name}", given, size) if np.size(given) else []
        for name, given in (("points", points), ("keep_points", keep_points))
    )
    corners = None if box is None else require_box_inside("Mask.sam: box", box, size)
    segmenter = _segmenter(model, SAM_CLASSES, device)
    prompts = _prompts(segmenter, size, clicks, keep_clicks, corners)
    with torch.no_grad(), segmenter.model.device:
        output = segmenter.model(pixel_values=segmenter.pixels(rgb), multimask_output=True, **prompts)
    masks, scores = _finite(output.pred_masks[0, 0]), _finite(output.iou_scores[0, 0])
    best = masks[scores.argmax()][None, None]
    if segmenter.kind == "sam":
        height, width = segmenter.fitted(size)
        best = _resized(best, (segmenter.side, segmenter.side))[..., :height, :width]
    return (_resized(best, size)[0, 0] > level).cpu().numpy()


def clipseg(
    rgb: Rgb,
    text: str | Sequence[str],
    model: Segmenter | Path | str,
    threshold: float = 0.5,
    device: str | None = None,
) -> Hole:
    """Find what a text names with CLIPSeg.

    Args:
        rgb: the image, uint8 (H, W, 3).
        text: the name of a thing, or a list of names, any of which is taken.
        model: a folder, a hub id, or the result of `load_segmenter`, which saves loading it for every mask.
        threshold: probability from which a pixel belongs to the thing.
        device: device that computes, such as "cuda"; None for where the model is; one that is loaded is on the CPU.

    Returns:
        The thing as a hole (H, W).

    Raises:
        MaskError: `text` is empty or too long.
        SettingError: `threshold` is not from 0 to 1, or the model cannot be loaded.
        NumericError: the model returns NaN or infinity.

    Source: Lueddecke and Ecker 2022, "Image Segmentation Using Text and Image Prompts"; transformers CLIPSegProcessor.
    """
    level = check_number("threshold", threshold, 0, 1, of="Mask.clipseg")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(words, str) and words.strip() for words in texts):
        expected = "some words, or a list of names"
        raise MaskError(
            "MASK_NO_TEXT", "Mask.clipseg: text", said(text), expected=expected, hint="name the thing: 'a dog'"
        )
    segmenter = _segmenter(model, CLIPSEG_CLASSES, device)
    tokens = _tokens(segmenter, texts)
    pixels = segmenter.pixels(rgb).expand(len(texts), -1, -1, -1)
    with torch.no_grad(), segmenter.model.device:
        logits = _finite(segmenter.model(pixel_values=pixels, **tokens).logits)
    probabilities = logits.sigmoid().reshape(len(texts), 1, *logits.shape[-2:])
    return (_resized(probabilities, rgb.shape[:2]) >= level).any(dim=0)[0].cpu().numpy()


def load_segmenter(source: Path | str) -> Segmenter:
    """Load SAM, SAM 2 or CLIPSeg on the CPU in float32.

    Args:
        source: a folder, or a model on the hub ("owner/name").

    Returns:
        The model, for the `model` argument of `Mask.sam` and `Mask.clipseg`.

    Raises:
        SettingError: the model is of another type, incomplete or damaged, or the extra `segment` is not installed.
    """
    return _load(source, SAM_CLASSES | CLIPSEG_CLASSES)


def _segmenter(model: Segmenter | nn.Module | Path | str, classes: Mapping[str, str], device: str | None) -> Segmenter:
    if isinstance(model, Path | str):
        model = _load(model, classes)
    segmenter = Segmenter(model) if isinstance(model, torch.nn.Module) else model
    kind = segmenter.kind if isinstance(segmenter, Segmenter) else type(model).__name__
    if kind not in classes:
        raise _refusal("model", f"of type {kind}", classes)
    if device is not None:
        segmenter.model.to(find_device(device))
    return segmenter


def _load(source: Path | str, classes: Mapping[str, str]) -> Segmenter:
    transformers = require_extra("transformers", extra="segment", what="a mask from a segmentation model")
    subject = f"model {str(source)!r}"
    if not Path(source).is_dir() and not is_hub_id(str(source)):
        raise _refusal(subject, "no such folder", classes)
    with _reading(transformers, subject, classes):
        kind = transformers.PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind not in classes:
        raise _refusal(subject, f"of type {kind}" if kind else "no config.json with a model_type", classes)
    with _reading(transformers, subject, classes), torch.device("cpu"):
        model, report = getattr(transformers, classes[kind]).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source) if kind in CLIPSEG_CLASSES else None
        processor = _processor(transformers, source)
    if lack := _lack(model, report, tokenizer):
        raise _refusal(subject, lack, classes)
    return Segmenter(model, tokenizer, processor)


def _lack(model: Any, report: Mapping[str, Any], tokenizer: Any) -> str | None:
    """Return what a checkpoint lacks where transformers would go on with random tensors or an empty vocabulary."""
    unfit = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if unfit:
        return f"{len(unfit)} tensors missing or of another shape, e.g. {unfit[0]}"
    if tokenizer is not None and len(tokenizer) != model.config.text_config.vocab_size:
        return f"a vocabulary of {len(tokenizer)} tokens, where the model has {model.config.text_config.vocab_size}"
    return None


def _processor(transformers: Any, source: Path | str) -> Mapping[str, Any]:
    """Read the settings of the image processor; return none where there is no file of them."""
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return {}


@contextmanager
def _reading(transformers: Any, subject: str, classes: Mapping[str, str]) -> Iterator[None]:
    """Silence transformers meanwhile, and raise its errors as SettingError."""
    try:
        with quietly(transformers):
            yield
    except FAILURES as error:
        raise _refusal(subject, textwrap.shorten(str(error), 200), classes) from error


def _refusal(subject: str, found: str, classes: Mapping[str, str]) -> SettingError:
    expected = f"transformers' config.json and model.safetensors, of type {' or '.join(classes)}"
    hint = f"give a folder or hub id, such as {' or '.join(RELEASED[kind] for kind in classes if kind in RELEASED)}"
    return SettingError("SETTING_SEGMENTER", subject, found, expected=expected, hint=hint)


def _prompts(
    segmenter: Segmenter,
    size: tuple[int, int],
    points: Sequence[Point],
    keep_points: Sequence[Point],
    box: Sequence[float] | None,
) -> dict[str, Tensor]:
    """Convert points and a box to the model's arguments: in pixels of its input, for one object of one image."""
    (height, width), device = segmenter.fitted(size), segmenter.model.device
    scale = torch.tensor([width / size[1], height / size[0]], dtype=torch.float32, device="cpu")
    prompts = {}
    if clicks := [*points, *keep_points]:
        prompts["input_points"] = torch.from_numpy(np.asarray(clicks, np.float32)) * scale
        labels = [1] * len(points) + [0] * len(keep_points)
        prompts["input_labels"] = torch.tensor(labels, dtype=torch.int64, device="cpu")
    if box is not None:
        prompts["input_boxes"] = torch.from_numpy(np.asarray(box, np.float32)) * scale.repeat(2)
    shapes = {"input_points": (1, 1, -1, 2), "input_labels": (1, 1, -1), "input_boxes": (1, 1, 4)}
    return {name: prompt.reshape(shapes[name]).to(device) for name, prompt in prompts.items()}


def _tokens(segmenter: Segmenter, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """Tokenize texts: input_ids and attention_mask (texts, tokens)."""
    if segmenter.tokenizer is None:
        hint = "load it by load_segmenter('FOLDER'), or give Segmenter(model, tokenizer)"
        raise SettingError("SETTING_SEGMENTER", "model", "CLIPSeg without its tokenizer", hint=hint)
    tokens = segmenter.tokenizer(texts, padding=True, return_tensors="pt")
    count, most = tokens["input_ids"].shape[1], segmenter.model.config.text_config.max_position_embeddings
    if count > most:
        raise MaskError(
            "MASK_LONG_TEXT", "Mask.clipseg: text", f"{count} tokens", expected=f"at most {most}", hint="name the thing"
        )
    return tokens.to(segmenter.model.device)


def _finite(values: Tensor) -> Tensor:
    """Return the output of a model in float32 on the CPU, after a check for NaN and infinity."""
    if not values.isfinite().all():
        found = f"{(~values.isfinite()).sum()} of {values.numel()} outputs are NaN or infinite"
        hint = "run the model in float32; if it already is, its weights are damaged"
        raise NumericError("NUMERIC_NOT_FINITE", "model", found, expected="finite values", hint=hint)
    return values.float().cpu()


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)
