"""The base class of sdinpaint's errors; it is defined in the lowest package that raises one."""

from __future__ import annotations


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
        super().__init__(found)
        self.code = code
        self.subject = str(subject)
        self.found = found
        self.expected = expected
        self.hint = hint

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
