"""A plugin of pytest that skips what needs a package of the extras that `make test-lowest` does not install.

PYTHONPATH=tools python -m pytest -p without_peers
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

PEERS = ("accelerate", "diffusers", "openvino", "peft", "torchmetrics", "transformers")


class SkipWithout:
    """An import finder behind all others: a test or test file that asks for a missing peer is skipped."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Skip for a peer, and find nothing else."""
        if name.partition(".")[0] in PEERS:
            pytest.skip(
                f"{name} is not installed here; `make test`, with the extra dev, runs it", allow_module_level=True
            )


if not all(map(find_spec, PEERS)):
    sys.meta_path.append(SkipWithout())
