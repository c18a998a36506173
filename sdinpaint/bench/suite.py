"""The whole run: every part over every checkpoint, rows kept as they come, and the table of them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path

from sdinpaint.bench.cases import Case
from sdinpaint.bench.checkpoints import DEMO_FAMILY, FULL_SIZE, checkpoint_of
from sdinpaint.bench.growth import growth_rows
from sdinpaint.bench.parts import PARTS
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import check_peers
from sdinpaint.bench.report.pages import Places
from sdinpaint.bench.report.rows import Row, append
from sdinpaint.checkpoints.opening import find_dtype, open_checkpoint
from sdinpaint.checks import check_choice, dtype_name
from sdinpaint.errors import SdInpaintError, SettingError
from sdinpaint.load_options import LoadOptions
from sdinpaint.progress import progress_bar

__all__ = ["ALL", "GROWTH", "Options", "Outcome", "run"]

ALL, QUALITY, GROWTH = "all", "quality", "growth"
BY_NAME = (GROWTH, "modes")
"""Parts that run only where they are asked for: of a full-size model, they take as long as all others."""
STEPS, ROUNDS = 20, 5
QUICK_SIZE, QUICK_STEPS, QUICK_ROUNDS = 256, 2, 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and beside what. Raises: SettingError naming what is not known or not installed."""

    part: str = ALL
    families: tuple[str, ...] = ("sd15",)
    checkpoint: str | None = None
    """A model to measure in place of random ones."""
    peers: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    stored: str | None = None
    """Dtype of the random checkpoints; None: the one that they are run in."""
    device: str = "cpu"
    steps: int | None = None
    rounds: int | None = None
    """None: STEPS and ROUNDS, or for a quick run QUICK_STEPS and QUICK_ROUNDS."""
    quick: bool = False
    most_seconds: float = 300.0
    most_bytes: float | None = None
    """Of one run of `growth`, as in `GrowthOptions`."""
    places: Places

    def __post_init__(self) -> None:
        check_choice("part", self.part, [*PARTS, GROWTH, ALL], code="BENCH_PART")
        for family in self.families:
            check_choice("family", family, [*FULL_SIZE, DEMO_FAMILY], code="BENCH_FAMILY")
        object.__setattr__(self, "dtypes", tuple(map(dtype_name, self.dtypes)))
        object.__setattr__(self, "stored", self.stored and dtype_name(self.stored))
        for name in ("steps", "rounds"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise SettingError("BENCH_COUNT", name, f"{given}", expected="1 or more")
        for name in ("most_seconds", "most_bytes"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise SettingError("BENCH_LIMIT", name, f"{limit:g}", expected="more than 0")
        check_peers(self.peers)

    @property
    def parts(self) -> list[str]:
        """The names of those that run."""
        return [part for part in PARTS if part not in BY_NAME] if self.part == ALL else [self.part]


@dataclass
class Outcome:
    """What came of a run, also of one that was interrupted."""

    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Why something was not measured: it failed, or its check did."""


def run(options: Options, outcome: Outcome, *, progress: bool = True) -> None:
    """Measure everything, appending rows to PART.jsonl and to `outcome`, which holds what was refused too.

    Raises: SettingError, for a command that tells no seconds.
    """
    plan = list(_plan(options))
    with progress_bar(len(plan), "bench", " parts", show=progress) as bar:
        for (family, dtype, given), group in groupby(plan, key=lambda one: one[:3]):
            with _source(options, family, dtype, given) as source:
                for *_, part in group:
                    bar.set_postfix_str(f"{part}, {family} in {dtype}")
                    _measure(part, _case(options, family, dtype, source), options, outcome, progress)
                    bar.update()


def _plan(options: Options) -> Iterator[tuple[str, str, str | None, str]]:
    """(family, dtype, given checkpoint, part), those of one checkpoint one after the other."""
    given = options.checkpoint
    families = options.families if given is None else (Path(given).name,)
    yield from product(families, options.dtypes, [given], [part for part in options.parts if part != QUALITY])
    if QUALITY in options.parts:  # only the included checkpoint has learned what it is asked for
        dtypes = options.dtypes if options.part == QUALITY else options.dtypes[:1]
        yield from product([DEMO_FAMILY], dtypes, [None], [QUALITY])


def _source(options: Options, family: str, dtype: str, given: str | None) -> AbstractContextManager[str]:
    return checkpoint_of(family, find_dtype(options.stored or dtype)) if given is None else nullcontext(given)


def _case(options: Options, family: str, dtype: str, source: str) -> Case:
    """The case at the size that the model was trained at."""
    size = open_checkpoint(LoadOptions(source=source), progress=False).family.size
    return Case(
        family=family,
        checkpoint=source,
        dtype=dtype,
        stored=(options.stored or dtype) if family in FULL_SIZE and options.checkpoint is None else None,
        device=options.device,
        size=min(size, QUICK_SIZE) if options.quick else size,
        steps=options.steps or (QUICK_STEPS if options.quick else STEPS),
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        quick=options.quick,
        peers=options.peers,
    )


def _measure(part: str, case: Case, options: Options, outcome: Outcome, progress: bool) -> None:
    """Append each row as soon as it is known, or say why there are none."""
    try:
        for row in _rows(part, case, options, progress):
            if isinstance(row, str):  # why a peer has none
                outcome.refused.append(row)
                continue
            append(options.places.rows / f"{part}.jsonl", row)
            outcome.rows.append(row)
    except SettingError:  # nothing that is asked for in this way will ever run
        raise
    except SdInpaintError as error:
        outcome.refused.append(str(error))


def _rows(part: str, case: Case, options: Options, progress: bool) -> Iterable[Row | str]:
    if part == GROWTH:
        return growth_rows(case, options.most_seconds, options.most_bytes, progress=progress)
    return PARTS[part](case, options.commands)
