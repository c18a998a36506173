"""The command that measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdinpaint.cli.common import quiet_option
from sdinpaint.cli.values import Value

__all__ = ["bench"]

REFUSED = 1
IN_REPOSITORY, ELSEWHERE = Path("benchmarks/results"), Path("bench-results")
NAMES = Value("names with commas between", "sd15,sd2", lambda text: tuple(text.split(",")))


@click.command()
@click.argument("part", default="all")
@click.option("--families", type=NAMES, metavar="NAMES", help="sd15, sd2, sdxl, demo.  [sd15]")
@click.option("--checkpoint", metavar="PATH", help="A model of yours instead of random weights of a family's size.")
@click.option("--peers", default=(), type=NAMES, metavar="NAMES", help="diffusers, diffusers-channels-last.")
@click.option("--peer-command", "lines", multiple=True, metavar="LINE", help="A program that paints, for `picture`.")
@click.option("--peer-time", "times", multiple=True, metavar="REGEX", help="Its group finds the seconds it tells.")
@click.option(
    "--dtype", "dtypes", default=("float32",), type=NAMES, metavar="NAMES", help="float32, bfloat16, float16."
)
@click.option("--stored", metavar="DTYPE", help="Of the random weights' files; default: as they are run.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--steps", type=int, help="Of a picture.  [20; quick: 2]")
@click.option("--rounds", type=int, help="How often each is timed, in turns.  [5; quick: 2]")
@click.option("--quick", is_flag=True, help="Two rounds, two steps, at most 256 pixels.")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="FOLDER")
@quiet_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    lines: tuple[str, ...],
    times: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure load, memory, step, picture or quality, or all of them, beside the peers that are named.

    What is measured is checked first: finite, and like the peers. Rows are appended to FOLDER/PART.jsonl as they are
    made, and FOLDER/bench.md shows the latest ones: 20th, 50th and 80th percentile, and what sdinpaint takes for each
    one of the peer's. FOLDER is benchmarks/results where there is one, else bench-results. Weights are random and of
    full size, so nothing is fetched; `quality` is of the included checkpoint. Ends with exit code 1 where a check
    failed.

    In a --peer-command, {checkpoint} {image} {mask} {out} {prompt} {size} {steps} {seed} {guidance} are filled in.

    \b
    Examples:
      sdinpaint bench --families demo --quick
      sdinpaint bench step --families sd15,sdxl --dtype float32,bfloat16 --peers diffusers
      sdinpaint bench picture --checkpoint MODEL --peers diffusers \\
        --peer-command 'sd -m {checkpoint} -i {image} --mask {mask} -p "{prompt}" --steps {steps} -o {out}' \\
        --peer-time 'generate_image completed in ([\\d.]+)s'
    """
    from sdinpaint.bench.commands import Command
    from sdinpaint.bench.suite import Options, Outcome, run, write_table

    if len(lines) != len(times):
        raise click.UsageError(f"{len(lines)} --peer-command and {len(times)} --peer-time: each needs the other")
    if options["families"] and options["checkpoint"]:
        raise click.UsageError("--families are of random weights, --checkpoint is a model of yours: give one of them")
    options["families"] = options["families"] or ("sd15",)
    commands = tuple(Command(line, time) for line, time in zip(lines, times, strict=True))
    folder = out or (IN_REPOSITORY if IN_REPOSITORY.is_dir() else ELSEWHERE)
    chosen, outcome = Options(commands=commands, out=folder, **options), Outcome()
    try:
        run(chosen, outcome, progress=not quiet)
    finally:  # an interrupted run keeps what it has
        shown = write_table(chosen, outcome)
        if not quiet:
            click.echo(shown, nl=False)
    if outcome.refused:
        ctx.exit(REFUSED)
