"""Open checkpoints by `torch.save`: zip archives of PyTorch 1.6 and later, and the plain files of earlier versions.

Source: torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import NoReturn

from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.files import FETCH_AGAIN, SourceFile, size_text
from sdinpaint_weights.pickle_objects import Names, PickledStorage, check_tensor, named_tensors, storage_of
from sdinpaint_weights.pickle_walker import PickleFault, Work, walk
from sdinpaint_weights.weights import Entry, Storage, Weights

MAX_PICKLE = 16_000_000
"""Bytes of a pickle without its storages at most; that of an SDXL checkpoint has half a million."""
MAX_MEMBERS = 50_000
MAX_DIRECTORY = 8_000_000
"""Bytes of the index at the end of an archive at most."""
MAX_WORD = 16
"""Bytes of the member that names the byte order, at most."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
RESAVE = "load it with the program that made it, and save a plain dictionary of tensors, best as .safetensors"
HINTS = {
    "CKPT_UNSAFE_PICKLE": "nothing in it was run; get the weights as .safetensors from a source that you trust",
    "CKPT_UNSUPPORTED_TENSOR": RESAVE,
    "CKPT_PICKLED_OBJECT": RESAVE,
    "CKPT_NO_TENSORS": "give a file of weights",
    "CKPT_TORCHSCRIPT": "get the weights themselves, or save the module's state_dict()",
    "CKPT_NOT_TORCH": "if it is an archive, unpack it; otherwise get the weights as .safetensors",
    "CKPT_BIG_ENDIAN": RESAVE,
    "CKPT_TOO_MANY_TENSORS": "give a file of weights",
}


def read_zip(file: SourceFile) -> Weights:
    """Open a zip archive by `torch.save` lazily; the CRC-32 of each storage is checked when it is first read.

    Args:
        file: the opened file.

    Returns:
        The weights; only headers have been read.

    Raises:
        CheckpointError: the archive is damaged, refused or not supported.
    """
    members, folder, data = _open_archive(file)
    names = Names()
    top = _walk(file, io.BytesIO(data), names, storage_of, Work())
    prefix = f"{folder}data/"

    def find(key: str) -> Storage | None:
        member = members.get(prefix + key)
        return None if member is None else _member_storage(file, member)

    return Weights(file.path, "zip pickle", _entries(file, top, find), ignored=tuple(sorted(names.unknown)))


def read_legacy(file: SourceFile) -> Weights:
    """Open a file by `torch.save` before PyTorch 1.6 lazily; such files have no checksums.

    Args:
        file: the opened file.

    Returns:
        The weights; only headers have been read.

    Raises:
        CheckpointError: the file is damaged, refused or not supported.
    """
    # Five pickles (magic number, version, machine, object, storage keys), then the storages, one after the other.
    stream = io.BytesIO(file.read(0, min(file.size, MAX_PICKLE)))
    names, work = Names(), Work()
    seen: dict[str, PickledStorage] = {}

    def remember(identity: object) -> object:
        storage = storage_of(identity)
        if isinstance(storage, PickledStorage):
            seen[storage.key] = storage
        return storage

    if _walk(file, stream, names, storage_of, work) != LEGACY_MAGIC:
        _refuse(file, "CKPT_NOT_TORCH", "a pickle that torch.save did not write")
    _walk(file, stream, names, storage_of, work)
    machine = _walk(file, stream, names, storage_of, work)
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        _refuse(file, "CKPT_BIG_ENDIAN", "weights saved on a big-endian machine")
    top = _walk(file, stream, names, remember, work)
    keys = _walk(file, stream, names, storage_of, work)
    storages = _legacy_storages(file, stream.tell(), keys if isinstance(keys, list) else [], seen)
    return Weights(file.path, "legacy pickle", _entries(file, top, storages.get), ignored=tuple(sorted(names.unknown)))


class _Bounded(io.FileIO):
    """A file of which `zipfile` reads its index, and no more."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise PickleFault("CKPT_TOO_MANY_TENSORS", f"an archive whose index has {size_text(size)}")
        return super().read(MAX_DIRECTORY if size is None or size < 0 else size)


def _open_archive(file: SourceFile) -> tuple[dict[str, zipfile.ZipInfo], str, bytes]:
    """Return the archive's members, the folder in it with the weights, and the bytes of the pickle there."""
    try:
        with file.second_handle(_Bounded) as handle, zipfile.ZipFile(handle) as archive:
            members = _members(file, archive.infolist())
    except CheckpointError:
        raise
    except PickleFault as fault:
        _refuse(file, fault.code, fault.found, f"at most {size_text(MAX_DIRECTORY)}")
    except zipfile.BadZipFile as error:
        found = f"the file has {size_text(file.size)}, but the index at the end of the archive is missing or damaged"
        raise CheckpointError("CKPT_TRUNCATED", file.path, found, hint=FETCH_AGAIN) from error
    except (OSError, ValueError, RuntimeError, EOFError, OverflowError, struct.error) as error:
        found = f"a damaged zip archive ({type(error).__name__})"
        raise CheckpointError("CKPT_BAD_ARCHIVE", file.path, found, hint=FETCH_AGAIN) from error
    folder = _weights_folder(file, members)
    order = f"{folder}byteorder"
    if order in members and _member(file, members[order], MAX_WORD) != b"little":
        _refuse(file, "CKPT_BIG_ENDIAN", "weights saved on a big-endian machine")
    return members, folder, _member(file, members[f"{folder}data.pkl"], MAX_PICKLE)


