"""LPIPS and FID by torchmetrics, whose networks are fetched at their first use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdinpaint.checks import require_extra
from sdinpaint.errors import SettingError
from sdinpaint.metrics.inputs import check_pictures

__all__ = ["fid", "lpips"]

Bytes = NDArray[np.uint8]


def lpips(reference: Bytes, picture: Bytes) -> float:
    """Learned perceptual distance of pictures (H, W, 3) by AlexNet: 0 if identical, about 1 at most.

    Raises: ImageError for pictures of two sizes, SettingError where torchvision or its weights are missing.
    Source: https://arxiv.org/abs/1801.03924.
    """
    check_pictures(reference, picture)
    require_extra("torchvision", extra="eval", what="lpips")
    module = require_extra("torchmetrics.image.lpip", extra="eval", what="lpips")
    with torch.device("cpu"):
        with _network("lpips"):
            metric = module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        return float(metric(_batch(reference).float() / 255, _batch(picture).float() / 255))


def fid(references: Sequence[Bytes], pictures: Sequence[Bytes], features: int | nn.Module = 2048) -> float:
    """Frechet distance of two sets of pictures, in the features of Inception: 0 for the same set.

    `features` may be a module uint8 (B, 3, H, W) -> (B, F) instead. Sets of fewer than some thousands of pictures
    compare with others of their size alone.
    Raises: SettingError for a set of fewer than two, or where torch-fidelity or its weights are missing.
    Source: https://arxiv.org/abs/1706.08500.
    """
    for name, given in (("references", references), ("pictures", pictures)):
        if len(given) < 2:
            raise SettingError("SETTING_COUNTS", name, f"{len(given)}", expected="at least two pictures")
        for picture in given:
            check_pictures(picture)
    if isinstance(features, int):
        require_extra("torch_fidelity", extra="eval", what="fid")
    module = require_extra("torchmetrics.image.fid", extra="eval", what="fid")
    with torch.device("cpu"):
        with _network("fid"):
            metric = module.FrechetInceptionDistance(feature=features)
        for given, real in ((references, True), (pictures, False)):
            for picture in given:
                metric.update(_batch(picture), real=real)
        return float(metric.compute())


@contextmanager
def _network(what: str) -> Iterator[None]:
    """Loading of weights, which may need the network. Raises: SettingError."""
    try:
        yield
    except OSError as error:
        hint = "connect once, or put the weights into torch's cache (torch.hub.get_dir())"
        raise SettingError("SETTING_WEIGHTS", what, f"its weights cannot be fetched ({error})", hint=hint) from error


def _batch(picture: Bytes) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
