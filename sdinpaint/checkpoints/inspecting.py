"""Describe a checkpoint from the headers of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from sdinpaint_weights.dtypes import StoredDtype
from sdinpaint_weights.folder import open_folder_component, weights_files
from sdinpaint_weights.layout import Layout, identify, require_family
from sdinpaint_weights.native import outside_keys
from sdinpaint_weights.reader import open_weights
from sdinpaint_weights.weights import Weights

from sdinpaint.checkpoints.configs import check_fit
from sdinpaint.checkpoints.describing_adapters import AdapterReport, describe_adapter, title_of
from sdinpaint.checkpoints.embedded import VOCABULARY
from sdinpaint.checkpoints.findings import Finding
from sdinpaint.checkpoints.known_shapes import has_known_shapes
from sdinpaint.checkpoints.opening import CONTROLNET, Checkpoint, open_checkpoint
from sdinpaint.checkpoints.sources import COMPONENTS, open_parts
from sdinpaint.checks import check_path, check_switch
from sdinpaint.errors import SdInpaintError, shown, shown_lines
from sdinpaint.families import KINDS, deviations
from sdinpaint.keywords import knowing_keywords
from sdinpaint.load_options import LoadOptions
from sdinpaint.paths import as_path
from sdinpaint.progress import progress_bar

__all__ = ["Report", "inspect"]

OF_A_FOLDER = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt")
"""Files that tell something only together with the others in their folder, which is described instead."""
SHOWN = 20
"""Findings that are printed at most."""
Tensors = list[tuple[tuple[int, ...], StoredDtype]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `inspect`; every field is plain data."""

    path: str
    title: str
    family: str
    layout: str
    in_channels: int | None
    prediction: str | None
    prediction_why: str
    deviations: dict[str, Any]
    """"part.field" -> a value that the released family of this name has otherwise, and that no shape tells."""
    has_ema: bool
    has_tokenizer: bool
    """True where the source has a tokenizer; a single file never has one."""
    parameters: dict[str, int]
    """Component -> number of parameters."""
    dtypes: dict[str, dict[str, int]]
    """Component -> {dtype: number of tensors}."""
    junk: tuple[str, ...]
    """Keys that belong to no component."""
    sha256: dict[str, str]
    """Weights file -> SHA-256 of the whole file; empty unless requested."""
    why: tuple[str, ...]
    """The names and shapes that family and layout were recognised by, as sentences."""
    problem: str
    """The error that prevents loading it as a model; empty where there is none."""
    serves_as: str = ""
    """The argument of `load` by which it can be used nevertheless, in words; empty where there is none."""
    verified: int = 0
    """Number of tensors that were read through; 0 unless requested."""
    adapter: AdapterReport | None = None
    """The contents of a LoRA or another addition to a model; None for models and their parts."""
    findings: tuple[Finding, ...] = ()
    """Tensors among them that cannot be right, and unusual ones."""

    @property
    def usable(self) -> bool:
        """Tell whether something can be done with it."""
        return (not self.problem or bool(self.serves_as)) and not any(finding.wrong for finding in self.findings)

    @property
    def dtype(self) -> str:
        """Return the dtype of all tensors, or "mixed"."""
        kinds = {kind for counts in self.dtypes.values() for kind in counts}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def to_json(self) -> dict[str, Any]:
        """Return every field by name."""
        return {**asdict(self), "dtype": self.dtype}

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        why = f" ({self.prediction_why})" if self.prediction_why else ""
        own = ", ".join(f"{name} {value}" for name, value in self.deviations.items())
        lines = [
            f"{shown(self.path)}: {self.title}",
            *(self._model_lines(why, own) if self.adapter is None else self.adapter.lines()),
            f"  parameters  {total:,}",
        ]
        for component, count in self.parameters.items():
            kinds = ", ".join(f"{kind} x {tensors}" for kind, tensors in self.dtypes[component].items())
            lines.append(f"    {component:<14} {count:>13,}  {kinds}")
        if self.junk:
            lines.append(f"  junk        {len(self.junk)} tensors of no model, e.g. {', '.join(self.junk[:5])}")
        lines += [f"  sha256      {digest}  {file}" for file, digest in self.sha256.items()]
        lines += [f"  because     {sentence}" for sentence in self.why if sentence not in self.problem]
        if self.verified:
            wrong = sum(finding.wrong for finding in self.findings)
            lines.append(f"  verified    {self.verified} tensors were read: {wrong or 'none'} of them cannot be right")
            lines += [f"    {finding}" for finding in self.findings[:SHOWN]]
            if (more := len(self.findings) - SHOWN) > 0:
                lines.append(f"    and {more} more, which --json lists")
        if self.serves_as:
            lines.append(f"  loads       {self.serves_as}")
        elif self.problem:
            lines.append(f"  does not load: {self.problem}")
        else:
            lines.append("  loads       every tensor is accounted for")
        return shown_lines("\n".join(lines))

    def _model_lines(self, why: str, own: str) -> list[str]:
        return [
            f"  family      {self.family}, layout {self.layout}, {self.in_channels or 'no'} input channels",
            f"  prediction  {self.prediction or 'unknown'}{why}",
            *([f"  deviates    {own}"] if own else []),
            f"  averages    {'EMA weights of the UNet' if self.has_ema else 'no EMA weights'}",
            f"  vocabulary  {'in the folder' if self.has_tokenizer else 'not included'}",
        ]


