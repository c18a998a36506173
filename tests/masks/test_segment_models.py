"""Masks from SAM, SAM 2 and CLIPSeg: small models with random weights in their real format, and one that draws."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import INF, NAN, refused
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import sdinpaint
from sdinpaint.errors import MaskError, NumericError, SettingError
from sdinpaint.images.boxes import Box
from sdinpaint.masks import prompting
from sdinpaint.masks.prompting import Segmenter, clipseg, load_segmenter, sam
from sdinpaint.masks.segmenting import flood, grabcut

SIZE = (48, 100)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
DEMO = Path(sdinpaint.__file__).parent / "demo"
POINTS, KEEP_POINTS, BOX = [(70, 12), (80.5, 20)], [(20, 40)], Box(55, 5, 95, 30)


# a model that draws what it is asked


class Drawing(nn.Module):
    """Proposes three discs around the first point, or boxes, as logits; draws in input pixels as SAM sees them."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, kind, side=128, scores=(0.1, 0.9, 0.3), swap=False):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind, prompt_encoder_config=SimpleNamespace(image_size=side))
        self.scores, self.swap = torch.tensor([[scores]]), swap

    def forward(self, pixel_values, input_points=None, input_labels=None, input_boxes=None, multimask_output=False):
        assert multimask_output
        self.seen = pixel_values
        side = self.config.prompt_encoder_config.image_size
        assert pixel_values.shape == (1, 3, side, side)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        if input_points is not None:
            points, labels = input_points[0, 0].flip(-1) if self.swap else input_points[0, 0], input_labels[0, 0]
            logits = 12 - (torch.stack([x, y], -1) - points[labels == 1][0]).norm(dim=-1)
            for point in points[labels == 0]:
                logits = torch.where((torch.stack([x, y], -1) - point).norm(dim=-1) < 6, -5.0, logits)
        else:
            left, top, right, bottom = input_boxes[0, 0]
            logits = torch.stack([x - left, right - 1 - x, y - top, bottom - 1 - y]).amin(0) + 0.5
        masks = torch.stack([logits - 4, logits, logits + 4])[None, None]
        return SimpleNamespace(pred_masks=masks, iou_scores=self.scores)


def middle(hole):
    rows, columns = np.nonzero(hole)
    return columns.mean(), rows.mean()


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam2_video"])
@pytest.mark.parametrize("size", [(48, 100), (100, 48), (300, 200), (64, 64)])
def test_points_and_boxes_are_where_they_were_given(kind, size):
    height, width = size
    rgb, model = np.zeros((*size, 3), np.uint8), Drawing(kind)
    point = (0.7 * width, 0.3 * height)
    found = sam(rgb, model, [point])
    assert found.dtype == bool
    assert found.shape == size
    assert np.abs(np.subtract(middle(found), point)).max() < 1
    box = Box(int(0.5 * width), int(0.2 * height), int(0.9 * width), int(0.6 * height))
    drawn = np.zeros(size, bool)
    drawn[box.slices] = True
    found = sam(rgb, model, box=box)
    assert (found ^ drawn).sum() <= 2 * sum(box.size)
    assert np.abs(np.subtract(middle(found), middle(drawn))).max() < 1


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_swapped_or_unscaled_points_would_be_seen(kind, sabotage):
    square = np.zeros((100, 100, 3), np.uint8)

    def away(model):
        return np.abs(np.subtract(middle(sam(square, model, [(60, 30)])), (60, 30))).max()

    assert away(Drawing(kind)) < 1
    assert away(Drawing(kind, swap=True)) > 5
    scaled = prompting._prompts
    sabotage(prompting, "_prompts", lambda segmenter, size, *rest: scaled(segmenter, (128, 128), *rest))
    assert away(Drawing(kind)) > 5


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_mask_of_the_highest_score_is_taken(best):
    scores = np.full(3, 0.2)
    scores[best] = 0.3
    found = sam(np.zeros((128, 128, 3), np.uint8), Drawing("sam2", scores=tuple(scores)), [(60, 64)])
    radius = 12 + (-4, 0, 4)[best]
    assert found.sum() == pytest.approx(np.pi * radius**2, rel=0.05)


def test_what_is_at_keep_points_is_kept():
    rgb, model = np.zeros((128, 128, 3), np.uint8), Drawing("sam2")
    whole, cut = sam(rgb, model, [(60, 64)]), sam(rgb, model, [(60, 64)], keep_points=[(66, 64)])
    assert whole[64, 66]
    assert not cut[64, 66]
    assert not (cut & ~whole).any()


