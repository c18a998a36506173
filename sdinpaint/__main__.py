"""The entry point of the command line: `sdinpaint` and `python -m sdinpaint`."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly, also while its own modules are being imported."""
    try:
        from sdinpaint.cli import main as commands  # noqa: PLC0415 - what it imports can be interrupted too

        commands(prog_name="sdinpaint")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
