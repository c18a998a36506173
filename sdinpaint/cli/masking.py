"""The commands `sdinpaint mask ...`, which make masks, change them, and report what a run would do with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdinpaint.cli.common import FILE, Group, Option, check_output, json_option, replacing, say, together
from sdinpaint.cli.edits import InOrder, apply_edits, edit_options, open_edits
from sdinpaint.cli.values import BOX, COLOR, POINT, SIZE, STROKE
from sdinpaint.cli.wording import as_typed
from sdinpaint.errors import ImageError, shown
from sdinpaint.images.files import save_png

if TYPE_CHECKING:
    from sdinpaint.images.input_image import InputImage
    from sdinpaint.masks import Cover, Mask

__all__ = ["mask"]

SCRIBBLES = ("keep", "repaint")
"""Options that name further input files."""

cover_option = click.option(
    "--cover",
    type=click.Choice(["nearest", "max"]),
    default="max",
    show_default=True,
    help="Mask downsampling that the report assumes: a latent cell of 8 x 8 pixels takes its first pixel (nearest) or "
    "its highest (max).",
)
result_options = together(
    edit_options,
    click.option("--out", "-o", required=True, type=FILE, help="Write the mask to this .png file."),
    cover_option,
    click.option("--quiet", "-q", is_flag=True, help="Print no report about the mask."),
    json_option,
)
"""Options of a command that writes a mask."""


@click.group(cls=Group)
def mask() -> None:
    """Make masks, change them, and check them before a run.

    White pixels of a mask are repainted, and black pixels are kept. Points are X,Y and boxes LEFT,TOP,RIGHT,BOTTOM, in
    pixels from the top left corner of the image. Options that change a mask, such as --grow 8, are applied in the order
    in which they are typed.

    \b
    Examples:
      sdinpaint mask box photo.jpg --at 100,50,300,400 -o mask.png
      sdinpaint mask text photo.jpg "the dog" --model CIDAS/clipseg-rd64-refined -o mask.png --grow 8 --feather 4
      sdinpaint mask edit mask.png --fill-holes --add other.png -o out.png
      sdinpaint mask report mask.png
    """


def _image(path: str) -> InputImage:
    from sdinpaint.images.input_image import read_image

    return read_image(path)


def _size(path: str) -> tuple[int, int]:
    return _image(path).size


@dataclass(frozen=True)
class Kind:
    """A command that makes a mask by a classmethod of `Mask`, whose arguments have the names of its options."""

    method: str
    reads: Callable[[str], Any]
    """Converts the path of IMAGE to the first argument of the method."""
    help: str
    example: str
    options: tuple[Option, ...]


AT_BOX = click.option("--at", "box", type=BOX, required=True, help="Edges of the box, in pixels.")
AT_POINT = click.option("--at", "point", type=POINT, required=True, help="The point, in pixels.")
AROUND = click.option("--box", type=BOX, help="A box around the object, in pixels.")
MODEL = click.option("--model", required=True, metavar="PATH", help="Folder of the model, or owner/name on the hub.")
DEVICE = click.option("--device", metavar="NAME", help="Device that computes, such as cuda.  [default: cpu]")

KINDS = {
    "box": Kind(
        "box",
        _size,
        "Make a mask of a box. The mask has the size of IMAGE.",
        "photo.jpg --at 100,50,300,400",
        (AT_BOX,),
    ),
    "ellipse": Kind(
        "ellipse",
        _size,
        "Make a mask of an ellipse. It touches the edges of the box given by --at. The mask has the size of IMAGE.",
        "photo.jpg --at 100,50,300,400",
        (AT_BOX,),
    ),
    "polygon": Kind(
        "polygon",
        _size,
        "Make a mask of a polygon. The mask has the size of IMAGE.",
        "photo.jpg --point 10,10 --point 200,30 --point 90,180",
        (
            click.option(
                "--point",
                "points",
                type=POINT,
                multiple=True,
                required=True,
                help="A corner of the polygon; give at least three, in order.",
            ),
        ),
    ),
    "strokes": Kind(
        "strokes",
        _size,
        "Make a mask of strokes of a round brush. The mask has the size of IMAGE.",
        "photo.jpg --stroke '10,10 40,30 60,30' --stroke 80,80 --width 12",
        (
            click.option(
                "--stroke",
                "strokes",
                type=STROKE,
                multiple=True,
                required=True,
                help="Points that a stroke runs through; a single point is a dot. May be given several times.",
            ),
            click.option("--width", type=float, required=True, metavar="PIXELS", help="Diameter of the brush."),
        ),
    ),
    "alpha": Kind(
        "from_alpha",
        _image,
        "Make a mask of the transparent pixels of IMAGE.",
        "cutout.png",
        (click.option("--opaque", is_flag=True, help="Repaint the opaque pixels instead of the transparent ones."),),
    ),
    "color": Kind(
        "from_color",
        _image,
        "Make a mask of the pixels of IMAGE that have a colour.",
        "painted.png --color '#ff00ff'",
        (
            click.option("--color", type=COLOR, required=True, help="The colour, as R,G,B, #rrggbb or a name."),
            click.option(
                "--tolerance",
                default=24.0,
                show_default=True,
                help="Largest difference from the colour in each of red, green and blue, 0 to 255.",
            ),
        ),
    ),
    "luminance": Kind(
        "from_luminance",
        _image,
        "Make a mask of the pixels of IMAGE in a range of brightness.",
        "photo.jpg --low 0.9 --high 1",
        (
            click.option("--low", default=0.5, show_default=True, help="Lowest brightness to repaint; 0 is black."),
            click.option("--high", default=1.0, show_default=True, help="Highest brightness to repaint; 1 is white."),
        ),
    ),
    "labels": Kind(
        "from_labels",
        Path,
        "Make a mask of classes in a label map. IMAGE holds one class id per pixel.",
        "segments.png --id 12 --id 14",
        (
            click.option(
                "--id",
                "ids",
                type=int,
                multiple=True,
                required=True,
                help="Class id to repaint; may be given several times.",
            ),
            click.option("--size", type=SIZE, help="Size of the mask, if it differs from that of the map."),
        ),
    ),
    "grabcut": Kind(
        "grabcut",
        _image,
        "Make a mask of the object in a box or under scribbles, by GrabCut.",
        "photo.jpg --box 100,50,300,400",
        (
            AROUND,
            click.option("--keep", metavar="MASK", help="File with white scribbles over pixels that are surely kept."),
            click.option("--repaint", metavar="MASK", help="File with white scribbles over pixels of the object."),
            click.option(
                "--iterations",
                default=5,
                show_default=True,
                help="Rounds of fitting the colours of object and background.",
            ),
        ),
    ),
    "flood": Kind(
        "flood",
        _image,
        "Make a mask of the area coloured like a point and joined to it.",
        "photo.jpg --at 220,140 --tolerance 0.2",
        (
            AT_POINT,
            click.option(
                "--tolerance",
                default=0.1,
                show_default=True,
                help="Largest difference from the colour at the point: 0 takes the same colour only, 1 all colours.",
            ),
        ),
    ),
    "region": Kind(
        "region",
        _image,
        "Make a mask of the region at a point. IMAGE is divided into regions along its edges.",
        "photo.jpg --at 220,140 --scale 400",
        (
            AT_POINT,
            click.option(
                "--scale",
                default=200.0,
                show_default=True,
                help="Scale of the regions; a higher value gives larger regions.",
            ),
        ),
    ),
    "points": Kind(
        "sam",
        _image,
        "Make a mask of the object at points or in a box, by SAM or SAM 2.",
        "photo.jpg --at 220,140 --not 10,10 --model facebook/sam-vit-base",
        (
            click.option(
                "--at", "points", type=POINT, multiple=True, help="A point on the object; may be given several times."
            ),
            click.option(
                "--not",
                "keep_points",
                type=POINT,
                multiple=True,
                help="A point beside the object; may be given several times.",
            ),
            AROUND,
            MODEL,
            DEVICE,
        ),
    ),
    "text": Kind(
        "clipseg",
        _image,
        "Make a mask of what TEXT names, by CLIPSeg.",
        'photo.jpg "the dog" --model CIDAS/clipseg-rd64-refined --grow 8',
        (
            click.argument("text"),
            MODEL,
            DEVICE,
            click.option(
                "--threshold",
                default=0.5,
                show_default=True,
                help="Probability from which a pixel is repainted; lower values repaint more.",
            ),
        ),
    ),
}


def _making(name: str, kind: Kind) -> click.Command:
    """Build the command that makes a mask of one kind."""

    @click.argument("image")
    @together(*kind.options)
    @result_options
    @click.option(
        "--preview", type=FILE, help="Also write IMAGE with the mask over it to this .png, .webp or .jpg file."
    )
    def make(
        image: str, out: Path, preview: Path | None, cover: Cover, quiet: bool, as_json: bool, **given: Any
    ) -> None:
        from sdinpaint.masks import Mask

        edits, files = open_edits(given)
        _check_outputs(out, preview, [image, *files, *(given[name] for name in SCRIBBLES if given.get(name))])
        source = kind.reads(image)
        made = apply_edits(getattr(Mask, kind.method)(source, **given), edits)
        tinted = made.over(image) if preview else None
        with replacing(out, quiet=quiet):
            made.save(out)
        if preview and tinted:
            with replacing(preview, quiet=quiet):
                save_png(tinted, preview, {"mask": out.name})
        _tell(made, cover, quiet, as_json, path=str(out))

    meaning = "White pixels of the mask are repainted, and black pixels are kept."
    help = f"{kind.help} {meaning}\n\n\b\nExample:\n  sdinpaint mask {name} {kind.example} -o mask.png"
    return click.command(name, cls=InOrder, help=help)(make)


for name, kind in KINDS.items():
    mask.add_command(_making(name, kind))


@mask.command(cls=InOrder)
@click.argument("path", metavar="MASK")
@result_options
def edit(path: str, out: Path, cover: Cover, quiet: bool, as_json: bool, **given: Any) -> None:
    """Change MASK by the options, in the order in which they are typed.

    \b
    Example:
      sdinpaint mask edit mask.png --grow 8 --fill-holes --add other.png --subtract third.png -o out.png
    """
    from sdinpaint.masks import Mask

    edits, files = open_edits(given)
    _check_outputs(out, None, [path, *files])
    edited = apply_edits(Mask.open(path), edits)
    with replacing(out, quiet=quiet):
        edited.save(out)
    _tell(edited, cover, quiet, as_json, path=str(out))


@mask.command()
@click.argument("path", metavar="MASK")
@cover_option
@json_option
def report(path: str, cover: Cover, as_json: bool) -> None:
    """Report what a run would do with MASK. Likely mistakes are named with a remedy.

    \b
    Example:
      sdinpaint mask report mask.png --cover nearest
    """
    from sdinpaint.masks import Mask

    _tell(Mask.open(path), cover, quiet=False, as_json=as_json, path=path)


@mask.command()
@click.argument("image")
@click.argument("path", metavar="MASK")
@click.option("--out", "-o", required=True, type=FILE, help="Write the preview to this .png, .webp or .jpg file.")
def preview(image: str, path: str, out: Path) -> None:
    """Show MASK over IMAGE.

    \b
    Example:
      sdinpaint mask preview photo.jpg mask.png -o preview.png
    """
    from sdinpaint.masks import Mask

    check_output(out, [image, path])
    with replacing(out):
        save_png(Mask.open(path).over(image), out, {"mask": Path(path).name})


def _check_outputs(out: Path, preview: Path | None, inputs: Iterable[str]) -> None:
    """Check the output files before anything is computed."""
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
        say(f"{shown(path)}\n{as_typed(str(told))}")