def test_a_higher_threshold_takes_less():
    holes = [sam(RGB, Drawing("sam"), [(60, 20)], threshold=threshold) for threshold in (-20, -3, 0, 3, 20)]
    for lower, higher in pairwise(holes):
        assert not (higher & ~lower).any()
        assert higher.sum() < lower.sum()
    assert not holes[-1].any()


def test_sam_keeps_the_shape_of_the_image_and_sam2_fills_the_input():
    grey = np.full((*SIZE, 3), 255, np.uint8)
    for kind, rows in (("sam", 61), ("sam2", 128)):
        model = Drawing(kind)
        sam(grey, model, [(5, 5)])
        assert (model.seen[0, :, :rows] > 2).all()
        assert not model.seen[0, :, rows:].any()
    thin = sam(np.zeros((1, 500, 3), np.uint8), Drawing("sam"), [(250, 0)])
    assert thin.shape == (1, 500)
    assert thin[0, 250]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["masks", "scores"])
def test_outputs_that_are_not_finite_make_no_mask(value, where, sabotage):
    def broken(self, **inputs):
        masks, scores = torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 3)
        (masks if where == "masks" else scores)[0, 0, 1] = value
        return SimpleNamespace(pred_masks=masks, iou_scores=scores)

    sabotage(Drawing, "forward", broken)
    with pytest.raises(NumericError) as caught:
        sam(RGB, Drawing("sam"), POINTS)
    assert caught.value.code == "NUMERIC_NOT_FINITE"
    assert caught.value.subject == "model"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({}, "MASK_NO_PROMPT", ["sam", "points", "box"]),
        ({"keep_points": POINTS}, "MASK_NO_PROMPT", ["sam", "points", "box"]),
        ({"points": [(5, 5), (100, 5)]}, "MASK_POINTS", ["points", "(100, 5)", "x < 100"]),
        ({"points": (5, 5)}, "MASK_POINTS", ["points", "(x, y)"]),
        ({"points": POINTS, "keep_points": [(5, 48)]}, "MASK_POINTS", ["keep_points", "(5, 48)", "y < 48"]),
        ({"points": [(NAN, 5)]}, "MASK_POINTS", ["points", "nan"]),
        ({"box": (95, 5, 55, 30)}, "MASK_BOX", ["box", "left < right"]),
        ({"box": (55, 5, 101, 30)}, "MASK_BOX", ["box", "100"]),
    ],
)
def test_sam_refuses(arguments, code, words):
    refused(MaskError, code, lambda: sam(RGB, Drawing("sam"), **arguments), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["text", "''"]),
        (" \n", ["text"]),
        ([], ["text", "[]"]),
        (["a fox", ""], ["text", "a fox"]),
        ([3], ["text", "[3]"]),
    ],
)
def test_clipseg_refuses_to_look_for_nothing(text, words):
    refused(MaskError, "MASK_NO_TEXT", lambda: clipseg(RGB, text, Segmenter(Drawing("clipseg"))), *words)


@pytest.mark.parametrize("threshold", [1.1, -0.1, NAN, "half"])
def test_thresholds_that_are_no_probability_are_refused(threshold):
    asking = Segmenter(Drawing("clipseg"))
    refused(SettingError, "SETTING_THRESHOLD", lambda: clipseg(RGB, "a fox", asking, threshold), "threshold", threshold)


@pytest.mark.parametrize("threshold", [INF, NAN, "half"])
def test_thresholds_that_are_no_number_are_refused(threshold):
    asking = Drawing("sam")
    refused(SettingError, "SETTING_THRESHOLD", lambda: sam(RGB, asking, POINTS, threshold=threshold), "threshold")


