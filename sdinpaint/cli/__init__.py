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
    """Change the part of an image under a mask, and keep the rest bit for bit.

    \b
    sdinpaint demo                       see it work, with the small checkpoint that is included
    sdinpaint mask box photo.jpg --at 100,50,300,400 --out mask.png
    sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model MODEL --out out.png
    sdinpaint replay out.png             make it again, and see whether it is the same

    \b
    Exit codes:
      0    done
      1    a comparison differs (replay, bench)
      2    the command line cannot be parsed: an unknown option or choice, or not a number
      3    a value, an input or a result was refused; nothing was written
      4    a batch ended with failures
      5    the machine: memory, disk, device, port or network
      130  interrupted (SIGINT)
      141  the reader of standard output has closed it (SIGPIPE)
      143  terminated (SIGTERM)
    """


for command in (inpaint, vary, outpaint, replay, mask, inspect, convert, merge, bench, samplers, demo, doctor):
    main.add_command(command)
