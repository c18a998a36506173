"""The command line. What needs torch is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
ENVIRONMENT_CODES = {
    "IMAGE_NOT_WRITTEN",
    "CKPT_NOT_WRITTEN",
    "CKPT_NO_SPACE",
    "SETTING_DEVICE",
    "OUT_OF_MEMORY",
    "DISK_FULL",
    "HUB_CACHE",
    "HUB_UNREACHABLE",
}
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
SPACINGS = ("leading", "linspace", "trailing", "karras")
DTYPES = ("auto", "float32", "float16", "bfloat16")
LOADING = (
    *("config", "vae", "controlnet", "base", "tokenizer", "prediction", "variant", "revision"),
    *("local_files_only", "ema", "device", "dtype"),
)
"""Options that `sdinpaint.load` takes; the others are those of `Pipeline.inpaint` and `Pipeline.vary`."""

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


def hub_options(command: Callable[..., None]) -> Callable[..., None]:
    """For a command that takes a model of the hub."""
    for option in (
        click.option("--offline", "local_files_only", is_flag=True, help="Of the hub, use what its cache holds."),
        click.option("--revision", metavar="NAME", help="A branch, tag or commit of the model on the hub."),
        click.option("--variant", metavar="NAME", help="Of a folder's files, e.g. fp16 for *.fp16.safetensors."),
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """For a command that paints pictures: what is to be painted."""
    return _with(
        command,
        click.option("--prompt", "-p", required=True, metavar="TEXT", help="What is to be painted."),
        click.option(
            "--model",
            required=True,
            metavar="PATH",
            help="A .safetensors or .ckpt file, a diffusers folder, owner/name on the hub, or demo.",
        ),
        click.option(
            "--out", "-o", required=True, type=click.Path(path_type=Path), help="A .png, .webp (lossless) or .jpg file."
        ),
        click.option("--negative", "-n", "negative_prompt", default="", metavar="TEXT", help="What is not to be seen."),
        click.option(
            "--seed", "-s", "seeds", type=int, multiple=True, help="Give several for several pictures. Default: drawn."
        ),
        click.option("--steps", default=30, show_default=True, help="More take longer; 20 to 50 are usual."),
        click.option(
            "--guidance", "--cfg-scale", "guidance_scale", default=7.5, show_default=True, help="Weight of the prompt."
        ),
        click.option("--sampler", type=click.Choice(SAMPLERS), default="ddim", show_default=True),
        click.option("--spacing", type=click.Choice(SPACINGS), help="Of the steps. Default: the sampler's own."),
        click.option("--eta", type=float, help="Fresh noise in each step, 0 to 1. Default: the sampler's own."),
    )


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """For a command that paints pictures: which model does it, and where."""
    return _with(
        command,
        click.option("--device", metavar="NAME", help="cpu, cuda or cuda:1. Default: the GPU where there is one."),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="auto", help="Default: float32 on a CPU, float16 on a GPU."
        ),
        click.option("--vae", metavar="PATH", help="Another autoencoder."),
        click.option(
            "--config", metavar="FOLDER", help="JSON files in the diffusers layout for a single file that needs them."
        ),
        click.option("--base", metavar="PATH", help="A model that supplies what a UNet alone lacks."),
        click.option("--tokenizer", metavar="PATH", help="CLIP's vocabulary, where it is not found by itself."),
        click.option(
            "--prediction", type=click.Choice(("eps", "v")), help="v for SD 2 at 768 pixels, where nothing tells it."
        ),
        click.option("--ema", is_flag=True, help="Use the averaged weights of the UNet."),
        hub_options,
        click.option("--quiet", "-q", is_flag=True, help="No progress and no summary."),
        json_option,
    )


def _with(command: Callable[..., None], *options: Callable[..., Any]) -> Callable[..., None]:
    for option in reversed(options):  # the help shows first what was added last
        command = option(command)
    return command


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
@run_options
@click.option(
    "--strength", default=1.0, show_default=True, help="Below 1, the repaint starts from what the picture shows."
)
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
@click.option("--controlnet", metavar="PATH", help="A ControlNet, file or folder.")
@click.option("--control-scale", default=1.0, show_default=True, help="Weight of the ControlNet.")
@click.option("--control-start", default=0.0, show_default=True, help="Share of the steps before it is asked.")
@click.option("--control-end", default=1.0, show_default=True, help="Share of the steps after which it is not.")
@click.option("--control-image", metavar="PICTURE", help="What it is shown, if not the picture without the hole.")
@model_options
def inpaint(**given: Any) -> None:
    """Repaint IMAGE where the mask is white.

    The result has the size of IMAGE, and its settings are stored inside: sdinpaint inspect OUT shows them.

    \b
    Examples:
      sdinpaint inpaint photo.jpg --mask mask.png --prompt "a red fox" --model sd-v1-5-inpainting.ckpt --out out.png
      sdinpaint inpaint photo.jpg -m mask.png -p "a red fox" --model folder/ -o out.png -s 1 -s 2 --sampler euler
    The second writes out-1.png and out-2.png.
    """
    _paint(**given)


@main.command()
@click.argument("image")
@run_options
@click.option("--strength", default=0.6, show_default=True, help="The higher, the less is left of the picture.")
@model_options
def vary(**given: Any) -> None:
    """Paint the whole of IMAGE anew: image to image, without a mask.

    \b
    Example:
      sdinpaint vary photo.jpg --prompt "an oil painting" --model sd-v1-5.ckpt --out out.png --strength 0.5
    """
    _paint(**given)


def _paint(
    image: str,
    prompt: str,
    model: str,
    out: Path,
    negative_prompt: str,
    seeds: tuple[int, ...],
    quiet: bool,
    as_json: bool,
    mask: str | None = None,
    control_image: str | None = None,
    **options: Any,
) -> None:
    """Run `Pipeline.inpaint`, or without a mask `Pipeline.vary`, once for every seed."""
    from sdinpaint.images import read_picture
    from sdinpaint.loading import load
    from sdinpaint.masks import read_mask
    from sdinpaint.settings import Settings, check_prompt, check_seed, require_no_control

    # All that can be wrong beside the model is found before the model is loaded.
    drawn = [check_seed(seed) for seed in seeds or (None,)]
    targets = _targets(out, len(drawn), inputs=[path for path in (image, mask, control_image) if path is not None])
    loading = {name: options.pop(name) for name in LOADING if name in options}
    settings = Settings(**options)
    if loading.get("controlnet") is None:
        require_no_control(settings, control_image)
    check_prompt("prompt", prompt), check_prompt("negative_prompt", negative_prompt)
    picture = read_picture(image)
    if mask is not None:
        options["mask"] = read_mask(mask, picture.size)
    if control_image is not None:
        options["control_image"] = read_picture(control_image, "control_image")
    show_progress = not quiet and not as_json
    pipe = load(model, **loading, progress=show_progress)
    paint = pipe.vary if mask is None else pipe.inpaint

    height, width = picture.size
    done: list[dict[str, Any]] = []
    for seed, target in zip(drawn, targets, strict=True):
        started = time.perf_counter()
        result = paint(
            picture, prompt=prompt, negative_prompt=negative_prompt, seed=seed, progress=show_progress, **options
        )
        used = {**result.settings, "size": f"{width}x{height}", "model": Path(model).name, "version": __version__}
        save_png(result.image, target, used)
        seconds = round(time.perf_counter() - started, 1)
        done.append({"path": str(target), "seconds": seconds, **used})
        if show_progress:
            click.echo(f"{target}: {width} x {height} pixels, seed {seed}, {seconds} s")
    if as_json:
        click.echo(json.dumps({"pictures": done}, indent=2))


@main.command()
@click.argument("path")
@click.option("--hash", is_flag=True, help="Also the SHA-256 of the weights files, which reads them through.")
@hub_options
@json_option
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Say what a checkpoint is, why, and whether it loads.

    PATH is a weights file, a diffusers folder, owner/name on the hub, or demo; only headers are read, of what is
    fetched if need be. For a picture that sdinpaint wrote, the settings that it was made with are shown.

    \b
    Examples:
      sdinpaint inspect sd-v1-5-inpainting.ckpt
      sdinpaint inspect out.png --json
    """
    from sdinpaint.inspecting import inspect as report_on

    if Path(path).suffix.lower() in SUFFIXES:
        click.echo(json.dumps(read_settings(path), indent=2))
        return
    report = report_on(path, **options)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else str(report))


