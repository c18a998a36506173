"""The base class of sdinpaint's errors; it is defined in the lowest package that raises one."""

from __future__ import annotations

import re

SUBJECT, LINE, VALUE = 200, 1200, 100
"""Characters of a subject, of a line of the other parts of an error, and of a value in it, at most."""
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff"  # control characters, lone surrogates
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"  # directions, separators, tags
)
"""Matches what moves the cursor, turns the direction of the text, or cannot be encoded."""


def shown(text: object, most: int = SUBJECT) -> str:
    """Make a text from outside safe to print: a name of a file, metadata, an error of another library.

    Args:
        text: the text.
        most: characters that are kept at most, of the beginning and of the end.

    Returns:
        One line, in which characters that would control a terminal are written as escapes.
    """
    line = " ".join(str(text).split("\n"))
    if len(line) > most:
        half = (most - 3) // 2
        line = f"{line[:half]}...{line[-half:]}"
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def said(value: object) -> str:
    """Write a value that a caller gave, in one line that is not long; a value that cannot be written gives its type.

    Args:
        value: any value.

    Returns:
        Its repr.
    """
    try:
        return shown(repr(value), VALUE)
    except Exception:  # whatever a class of the caller's does there, also a number of more digits than Python writes
        return f"a {type(value).__name__} that cannot be written"


def shown_lines(text: str) -> str:
    """Make sentences that hold text from outside safe to print, and keep their lines.

    Args:
        text: the sentences.

    Returns:
        The lines, each as `shown` makes it.
    """
    return "\n".join(shown(line, LINE) for line in text.split("\n"))


class SdInpaintError(Exception):
    """An error that says what was found, what was expected, and how to continue.

    Args:
        code: a name for programs, which is stable across versions.
        subject: the file or the argument that the error is about.
        found: what is wrong with it.
        expected: what it should have been.
        hint: what to do about it.
    """

    def __init__(self, code: str, subject: object, found: str, *, expected: str = "", hint: str = "") -> None:
        self.code = code
        self.subject = shown(subject)
        self.found, self.expected, self.hint = map(shown_lines, (found, expected, hint))
        super().__init__(self.found)

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.subject, self.found, self.expected, self.hint)

    def to_json(self) -> dict[str, str]:
        """Return every field by name, for `--json` output and logs."""
        return {key: getattr(self, key) for key in ("code", "subject", "found", "expected", "hint")}


def _rebuild(kind: type[SdInpaintError], code: str, subject: str, found: str, expected: str, hint: str) -> object:
    return kind(code, subject, found, expected=expected, hint=hint)


class CheckpointError(SdInpaintError, OSError, ValueError):
    """A weights file or folder cannot be used as asked."""
