"""The command line. What needs torch is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from tqdm import tqdm

from sdinpaint import __version__
from sdinpaint.errors import ImageError, SdInpaintError, SdInpaintWarning
from sdinpaint.picture_io import SUFFIXES, check_output_path, read_settings, save_png

__all__ = ["main"]

BAD_INPUT, ENVIRONMENT, INTERRUPTED = 3, 5, 130
ENVIRONMENT_CODES = {"IMAGE_NOT_WRITTEN", "SETTING_DEVICE", "OUT_OF_MEMORY", "DISK_FULL"}
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
SPACINGS = ("leading", "linspace", "trailing", "karras")
DTYPES = ("auto", "float32", "float16", "bfloat16")
LOADING = ("config", "vae", "tokenizer", "variant", "ema", "device", "dtype")
"""Options of `inpaint` that `sdinpaint.load` takes; the others are those of `Pipeline.inpaint`."""

JSON = "sdinpaint.json"


class Commands(click.Group):
    """A group whose commands end with an error's explanation and exit code instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            with _notes():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted: no unfinished file is left", err=True)
            ctx.exit(INTERRUPTED)
        except (SdInpaintError, MemoryError, OSError, RuntimeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            if ctx.meta.get(JSON):
                click.echo(json.dumps({"error": explained.to_json()}, indent=2))
            else:
                click.echo(f"error: {explained}", err=True)
            ctx.exit(ENVIRONMENT if explained.code in ENVIRONMENT_CODES else BAD_INPUT)


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember_json, help="Print one JSON object: the result, or the error."
)
variant_option = click.option(
    "--variant", metavar="NAME", help="Of a folder's files, e.g. fp16 for *.fp16.safetensors."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sdinpaint")
def main() -> None:
    """Change the part of a picture under a mask, and keep the rest bit for bit.

    \b
    sdinpaint demo                       see it work, with the small checkpoint that is included
    sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model MODEL --out out.png

    \b
    Exit codes: 0 done, 2 wrong usage, 3 unusable input (nothing was written),
    5 environment (memory, disk, device), 130 interrupted.
    """


@main.command()
@click.argument("image")
@click.option("--mask", "-m", required=True, metavar="PICTURE", help="White is repainted, black is kept.")
@click.option("--prompt", "-p", required=True, metavar="TEXT", help="What is to be seen where the mask is white.")
@click.option(
    "--model", required=True, metavar="PATH", help="A .safetensors or .ckpt file, a diffusers folder, or demo."
)
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="A .png, .webp (lossless) or .jpg file."
)
@click.option("--negative", "-n", "negative_prompt", default="", metavar="TEXT", help="What is not to be seen.")
@click.option(
    "--seed", "-s", "seeds", type=int, multiple=True, help="Give several for several pictures. Default: drawn."
)
@click.option("--steps", default=30, show_default=True, help="More take longer; 20 to 50 are usual.")
@click.option(
    "--guidance", "--cfg-scale", "guidance_scale", default=7.5, show_default=True, help="Weight of the prompt."
)
@click.option("--sampler", type=click.Choice(SAMPLERS), default="ddim", show_default=True)
@click.option("--spacing", type=click.Choice(SPACINGS), help="Of the steps. Default: the sampler's own.")
@click.option(
    "--strength", default=1.0, show_default=True, help="Below 1, the repaint starts from what the picture shows."
)
@click.option("--eta", type=float, help="Fresh noise in each step, 0 to 1. Default: the sampler's own.")
@click.option(
    "--cover",
    type=click.Choice(["nearest", "max"]),
    default="nearest",
    show_default=True,
    help="max also repaints where the mask only touches an 8 x 8 cell.",
)
@click.option(
    "--paste-back/--no-paste-back", default=True, help="Keep black pixels of the mask bit for bit.  [default: on]"
)
@click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: the GPU where there is one.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Default: float32 on a CPU, float16 on a GPU.")
@click.option("--vae", metavar="PATH", help="Another autoencoder.")
@click.option(
    "--config", metavar="FOLDER", help="JSON files in the diffusers layout for a single file that needs them."
)
@click.option("--tokenizer", metavar="PATH", help="CLIP's vocabulary, where it is not found by itself.")
@click.option("--ema", is_flag=True, help="Use the averaged weights of the UNet.")
@variant_option
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
@json_option
def inpaint(
    image: str,
    mask: str,
    prompt: str,
    model: str,
    out: Path,
    negative_prompt: str,
    seeds: tuple[int, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Repaint IMAGE where the mask is white.

    The result has the size of IMAGE, and its settings are stored inside: sdinpaint inspect OUT shows them.

    \b
    Examples:
      sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model sd-v1-5-inpainting.ckpt --out out.png
      sdinpaint inpaint photo.jpg -m mask.png -p "a red fox" --model folder/ -o out.png -s 1 -s 2 --sampler euler
    The second writes out-1.png and out-2.png.
    """
    from sdinpaint.images import read_picture
    from sdinpaint.loading import load
    from sdinpaint.masks import read_mask
    from sdinpaint.settings import Settings, check_prompt, check_seed

    # All that can be wrong beside the model is found before the model is loaded.
    drawn = [check_seed(seed) for seed in seeds or (None,)]
    targets = _targets(out, len(drawn), inputs=(image, mask))
    loading = {name: options.pop(name) for name in LOADING}
    Settings(**options)
    check_prompt("prompt", prompt), check_prompt("negative_prompt", negative_prompt)
    picture = read_picture(image)
    soft = read_mask(mask, picture.size)
    show_progress = not quiet and not as_json
    pipe = load(model, **loading, progress=show_progress)

    height, width = picture.size
    done: list[dict[str, Any]] = []
    for seed, target in zip(drawn, targets, strict=True):
        started = time.perf_counter()
        result = pipe.inpaint(
            picture, soft, prompt, negative_prompt=negative_prompt, seed=seed, progress=show_progress, **options
        )
        settings = {**result.settings, "size": f"{width}x{height}", "model": Path(model).name, "version": __version__}
        save_png(result.image, target, settings)
        seconds = round(time.perf_counter() - started, 1)
        done.append({"path": str(target), "seconds": seconds, **settings})
        if show_progress:
            click.echo(f"{target}: {width} x {height} pixels, seed {seed}, {seconds} s")
    if as_json:
        click.echo(json.dumps({"pictures": done}, indent=2))


@main.command()
@click.argument("path")
@variant_option
@json_option
def inspect(path: str, variant: str | None, as_json: bool) -> None:
    """Say what a checkpoint is, why, and whether it loads.

    PATH is a weights file, a diffusers folder, or demo; only headers are read. For a picture that sdinpaint wrote, the
    settings that it was made with are shown.

    \b
    Examples:
      sdinpaint inspect sd-v1-5-inpainting.ckpt
      sdinpaint inspect out.png --json
    """
    from sdinpaint.inspecting import inspect as report_on

    if Path(path).suffix.lower() in SUFFIXES:
        click.echo(json.dumps(read_settings(path), indent=2))
        return
    report = report_on(path, variant=variant)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else str(report))


@main.command()
@click.option("--out", "-o", default=".", show_default=True, metavar="FOLDER", type=click.Path(path_type=Path))
def demo(out: Path) -> None:
    """Repaint some drawn scenes with the included checkpoint.

    Writes one sheet of pictures, FOLDER/sdinpaint-demo.png. Needs no network, and less than a minute on two CPU cores.

    \b
    Example:
      sdinpaint demo --out out
    """
    from sdinpaint.demonstration import demonstrate

    click.echo("Repainting drawn scenes with the included checkpoint ...")
    done = demonstrate(out)
    click.echo(f"{done.pictures} pictures in {done.seconds:.0f} s, each with all its known pixels kept bit for bit.")
    click.echo(f"Look at them: {done.path}")
    click.echo("\nThe same on a picture of yours, with released weights (white in the mask is repainted):")
    click.echo('  sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model MODEL --out out.png')


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory.

    \b
    Example:
      sdinpaint doctor
    """
    from sdinpaint.doctor import examine

    found = examine()
    width = max(map(len, found))
    lines = (f"{name:<{width}}  {value}" for name, value in found.items())
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))