def writing_options(command: Callable[..., None]) -> Callable[..., None]:
    """For a command that writes a checkpoint."""
    return _with(
        command,
        click.option("--dtype", type=click.Choice(("fp32", "fp16", "bf16")), help="Default: each tensor's own."),
        click.option("--vae", metavar="PATH", help="Another autoencoder."),
        click.option("--config", metavar="FOLDER", help="JSON files in the diffusers layout that it needs."),
        click.option("--prediction", type=click.Choice(("eps", "v")), help="Where nothing in the checkpoint tells."),
        hub_options,
        click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote."),
        click.option("--quiet", "-q", is_flag=True, help="No progress and no summary."),
    )


@main.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--layout", type=click.Choice(("diffusers", "ldm")), help="Default: ldm, one file, if TARGET is a .safetensors."
)
@click.option("--ema", is_flag=True, help="Take the averaged weights of the UNet.")
@click.option("--base", metavar="PATH", help="A model that supplies what SOURCE lacks.")
@writing_options
def convert(source: str, target: Path, quiet: bool, **options: Any) -> None:
    """Write SOURCE in another layout or dtype: TARGET is a diffusers folder, or one .safetensors file.

    SOURCE is a whole model, a VAE or a ControlNet. Without --dtype every bit is kept.

    \b
    Examples:
      sdinpaint convert sd-v1-5-inpainting.ckpt sd-inpainting/ --dtype fp16
      sdinpaint convert sd-inpainting/ sd-inpainting.safetensors
    """
    from sdinpaint.converting import convert as write

    write(source, target, progress=not quiet, **options)
    _say_written(target, quiet)


@main.command()
@click.argument("custom")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="PATH", help="The text-to-image model that CUSTOM was trained from.")
@click.option("--inpaint", metavar="PATH", help="The inpainting model of that base.")
@writing_options
def merge(custom: str, out: Path, quiet: bool, **options: Any) -> None:
    """Make an inpainting model of CUSTOM, a text-to-image model: custom + inpaint - base.

    Without --base and --inpaint the new input channels are zeros: a start for training. VAE and text encoder are
    CUSTOM's. OUT is a .safetensors file, or a diffusers folder.

    \b
    Example:
      sdinpaint merge custom.safetensors out.safetensors --base v1-5.ckpt --inpaint sd-v1-5-inpainting.ckpt
    """
    from sdinpaint.merging import to_inpainting

    to_inpainting(custom, out, progress=not quiet, **options)
    _say_written(out, quiet)


def _say_written(target: Path, quiet: bool) -> None:
    if not quiet:
        files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
        click.echo(f"{target}: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB")


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
