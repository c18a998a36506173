"""Options that change a mask, applied in the order in which they are typed: --grow 8 --fill-holes --add other.png."""

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
"""Edits that combine two masks; all others are methods of `Mask`."""
ORDER = "sdinpaint.edits"

Edit = tuple[str, list[Any]]


def _by_pixels(name: str, help: str) -> Any:
    return click.option(f"--{name}", type=float, multiple=True, metavar="PIXELS", help=help)


def _by_mask(name: str, help: str) -> Any:
    return click.option(f"--{name}", multiple=True, metavar="MASK", help=help)


EDITS = {
    "grow": _by_pixels("grow", "Widen the white area by this distance."),
    "shrink": _by_pixels("shrink", "Narrow the white area by this distance."),
    "feather": _by_pixels("feather", "Soften the edge of the white area over this distance to either side."),
    "smooth": _by_pixels("smooth", "Round the outline, and remove parts thinner than two thirds of this distance."),
    "fill_holes": click.option("--fill-holes", count=True, help="Fill black areas that the white area encloses."),
    "drop_specks": click.option("--drop-specks", count=True, help="Turn white regions of fewer than 64 pixels black."),
    "invert": click.option("--invert", count=True, help="Exchange white and black."),
    "on_lattice": click.option(
        "--on-lattice", count=True, help="Widen the white area to whole latent cells of 8 x 8 pixels."
    ),
    "resize": click.option("--resize", type=SIZE, multiple=True, help="Scale the mask to another size."),
    "add": _by_mask("add", "Add the white area of another mask."),
    "subtract": _by_mask("subtract", "Remove the white area of another mask."),
    "intersect": _by_mask("intersect", "Leave white only where another mask is white too."),
}
edit_options = together(*EDITS.values())
"""All edits as options of an `InOrder` command."""


class InOrder(click.Command):
    """A command that remembers the order in which its edits were typed; each may be given several times."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments as usual, and remember the order of the edits."""
        _, _, typed = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[ORDER] = [option.name for option in typed if option.name in EDITS]
        return super().parse_args(ctx, args)


def open_edits(given: dict[str, Any]) -> tuple[list[Edit], list[str]]:
    """Take the edits out of the parameters of the running command.

    Args:
        given: the parameters of the command by name; the edits are removed from it.

    Returns:
        The edits with their arguments, in order, and the paths of the masks that they read.

    Raises:
        ImageError: a mask cannot be read.
        MaskError: a file is no mask.
    """
    from sdinpaint.masks import Mask

    files = [file for name in COMBINING for file in given[name]]
    typed = {name: given.pop(name) for name in EDITS}
    arguments = {name: [] if isinstance(values, int) else list(values) for name, values in typed.items()}
    arguments |= {name: [Mask.open(file) for file in arguments[name]] for name in COMBINING}
    order = click.get_current_context().meta[ORDER]
    return [(name, [arguments[name].pop(0)] if arguments[name] else []) for name in order], files


def apply_edits(mask: Mask, edits: list[Edit]) -> Mask:
    """Apply edits to a mask one after the other.

    Args:
        mask: the mask.
        edits: the edits with their arguments, from `open_edits`.

    Returns:
        The edited mask.

    Raises:
        MaskError: a mask has another size.
        SettingError: an argument is out of range.
    """
    for name, arguments in edits:
        mask = COMBINING[name](mask, *arguments) if name in COMBINING else getattr(mask, name)(*arguments)
    return mask
