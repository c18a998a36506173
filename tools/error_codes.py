"""Write docs/errors.md, the page of all error codes, from the source of the three packages.

    python tools/error_codes.py           # writes the page
    python tools/error_codes.py --check   # ends with 1 where the page is not what would be written

`raised_errors.py` finds the errors.
"""

from __future__ import annotations

import itertools
import re
import sys

from raised_errors import Error, Reader
from source_tree import ROOT, read_modules

PAGE = ROOT / "docs" / "errors.md"
WHEN = {
    "CheckpointError": "A file or folder of weights cannot be used as asked. Give another file, or fetch it again.",
    "AdapterError": "A LoRA or an embedding cannot be added to this model, which stays as it was. Take another file.",
    "ImageError": "An image cannot be read or written, or is not usable. Change the image or its path.",
    "MaskError": "A mask does not fit its image, or its meaning is unclear. Change the mask.",
    "SettingError": "An argument, an option or an environment variable is outside of what it may be. Change its value.",
    "TokenizerError": "The vocabulary of a text encoder is missing or does not belong to it. Give another tokenizer.",
    "OutOfMemoryError": "The machine or its GPU has too little memory. It is a `MemoryError`, too.",
    "NumericError": "A model returned NaN or infinity. No image is made of it. Take float32, or other weights.",
    "SdInpaintError": "The disk is full, or a process of a benchmark failed.",
}
"""Class -> when it is raised and what to do."""
HEAD = """# Error codes

This page is written by `python tools/error_codes.py` from the source. Every error has a `code`, which stays the same
across versions and which programs can test for; a `subject`, which is the file or argument that it is about; and the
texts `found`, `expected` and `hint`, of which the last two may be empty. `error.to_json()` has them all, and so has the
command line with `--json`. All classes derive from `sdinpaint.SdInpaintError`; import them from `sdinpaint.errors`.

Words in braces stand for what is known only when the error is raised.
"""


def page(errors: set[Error]) -> str:
    """Return the page of all errors, by class and code."""
    unsaid = {error.kind for error in errors} - set(WHEN)
    if unsaid:
        sys.exit(f"say in WHEN of {__file__} when these are raised: {', '.join(sorted(unsaid))}")
    parts = [HEAD]
    for kind, when in WHEN.items():
        of_kind = sorted(error for error in errors if error.kind == kind)
        lines = []
        for code, group in itertools.groupby(of_kind, key=lambda error: error.code):
            ways = list(group)
            modules = ", ".join(f"`{name}`" for name in sorted({error.module for error in ways}))
            lines.append(f"- `{code}` ({modules})")
            lines += [f"  - {text}" for text in dict.fromkeys(map(_sentence, ways))]
        parts.append("\n".join([f"## {kind}", "", when, "", *lines, ""]))
    return "\n".join(parts)


def _sentence(error: Error) -> str:
    said = [error.found, f"expected: {error.expected}" * bool(error.expected), f"hint: {error.hint}" * bool(error.hint)]
    return re.sub(r"\s+", " ", "; ".join(filter(None, said)))


def main() -> int:
    """Write the page, or with --check compare it. Return 1 where it is stale, else 0."""
    text = page(set(Reader(read_modules()).errors()))
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            print("docs/errors.md is not what the source says: python tools/error_codes.py writes it anew")
            return 1
    else:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
