"""The entry point of the command line: `sdinpaint`, `python -m sdinpaint` and `python -m sdinpaint.cli`."""

from __future__ import annotations

import signal
import sys

INTERRUPTED, TERMINATED = 130, 143


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it quietly, also while libraries are being imported."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from sdinpaint.cli import main as commands  # noqa: PLC0415 - what it imports can be interrupted too

        commands(prog_name="sdinpaint")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _terminate(*_: object) -> None:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
