"""Common parts of all commands: exit codes, errors and warnings as text, and shared options."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from sdinpaint_weights.targets import resolved
from tqdm import tqdm

from sdinpaint.cli.values import LORA
from sdinpaint.cli.wording import Wording
from sdinpaint.errors import ImageError, SdInpaintError, SdInpaintWarning, out_of_memory, shown, shown_lines
from sdinpaint.images.files import check_output_path

__all__ = [
    "BAD_INPUT",
    "ENVIRONMENT",
    "FILE",
    "INTERRUPTED",
    "Commands",
    "Group",
    "check_output",
    "given",
    "hub_options",
    "json_option",
    "lora_option",
    "quiet_option",
    "raising_on_signals",
    "replacing",
    "say",
    "together",
]

BAD_INPUT, ENVIRONMENT, INTERRUPTED, TERMINATED = 3, 5, 130, 143
ENVIRONMENT_CODES = {
    "IMAGE_NOT_WRITTEN",
    "CKPT_NOT_WRITTEN",
    "CKPT_NO_SPACE",
    "SETTING_DEVICE",
    "OUT_OF_MEMORY",
    "DISK_FULL",
    "FILE_NOT_USABLE",
    "HUB_CACHE",
    "HUB_UNREACHABLE",
}
JSON = "sdinpaint.json"
CALLED = "sdinpaint.called"

Option = Callable[[Callable[..., None]], Callable[..., None]]


class Group(click.Group):
    """A group that remembers which of its commands was called, for the options that an error names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that was typed.

        Args:
            ctx: context of the group.
            args: what was typed.

        Returns:
            The name of the command, the command, and the arguments that are left, as click's own method.
        """
        found = super().resolve_command(ctx, args)
        ctx.meta[CALLED] = found[1]
        return found


class Commands(Group):
    """A group whose commands end with an error's explanation and an exit code instead of a traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line, and exit the process unless `standalone_mode` is False.

        Args:
            args: positional arguments of click's own method.
            standalone_mode: whether the process ends here.
            extra: further arguments of click's own method.

        Returns:
            The return value of the command.
        """
        try:
            code = super().main(*args, standalone_mode=False, **extra)  # type: ignore[call-overload]
        except click.ClickException as error:
            if not standalone_mode:
                raise
            error.show()
            code = error.exit_code
        except click.Abort:
            if not standalone_mode:
                raise
            click.echo("interrupted: no unfinished file is left", err=True)
            code = INTERRUPTED
        return sys.exit(code or 0) if standalone_mode else code

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for.

        Args:
            ctx: context of the command line.

        Returns:
            The return value of the command.
        """
        try:
            with _notes(ctx):
                return super().invoke(ctx)
        except (SdInpaintError, MemoryError, OSError, RuntimeError, ImportError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            explained = Wording(ctx.meta[CALLED]).error(explained)
            if ctx.meta.get(JSON):
                click.echo(json.dumps({"error": explained.to_json()}, indent=2))
            else:
                click.echo(f"error: {explained}", err=True)
            ctx.exit(ENVIRONMENT if explained.code in ENVIRONMENT_CODES else BAD_INPUT)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise an exception on SIGINT and SIGTERM until the end of the block, which has work to do before it ends.

    Elsewhere a signal ends the process at once, as `sdinpaint.__main__` has it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [
        (signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)),
        (signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))),
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


def together(*options: Option) -> Option:
    """Join several options into one decorator.

    Args:
        options: the options, in the order of the help.

    Returns:
        A decorator that adds them to a command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):  # the help shows first what was added last
            command = option(command)
        return command

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember_json, help="Print one JSON object: the result, or the error."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress and no summary.")
lora_option = click.option(
    "--lora",
    "loras",
    type=LORA,
    multiple=True,
    metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
    help="LoRA, or an adapter like it, to add; the weight is 1 by default.  [repeatable]",
)
hub_options = together(
    click.option("--variant", metavar="NAME", help="Variant of a folder's files, such as fp16 for *.fp16.safetensors."),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of the model on the hub."),
    click.option(
        "--offline", "local_files_only", is_flag=True, help="Fetch nothing, and use what the cache of the hub holds."
    ),
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
    """Check that an image can be written at a path that is none of the inputs, under whatever name.

    Args:
        target: the file to write.
        inputs: files that the command reads, or also writes; what is no path of this machine is passed over.

    Raises:
        ImageError: the path cannot be written, or is one of the inputs.
    """
    check_output_path(target)
    for one in map(Path, inputs):
        if resolved(one) == resolved(target) or (target.exists() and one.exists() and target.samefile(one)):
            found, hint = f"it is {str(one)!r} itself, which the command also uses", "choose another name"
            raise ImageError("IMAGE_OUTPUT_PATH", f"output {str(target)!r}", found, hint=hint)


class UserPath(click.Path):
    """A path in which ~ is a home folder, also behind "=", where a shell leaves it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the Path."""
        return super().convert(os.path.expanduser(value), param, ctx)


FILE = UserPath(path_type=Path)


def say(text: str, *, err: bool = False) -> None:
    """Print lines for a person; text in them that came from outside cannot control the terminal.

    Args:
        text: the lines.
        err: print them on standard error.
    """
    click.echo(shown_lines(text), err=err)


@contextmanager
def replacing(target: Path, *, quiet: bool = False) -> Iterator[None]:
    """Say on standard error that a file was replaced, if one was there before the block wrote it.

    Args:
        target: the file.
        quiet: say nothing.
    """
    there = target.exists()
    yield
    if there and not quiet:
        say(f"replaced {shown(target)}", err=True)


def _explained(error: Exception) -> SdInpaintError | None:
    """Return an error as the library explains it; None where neither an input nor the machine is at fault."""
    if isinstance(error, SdInpaintError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SdInpaintError("DISK_FULL", error.filename or "disk", str(error.strerror), hint="free some space")
    if isinstance(error, OSError) and error.filename is not None:
        hint = "check the path, and whether you may read and write there"
        return SdInpaintError("FILE_NOT_USABLE", error.filename, str(error.strerror), hint=hint)
    return out_of_memory(error)


@contextmanager
def _notes(ctx: click.Context) -> Iterator[None]:
    """Show each warning of the library once, as one line on standard error; show others as Python does."""
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
                python_way(shown_lines(str(message)), category, filename, lineno, file, line)
            elif str(message) not in shown:
                shown.add(str(message))
                tqdm.write(f"note: {Wording(ctx.meta[CALLED]).sentence(str(message))}", file=sys.stderr)

        warnings.simplefilter("always", SdInpaintWarning)
        warnings.showwarning = show
        yield