def _members(file: SourceFile, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    members = {info.filename: info for info in infos}
    if len(infos) > MAX_MEMBERS:
        _refuse(file, "CKPT_TOO_MANY_TENSORS", f"an archive of {len(infos)} members", f"at most {MAX_MEMBERS}")
    if len(members) != len(infos):
        _refuse(file, "CKPT_DUPLICATE_KEY", "an archive in which a member's name occurs twice")
    return members


def _weights_folder(file: SourceFile, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """Return the folder of data.pkl, with its slash."""
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        _refuse(file, "CKPT_NOT_TORCH", "a zip archive that torch.save did not write")
    if len(pickles) > 1:
        _refuse(file, "CKPT_BAD_ARCHIVE", f"an archive of {len(pickles)} files named data.pkl", "one")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        _refuse(file, "CKPT_TORCHSCRIPT", "a TorchScript program", "a dictionary of tensors")
    return folder


def _member(file: SourceFile, member: zipfile.ZipInfo, at_most: int) -> bytes:
    """Read a member whole."""
    storage = _member_storage(file, member)
    if storage.size > at_most:
        found = f"{member.filename!r} is too large: {size_text(storage.size)}"
        _refuse(file, "CKPT_BAD_ARCHIVE", found, f"at most {size_text(at_most)}")
    storage.verify()
    return bytes(file.read(storage.offset, storage.size))


def _member_storage(file: SourceFile, member: zipfile.ZipInfo) -> Storage:
    """Find the bytes of a member, which follow a local header of variable length; nothing is ever inflated."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
        _refuse(file, "CKPT_BAD_ARCHIVE", f"{member.filename!r} is compressed or encrypted", "not compressed")
    begin = member.header_offset
    header = file.read(begin, 30) if 0 <= begin <= file.size - 30 else b""
    if not header.startswith(b"PK\x03\x04"):
        _refuse(file, "CKPT_BAD_ARCHIVE", f"{member.filename!r} does not begin where the index says")
    start = begin + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > file.size:
        _refuse(file, "CKPT_TRUNCATED", f"{member.filename!r} reaches beyond the end of the file")
    return Storage(file, start, member.file_size, member.CRC, member.filename)


def _legacy_storages(
    file: SourceFile, position: int, keys: list[object], seen: Mapping[str, PickledStorage]
) -> dict[str, Storage]:
    """Find the storages: each is an element count of 8 bytes, followed by its bytes."""
    storages: dict[str, Storage] = {}
    for key in keys:
        if not isinstance(key, str) or key not in seen or key in storages:
            _refuse(file, "CKPT_BAD_PICKLE", "a damaged pickle: a storage twice, or one that no tensor uses")
        size = seen[key].total * seen[key].dtype.itemsize
        position += 8
        if position + size > file.size:
            found = f"its tensors need {size_text(position + size)} or more, the file has {size_text(file.size)}"
            _refuse(file, "CKPT_TRUNCATED", f"{found}: incomplete")
        if int.from_bytes(file.read(position - 8, 8), "little") != seen[key].total:
            _refuse(file, "CKPT_BAD_PICKLE", f"the size of storage {key[:40]!r} is not the one that its tensors state")
        storages[key] = Storage(file, position, size, name=key)
        position += size
    return storages


def _entries(file: SourceFile, top: object, find: Callable[[str], Storage | None]) -> dict[str, Entry]:
    try:
        tensors = named_tensors(top)
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
    except PickleFault as fault:
        _refuse(file, fault.code, fault.found)
    # Tensors that share a storage share its object, so that its checksum is checked once.
    storages: dict[str, Storage] = {}
    entries = {}
    for name, tensor in tensors.items():
        key, size = tensor.storage.key, tensor.storage.total * tensor.storage.dtype.itemsize
        storage = storages.get(key) or find(key)
        if storage is None:
            _refuse(file, "CKPT_TRUNCATED", f"the bytes of {name!r} are not in the file")
        if storage.size != size:
            _refuse(file, "CKPT_BAD_PICKLE", f"{name!r} has a storage of {storage.size} bytes", f"{size} bytes")
        storages[key] = storage
        entries[name] = Entry(storage, tensor.start, tensor.dtype, tensor.shape, tensor.stride)
    return entries


def _walk(
    file: SourceFile, stream: io.BytesIO, names: Names, persistent: Callable[[object], object], work: Work
) -> object:
    try:
        return walk(stream, names, persistent, work)
    except PickleFault as fault:
        # The stream of a legacy file is the file itself: a pickle that reaches its end was truncated.
        cut = fault.code == "CKPT_BAD_PICKLE" and stream.tell() == file.size
        _refuse(file, "CKPT_TRUNCATED" if cut else fault.code, fault.found)


def _refuse(file: SourceFile, code: str, found: str, expected: str = "") -> NoReturn:
    raise CheckpointError(code, file.path, found, expected=expected, hint=HINTS.get(code, FETCH_AGAIN))
