"""Models of the Hugging Face hub: the files of a repository that are needed, downloaded into the shared cache.

Cache, log-in, resumption and progress are those of huggingface_hub; this module selects the files and explains errors.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, validate_repo_id  # type: ignore[attr-defined]
from sdinpaint_weights.folder import weights_files

from sdinpaint.errors import CheckpointError, warn
from sdinpaint.progress import bar_class

__all__ = ["fetch", "is_hub_id", "wanted_files"]

VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BESIDE = {
    "": ("model_index.json",),
    "scheduler": ("scheduler_config.json",),
    "tokenizer": VOCABULARY,
    "tokenizer_2": VOCABULARY,
}
"""Files of a whole model besides its networks, by folder."""
NETWORK = "diffusion_pytorch_model"
"""Start of the names of diffusers' weights files of a single network."""
SAFE, PICKLED = (".safetensors",), (".ckpt", ".pth", ".pt", ".bin")

SECONDS = 10.0
"""Seconds without an answer after which the hub counts as unreachable."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
REFUSALS = (
    (errors.RevisionNotFoundError, "HUB_REVISION", "no revision {revision!r}", "see {url}/tree/main"),
    (
        errors.GatedRepoError,
        "HUB_ACCESS",
        "a gated model: its owner requires terms to be accepted",
        f"accept them at {{url}}, then {LOG_IN}",
    ),
    (
        errors.RepositoryNotFoundError,
        "HUB_NOT_FOUND",
        "no such file or folder here, and no such model on the hub, or a private one",
        f"check the name at {{url}}; for a private model {LOG_IN}",
    ),
)
"""Error of huggingface_hub, code, meaning and hint; the first that matches is used."""
FAILURES = (errors.HTTPError, OSError, ValueError, RuntimeError)  # type: ignore[attr-defined]
"""Errors that huggingface_hub lets through: its own, and those of its HTTP library, the disk and hf_xet."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of one download."""

    source: str
    components: Sequence[str]
    variant: str | None
    revision: str | None

    @property
    def repository(self) -> str:
        return self.source.partition(":")[0]

    @property
    def url(self) -> str:
        return f"{_endpoint()}/{self.repository}"

    def choose(self, names: Collection[str]) -> list[str]:
        """Select the needed files among the files of a repository."""
        file = self.source.partition(":")[2]
        if not file:
            return wanted_files(names, self.components, self.variant, subject=self.source)
        if file in names:
            return [file]
        raise _unusable(self.source, "no such file in the repository", names)


def is_hub_id(source: str) -> bool:
    """Tell whether a source that is no local path names a model on the hub.

    Args:
        source: the text, such as "owner/name" or "owner/name:FILE".

    Returns:
        True if the text has one of these forms.
    """
    repository, colon, _ = source.partition(":")
    if repository.count("/") != 1 or (not colon and repository.endswith(SAFE + PICKLED)):
        return False
    try:
        validate_repo_id(repository)
    except errors.HFValidationError:
        return False
    return True


