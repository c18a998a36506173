"""What the commands share: errors in words with an exit code, notes, and options."""

from __future__ import annotations

import errno
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from tqdm import tqdm

from sdinpaint.errors import ImageError, SdInpaintError, SdInpaintWarning
from sdinpaint.images.files import check_output_path

__all__ = [
    "BAD_INPUT",
    "ENVIRONMENT",
    "INTERRUPTED",
    "Commands",
    "check_output",
    "given",
    "hub_options",
    "json_option",
    "quiet_option",
    "together",
]

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 3, 5, 130
ENVIRONMENT_CODES = {
    "IMAGE_NOT_WRITTEN",
    "CKPT_NOT_WRITTEN",
    "CKPT_NO_SPACE",
    "SETTING_DEVICE",
    "OUT_OF_MEMORY",
    "DISK_FULL",
    "HUB_CACHE",
    "HUB_UNREACHABLE",
}
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)
JSON = "sdinpaint.json"

Option = Callable[[Callable[..., None]], Callable[..., None]]


class Commands(click.Group):
    """A group whose commands end with an error's explanation and exit code instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            with _notes():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted: no unfinished file is left", err=True)
            ctx.exit(INTERRUPTED)
        except (SdInpaintError, MemoryError, OSError, RuntimeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            if ctx.meta.get(JSON):
                click.echo(json.dumps({"error": explained.to_json()}, indent=2))
            else:
                click.echo(f"error: {explained}", err=True)
            ctx.exit(ENVIRONMENT if explained.code in ENVIRONMENT_CODES else BAD_INPUT)


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


def together(*options: Option) -> Option:
    """Several options as one decorator; the help shows them in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):  # the help shows first what was added last
            command = option(command)
        return command

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember_json, help="Print one JSON object: the result, or the error."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
hub_options = together(
    click.option("--variant", metavar="NAME", help="Of a folder's files, e.g. fp16 for *.fp16.safetensors."),
    click.option("--revision", metavar="NAME", help="A branch, tag or commit of the model on the hub."),
    click.option("--offline", "local_files_only", is_flag=True, help="Of the hub, use what its cache holds."),
)


def given(ctx: click.Context, name: str) -> bool:
    """Tell whether an option was typed, in place of its default.

    Args:
        ctx: context of the command.
        name: name of the parameter.

    Returns:
        True where it was.
    """
    source = ctx.get_parameter_source(name)
    return source is not None and source is not click.core.ParameterSource.DEFAULT


def check_output(target: Path, inputs: Iterable[Path | str]) -> None:
    """Check that a picture can be written at `target`, and that it is none of `inputs`. Raises: ImageError."""
    check_output_path(target)
    if target.resolve() in {Path(one).resolve() for one in inputs}:
        found, hint = "it is the picture or the mask itself", "choose another name"
        raise ImageError("IMAGE_OUTPUT_PATH", f"output {str(target)!r}", found, hint=hint)


def _explained(error: Exception) -> SdInpaintError | None:
    """What went wrong as the library says it; None for what is neither an input's nor the machine's fault."""
    if isinstance(error, SdInpaintError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        reason = (str(error).splitlines() or ["out of memory"])[0]
        hint = "close other programs, take a smaller picture, or on a GPU give --dtype float16 or --device cpu"
        return SdInpaintError("OUT_OF_MEMORY", "memory", reason, hint=hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SdInpaintError("DISK_FULL", error.filename or "disk", str(error.strerror), hint="free some space")
    return None


@contextmanager
def _notes() -> Iterator[None]:
    """Show warnings of the library as one line on standard error each, once; others as Python does."""
    with warnings.catch_warnings():
        shown: set[str] = set()
        python_way = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, SdInpaintWarning):
                python_way(message, category, filename, lineno, file, line)
            elif str(message) not in shown:
                shown.add(str(message))
                tqdm.write(f"note: {message}", file=sys.stderr)

        warnings.simplefilter("always", SdInpaintWarning)
        warnings.showwarning = show
        yield
