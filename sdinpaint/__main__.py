"""The entry point of the command line as a process of its own: `sdinpaint` and `python -m sdinpaint`.

A signal, a closed pipe or a full disk under the output end it in good order at any moment, while its own modules are
imported too. So this module imports as little as it can before all that is set up.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

from sdinpaint.on_demand import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

ENVIRONMENT, PIPE_CLOSED = 5, 141
ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    for number in ENDINGS:  # SIGINT too where the shell has it ignored, as for a job in the background
        signal.signal(number, _end)
    _open_streams()
    try:
        os.getcwd()
    except OSError as error:
        sys.stderr.write(f"error: current folder: {error.strerror}\n  hint: change to a folder that exists\n")
        os._exit(ENVIRONMENT)
    try:
        from sdinpaint.cli import main as commands  # noqa: PLC0415 - signals are handled from before it is imported

        commands(prog_name="sdinpaint")
        code: object = 0
    except SystemExit as end:
        code = end.code
    except (ImportError, MemoryError) as error:  # before there is a command line that could explain it
        if isinstance(error, ImportError) and "map segment" not in str(error):
            raise
        sys.stderr.write(f"error: memory: there is no more memory: {error}\n")
        code = ENVIRONMENT
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Unloading torch takes a tenth of a second, in which a signal would change the exit code of what is done.
    os._exit(code if isinstance(code, int) else int(code is not None))


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Remove unfinished files and end the process at once.

    An exception instead would be lost where libraries swallow it: in destructors, callbacks and imports.
    """
    for each in ENDINGS:
        signal.signal(each, signal.SIG_DFL)  # a second one does not wait for the first
    strays = sys.modules.get("sdinpaint_weights.strays")
    if discard := getattr(strays, "discard_unfinished", None):  # None while that module is being imported
        discard()
    line = "\n" * os.isatty(2) + f"{ENDINGS[signal.Signals(number)]}: no unfinished file is left\n"
    try:
        os.write(2, line.encode())  # sys.stderr may be in the middle of a line
    finally:
        os._exit(128 + number)


class _Errors(io.FileIO):
    """Standard error: where it cannot be written, nothing can be told, and the work goes on."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self._lose(error)
            return memoryview(data).nbytes  # type: ignore[arg-type]

    def _lose(self, _: OSError) -> None:
        with open(os.devnull, "w", encoding="ascii") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())


class _Output(_Errors):
    """Standard output: where it cannot be written, the process ends; quietly, if its reader has closed it."""

    def _lose(self, error: OSError) -> None:
        super()._lose(error)  # so that what is flushed on the way out does not fail again
        if error.errno == errno.EPIPE:
            sys.exit(PIPE_CLOSED)
        sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
        sys.exit(ENVIRONMENT)


def _open_streams() -> None:
    """Give the process all three standard streams, so that no file that it opens takes the number of a closed one."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # to write to such an output fails
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    if os.name == "posix":  # a console of Windows is no file
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
        sys.stderr = _text(_Errors(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, previous: io.TextIOWrapper | object) -> io.TextIOWrapper:
    encoding = getattr(previous, "encoding", "utf-8")  # what it has no letters for is written as escapes
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


if __name__ == "__main__":
    main()
