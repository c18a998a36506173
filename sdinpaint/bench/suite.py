"""A run of the suite: every part for every checkpoint, with rows written as soon as they are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path

import torch

from sdinpaint.bench.cases import Case
from sdinpaint.bench.checkpoints import DEMO_FAMILY, FULL_SIZE, checkpoint_of
from sdinpaint.bench.estimate import Planned, announcement, duration
from sdinpaint.bench.growth import growth_rows
from sdinpaint.bench.parts import PARTS
from sdinpaint.bench.peers.commands import Command
from sdinpaint.bench.peers.systems import check_peers
from sdinpaint.bench.report.pages import Places, read_rows
from sdinpaint.bench.report.rows import Row, append
from sdinpaint.bench.timing import first_round_told
from sdinpaint.checkpoints.building import find_dtype
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checks import check_choice, dtype_name, find_device
from sdinpaint.errors import SdInpaintError, SettingError
from sdinpaint.load_options import LoadOptions
from sdinpaint.progress import progress_bar

__all__ = ["ALL", "AUTO", "GROWTH", "Options", "Outcome", "run"]

ALL, GROWTH, AUTO = "all", "growth", "auto"
BY_NAME = (GROWTH, "modes", "seams", "defects", "tuning", "forms", "adapters")
"""Parts that run only when they are named, because they take long or measure no speed."""
NO_MODEL = "none"
"""The family of rows that no model has part in."""
ONCE = {"quality": DEMO_FAMILY, "seams": DEMO_FAMILY, "defects": DEMO_FAMILY, "startup": NO_MODEL}
"""Parts that run once whatever families are chosen, and the family of their rows.

