"""`python -m sdinpaint.cli` is the command `sdinpaint`."""

from __future__ import annotations

from sdinpaint.cli import main

main(prog_name="sdinpaint")
