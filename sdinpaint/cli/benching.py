"""The command that measures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from sdinpaint.cli.common import FILE, quiet_option, raising_on_signals, say
from sdinpaint.cli.values import Value
from sdinpaint.errors import shown, shown_lines

__all__ = ["bench"]

REFUSED = 1
PRUNE, PAGES, KERNELS = "prune", "pages", "kernels"
FORMS_TABLE = Path("kernels/sdinpaint_kernels/forms.json")
"""The table that the kernels read, in a checkout."""
ELSEWHERE = Path("bench-results")
PEER_NAMES = "Baselines, for example diffusers,openvino."
NAMES = Value("names with commas between", "sd15,sd2", lambda text: tuple(text.split(",")))


@click.command()
@click.argument("part", default="all")
@click.option("--families", type=NAMES, metavar="NAMES", help="sd15, sd2, sdxl, demo.  [sd15]")
@click.option("--checkpoint", metavar="PATH", help="Measure your model instead of random weights of a family's size.")
@click.option("--peers", default=(), type=NAMES, metavar="NAMES", help=PEER_NAMES)
@click.option(
    "--peer-command", "lines", multiple=True, metavar="LINE", help="Another program as a baseline of picture."
)
@click.option("--peer-time", "times", multiple=True, metavar="REGEX", help="Its group finds the seconds in the output.")
@click.option(
    "--dtype", "dtypes", default=("float32",), type=NAMES, metavar="NAMES", help="float32, bfloat16, float16."
)
@click.option("--stored", metavar="DTYPE", help="The dtype of random weights' files.  [the dtype that is computed in]")
@click.option("--device", default="auto", show_default=True, help="auto is cuda where there is a GPU, else cpu.")
@click.option("--size", type=int, help="Pixels a side of images.  [as the model was trained; quick: at most 256]")
@click.option("--images", type=int, help="step: guided steps of so many images at once.  [1]")
@click.option("--steps", type=int, help="Sampling steps of an image.  [20; quick: 2]")
@click.option("--rounds", type=int, help="Interleaved rounds of each measurement.  [5; quick: 2]")
@click.option(
    "--choose", is_flag=True, help="kernels: time every form of an operation, for the choice among them (CPU)."
)
@click.option("--quick", is_flag=True, help="Two rounds, two steps, at most 256 pixels.")
@click.option("--most-seconds", default=300.0, show_default=True, help="growth: end a curve before longer runs.")
@click.option("--most-gb", type=float, help="growth: the same for memory.  [four fifths of the free memory]")
@click.option("--out", "-o", type=FILE, metavar="FOLDER", help="Folder of rows, pages and plots.")
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
    choose: bool,
    **options: Any,
) -> None:
    """Measure speed, memory and quality, alone or beside baselines.

    PART is one of these, or all (default), which runs the first seven:

    \b
      load      import and load time, peak memory of loading
      memory    peak memory of the first and the second guided step, and of an image
      kernels   every distinct operation of a step and of decoding, beside plain torch
      step      a guided step, VAE and text encoders
      picture   a whole image; a new process until its first image
      quality   scores of held-out scenes, by sampler and steps (included checkpoint)
      startup   the command line, beside importing torch
      adapters  a LoRA of rank 64: adding it, a step with it, removing it
      modes     peak memory up to 4096 pixels, in tiles and with offloading
      growth    cost by image size, batch size and steps, each until a limit
      seams     the edge of the hole, by blend and colour matching (included checkpoint)
      defects   known defects of inpainting pipelines (included checkpoint)
      tuning    configurations of the Triton kernels (GPU)
      prune     measure nothing: remove rows that later ones of the same machine supersede
      pages     measure nothing: make pages and plots of the rows, and list reasons to write

    Before anything is timed, its output is checked: it is finite, and close to the baselines'. A failed check ends with
    exit code 1. Rows are appended to FOLDER/PART.jsonl; FOLDER/bench.md shows the latest ones. FOLDER is bench-results;
    in a checkout, all but quick rows go to benchmarks/results, and pages to docs/benchmarks. Weights are random and of
    full size, so nothing is downloaded.

    kernels --choose times every form of an operation on the CPU, and writes the table by which they are chosen.

    \b
    Baselines (--peers):
      diffusers, diffusers-channels-last, diffusers-compiled, openvino
      diffusers-captured      with the UNet in a CUDA graph (GPU)
      sdinpaint-torch         sdinpaint with torch's operations in place of its kernels
      sdinpaint-uncaptured    sdinpaint without CUDA graphs

    In a --peer-command, {checkpoint} {image} {mask} {out} {prompt} {size} {steps} {seed} {guidance} are replaced.

    \b
    Examples:
      sdinpaint bench --families demo --quick
      sdinpaint bench step --families sd15,sdxl --dtype float32,bfloat16 --peers diffusers,diffusers-channels-last
      sdinpaint bench memory --size 1024 --dtype bfloat16 --stored float16 --peers diffusers,diffusers-channels-last
      sdinpaint bench picture --checkpoint MODEL --peers diffusers \\
        --peer-command 'sd -m {checkpoint} -i {image} --mask {mask} -p "{prompt}" --steps {steps} -o {out}' \\
        --peer-time 'generate_image completed in ([\\d.]+)s'
      sdinpaint bench prune
    """
    from sdinpaint.bench import forms
    from sdinpaint.bench.peers.commands import Command
    from sdinpaint.bench.report.pages import CHECKOUT, Places, prune, read_rows, tables, write_pages
    from sdinpaint.bench.report.slower import open_questions
    from sdinpaint.bench.suite import Options, Outcome, run

    if len(lines) != len(times):
        raise click.UsageError(f"{len(lines)} --peer-command and {len(times)} --peer-time: each needs the other")
    if choose:
        if options["part"] != KERNELS:
            raise click.UsageError(f"--choose belongs to the part {KERNELS}, not to {options['part']}")
        options["part"] = forms.PART
    if options["families"] and options["checkpoint"]:
        raise click.UsageError("--families are of random weights, --checkpoint is a model of yours: give one of them")
    options["families"] = options["families"] or ("sd15",)
    commands = tuple(Command(line, time) for line, time in zip(lines, times, strict=True))
    in_checkout = out is None and not options["quick"] and CHECKOUT.reasons.is_file()
    places = CHECKOUT if in_checkout else Places(out or ELSEWHERE, out or ELSEWHERE)
    if options["part"] in (PRUNE, PAGES):
        if options["part"] == PRUNE:
            removed = prune(places)
            of = "".join(f", {count} of {name}" for name, count in removed.items())
            say(f"{sum(removed.values())} superseded rows removed from {places.rows}{of}")
        write_pages(places)
        if options["part"] == PAGES:
            for question in open_questions(read_rows(places), places.reasons):
                say(question)
        return
    most_bytes = None if most_gb is None else most_gb * 1e9
    chosen, outcome = Options(commands=commands, places=places, most_bytes=most_bytes, **options), Outcome()
    try:
        with raising_on_signals():
            run(chosen, outcome, progress=not quiet, say=None if quiet else _say)
    finally:  # an interrupted run keeps its rows
        write_pages(places, outcome.refused)
        if choose and outcome.rows:
            table = FORMS_TABLE if in_checkout else places.rows / FORMS_TABLE.name
            forms.write_table(places.rows / f"{forms.PART}.jsonl", table)
            say(f"table of the forms: {shown(table)}", err=True)
        if not quiet:
            say((tables(outcome.rows) + "".join(f"Refused: {reason}\n" for reason in outcome.refused)).rstrip("\n"))
    if outcome.refused:
        ctx.exit(REFUSED)


def _say(text: str) -> None:
    tqdm.write(shown_lines(text), file=sys.stderr)  # above the progress bar
