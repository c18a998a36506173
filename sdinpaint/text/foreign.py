"""Prompt syntax of other programs, which this library reads as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["foreign_syntax"]

SEARCHED = 10_000
"""Characters of a prompt that are searched."""
NUMBER = r"[-+]?\d*\.?\d+"
# Each pattern begins once per run of brackets and stops at the next one, so that the time grows with the length alone.
SYNTAX = (
    (re.compile(rf"<(?:lora|lyco|locon|loha|lokr|hypernet):[^<>]*>|<[\w.-]+:{NUMBER}>"), "a LoRA or another adapter"),
    (re.compile(r"\bembedding:[\w./-]+"), "a textual inversion"),
    (re.compile(rf"[(\[{{][^()\[\]{{}}]*:\s*{NUMBER}\s*[)\]}}]"), "a weight, or a change during the run"),
    (re.compile(r"(?<!\()\({2,}+[^()]*+\){2}|(?<!{){{2,}+[^{}]*+}{2}"), "a weight"),
    (re.compile(r"(?:[\w)\"']\++|[\w)\"']-{2,}+)(?=[\s,.)]|$)"), "a weight"),
    (re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]|\{[^{}|]*\|[^{}]*\}"), "a choice"),
    (re.compile(r"\[[^\[\]]*\w[^\[\]]*\]"), "a lower weight"),
    (re.compile(r"(?<!\w)__[\w/*-]+?__(?!\w)"), "a wildcard"),
    (re.compile(r"\)\.(?:blend|and|swap)\("), "a blend of prompts"),
)
"""(pattern, meaning elsewhere); the first pattern that matches a place counts."""
WORDS = re.compile(r"(?<!\S)(?:BREAK|AND)(?!\S)")
"""Matches words that divide a prompt elsewhere, where they are in capitals among others that are not."""


def foreign_syntax(prompt: str) -> Iterator[str]:
    """Find what other programs would not read as plain text.

    Args:
        prompt: the prompt.

    Yields:
        For each kind of syntax the end of a sentence that begins with the name of the prompt.
    """
    text = prompt[:SEARCHED]
    told: dict[str, str] = {}
    for pattern, meaning in SYNTAX:
        if (match := pattern.search(text)) and not any(match[0] in found for found in told.values()):
            told.setdefault(meaning, match[0])
    if (match := WORDS.search(text)) and not text.isupper():
        told["a division of the prompt"] = match[0]
    for meaning, found in told.items():
        shown = found if len(found) <= 40 else f"{found[:37]}..."
        yield f"has {shown!r}, which other programs read as {meaning}; here it is plain text"