def _targets(out: Path, count: int, inputs: Sequence[str]) -> list[Path]:
    """The files to write: `out`, or out-1, out-2, ... beside it; none of them is an input. Raises: ImageError."""
    names = [out] if count == 1 else [out.with_stem(f"{out.stem}-{index + 1}") for index in range(count)]
    given = {Path(one).resolve() for one in inputs}
    for target in names:
        check_output_path(target)
        if target.resolve() in given:
            found, hint = "it is the picture or the mask itself", "choose another name"
            raise ImageError("IMAGE_OUTPUT_PATH", f"output {str(target)!r}", found, hint=hint)
    return names


def _explained(error: Exception) -> SdInpaintError | None:
    """What went wrong as the library says it; None for what is neither an input's nor the machine's fault."""
    if isinstance(error, SdInpaintError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        reason = (str(error).splitlines() or ["out of memory"])[0]
        hint = "close other programs, take a smaller picture, or on a GPU give --dtype float16 or --device cpu"
        return SdInpaintError("OUT_OF_MEMORY", "memory", reason, hint=hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SdInpaintError("DISK_FULL", error.filename or "disk", str(error.strerror), hint="free some space")
    return None


@contextmanager
def _notes() -> Iterator[None]:
    """Show warnings of the library as one line on standard error each, once; others as Python does."""
    with warnings.catch_warnings():
        shown: set[str] = set()
        python_way = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, SdInpaintWarning):
                python_way(message, category, filename, lineno, file, line)
            elif str(message) not in shown:
                shown.add(str(message))
                tqdm.write(f"note: {message}", file=sys.stderr)

        warnings.simplefilter("always", SdInpaintWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
