"""Open a weights file of any kind, which is recognised by its first bytes and not by its name."""

from __future__ import annotations

import codecs
import os
import re
from typing import NoReturn

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile, size_text
from sdinpaint_weights.pickle_file import read_legacy, read_zip
from sdinpaint_weights.safetensors_file import MAX_HEADER, read_safetensors
from sdinpaint_weights.weights import Weights
from sdinpaint_weights.wrappers import unwrapped

FOREIGN = (
    (b"GGUF", "CKPT_GGUF", "a GGUF file, quantised for other programs"),
    (b"ggml", "CKPT_GGUF", "a GGML file, quantised for other programs"),
    (b"\x1f\x8b", "CKPT_UNKNOWN_FORMAT", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "CKPT_UNKNOWN_FORMAT", "a 7z archive: unpack it first"),
    (b"Rar!", "CKPT_UNKNOWN_FORMAT", "a RAR archive: unpack it first"),
    (b"\x89HDF", "CKPT_UNKNOWN_FORMAT", "an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "CKPT_UNKNOWN_FORMAT", "a NumPy array"),
    (b"\x89PNG", "CKPT_UNKNOWN_FORMAT", "a PNG image"),
    (b"\xff\xd8\xff", "CKPT_UNKNOWN_FORMAT", "a JPEG image"),
)
"""Other kinds of files: (first bytes, error code, description)."""
KINDS = "a safetensors file, or a checkpoint by torch.save"
HEAD = 512


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a weights file lazily: a safetensors file, or a checkpoint by any version of `torch.save`.

    No name in a pickle is imported or called. Names are those of the module itself, without what wrapped it.

    Args:
        path: the file.

    Returns:
        The weights; only headers have been read.

    Raises:
        CheckpointError: the file cannot be read or is not a supported weights file; no other exception is raised.
    """
    weights = _read(SourceFile(path))
    weights.entries = unwrapped(weights.entries, path)
    return weights


def _read(file: SourceFile) -> Weights:
    head = bytes(file.read(0, min(HEAD, file.size)))
    header_size, begins_json = int.from_bytes(head[:8], "little"), head[8:9] == b"{"
    if header_size <= MAX_HEADER and begins_json:
        return read_safetensors(file)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return read_zip(file)
    if header_size > MAX_HEADER and head.startswith(b"\x80"):
        return read_legacy(file)
    if _is_text(head):
        _refuse_text(file, head)
    for magic, code, found in FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(code, file.path, found, expected=KINDS, hint="get the weights as .safetensors")
    if header_size <= MAX_HEADER or begins_json:
        # A damaged safetensors file, for which its reader has a precise error.
        return read_safetensors(file)
    _refuse_unknown(file, f"unknown content of {size_text(file.size)}, beginning {head[:8].hex(' ')}")


def _is_text(head: bytes) -> bool:
    begins_as_text = head[:1].isascii() or head.startswith(codecs.BOM_UTF8)
    return begins_as_text and not any(byte < 9 or 13 < byte < 32 for byte in head)


def _refuse_text(file: SourceFile, head: bytes) -> NoReturn:
    text = head.decode("utf-8", "replace").strip("\ufeff \t\r\n")
    if text.startswith("version https://git-lfs"):
        size = re.search(r"size (\d{1,15})\b", text)
        stands_for = f" that stands for a file of {size_text(int(size[1]))}" if size else ""
        hint = "run `git lfs pull` in its folder, or download the file itself"
        raise CheckpointError("CKPT_LFS_POINTER", file.path, f"a git-lfs pointer{stands_for}", hint=hint)
    if file.path.suffix == ".json" and text[:1] == "{":
        found, hint = "a JSON file, which holds settings and no weights", "give the folder that it is in"
        raise CheckpointError("CKPT_UNKNOWN_FORMAT", file.path, found, expected=KINDS, hint=hint)
    if text.lower().startswith(("<!doctype", "<html", "<head", "<body", "<?xml")) or text[:1] in ("{", "["):
        title = re.search(r"<title>\s*([^<]{1,80})", text, re.IGNORECASE)
        says = repr(title[1].strip() if title else text[:80])
        hint = "the download got an error or a log-in page: sign in or check the link, then fetch the file again"
        raise CheckpointError("CKPT_HTML", file.path, f"a web page or an error message, not weights: {says}", hint=hint)
    _refuse_unknown(file, f"a text of {size_text(file.size)}, beginning {text[:40]!r}")


def _refuse_unknown(file: SourceFile, found: str) -> NoReturn:
    try:
        # The oldest pickle protocols have no magic number, so that an unsafe pickle must be looked for.
        read_legacy(file)
    except CheckpointError as error:
        if error.code == "CKPT_UNSAFE_PICKLE":
            raise
    raise CheckpointError("CKPT_UNKNOWN_FORMAT", file.path, found, expected=KINDS, hint=FETCH_AGAIN)