def test_a_model_of_another_kind_is_refused():
    for model, words in (
        (Drawing("clipseg"), ["clipseg", "sam or sam2"]),
        (nn.Linear(2, 2), ["Linear"]),
        (3, ["int"]),
    ):
        refused(SettingError, "SETTING_SEGMENTER", lambda model=model: sam(RGB, model, POINTS), "model", *words)
    drawing = Segmenter(Drawing("sam"), "a tokenizer")
    refused(SettingError, "SETTING_SEGMENTER", lambda: clipseg(RGB, "a fox", drawing), "model", "sam", "clipseg")
    alone = Drawing("clipseg")
    refused(SettingError, "SETTING_SEGMENTER", lambda: clipseg(RGB, "a fox", alone), "model", "tokenizer")


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("transformers", "segment", lambda: sam(RGB, "some/folder", POINTS)),
        ("cv2", "mask", lambda: grabcut(RGB, BOX)),
        ("skimage.segmentation", "mask", lambda: flood(RGB, (5, 5))),
    ],
)
def test_what_to_install(module, extra, call, without):
    without(module)
    refused(SettingError, "SETTING_EXTRA", call, f"pip install 'sdinpaint[{extra}]'")


# small models in the format of the released ones


def lively(model, seed):
    """Random weights under which every input counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * weight[0].numel() ** -0.5 if weight.ndim > 1 else weight + 0.1 * drawn)
        for name, table in model.named_buffers():
            if name.endswith("positional_embedding"):
                table.copy_(torch.randn(table.shape, generator=generator))
    return model.eval()


PROMPTS = {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4}
DECODER = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 12}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads": 1,
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 4, 2, 2],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [3, 3],
}
SAM2 = {
    "prompt_encoder_config": PROMPTS,
    "mask_decoder_config": DECODER,
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": HIERA,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    },
}


def small_sam():
    from transformers import SamConfig, SamModel

    vision = {
        "hidden_size": 24,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
        "mlp_dim": 32,
    }
    prompts = PROMPTS | {"patch_size": 8}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER)
    return lively(SamModel(config), 6)


def small_sam2():
    from transformers import Sam2Config, Sam2Model

    return lively(Sam2Model(Sam2Config(**SAM2)), 4)


def small_sam2_video():
    from transformers import Sam2VideoConfig, Sam2VideoModel

    memory = {
        "memory_attention_hidden_size": 16,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 16,
        "memory_attention_rope_feat_sizes": [4, 4],
        "memory_encoder_hidden_size": 16,
        "memory_encoder_output_channels": 8,
        "memory_fuser_embed_dim": 16,
        "memory_fuser_num_layers": 1,
        "memory_fuser_intermediate_dim": 16,
        "mask_downsampler_embed_dim": 16,
    }
    return lively(Sam2VideoModel(Sam2VideoConfig(**SAM2, **memory, image_size=64)), 5)


def small_clipseg(tokenizer):
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    vision = {"hidden_size": 28, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=text | marks | {"vocab_size": len(tokenizer)},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        projection_dim=20,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    )
    return lively(CLIPSegForImageSegmentation(config), 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vocabulary):
    """{kind: folder} of small models as save_pretrained writes them; CLIPSeg with processor and vocabulary."""
    import transformers

    root = tmp_path_factory.mktemp("segmenters")
    vocabulary.save(root / "clipseg")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "clipseg")
    for kind, model in {
        "sam": small_sam(),
        "sam2": small_sam2(),
        "sam2_video": small_sam2_video(),
        "clipseg": small_clipseg(tokenizer),
    }.items():
        model.save_pretrained(root / kind)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "size": {"height": 40, "width": 40}}
    (root / "clipseg" / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "ViTImageProcessor", "resample": 2})
    )
    return {kind: root / kind for kind in ("sam", "sam2", "sam2_video", "clipseg")}


def sam2_by_hand(folder):
    """Points, labels and box -> SAM 2's logits (3, H, W) and scores (3,), its inputs made as its processor would."""
    from transformers import Sam2Model

    model = Sam2Model.from_pretrained(folder)
    pixels = torch.from_numpy(np.asarray(Image.fromarray(RGB).resize((64, 64), Image.Resampling.BILINEAR)) / 255.0)
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    scale = torch.tensor([64 / SIZE[1], 64 / SIZE[0]])

    @torch.no_grad()
    def ask(points, labels, box):
        output = model(
            pixel_values=pixels.permute(2, 0, 1)[None].float(),
            input_points=(torch.tensor(points) * scale)[None, None],
            input_labels=torch.tensor(labels)[None, None],
            input_boxes=(torch.tensor(box).view(2, 2) * scale).view(1, 1, 4),
        )
        return F.interpolate(output.pred_masks[0], SIZE, mode="bilinear")[0], output.iou_scores[0, 0]

    return ask


def sams_processor():
    from transformers import SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    return SamProcessor(SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}))


