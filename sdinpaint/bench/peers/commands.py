"""A baseline that is a command line: it is run as it is, and prints its seconds."""

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
"""The name of such a baseline in the tables, before its number."""
FIELDS = ("checkpoint", "image", "mask", "out", "prompt", "size", "steps", "seed", "guidance")
TAIL = 300
"""The number of characters of a command's output that an error shows."""


@dataclass(frozen=True)
class Command:
    """A command line with placeholders.

    Raises:
        SettingError: `time` is no regular expression with one group, or `line` has another placeholder.
    """

    line: str
    """May hold {checkpoint} {image} {mask} {out} {prompt} {size} {steps} {seed} {guidance}."""
    time: str
    """A regular expression whose group finds the seconds in the output."""

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
        """The program's name in the tables."""
        return Path(shlex.split(self.line)[0]).name

    @contextmanager
    def inputs(self, case: Case) -> Iterator[dict[str, str]]:
        """Provide the values of the placeholders; image and mask are files for as long as the block lasts.

        Args:
            case: checkpoint, size and steps.
        """
        with TemporaryDirectory(prefix="sdinpaint-bench-") as name:
            folder = Path(name)
            files = {kind: str(folder / f"{kind}.png") for kind in ("image", "mask", "out")}
            for kind, image in zip(("image", "mask"), picture_and_mask(case.size), strict=True):
                image.save(files[kind])
            numbers = {"size": case.size, "steps": case.steps, "seed": SEED, "guidance": GUIDANCE}
            yield {
                "checkpoint": case.checkpoint,
                "prompt": PROMPT,
                **files,
                **{name: str(value) for name, value in numbers.items()},
            }

    def seconds(self, inputs: dict[str, str]) -> float:
        """Run the command once.

        Args:
            inputs: the values of the placeholders.

        Returns:
            The seconds that it prints.

        Raises:
            SettingError: it fails, or prints no seconds.
        """
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
        """Split the line into words. Raises: SettingError for another placeholder, or an unclosed quote."""
        try:
            words = [word.format_map(inputs) for word in shlex.split(self.line)]
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            expected = "words with " + ", ".join(f"{{{name}}}" for name in FIELDS)
            hint = "write other braces twice: {{ and }}"
            found = f"{self.line!r}: {error}"
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", found, expected=expected, hint=hint) from error
        if not words:
            raise SettingError("BENCH_PEER_COMMAND", "peer-command", "an empty line", expected="a command")
        return words