Only the included checkpoint has learned the scenes of the first two; defects do not depend on the weights.
"""
ON_CPU = ("defects", "startup")
"""Parts that run once on the CPU, in float32, whatever dtypes and device are chosen."""
SIZED = ("memory", "kernels", "step", "picture", "tuning", "forms", "adapters")
"""Parts whose images have the size that is chosen; others have sizes of their own, or no images."""
STEPPED = "step"
"""The part of which the number of images can be chosen."""
LEAST_SIZE = 64
"""Sizes are multiples of it, which every UNet and VAE halves evenly."""
STEPS, ROUNDS = 20, 5
QUICK_SIZE, QUICK_STEPS, QUICK_ROUNDS = 256, 2, 2
WORTH_TELLING = 10.0
"""Seconds that are left of a measurement, of which a person is told after its first round."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The measurements of a run.

    Raises:
        SettingError: a name is not known, a package is not installed, or a number is out of range.
    """

    part: str = ALL
    families: tuple[str, ...] = ("sd15",)
    checkpoint: str | None = None
    """A model that is measured in place of random ones."""
    peers: tuple[str, ...] = ()
    """The baselines."""
    commands: tuple[Command, ...] = ()
    """Other programs, for the part "picture"."""
    dtypes: tuple[str, ...] = ("float32",)
    stored: str | None = None
    """The dtype of random checkpoints' files; None: the one that they are run in."""
    device: str = AUTO
    """"auto" is replaced by "cuda" where there is a GPU, else by "cpu"."""
    size: int | None = None
    """Height and width of the images of SIZED; None: those that the model was trained at."""
    images: int | None = None
    """Images at once in the guided step of the part "step"; None: 1."""
    steps: int | None = None
    rounds: int | None = None
    """None: STEPS and ROUNDS, or for a quick run QUICK_STEPS and QUICK_ROUNDS."""
    quick: bool = False
    most_seconds: float = 300.0
    most_bytes: float | None = None
    """Limits of one run of the part "growth", as in `GrowthOptions`."""
    places: Places

    def __post_init__(self) -> None:
        check_choice("part", self.part, [*PARTS, GROWTH, ALL], code="BENCH_PART")
        for family in self.families:
            check_choice("family", family, [*FULL_SIZE, DEMO_FAMILY], code="BENCH_FAMILY")
        object.__setattr__(self, "dtypes", tuple(map(dtype_name, self.dtypes)))
        object.__setattr__(self, "stored", self.stored and dtype_name(self.stored))
        if self.device == AUTO:
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        else:
            find_device(self.device)  # now, and not after the parts that run on the CPU
        for name in ("steps", "rounds", "images"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise SettingError("BENCH_COUNT", name, f"{given}", expected="1 or more")
        if self.size is not None and (self.size < 1 or self.size % LEAST_SIZE):
            raise SettingError("BENCH_SIZE", "size", f"{self.size}", expected=f"a multiple of {LEAST_SIZE}")
        if self.size is not None and not {*SIZED} & {*self.parts}:
            expected = f"a part whose images have a size that is chosen: {', '.join(SIZED)}"
            raise SettingError("BENCH_SIZE", "size", f"{self.size} for the part {self.part}", expected=expected)
        if self.images is not None and STEPPED not in self.parts:
            found = f"{self.images} for the part {self.part}"
            raise SettingError("BENCH_COUNT", "images", found, expected=f"the part {STEPPED}")
        for name in ("most_seconds", "most_bytes"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise SettingError("BENCH_LIMIT", name, f"{limit:g}", expected="more than 0")
        check_peers(self.peers)

    @property
    def parts(self) -> list[str]:
        """The names of the parts that run."""
        return [part for part in PARTS if part not in BY_NAME] if self.part == ALL else [self.part]


@dataclass
class Outcome:
    """The results of a run, also of one that was interrupted."""

    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Why something was not measured: it failed, or its check did."""


def run(options: Options, outcome: Outcome, *, progress: bool = True, say: Say | None = None) -> None:
    """Measure everything, and append rows to PART.jsonl and to `outcome`.

    Args:
        options: what is measured.
        outcome: receives rows, and the reasons for those that are missing.
        progress: show a progress bar.
        say: is told which machine measures and how long it will take, before and after first rounds; None: nobody is.

    Raises:
        SettingError: a command prints no seconds, or a part does not run on this device.
    """
    plan = list(_plan(options))
    if say is not None:
        planned = [_planned(options, *one) for one in plan]
        say(announcement(planned, read_rows(options.places)))
    with progress_bar(len(plan), "bench", " parts", show=progress) as bar:
        for (family, dtype, given), group in groupby(plan, key=lambda one: one[:3]):
            with _source(options, family, dtype, given) as source:
                for *_, part in group:
                    label = part if family == NO_MODEL else f"{part}, {family} in {dtype}"
                    bar.set_postfix_str(label)
                    with first_round_told(_teller(label, say)):
                        _measure(part, _case(options, family, dtype, source, part), options, outcome, progress)
                    bar.update()


def _plan(options: Options) -> Iterator[tuple[str, str, str | None, str]]:
    """Yield (family, dtype, given checkpoint, part), those of one checkpoint one after the other."""
    given = options.checkpoint
    families = options.families if given is None else (Path(given).name,)
    yield from product(families, options.dtypes, [given], [part for part in options.parts if part not in ONCE])
    for part in options.parts:
        if part in ONCE:
            dtypes = options.dtypes if options.part == part else options.dtypes[:1]
            yield from product([ONCE[part]], ["float32"] if part in ON_CPU else dtypes, [None], [part])


def _planned(options: Options, family: str, dtype: str, given: str | None, part: str) -> Planned:
    stored = _stored(options, family, dtype)
    return Planned(
        part=part,
        family=family,
        dtype=dtype,
        stored=stored,
        device=_device(options, part),
        size=_size(options, part, FULL_SIZE[family].size if stored else 0) or None,
        quick=options.quick,
        rounds=_rounds(options),
        steps=_steps(options),
        peers=() if part in ONCE or part in BY_NAME or part == "kernels" else options.peers,
    )


def _teller(what: str, say: Say | None) -> Callable[[float, int], None]:
    """Return a listener that says how long the rounds of a measurement will still take."""

    def tell(seconds: float, left: int) -> None:
        if say is not None and left * seconds > WORTH_TELLING:
            say(f"{what}: round 1 of {left + 1} took {duration(seconds)}, about {duration(left * seconds)} left")

    return tell


def _source(options: Options, family: str, dtype: str, given: str | None) -> AbstractContextManager[str]:
    if given is not None or family == NO_MODEL:
        return nullcontext(given or "")
    return checkpoint_of(family, find_dtype(options.stored or dtype))


def _case(options: Options, family: str, dtype: str, source: str, part: str) -> Case:
    """Make the case, at the size that is chosen or that the model was trained at."""
    size = open_checkpoint(LoadOptions(source=source), progress=False).family.size if source else 0
    return Case(
        family=family,
        checkpoint=source,
        dtype=dtype,
        stored=_stored(options, family, dtype),
        device=_device(options, part),
        size=_size(options, part, size),
        steps=_steps(options),
        rounds=_rounds(options),
        quick=options.quick,
        peers=options.peers,
        images=options.images or 1 if part == STEPPED else 1,
    )


def _size(options: Options, part: str, own: int) -> int:
    """Return the size that is chosen, or the model's own."""
    if options.size is not None and part in SIZED:
        return options.size
    return min(own, QUICK_SIZE) if options.quick else own


def _stored(options: Options, family: str, dtype: str) -> str | None:
    return (options.stored or dtype) if family in FULL_SIZE and options.checkpoint is None else None


def _device(options: Options, part: str) -> str:
    return "cpu" if part in ON_CPU else options.device


def _steps(options: Options) -> int:
    return options.steps or (QUICK_STEPS if options.quick else STEPS)


def _rounds(options: Options) -> int:
    return options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)


def _measure(part: str, case: Case, options: Options, outcome: Outcome, progress: bool) -> None:
    """Append each row as soon as it is known, or say why there are none."""
    try:
        for row in _rows(part, case, options, progress):
            if isinstance(row, str):  # why a baseline has none
                outcome.refused.append(row)
                continue
            outcome.rows.append(append(options.places.rows / f"{part}.jsonl", row))
    except SettingError:  # it fails in the same way for every case
        raise
    except SdInpaintError as error:
        outcome.refused.append(str(error))


def _rows(part: str, case: Case, options: Options, progress: bool) -> Iterable[Row | str]:
    if part == GROWTH:
        return growth_rows(case, options.most_seconds, options.most_bytes, progress=progress)
    return PARTS[part](case, options.commands)