def fetch(
    source: str,
    components: Sequence[str] = (),
    *,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Download what is missing of a model on the hub, and return where it is on this machine.

    If the hub cannot be reached, a copy in the cache is used, with a warning.

    Args:
        source: "owner/name", or "owner/name:FILE" for one file of the repository.
        components: names of the networks to load, as in a diffusers folder.
        variant: variant of the weights, such as "fp16".
        revision: a branch, tag or commit; None is main.
        local_files_only: use only the cache, as the variable HF_HUB_OFFLINE does.
        progress: show a progress bar.

    Returns:
        The folder or file.

    Raises:
        CheckpointError: the model does not exist, is not accessible, has no usable weights, or cannot be downloaded.
    """
    request = _Request(source=source, components=components, variant=variant, revision=revision)
    if local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return _cached(request)
    try:
        return _download(request, progress)
    except CheckpointError:
        raise
    except FAILURES as error:
        refusal = _explained(error, request)
        if refusal.code != "HUB_UNREACHABLE":
            raise refusal from error
    try:
        path = _cached(request)
    except CheckpointError:
        raise refusal from None
    warn(f"{source}: {refusal.found}; the copy in the cache is used")
    return path


def wanted_files(
    names: Collection[str], components: Sequence[str], variant: str | None = None, subject: str = "repository"
) -> list[str]:
    """Select the files of a repository from which some networks are loaded, without any weights twice.

    These are the folders of a diffusers model; else the config.json and the weights of a single network; else the only
    single-file checkpoint.

    Args:
        names: all files of the repository.
        components: names of the networks to load, as in a diffusers folder.
        variant: variant of the weights, such as "fp16".
        subject: name that an error gives to the repository.

    Returns:
        The files.

    Raises:
        CheckpointError: there are no usable weights, or several checkpoints to choose from.
    """
    folders: dict[str, set[str]] = {}
    for path in names:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    root = folders.get("", set())
    if components and components[0] in folders:
        beside = BESIDE if len(components) > 1 else {}
        wanted = [
            _join(folder, name) for folder in beside for name in beside[folder] if name in folders.get(folder, ())
        ]
        present = [component for component in components if component in folders]
        with_variant = [component for component in present if weights_files(folders[component], variant)]
        for component in present:
            taken = variant if component in with_variant or not with_variant else None
            wanted += _network(component, folders[component], taken, subject)
        return wanted
    if "config.json" in root and any(name.startswith(NETWORK) for name in root):
        return _network("", root, variant, subject)
    return [_single_file(root, names, subject)]


def _network(folder: str, files: set[str], variant: str | None, subject: str) -> list[str]:
    weights = weights_files(files, variant)
    if not weights:
        which = f" of the variant {variant!r}" if variant else ""
        where = f"{subject}, {folder}/" if folder else subject
        raise _unusable(where, f"no weights{which}", files, hint="variant= selects a variant")
    return [_join(folder, name) for name in ("config.json", *weights) if name in files]


def _single_file(root: Collection[str], names: Collection[str], subject: str) -> str:
    safe, pickled = (sorted(name for name in root if name.endswith(kinds)) for kinds in (SAFE, PICKLED))
    found = safe or pickled
    if len(found) == 1:
        return found[0]
    if found:
        hint = f"name one: {subject}:{found[0]}"
        raise _unusable(subject, f"{len(found)} checkpoints to choose from", found, hint=hint)
    raise _unusable(subject, "no weights that could be used", names)


def _join(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _unusable(
    subject: str, found: str, names: Iterable[str], hint: str = "owner/name:FILE selects one file of a repository"
) -> CheckpointError:
    there = sorted(names)
    listed = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
    found = f"{found}; it holds {listed or 'nothing'}"
    expected = "a diffusers folder, or one .safetensors or .ckpt file"
    return CheckpointError("HUB_FILES", subject, found, expected=expected, hint=hint)


def _download(request: _Request, progress: bool) -> Path:
    api = huggingface_hub.HfApi(endpoint=_endpoint())
    info = api.model_info(request.repository, revision=request.revision, timeout=SECONDS)
    wanted = request.choose([file.rfilename for file in info.siblings or ()])
    # settings first: after an interruption, a copy that has the weights is complete
    settings = [name for name in wanted if name.endswith((".json", ".txt"))]
    weights = [name for name in wanted if name not in settings]
    bars = bar_class(show=progress and not are_progress_bars_disabled())
    revision, folder = request.revision, Path()
    for names in filter(None, (settings, weights)):
        folder = Path(_snapshot(request, names, revision=revision, tqdm_class=bars))
        revision = folder.name  # the commit, so that weights and settings belong together
    return _located(folder, wanted)


def _cached(request: _Request) -> Path:
    """Return the copy in the cache, if it is complete."""
    try:
        folder = Path(_snapshot(request, [], revision=request.revision, local_files_only=True))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return _located(folder, request.choose(names))
    except FAILURES as error:
        why = f" ({error.found})" if isinstance(error, CheckpointError) else ""
        found = f"missing or incomplete in the cache{why}, and network access is off"
        expected = f"a copy in {_cache()}"
        revision = f" --revision {request.revision}" if request.revision else ""
        hint = f"with network access, load it once, or run: hf download {request.source.replace(':', ' ')}{revision}"
        raise CheckpointError("HUB_NOT_CACHED", request.source, found, expected=expected, hint=hint) from error


def _snapshot(request: _Request, names: Iterable[str], **options: Any) -> str:
    """Download the named files, and return the folder of their commit in the cache."""
    patterns = [glob.escape(name) for name in names]
    return huggingface_hub.snapshot_download(
        request.repository, allow_patterns=patterns, endpoint=_endpoint(), **options
    )


def _located(folder: Path, wanted: Sequence[str]) -> Path:
    return folder / wanted[0] if len(wanted) == 1 else folder


def _explained(error: Exception, request: _Request) -> CheckpointError:
    """Translate an error of huggingface_hub, its HTTP library or the disk to an error of this library."""
    for kind, code, found, hint in REFUSALS:
        if isinstance(error, kind):
            names = {"url": request.url, "revision": request.revision}
            return CheckpointError(code, request.source, found.format(**names), hint=hint.format(**names))
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        hint = f"see {request.url}; {LOG_IN}"
        return CheckpointError("HUB_ACCESS", request.source, f"the hub refuses access ({status})", hint=hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            "DISK_FULL", _cache(), f"no space left for {request.source}", hint="free some, or set HF_HOME"
        )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if isinstance(error, OSError) and error.filename is not None:
        hint = "set HF_HOME to a writable folder"
        return CheckpointError("HUB_CACHE", _cache(), f"cannot store {request.source} ({reason})", hint=hint)
    hint = "check the network and try again, or give the path of a copy on this machine"
    return CheckpointError(
        "HUB_UNREACHABLE", request.source, f"{request.url} cannot be downloaded ({reason})", hint=hint
    )


def _cache() -> str:
    return str(constants.HF_HUB_CACHE)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
