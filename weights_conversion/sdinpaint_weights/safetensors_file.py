"""Open a safetensors file, with checks that explain what is wrong.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple, NoReturn, TypeGuard

from sdinpaint_weights.dtypes import STORED, StoredDtype
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile, size_text
from sdinpaint_weights.weights import MAX_TENSORS, Entry, Storage, Weights, contiguous_stride, is_tensor_name

MAX_HEADER = 16_000_000
DTYPES = {
    "F64": STORED["float64"],
    "F32": STORED["float32"],
    "F16": STORED["float16"],
    "BF16": STORED["bfloat16"],
    "F8_E4M3": STORED["float8_e4m3fn"],
    "F8_E5M2": STORED["float8_e5m2"],
    "I64": STORED["int64"],
    "I32": STORED["int32"],
    "I16": STORED["int16"],
    "I8": STORED["int8"],
    "U8": STORED["uint8"],
    "BOOL": STORED["bool"],
}


class _Span(NamedTuple):
    dtype: StoredDtype
    shape: tuple[int, ...]
    start: int
    end: int


class _DuplicateNameError(Exception):
    pass


def read_safetensors(file: SourceFile) -> Weights:
    """Open a safetensors file lazily.

    Args:
        file: the opened file.

    Returns:
        The weights; only the header has been read.

    Raises:
        CheckpointError: the file is damaged or incomplete.
    """
    header, data_start = _read_header(file)
    metadata = _metadata(file, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        _refuse(file, f"{len(header)} tensors", f"at most {MAX_TENSORS}", code="CKPT_TOO_MANY_TENSORS")
    spans = {name: _span(file, name, value) for name, value in header.items()}
    promised = data_start + max((span.end for span in spans.values()), default=0)
    if promised > file.size:
        found = f"the header promises {size_text(promised)}, the file has {size_text(file.size)}: incomplete"
        _refuse(file, found, code="CKPT_TRUNCATED")
    _require_gapless(file, spans, file.size - data_start)
    entries = {
        name: Entry(
            Storage(file, data_start + span.start, span.end - span.start),
            0,
            span.dtype,
            span.shape,
            contiguous_stride(span.shape),
        )
        for name, span in spans.items()
    }
    return Weights(file.path, "safetensors", entries, metadata)


def _read_header(file: SourceFile) -> tuple[dict[str, object], int]:
    if file.size < 8:
        _refuse(file, f"only {file.size} bytes", code="CKPT_TRUNCATED")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        _refuse(file, f"a header of {length} bytes", f"at most {MAX_HEADER} bytes")
    if 8 + length > file.size:
        found = f"the header alone needs {size_text(8 + length)}, the file has {size_text(file.size)}: incomplete"
        _refuse(file, found, code="CKPT_TRUNCATED")
    text = file.read(8, length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateNameError as error:
        _refuse(file, f"the name {error} occurs twice in the header", code="CKPT_DUPLICATE_KEY")
    except (ValueError, RecursionError) as error:
        _refuse(file, f"a header that is not JSON ({type(error).__name__})")
    if not isinstance(header, dict):
        _refuse(file, "a header that is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateNameError(repr(name[:200]))
            seen.add(name)
    return names


def _metadata(file: SourceFile, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse(file, "__metadata__ that is not a table of texts")
    return value


def _span(file: SourceFile, name: str, value: object) -> _Span:
    if not is_tensor_name(name):
        _refuse(file, f"a tensor whose name is empty, too long or not printable: {name[:20]!r}")
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(file, f"tensor {name!r}: dtype {str(dtype)[:20]!r}", f"one of {', '.join(DTYPES)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        _refuse(file, f"tensor {name!r}: its shape or its offsets are not lists of sizes")
    start, end = offsets
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != size:
        _refuse(file, f"tensor {name!r}: {end - start} bytes for {dtype} {tuple(shape)}", f"{size} bytes")
    return _Span(DTYPES[dtype], tuple(shape), start, end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 16
        # No file has 2 ** 62 bytes; the bound keeps products and messages small.
        and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    )


def _require_gapless(file: SourceFile, spans: Mapping[str, _Span], size: int) -> None:
    """Check that the tensors follow one another and fill the file, as the format demands."""
    end, before = 0, "the header"
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != end:
            how = "overlaps" if span.start < end else "leaves a gap after"
            _refuse(file, f"tensor {name!r} {how} {before}", "tensors that follow one another")
        end, before = span.end, repr(name)
    if end != size:
        _refuse(file, f"{size - end} bytes after the last tensor", "none")


def _refuse(file: SourceFile, found: str, expected: str = "", code: str = "CKPT_BAD_HEADER") -> NoReturn:
    raise CheckpointError(code, file.path, found, expected=expected, hint=FETCH_AGAIN)
