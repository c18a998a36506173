"""Read words of the .yaml file that the original code keeps beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from sdinpaint_weights.door import Refusal, read_whole

from sdinpaint.errors import warn

__all__ = ["Place", "words_beside"]

Place = tuple[str, ...]
"""Keys of nested mappings, from the outermost on."""

SUFFIXES = (".yaml", ".yml")
MAX_YAML = 65_536
"""Bytes of a .yaml file at most; those of the releases have 2 to 5 kB."""
NOTHING = ("", "null", "~")


def words_beside(weights: Path, places: Iterable[Place]) -> Iterator[tuple[Path, Place, str]]:
    """Read words of the .yaml files that are named as a file of weights.

    Args:
        weights: the file of weights.
        places: where the words are.

    Yields:
        The .yaml file, the place and the word, for each place that has one.
    """
    for suffix in SUFFIXES:
        path = weights.with_suffix(suffix)
        for place, word in _words(path, places):
            yield path, place, word


def _words(path: Path, places: Iterable[Place]) -> Iterator[tuple[Place, str]]:
    import yaml  # noqa: PLC0415 - few checkpoints have such a file

    try:
        # nodes, not objects: an object repeats what its aliases stand for, to any size
        top = yaml.compose(read_whole(path, MAX_YAML), Loader=yaml.SafeLoader)
    except Refusal as refusal:
        if refusal.reason != "missing" or path.is_symlink():
            warn(f"{path}: {refusal.found}; it is not used")
        return
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        warn(f"{path}: not YAML ({type(error).__name__}); it is not used")
        return
    for place in places:
        node = top
        for name in place:
            below = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((value for key, value in below if key.value == name), None)
        if isinstance(node, yaml.ScalarNode) and node.value not in NOTHING:
            yield place, node.value
