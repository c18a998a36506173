"""LPIPS and FID by torchmetrics, which downloads their networks at the first use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdinpaint.checks import require_extra
from sdinpaint.errors import SettingError, said
from sdinpaint.metrics.inputs import check_images

__all__ = ["fid", "lpips"]

Bytes = NDArray[np.uint8]


def lpips(reference: Bytes, image: Bytes) -> float:
    """Compute LPIPS, the learned perceptual distance, by AlexNet; it is 0 for identical images, and about 1 at most.

    Args:
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3).

    Returns:
        The distance.

    Raises:
        ImageError: the images differ in size.
        SettingError: the extra `eval` is not installed, or the weights cannot be downloaded.

    Source: https://arxiv.org/abs/1801.03924.
    """
    check_images(reference, image)
    require_extra("torchvision", extra="eval", what="lpips")
    module = require_extra("torchmetrics.image.lpip", extra="eval", what="lpips")
    with torch.device("cpu"):
        with _network("lpips"):
            metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        return float(metric(_batch(reference).float() / 255, _batch(image).float() / 255))


def fid(references: Sequence[Bytes], images: Sequence[Bytes], features: int | nn.Module = 2048) -> float:
    """Compute FID, the Frechet distance of two sets of images in the features of Inception; it is 0 for the same set.

    Sets of fewer than some thousands of images compare only with sets of the same size.

    Args:
        references: images, uint8 (H, W, 3) each.
        images: images, uint8 (H, W, 3) each.
        features: the layer of Inception by its number of features, or a module uint8 (B, 3, H, W) -> (B, F).

    Returns:
        The distance.

    Raises:
        ImageError: an image has another type or shape.
        SettingError: a set has fewer than two images, the extra `eval` is not installed, or the weights cannot be
            downloaded.

    Source: https://arxiv.org/abs/1706.08500.
    """
    if not isinstance(features, int | nn.Module) or isinstance(features, bool):
        expected = "64, 192, 768, 2048, or a module"
        raise SettingError("SETTING_FEATURES", "features", said(features), expected=expected)
    for name, given in (("references", references), ("images", images)):
        if not isinstance(given, Sequence | np.ndarray):
            raise SettingError("SETTING_COUNTS", name, f"a {type(given).__name__}", expected="a list of images")
        if len(given) < 2:
            raise SettingError("SETTING_COUNTS", name, f"{len(given)}", expected="at least two images")
        for image in given:
            check_images(image)
    if isinstance(features, int):
        require_extra("torch_fidelity", extra="eval", what="fid")
    module = require_extra("torchmetrics.image.fid", extra="eval", what="fid")
    with torch.device("cpu"):
        with _network("fid"):
            metric = module.FrechetInceptionDistance(feature=features)
        for given, real in ((references, True), (images, False)):
            for image in given:
                metric.update(_batch(image), real=real)
        return float(metric.compute())


@contextmanager
def _network(what: str) -> Iterator[None]:
    """Raise SettingError where loading the weights of a metric fails."""
    try:
        yield
    except OSError as error:
        hint = "connect to the network once, or put the weights into torch's cache (torch.hub.get_dir())"
        raise SettingError("SETTING_WEIGHTS", what, f"its weights cannot be downloaded ({error})", hint=hint) from error


def _batch(image: Bytes) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
