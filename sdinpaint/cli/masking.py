"""The commands `sdinpaint mask ...`: they make masks, change them, and tell what a model would make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdinpaint.cli.common import Group, Option, check_output, json_option, together
from sdinpaint.cli.edits import InOrder, apply_edits, edit_options, open_edits
from sdinpaint.cli.values import BOX, COLOR, POINT, SIZE, STROKE
from sdinpaint.errors import ImageError
from sdinpaint.images.files import save_png

if TYPE_CHECKING:
    from sdinpaint.images.picture import Picture
    from sdinpaint.masks import Cover, Mask

__all__ = ["mask"]

SCRIBBLES = ("keep", "repaint")
"""Options that name further pictures to read."""
FILE = click.Path(path_type=Path)

cover_option = click.option(
    "--cover", type=click.Choice(["nearest", "max"]), default="max", help="Of the run that the report is about."
)
result_options = together(
    edit_options,
    click.option("--out", "-o", required=True, type=FILE, help="The mask, a .png file."),
    cover_option,
    click.option("--quiet", "-q", is_flag=True, help="No report."),
    json_option,
)
"""For a command that writes a mask."""


@click.group(cls=Group)
def mask() -> None:
    """Make masks, change them, and see what they would do. White is repainted, black is kept.

    Points are X,Y and boxes LEFT,TOP,RIGHT,BOTTOM, in pixels from the top left corner. What changes a mask, such as
    --grow 8, is done in the order in which it is typed.

    \b
    Examples:
      sdinpaint mask box photo.jpg --at 100,50,300,400 -o mask.png
      sdinpaint mask text photo.jpg "the dog" --model CIDAS/clipseg-rd64-refined -o mask.png --grow 8 --feather 4
      sdinpaint mask edit mask.png --fill-holes --add other.png -o out.png
      sdinpaint mask report mask.png
    """


def _picture(image: str) -> Picture:
    from sdinpaint.images.picture import read_picture

    return read_picture(image)


def _size(image: str) -> tuple[int, int]:
    return _picture(image).size


@dataclass(frozen=True)
class Kind:
    """A command that makes a mask by a classmethod of `Mask`, after whose arguments its own options are named."""

    method: str
    reads: Callable[[str], Any]
    """What the method takes first, of the path that was given."""
    help: str
    example: str
    options: tuple[Option, ...]


AT_BOX = click.option("--at", "box", type=BOX, required=True, help="Its edges.")
AT_POINT = click.option("--at", "point", type=POINT, required=True, help="A point of it.")
AROUND = click.option("--box", type=BOX, help="A box around it.")
MODEL = click.option("--model", required=True, metavar="PATH", help="A folder, or owner/name on the hub.")

KINDS = {
    "box": Kind("box", _size, "A box.", "photo.jpg --at 100,50,300,400", (AT_BOX,)),
    "ellipse": Kind("ellipse", _size, "The ellipse in a box.", "photo.jpg --at 100,50,300,400", (AT_BOX,)),
    "polygon": Kind(
        "polygon",
        _size,
        "The inside of an outline.",
        "photo.jpg --point 10,10 --point 200,30 --point 90,180",
        (click.option("--point", "points", type=POINT, multiple=True, required=True, help="Its corners, in order."),),
    ),
    "strokes": Kind(
        "strokes",
        _size,
        "Strokes of a round brush.",
        "photo.jpg --stroke '10,10 40,30 60,30' --stroke 80,80 --width 12",
        (
            click.option(
                "--stroke", "strokes", type=STROKE, multiple=True, required=True, help="Its points; one is a dot."
            ),
            click.option("--width", type=float, required=True, metavar="PIXELS", help="Of the brush."),
        ),
    ),
    "alpha": Kind(
        "from_alpha",
        _picture,
        "What is transparent in IMAGE.",
        "cutout.png",
        (click.option("--opaque", is_flag=True, help="What is opaque instead."),),
    ),
    "color": Kind(
        "from_color",
        _picture,
        "What has a colour in IMAGE.",
        "painted.png --color '#ff00ff'",
        (
            click.option("--color", type=COLOR, required=True, help="As R,G,B, #rrggbb or a name."),
            click.option("--tolerance", default=24.0, show_default=True, help="Largest difference of R, G and B."),
        ),
    ),
    "luminance": Kind(
        "from_luminance",
        _picture,
        "What is as bright as said in IMAGE.",
        "photo.jpg --low 0.9 --high 1",
        (
            click.option("--low", default=0.5, show_default=True, help="From 0, black,"),
            click.option("--high", default=1.0, show_default=True, help="to 1, white."),
        ),
    ),
    "labels": Kind(
        "from_labels",
        Path,
        "Classes of IMAGE, a map of class ids.",
        "segments.png --id 12 --id 14",
        (
            click.option("--id", "ids", type=int, multiple=True, required=True, help="A class to be repainted."),
            click.option("--size", type=SIZE, help="Of the picture, where the map's is another."),
        ),
    ),
    "grabcut": Kind(
        "grabcut",
        _picture,
        "The object in a box or under scribbles.",
        "photo.jpg --box 100,50,300,400",
        (
            AROUND,
            click.option("--keep", metavar="MASK", help="Scribbles over what is surely kept."),
            click.option("--repaint", metavar="MASK", help="Scribbles over what is surely repainted."),
            click.option("--iterations", default=5, show_default=True, help="Rounds of learning its colours."),
        ),
    ),
    "flood": Kind(
        "flood",
        _picture,
        "The area coloured like a point.",
        "photo.jpg --at 220,140 --tolerance 0.2",
        (
            AT_POINT,
            click.option("--tolerance", default=0.1, show_default=True, help="0 is the same colour, 1 all of them."),
        ),
    ),
    "region": Kind(
        "region",
        _picture,
        "The region at a point, up to its edges.",
        "photo.jpg --at 220,140 --scale 400",
        (AT_POINT, click.option("--scale", default=200.0, show_default=True, help="The higher, the larger.")),
    ),
    "points": Kind(
        "sam",
        _picture,
        "The object at points or in a box, by SAM or SAM 2.",
        "photo.jpg --at 220,140 --not 10,10 --model facebook/sam-vit-base",
        (
            click.option("--at", "points", type=POINT, multiple=True, help="A point of it; give several for more."),
            click.option("--not", "keep_points", type=POINT, multiple=True, help="A point beside it."),
            AROUND,
            MODEL,
        ),
    ),
    "text": Kind(
        "clipseg",
        _picture,
        "What TEXT names, by CLIPSeg.",
        'photo.jpg "the dog" --model CIDAS/clipseg-rd64-refined --grow 8',
        (
            click.argument("text"),
            MODEL,
            click.option("--threshold", default=0.5, show_default=True, help="The lower, the more."),
        ),
    ),
}


def _making(name: str, kind: Kind) -> click.Command:
    """The command that makes a mask of that kind."""

    @click.argument("image")
    @together(*kind.options)
    @result_options
    @click.option("--preview", type=FILE, help="A .png, .webp or .jpg file: IMAGE with the mask over it.")
    def make(
        image: str, out: Path, preview: Path | None, cover: Cover, quiet: bool, as_json: bool, **given: Any
    ) -> None:
        from sdinpaint.masks import Mask

        edits, files = open_edits(given)
        _check_outputs(out, preview, [image, *files, *(given[name] for name in SCRIBBLES if given.get(name))])
        source = kind.reads(image)
        made = apply_edits(getattr(Mask, kind.method)(source, **given), edits)
        tinted = made.over(image) if preview else None
        made.save(out)
        if preview and tinted:
            save_png(tinted, preview, {"mask": out.name})
        _tell(made, cover, quiet, as_json, path=str(out))

    help = f"{kind.help}\n\n\b\nExample:\n  sdinpaint mask {name} {kind.example} -o mask.png"
    return click.command(name, cls=InOrder, help=help)(make)


for name, kind in KINDS.items():
    mask.add_command(_making(name, kind))


@mask.command(cls=InOrder)
@click.argument("path", metavar="MASK")
@result_options
def edit(path: str, out: Path, cover: Cover, quiet: bool, as_json: bool, **given: Any) -> None:
    """Change MASK.

    \b
    Example:
      sdinpaint mask edit mask.png --grow 8 --fill-holes --add other.png --subtract third.png -o out.png
    """
    from sdinpaint.masks import Mask

    edits, files = open_edits(given)
    _check_outputs(out, None, [path, *files])
    edited = apply_edits(Mask.open(path), edits)
    edited.save(out)
    _tell(edited, cover, quiet, as_json, path=str(out))


@mask.command()
@click.argument("path", metavar="MASK")
@cover_option
@json_option
def report(path: str, cover: Cover, as_json: bool) -> None:
    """Say what MASK would do, and what looks like a mistake.

    \b
    Example:
      sdinpaint mask report mask.png --cover nearest
    """
    from sdinpaint.masks import Mask

    _tell(Mask.open(path), cover, quiet=False, as_json=as_json, path=path)


@mask.command()
@click.argument("image")
@click.argument("path", metavar="MASK")
@click.option("--out", "-o", required=True, type=FILE, help="A .png, .webp or .jpg file.")
def preview(image: str, path: str, out: Path) -> None:
    """Show MASK over IMAGE.

    \b
    Example:
      sdinpaint mask preview photo.jpg mask.png -o preview.png
    """
    from sdinpaint.masks import Mask

    check_output(out, [image, path])
    save_png(Mask.open(path).over(image), out, {"mask": Path(path).name})


def _check_outputs(out: Path, preview: Path | None, inputs: Iterable[str]) -> None:
    """Before anything is computed. Raises: ImageError."""
    if out.suffix.lower() != ".png":
        found = f"the extension {out.suffix!r}" if out.suffix else "no extension"
        hint = "other formats may change a mask's values"
        raise ImageError("IMAGE_OUTPUT_TYPE", f"output {str(out)!r}", found, expected=".png", hint=hint)
    check_output(out, inputs)
    if preview:
        check_output(preview, [*inputs, out])


def _tell(mask: Mask, cover: Cover, quiet: bool, as_json: bool, path: str) -> None:
    told = mask.report(cover)
    if as_json:
        click.echo(json.dumps({"path": path, **told.to_json()}, indent=2))
    elif not quiet:
        click.echo(f"{path}\n{told}")
