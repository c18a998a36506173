"""A peer that is a command line: it is run as it is, and tells the seconds in its output."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sdinpaint.bench.cases import GUIDANCE, PROMPT, SEED, Case, picture_and_mask
from sdinpaint.errors import SettingError

__all__ = ["COMMAND", "Command"]

COMMAND = "command"
"""What this peer is called in the table."""
FIELDS = ("checkpoint", "image", "mask", "out", "prompt", "size", "steps", "seed", "guidance")
TAIL = 300
"""Characters of a command's output that an error shows."""


@dataclass(frozen=True)
class Command:
    """`line` may hold {checkpoint} {image} {mask} {out} {prompt} {size} {steps} {seed} {guidance}; the first group of
    `time` finds the seconds.

    Raises: SettingError where `time` is no regular expression with one group, or `line` names anything else.
    """

    line: str
    time: str

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.time).groups
        except re.error as error:
            raise SettingError("BENCH_PEER_TIME", "peer-time", f"{self.time!r}: {error}") from error
        if groups != 1:
            expected = r"one group around the seconds, such as 'took ([\d.]+) s'"
            raise SettingError("BENCH_PEER_TIME", "peer-time", f"{self.time!r}: {groups} groups", expected=expected)
        self._filled(dict.fromkeys(FIELDS, ""))

    @property
    def program(self) -> str:
        """Its name in the table."""
        return Path(shlex.split(self.line)[0]).name

    @contextmanager
    def inputs(self, case: Case) -> Iterator[dict[str, str]]:
        """What stands for the names in braces; the picture and its mask are files for as long as this lasts."""
        with TemporaryDirectory(prefix="sdinpaint-bench-") as name:
            folder = Path(name)
            files = {kind: str(folder / f"{kind}.png") for kind in ("image", "mask", "out")}
            for kind, picture in zip(("image", "mask"), picture_and_mask(case.size), strict=True):
                picture.save(files[kind])
            numbers = {"size": case.size, "steps": case.steps, "seed": SEED, "guidance": GUIDANCE}
            yield {
                "checkpoint": case.checkpoint,
                "prompt": PROMPT,
                **files,
                **{name: str(value) for name, value in numbers.items()},
            }

    def seconds(self, inputs: dict[str, str]) -> float:
        """Run it once -> the seconds that it tells. Raises: SettingError where it fails, or tells none."""
        words = self._filled(inputs)
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", f"{words[0]!r}: {error.strerror}") from error
        output = done.stdout + done.stderr
        if done.returncode:
            found = f"{words[0]!r} ended with code {done.returncode}: {output[-TAIL:].strip()}"
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", found, hint="run it by hand first")
        match = re.search(self.time, output)
        try:
            return float(match[1] if match else "")
        except ValueError as error:
            found = f"{self.time!r} finds {'no number' if match else 'nothing'} in {output[-TAIL:].strip()!r}"
            hint = r"one group around the seconds, such as 'took ([\d.]+) s'"
            raise SettingError("BENCH_PEER_TIME", "peer-time", found, hint=hint) from error

    def _filled(self, inputs: dict[str, str]) -> list[str]:
        """The words of the line. Raises: SettingError for another name in braces, or a quote that is left open."""
        try:
            words = [word.format_map(inputs) for word in shlex.split(self.line)]
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            expected = "words with " + ", ".join(f"{{{name}}}" for name in FIELDS)
            hint = "other braces are doubled: {{ and }}"
            found = f"{self.line!r}: {error}"
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", found, expected=expected, hint=hint) from error
        if not words:
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", "an empty line", expected="a command")
        return words