def processed(rgb, points, labels, box):
    """Return what SAM's own processor makes of an image and its prompts."""
    prompts = {"input_points": [[list(point) for point in points]], "input_labels": [labels]}
    return sams_processor()(rgb, **prompts, input_boxes=[[list(box)]], return_tensors="pt")


def sam_by_processor(folder):
    """Points, labels and box -> SAM's logits (3, H, W) and scores (3,), by its own processor."""
    from transformers import SamModel

    model = SamModel.from_pretrained(folder)

    @torch.no_grad()
    def ask(points, labels, box):
        inputs = processed(RGB, points, labels, box)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        output = model(**inputs)
        masks = sams_processor().post_process_masks(output.pred_masks, *sizes, binarize=False)
        return masks[0][0], output.iou_scores[0, 0]

    return ask


def same(hole, values, threshold):
    """Whether the hole is where the values are above the threshold, but for those at it within float32's rounding."""
    clear = ((values - threshold).abs() > 1e-5).numpy()
    assert clear.mean() > 0.99
    return np.array_equal(hole[clear], (values > threshold).numpy()[clear])


@pytest.mark.peer
@pytest.mark.parametrize(
    ("kind", "reference"), [("sam", sam_by_processor), ("sam2", sam2_by_hand), ("sam2_video", sam2_by_hand)]
)
def test_sam_is_transformers_own(folders, kind, reference):
    segmenter, ask = load_segmenter(folders[kind]), reference(folders[kind])
    best = set()
    for shift in range(6):
        points = [(x - 12 * shift, y + 4 * shift) for x, y in POINTS]
        box = (55 - 9 * shift, 5, 95 - 9 * shift, 30 + 3 * shift)
        logits, scores = ask([*points, *KEEP_POINTS], [1, 1, 0], box)
        best.add(int(scores.argmax()))
        threshold = float(logits[scores.argmax()].median())
        hole = sam(RGB, segmenter, points, KEEP_POINTS, box, threshold)
        assert same(hole, logits[scores.argmax()], threshold)
        assert not same(hole, logits[scores.argmin()], threshold)
        swapped, scores = ask([(y, x) for x, y in [*points, *KEEP_POINTS]], [1, 1, 0], box)
        assert not same(hole, swapped[scores.argmax()], threshold)
    assert len(best) > 1


@pytest.mark.peer
def test_pixels_and_prompts_are_those_of_sams_processor(folders):
    segmenter = load_segmenter(folders["sam"])
    for rgb in (RGB, RGB.transpose(1, 0, 2), RGB[:, :48], RGB[:33, :77]):
        size, points, box = rgb.shape[:2], [(40.5, 30), (3, 32)], (1, 2, 30, 31)
        theirs = processed(rgb, points, [1, 0], box)
        assert segmenter.fitted(size) == tuple(theirs["reshaped_input_sizes"][0].tolist())
        torch.testing.assert_close(segmenter.pixels(rgb), theirs["pixel_values"], atol=1e-6, rtol=0)
        for name, value in prompting._prompts(segmenter, size, points[:1], points[1:], box).items():
            assert value.shape == theirs[name].shape
            torch.testing.assert_close(value, theirs[name], check_dtype=False, atol=1e-5, rtol=0)


