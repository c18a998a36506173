"""`python -m sdinpaint.cli` is the command `sdinpaint`."""

from sdinpaint.__main__ import main

main()