@knowing_keywords()
def inspect(
    source: str | Path,
    *,
    hash: bool = False,
    verify: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Report:
    """Describe a checkpoint: family, layout, components and dtypes, with the reasons, and what prevents loading it.

    Only headers are read, unless `hash` or `verify` is set.

    Args:
        source: a file, a folder, a model on the hub, or "demo".
        hash: also compute the SHA-256 of each weights file, which reads all of it.
        verify: also read every tensor, and report what cannot be right (NaN, infinity, zeros throughout, a checksum
            that does not match) and what is unusual (blocks of zeros, outliers); the SHA-256, too.
        variant: weights variant of a folder, such as "fp16".
        revision: branch, tag or commit of a model on the hub.
        local_files_only: do not use the network.
        progress: show a bar in a terminal or a notebook.

    Returns:
        The report.

    Raises:
        CheckpointError: the source is not a readable weights file or folder.
    """
    path, hash = as_path(check_path("source", source)), check_switch("hash", hash)
    verify = check_switch("verify", verify)
    if (path.name in OF_A_FOLDER or path.name.endswith(".index.json")) and path.is_file():
        source = path = path.parent
    options = LoadOptions(source=source, variant=variant, revision=revision, local_files_only=local_files_only)
    try:
        checkpoint = open_checkpoint(options)
    except SdInpaintError as error:
        adapter, states = _adapter(source, path), {}
        if adapter is None:
            report, opened = _report_foreign(path, variant, error), _readable(path, variant)
        else:
            report, weights = adapter
            opened, path = {"adapter": weights}, weights.path
    else:
        report, path, states = _report(checkpoint, _problem(checkpoint)), checkpoint.path, checkpoint.states
        opened = {name: state.weights for name, state in states.items()}
    if verify and opened:
        from sdinpaint.checkpoints.verifying import verify as read_through  # noqa: PLC0415 - needs torch

        files = {id(weights): len(weights) for weights in opened.values()}
        findings = read_through(opened, states, report.junk, progress=progress)
        report = replace(report, verified=sum(files.values()), findings=findings)
    if hash or verify:
        report = replace(report, sha256=_sha256(path, opened.values(), progress=progress))
    return report


def _problem(checkpoint: Checkpoint) -> str:
    """Return what prevents the checkpoint from loading; empty where nothing does."""
    try:
        if has_known_shapes(checkpoint):
            check_fit(checkpoint.family, checkpoint.path)
        else:
            from sdinpaint.checkpoints.building import build  # noqa: PLC0415 - networks need torch, which takes seconds

            build(checkpoint)
    except SdInpaintError as error:
        return str(error)
    return ""


def _report(checkpoint: Checkpoint, problem: str) -> Report:
    family, unet, states = checkpoint.family, checkpoint.layouts["unet"], checkpoint.states
    tensors = {
        name: [(shape, state.weights.stored_dtype(state.sources[key].key)) for key, shape in state.shapes().items()]
        for name, state in states.items()
    }
    reasons = dict.fromkeys(sentence for layout in checkpoint.layouts.values() for sentence in layout.why)
    return Report(
        path=str(checkpoint.path),
        title=unet.title if checkpoint.folder is None else f"a {KINDS[family.kind]} model in a diffusers folder",
        family=family.name,
        layout=unet.naming if checkpoint.folder is None else "diffusers",
        in_channels=family.unet.in_channels,
        prediction=family.schedule.prediction,
        prediction_why=checkpoint.prediction.why,
        deviations=deviations(family),
        has_ema=unet.has_ema,
        has_tokenizer=(checkpoint.path / "tokenizer").is_dir() or VOCABULARY in states["text_encoder"].weights.metadata,
        **_counts(tensors),
        junk=checkpoint.outside,
        sha256={},
        why=(*reasons, *checkpoint.notes[bool(checkpoint.outside) :]),  # those outside have a line of their own
        problem=problem,
    )


def _adapter(source: str | Path, path: Path) -> tuple[Report, Weights] | None:
    """Open and describe an adapter; None for anything else."""
    if path.suffix == ".json":
        return None
    from sdinpaint.adapters.reading import find_weights  # noqa: PLC0415 - needs torch, which takes seconds

    try:
        file, config, _ = find_weights(source)
        weights = open_weights(file)
    except SdInpaintError:  # the error of opening it as a model tells more
        return None
    described = describe_adapter(weights, config)
    if described is None:
        return None
    layout, adapter, serves_as, problem = described
    report = Report(
        path=str(path if path.is_dir() else file),
        title=title_of(layout),
        family=layout.family,
        layout=layout.kind,
        in_channels=None,
        prediction=None,
        prediction_why="",
        deviations={},
        has_ema=False,
        has_tokenizer=False,
        **_counts({"adapter": [(weights.shape(key), weights.stored_dtype(key)) for key in weights]}),
        junk=(),
        sha256={},
        why=(),
        problem=problem,
        serves_as=serves_as,
        adapter=adapter,
    )
    return report, weights


def _report_foreign(path: Path, variant: str | None, error: SdInpaintError) -> Report:
    """Describe a source that can be read but not loaded; raise `error` where it cannot be read."""
    parts = _readable(path, variant)
    if not parts:
        return _report_settings(path, error)
    layouts = {name: identify(weights.shapes()) for name, weights in parts.items()}
    main = layouts.get("unet", next(iter(layouts.values())))
    tensors = {
        component: found
        for name, weights in parts.items()
        for component, found in _by_component(name, weights, layouts[name]).items()
    }
    serves_as, problem = _serves_as(path, variant, error)
    whole = path.is_dir() and "tensors" not in parts
    return Report(
        path=str(path),
        title="a diffusers folder" if whole else main.title,
        family=main.family,
        layout="diffusers" if whole else main.layout,
        in_channels=main.in_channels,
        prediction=None,
        prediction_why="",
        deviations={},
        has_ema=main.has_ema,
        has_tokenizer=(path / "tokenizer").is_dir(),
        **_counts(tensors),
        junk=tuple(
            key
            for name, weights in parts.items()
            if layouts[name].prefixes
            for key in outside_keys(weights, layouts[name])
        ),
        sha256={},
        why=tuple(sentence for layout in layouts.values() for sentence in layout.why),
        problem=problem,
        serves_as=serves_as,
    )


def _serves_as(path: Path, variant: str | None, error: SdInpaintError) -> tuple[str, str]:
    """Return what a part of a model serves as, in words, and what prevents loading it; one of both may be empty."""
    if error.code != "CKPT_NO_COMPONENT":
        return "", str(error)
    from sdinpaint.checkpoints.alone import SERVES_AS, configured  # noqa: PLC0415 - networks need torch

    try:
        parts = open_parts(path, (*COMPONENTS, CONTROLNET), variant=variant)
        for name, part in parts.items():
            require_family(part.layout, path, (*KINDS, "sd"))
            configured(name, part, path)
    except SdInpaintError as reason:
        return "", str(reason)
    return next(words for name, words in SERVES_AS.items() if name in parts), str(error)


def _report_settings(path: Path, error: SdInpaintError) -> Report:
    """Describe the settings of a scheduler or a tokenizer; raise `error` for anything else."""
    from sdinpaint.checkpoints.alone import settings_serve_as  # noqa: PLC0415 - networks need torch

    problem = ""
    try:
        serves_as = settings_serve_as(path)
    except SdInpaintError as reason:
        serves_as, problem = "", str(reason)
    if serves_as is None:
        raise error
    return Report(
        path=str(path),
        title="settings without weights",
        family="unknown",
        layout="diffusers",
        in_channels=None,
        prediction=None,
        prediction_why="",
        deviations={},
        has_ema=False,
        has_tokenizer="tokenizer" in serves_as,
        **_counts({}),
        junk=(),
        sha256={},
        why=(),
        problem=problem,
        serves_as=serves_as,
    )


def _readable(path: Path, variant: str | None) -> dict[str, Weights]:
    """Open the weights files that exist, by component for a folder."""
    if path.is_dir():
        if weights_files([entry.name for entry in path.iterdir()], variant):
            return {"tensors": open_folder_component(path, variant)}
        return {name: open_folder_component(path / name, variant) for name in COMPONENTS if (path / name).is_dir()}
    return {"tensors": open_weights(path)} if path.exists() and path.suffix != ".json" else {}


def _by_component(name: str, weights: Weights, layout: Layout) -> dict[str, Tensors]:
    """Group the tensors of a weights file by component; tensors of no component are left out."""
    prefixes = layout.prefixes or {name: ""}
    found: dict[str, Tensors] = {component: [] for component in prefixes}
    for key in weights:
        component = next((component for component, prefix in prefixes.items() if key.startswith(prefix)), None)
        if component is not None:
            found[component].append((weights.shape(key), weights.stored_dtype(key)))
    return found


def _counts(tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """Make the fields `parameters` and `dtypes` of a report."""
    kinds = {name: Counter(dtype.name for _, dtype in found) for name, found in tensors.items()}
    return {
        "parameters": {name: sum(prod(shape) for shape, _ in found) for name, found in tensors.items()},
        "dtypes": {name: dict(counts) for name, counts in kinds.items()},
    }


def _sha256(root: Path, parts: Iterable[Weights], *, progress: bool) -> dict[str, str]:
    files = {file.path: file for weights in parts for file in weights.files}
    with progress_bar(sum(file.size for file in files.values()), "sha256", "B", show=progress, unit_scale=True) as bar:
        digests = {path: files[path].sha256(bar.update) for path in sorted(files)}
    return {str(path.relative_to(root)) if path != root else path.name: digest for path, digest in digests.items()}