@pytest.mark.peer
def test_pixels_are_those_of_clipsegs_processor(folders):
    from transformers import ViTImageProcessor

    theirs = ViTImageProcessor.from_pretrained(folders["clipseg"])(RGB, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(load_segmenter(folders["clipseg"]).pixels(RGB), theirs, atol=1e-6, rtol=0)


@pytest.mark.peer
def test_clipseg_is_transformers_own(folders):
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessor

    folder = folders["clipseg"]
    tokens = CLIPTokenizer.from_pretrained(folder)("a red fox", return_tensors="pt")
    pixels = ViTImageProcessor.from_pretrained(folder)(RGB, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(folder)(pixel_values=pixels, **tokens).logits
    shares = F.interpolate(logits.sigmoid().view(1, 1, 40, 40), SIZE, mode="bilinear")[0, 0]
    for threshold in (0.4, 0.5, 0.6):
        hole = clipseg(RGB, "a red fox", folder, threshold)
        assert hole.dtype == bool
        assert hole.shape == SIZE
        assert same(hole, shares, threshold)
    assert not same(clipseg(RGB[::-1], "a red fox", folder), shares, 0.5)
    assert not same(clipseg(RGB, "a blue cube on the b", folder), shares, 0.5)


@pytest.mark.peer
def test_several_texts_are_a_union(folders):
    segmenter = load_segmenter(str(folders["clipseg"]))
    texts = ["a red fox", "a blue cube on the a", "b"]
    holes = [clipseg(RGB, text, segmenter, 0.6) for text in texts]
    union = clipseg(RGB, texts, segmenter, 0.6)
    # a text beside longer ones is padded, which changes the last bits
    assert (union ^ np.logical_or.reduce(holes)).mean() < 0.01
    assert all(hole.sum() < union.sum() for hole in holes)


@pytest.mark.peer
def test_thresholds_of_clipseg_are_probabilities(folders):
    segmenter = load_segmenter(folders["clipseg"])
    holes = [clipseg(RGB, "a red fox", segmenter, threshold) for threshold in (0, 0.4, 0.5, 0.6, 1)]
    assert holes[0].all()
    assert not holes[-1].any()
    for lower, higher in pairwise(holes):
        assert not (higher & ~lower).any()
        assert higher.sum() < lower.sum()


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_a_model_runs_in_its_own_dtype(folders, kind):
    segmenter = load_segmenter(folders[kind])
    whole = sam(RGB, segmenter.model, POINTS, box=BOX)
    assert np.array_equal(whole, sam(RGB, segmenter, POINTS, box=BOX))
    half = sam(RGB, segmenter.model.bfloat16(), POINTS, box=BOX)
    assert (half ^ whole).mean() < 0.1


@pytest.mark.peer
def test_a_text_too_long_is_refused(folders):
    refused(MaskError, "MASK_LONG_TEXT", lambda: clipseg(RGB, "fox " * 80, folders["clipseg"]), "text", 77)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["sam", "clipseg"])
def test_loading_prints_nothing_and_leaves_transformers_as_it_was(folders, kind, capfd):
    from transformers import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_segmenter(folders[kind])
    assert "".join(capfd.readouterr()) == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    assert bars


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["mask_decoder_config"]["mlp_dim"] = 32
    (folder / "config.json").write_text(json.dumps(config))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_a_broken_config(folder):
    (folder / "config.json").write_text("{")


def with_an_odd_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_a_tensor, ["1 tensors missing", "mask_decoder.iou_token.weight"]),
        (of_another_size, ["another shape", "mlp"]),
        (cut_short, ["not fully covered"]),
        (without_weights, ["model.safetensors"]),
        (with_a_broken_config, ["valid JSON"]),
        (with_an_odd_config, ["hidden_size"]),
    ],
)
def test_damaged_folders_are_refused(folders, tmp_path, damage, words, own_cache):
    folder = shutil.copytree(folders["sam"], tmp_path / "model")
    damage(folder)
    refused(SettingError, "SETTING_SEGMENTER", lambda: load_segmenter(folder), folder, "sam or sam2", *words)


@pytest.mark.peer
def test_a_missing_vocabulary_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["clipseg"], tmp_path / "model")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    refused(SettingError, "SETTING_SEGMENTER", lambda: load_segmenter(folder), folder, "a vocabulary of 2 tokens")


@pytest.mark.peer
@pytest.mark.parametrize("source", [DEMO, DEMO / "unet", DEMO / "tokenizer", DEMO / "nothing", "nobody's/folder"])
def test_what_is_no_such_model_is_refused(source, own_cache):
    refused(SettingError, "SETTING_SEGMENTER", lambda: sam(RGB, source, POINTS), source, "sam or sam2", "config.json")


@pytest.mark.peer
def test_folders_of_the_other_kind_are_refused(folders):
    refused(SettingError, "SETTING_SEGMENTER", lambda: sam(RGB, folders["clipseg"], POINTS), "type clipseg", "sam2")
    refused(SettingError, "SETTING_SEGMENTER", lambda: clipseg(RGB, "a fox", folders["sam"]), "type sam", "clipseg")


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_the_device_is_that_of_the_model_unless_another_is_given(kind):
    rgb = np.zeros((96, 128, 3), np.uint8)
    model = Drawing(kind)
    alone = sam(rgb, Segmenter(model), [(40, 40)])
    assert np.array_equal(sam(rgb, Segmenter(model), [(40, 40)], device="cpu"), alone)
    error = refused(SettingError, "SETTING_DEVICE", lambda: sam(rgb, Segmenter(model), [(40, 40)], device="warp"))
    assert "'warp'" in error.found
