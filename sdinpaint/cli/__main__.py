"""`python -m sdinpaint.cli` is the command `sdinpaint`."""

from __future__ import annotations

from sdinpaint.__main__ import main

main()
