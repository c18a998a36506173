"""Options that change a mask, done in the order in which they are typed: --grow 8 --fill-holes --add other.png."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import click

from sdinpaint.cli.common import together
from sdinpaint.cli.values import SIZE

if TYPE_CHECKING:
    from sdinpaint.masks import Mask

__all__ = ["InOrder", "apply_edits", "edit_options", "open_edits"]

COMBINING = {"add": operator.or_, "subtract": operator.sub, "intersect": operator.and_}
"""Edits by another mask; the others are methods of `Mask`."""
ORDER = "sdinpaint.edits"

Edit = tuple[str, list[Any]]


def _by_pixels(name: str, help: str) -> Any:
    return click.option(f"--{name}", type=float, multiple=True, metavar="PIXELS", help=help)


def _by_mask(name: str, help: str) -> Any:
    return click.option(f"--{name}", multiple=True, metavar="MASK", help=help)


EDITS = {
    "grow": _by_pixels("grow", "Widen the white."),
    "shrink": _by_pixels("shrink", "Narrow the white."),
    "feather": _by_pixels("feather", "Soften its edge, so far to either side."),
    "smooth": _by_pixels("smooth", "Round its corners, and drop what is thinner than two thirds of that."),
    "fill_holes": click.option("--fill-holes", count=True, help="Repaint also what the white encloses."),
    "drop_specks": click.option("--drop-specks", count=True, help="Keep white regions of fewer than 64 pixels."),
    "invert": click.option("--invert", count=True, help="Exchange white and black."),
    "on_lattice": click.option("--on-lattice", count=True, help="Widen to whole 8 x 8 cells, as a model sees it."),
    "resize": click.option("--resize", type=SIZE, multiple=True, help="Scale it to another picture's size."),
    "add": _by_mask("add", "Repaint also what is white in another mask."),
    "subtract": _by_mask("subtract", "Keep what is white in another mask."),
    "intersect": _by_mask("intersect", "Repaint only what is white in another mask, too."),
}
edit_options = together(*EDITS.values())
"""For an `InOrder` command."""


class InOrder(click.Command):
    """A command that knows in which order its edits were typed; each may be given several times."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, and note the order."""
        _, _, typed = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[ORDER] = [option.name for option in typed if option.name in EDITS]
        return super().parse_args(ctx, args)


def open_edits(given: dict[str, Any]) -> tuple[list[Edit], list[str]]:
    """Take the edits out of the command's parameters -> (each with its arguments, in order; the masks they read).

    Raises: ImageError, MaskError for a mask that cannot be read.
    """
    from sdinpaint.masks import Mask

    files = [file for name in COMBINING for file in given[name]]
    typed = {name: given.pop(name) for name in EDITS}
    arguments = {name: [] if isinstance(values, int) else list(values) for name, values in typed.items()}
    arguments |= {name: [Mask.open(file) for file in arguments[name]] for name in COMBINING}
    order = click.get_current_context().meta[ORDER]
    return [(name, [arguments[name].pop(0)] if arguments[name] else []) for name in order], files


def apply_edits(mask: Mask, edits: list[Edit]) -> Mask:
    """The mask after all edits. Raises: MaskError, SettingError."""
    for name, arguments in edits:
        mask = COMBINING[name](mask, *arguments) if name in COMBINING else getattr(mask, name)(*arguments)
    return mask
