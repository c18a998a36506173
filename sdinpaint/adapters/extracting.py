"""Extract a LoRA from two models, by singular value decomposition of the differences of their weights."""

from __future__ import annotations

import torch
from sdinpaint_weights.adapter_names import Target, targets_of
from torch import Tensor, nn

from sdinpaint.adapters.deltas import Parts
from sdinpaint.adapters.dialects import Adapter
from sdinpaint.adapters.stack import Networks
from sdinpaint.errors import AdapterError, warn
from sdinpaint.progress import progress_bar

__all__ = ["difference_of", "low_rank"]

OVERSAMPLED, ITERATIONS = 16, 4
"""Further directions and iterations of the randomized decomposition.

Source: Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4.
"""
FULL = 4
"""A matrix whose smaller side is at most so many times the rank is decomposed exactly."""
SEED = 0
EXAMPLES = 5


def difference_of(base: Networks, tuned: Networks, rank: int, dtype: torch.dtype, *, progress: bool = True) -> Adapter:
    """Approximate the differences of all linear layers and convolutions of two models.

    Args:
        base: the networks of the model that the LoRA is to be added to.
        tuned: the networks of the model that it is to become.
        rank: the rank of each layer at most.
        dtype: dtype of the tensors.
        progress: show a progress bar.

    Returns:
        The LoRA; layers that are the same are left out.

    Raises:
        AdapterError: the models have other layers, no layer differs, or a difference is NaN or infinite.
    """
    pairs = [pair for name in base if name in tuned for pair in _pairs(name, base[name], tuned[name])]
    adapter: dict[Target, Parts] = {}
    skipped = []
    with progress_bar(len(pairs), "extract", " layers", show=progress) as bar:
        for target, before, after in pairs:
            if before.shape != after.shape:
                skipped.append(target.name)
            elif bool((delta := after.float() - before.float()).any()):
                if not bool(torch.isfinite(delta).all()):
                    found = f"the difference of {target.name} is NaN or infinite"
                    raise AdapterError("ADAPTER_VALUES", "base and tuned", found, expected="finite weights")
                down, up = low_rank(delta, rank)
                adapter[target] = {"down": down.to(dtype), "up": up.to(dtype), "alpha": torch.tensor(float(len(down)))}
            bar.update()
    if skipped:
        listed = ", ".join(skipped[:EXAMPLES])
        warn(f"{len(skipped)} layers have other sizes in the two models and are left out: {listed}")
    if not adapter:
        hint = "give the model from before training, and the one from after"
        raise AdapterError("ADAPTER_SHAPE", "base and tuned", "no layer differs", expected="two models", hint=hint)
    return adapter


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate a difference of weights by a product of low rank.

    Args:
        delta: the difference (o, i) or (o, i, k, k), float32 or better.
        rank: the rank, which is lowered to the smaller side of the matrix.

    Returns:
        down (r, i) or (r, i, k, k) and up (o, r) or (o, r, 1, 1), whose product is closest to the difference.
    """
    matrix = delta.flatten(1)
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= FULL * rank + OVERSAMPLED:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.mT
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            left, values, right = torch.svd_lowrank(matrix, q=2 * rank + OVERSAMPLED, niter=ITERATIONS)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, (right[:, :rank] * root).mT
    kernel = [1] * (delta.ndim - 2)
    return down.reshape(rank, *delta.shape[1:]).contiguous(), up.reshape(len(delta), rank, *kernel).contiguous()


def _pairs(name: str, base: nn.Module, tuned: nn.Module) -> list[tuple[Target, Tensor, Tensor]]:
    """Return the layers of a network with their weights in both models."""
    layers = {key: one for key, one in base.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    others = dict(tuned.named_modules())
    if missing := [key for key in layers if not isinstance(others.get(key), type(layers[key]))]:
        found = f"the tuned model lacks {len(missing)} layers of the base, e.g. {', '.join(missing[:EXAMPLES])}"
        raise AdapterError("ADAPTER_FAMILY", name, found, expected="two models of one family")
    targets = targets_of(name, layers)
    return [(target, layers[target.module].weight.data, others[target.module].weight.data) for target in targets]
