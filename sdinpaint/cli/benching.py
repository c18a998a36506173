"""The command that measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdinpaint.cli.common import quiet_option
from sdinpaint.cli.values import Value

__all__ = ["bench"]

REFUSED = 1
ELSEWHERE = Path("bench-results")
PEER_NAMES = "diffusers, diffusers-channels-last, diffusers-compiled, openvino."
NAMES = Value("names with commas between", "sd15,sd2", lambda text: tuple(text.split(",")))


@click.command()
@click.argument("part", default="all")
@click.option("--families", type=NAMES, metavar="NAMES", help="sd15, sd2, sdxl, demo.  [sd15]")
@click.option("--checkpoint", metavar="PATH", help="A model of yours instead of random weights of a family's size.")
@click.option("--peers", default=(), type=NAMES, metavar="NAMES", help=PEER_NAMES)
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
@click.option("--most-seconds", default=300.0, show_default=True, help="Of a run: where a curve of `growth` ends.")
@click.option("--most-gb", type=float, help="The same of its memory.  [four fifths of what is free]")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="FOLDER", help="For rows, table and pictures.")
@quiet_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    lines: tuple[str, ...],
    times: tuple[str, ...],
    most_gb: float | None,
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure load, memory, kernels, step, picture or quality, or all, beside the peers named; or modes, or growth.

    What is measured is checked first: finite, and like the peers. Rows are appended to FOLDER/PART.jsonl as they are
    made, and FOLDER/bench.md and its pictures show the latest ones: 20th, 50th and 80th percentile, and what sdinpaint
    takes for each one of the peer's. FOLDER is bench-results; in a checkout, all but quick rows go to
    benchmarks/results, and what shows them to docs/benchmarks. Weights are random and of full size, so nothing is
    fetched; `quality` is of the included checkpoint. Ends with exit code 1 where a check failed.

    `modes` is the peak memory of pictures up to 4096 pixels a side, whole, in tiles and with models offloaded. `growth`
    is of pictures from 256 to 2048 pixels a side, 1 to 16 at once, and 1 to 50 steps, each until a limit.

    In a --peer-command, {checkpoint} {image} {mask} {out} {prompt} {size} {steps} {seed} {guidance} are filled in.

    \b
    Examples:
      sdinpaint bench --families demo --quick
      sdinpaint bench step --families sd15,sdxl --dtype float32,bfloat16 --peers diffusers
      sdinpaint bench picture --checkpoint MODEL --peers diffusers \\
        --peer-command 'sd -m {checkpoint} -i {image} --mask {mask} -p "{prompt}" --steps {steps} -o {out}' \\
        --peer-time 'generate_image completed in ([\\d.]+)s'
    """
    from sdinpaint.bench.peers.commands import Command
    from sdinpaint.bench.report.pages import CHECKOUT, Places, tables, write_pages
    from sdinpaint.bench.suite import Options, Outcome, run

    if len(lines) != len(times):
        raise click.UsageError(f"{len(lines)} --peer-command and {len(times)} --peer-time: each needs the other")
    if options["families"] and options["checkpoint"]:
        raise click.UsageError("--families are of random weights, --checkpoint is a model of yours: give one of them")
    options["families"] = options["families"] or ("sd15",)
    commands = tuple(Command(line, time) for line, time in zip(lines, times, strict=True))
    kept = out is None and not options["quick"] and CHECKOUT.reasons.is_file()
    places = CHECKOUT if kept else Places(out or ELSEWHERE, out or ELSEWHERE)
    most_bytes = None if most_gb is None else most_gb * 1e9
    chosen, outcome = Options(commands=commands, places=places, most_bytes=most_bytes, **options), Outcome()
    try:
        run(chosen, outcome, progress=not quiet)
    finally:  # an interrupted run keeps what it has
        write_pages(places, outcome.refused)
        if not quiet:
            click.echo(tables(outcome.rows) + "".join(f"Refused: {reason}\n" for reason in outcome.refused), nl=False)
    if outcome.refused:
        ctx.exit(REFUSED)
