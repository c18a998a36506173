"""The errors of sdinpaint. They live here because the weights package is the lowest one that raises them."""

from __future__ import annotations


class SdInpaintError(Exception):
    """What was given, what was expected, and how to go on.

    `code` is stable across versions and meant for programs; `subject` names the file or the argument.
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
        """Every field by name, for `--json` output and logs."""
        return {key: getattr(self, key) for key in ("code", "subject", "found", "expected", "hint")}


def _rebuild(kind: type[SdInpaintError], code: str, subject: str, found: str, expected: str, hint: str) -> object:
    return kind(code, subject, found, expected=expected, hint=hint)


class CheckpointError(SdInpaintError, OSError, ValueError):
    """A weights file or folder that cannot be used as asked."""
