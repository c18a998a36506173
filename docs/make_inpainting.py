"""Run the code of inpainting.md from top to bottom and make its images: `python docs/make_inpainting.py`."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner
from PIL import Image

from sdinpaint.cli import main as command_line

DOCUMENT = Path(__file__).with_name("inpainting.md")
IMAGES = DOCUMENT.with_suffix("")
FENCE = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"!\[.+?\]\(inpainting/(.+?)\)")
EVEN = [level & ~1 for level in range(256)] * 3


class Block(NamedTuple):
    """A fenced block: its language, what stands beside it, its text, and the line where that begins."""

    language: str
    note: str
    text: str
    line: int


def blocks(document: str) -> list[Block]:
    """All fenced blocks in their order."""
    return [
        Block(found[1], found[2], found[3], document.count("\n", 0, found.start(3)) + 1)
        for found in FENCE.finditer(document)
    ]


def run(document: str) -> Iterator[tuple[Block, str, dict[str, Any]]]:
    """Run the code in the working folder -> each block with what it wrote, and the names so far."""
    names: dict[str, Any] = {}
    for block in blocks(document):
        written = io.StringIO()
        if block.language == "python" and not block.note:
            # as many lines before it as in the document, so that a traceback tells where
            code = compile("\n" * (block.line - 1) + block.text, str(DOCUMENT), "exec")
            with contextlib.redirect_stdout(written):
                exec(code, names)
        elif block.language == "sh" and not block.note:
            for line in block.text.replace("\\\n", "").splitlines():
                program, *arguments = shlex.split(line)
                done = CliRunner().invoke(command_line, arguments, catch_exceptions=False)
                if program != "sdinpaint" or done.exit_code:
                    raise RuntimeError(f"{DOCUMENT}: {line}: exit code {done.exit_code}: {done.output}")
                written.write(done.output)
        yield block, written.getvalue(), names


def make() -> None:
    """Write the images that the document shows."""
    text = DOCUMENT.read_text(encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for _ in run(text):
            pass
        for name in SHOWN.findall(text):
            as_shown(Path(name)).save(IMAGES / name, optimize=True)


def as_shown(path: Path) -> Image.Image:
    """An image with even levels alone: nobody sees it, and the file is a fifth smaller."""
    return Image.open(path).convert("RGB").point(EVEN)


if __name__ == "__main__":
    make()
