"""The command line. What needs torch is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import click

from sdinpaint.cli.benching import bench
from sdinpaint.cli.checkpoints import convert, inspect, merge
from sdinpaint.cli.common import Commands
from sdinpaint.cli.machine import demo, doctor, samplers
from sdinpaint.cli.masking import mask
from sdinpaint.cli.painting import inpaint, outpaint, vary
from sdinpaint.cli.replaying import replay
from sdinpaint.version import __version__

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sdinpaint")
def main() -> None:
    """Change the part of a picture under a mask, and keep the rest bit for bit.

    \b
    sdinpaint demo                       see it work, with the small checkpoint that is included
    sdinpaint mask box photo.jpg --at 100,50,300,400 --out mask.png
    sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model MODEL --out out.png
    sdinpaint replay out.png             make it again, and see whether it is the same

    \b
    Exit codes: 0 done, 1 a replay or a check of a benchmark that differs, 2 wrong usage,
    3 unusable input (nothing was written), 5 environment (memory, disk, device), 130 interrupted.
    """


for command in (inpaint, vary, outpaint, replay, mask, inspect, convert, merge, bench, samplers, demo, doctor):
    main.add_command(command)
