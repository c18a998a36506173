"""CUDA graphs without a GPU: a recording that replays by calling."""

from __future__ import annotations

import torch

from sdinpaint.sampling import graphs


class Replay:
    """Keeps tensors of its own as a recording does, and computes from nothing else."""

    made = 0

    def __init__(self, function, varying, constant, memory):
        type(self).made += 1
        self.graph, self.function = self, function
        self.varying = [one.clone() for one in varying]
        self.constant, self.loaded = [one.clone() for one in constant], constant

    def pool(self):
        return None

    def __call__(self, varying, constant):
        if constant is not self.loaded:
            graphs._copy(constant, self.constant)
            self.loaded = constant
        graphs._copy(varying, self.varying)
        return self.function(self.varying, self.constant)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
