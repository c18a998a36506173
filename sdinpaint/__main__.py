"""`python -m sdinpaint` is the command line, as `sdinpaint` is."""

from sdinpaint.cli import main

if __name__ == "__main__":
    main(prog_name="sdinpaint")
