"""Settings of the process change no run: torch's defaults and modes, random states, folder, locale."""

from __future__ import annotations

import locale
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from closeness import close, same_image
from painting import IMAGE, MASK, pixels, random_image
from PIL import Image

import sdinpaint
from sdinpaint import Mask, metrics
from sdinpaint.sampling import find_sampler, schedule, schedules

SECONDS = 120
OPTIONS = {"steps": 2, "seed": 5, "progress": False}


class World:
    """A small pipeline and its files, which operations work on."""

    def __init__(self, pipe, folder):
        self.pipe, self.folder = pipe, folder
        self.model = folder / "model"
        sdinpaint.save_diffusers(self.model, pipe, torch.float16)
        self.known = pipe.encode_image(IMAGE, MASK)
        self.cond, self.uncond = pipe.encode_prompts(["a red fox", ""])
        self.noise = torch.randn(self.known.latents.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(tiny, vocabulary, tmp_path_factory):
    return World(random_pipeline(small(tiny), vocabulary), tmp_path_factory.mktemp("world"))


def load(world, **options):
    return sdinpaint.load(world.model, progress=False, **options)


def weights(world):
    pipe = load(world)
    parts = pipe.unet, pipe.vae, *pipe.condition.encoders
    return [tensor for part in parts for _, tensor in sorted(part.state_dict().items())]


def offloaded(world):
    return pixels(load(world, offload=True).inpaint(IMAGE, MASK, "a fox", **OPTIONS).image)


def inpaint(world, **options):
    return pixels(world.pipe.inpaint(IMAGE, MASK, "a fox", **OPTIONS | options).image)


def encode_image(world):
    return [*vars(world.pipe.encode_image(IMAGE, MASK)).values()]


def encode_prompts(world):
    return [one.context for one in world.pipe.encode_prompts(["a red fox", ["", "a cube"]])]


def sampled(world, sampler, spacing):
    """Every step by its name, as the README has it."""
    path = schedule(sampler, spacing, world.pipe.family.schedule, 3)
    denoise = world.pipe.denoiser(world.known, world.cond, world.uncond, guidance_scale=5.0)
    run = find_sampler(sampler).run
    x = run(denoise, schedules.start(world.noise, path), path, noise=lambda x: x.roll(1, -1))
    return [path, x, schedules.finish(x, path)]


def decode(world):
    return world.pipe.decode(world.noise)


def masks(world):
    mask = Mask.ellipse((64, 72), (9, 12, 50, 44)) | Mask.polygon((64, 72), [(3, 3), (30, 5), (9, 40)])
    edited = mask.grow(3).feather(2).smooth(3).fill_holes().drop_specks().resize((60, 90)).on_lattice()
    seen = Mask.grabcut(IMAGE, box=(8, 8, 50, 50)) | Mask.flood(IMAGE, (5, 5), 0.3) | Mask.region(IMAGE, (9, 9))
    return [edited.array, seen.array, np.array(str(edited.report()).encode())]


def measures(world):
    other = random_image(64, 72, seed=1)
    scores = metrics.scores(IMAGE, np.where(MASK[..., None], other, IMAGE), MASK)
    return np.array([*scores.to_json().values(), metrics.psnr(IMAGE, other), metrics.ssim(IMAGE, other)], np.float64)


def convert(world):
    target = world.folder / "converted.safetensors"
    sdinpaint.convert(world.model, target, dtype="bfloat16", overwrite=True, progress=False)
    return np.frombuffer(target.read_bytes(), np.uint8)


CROPPED = {"crop": "auto", "regions": "each", "blend": "poisson", "match_color": True, "fill": "telea", "strength": 0.7}
SOFT = {"soft": True, "blend": "feather", "fill": "blur", "strength": 0.7, "sampler": "dpmpp_2m", "spacing": "karras"}
OPERATIONS = {
    "load": weights,
    "load, offloaded": offloaded,
    "inpaint": inpaint,
    "inpaint, cropped": partial(inpaint, **CROPPED),
    "inpaint, soft": partial(inpaint, **SOFT),
    "vary": lambda world: pixels(world.pipe.vary(IMAGE, "a fox", **OPTIONS).image),
    "outpaint": lambda world: pixels(world.pipe.outpaint(IMAGE, "a fox", right=16, top=8, **OPTIONS).image),
    "encode_image": encode_image,
    "encode_prompts": encode_prompts,
    "euler": partial(sampled, sampler="euler", spacing="linspace"),
    "euler_ancestral": partial(sampled, sampler="euler_ancestral", spacing="leading"),
    "dpmpp_2m": partial(sampled, sampler="dpmpp_2m", spacing="karras"),
    "ddim": partial(sampled, sampler="ddim", spacing="trailing"),
    "decode": decode,
    "tiled decode": lambda world: load(world, tile=16).decode(world.noise),
    "masks": masks,
    "metrics": measures,
    "convert": convert,
}
RUNS = ("inpaint", "inpaint, cropped", "inpaint, soft", "vary", "outpaint")
LOADED_ANEW = "load, offloaded", "tiled decode"
"""Their weights lie elsewhere each time, on which bits may depend."""


@contextmanager
def changed(read, write, value):
    """A setting with another value for a while."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def default_dtype(dtype):
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def deterministic():
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


DETERMINISTIC = "deterministic algorithms"
"""The operations that torch may compute by other kernels then."""
SETTINGS = {
    "default dtype float64": partial(default_dtype, torch.float64),
    "default dtype bfloat16": partial(default_dtype, torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "in inference mode": torch.inference_mode,
    DETERMINISTIC: deterministic,
    "numpy raises": lambda: np.errstate(all="raise"),
}


def equal(made, expected):
    """Tell whether two values of an operation have the same dtypes, shapes and bytes."""
    return [bits(one) for one in parts(made)] == [bits(one) for one in parts(expected)]


def parts(made):
    return made if isinstance(made, list | tuple) else [made]


def bits(made):
    if isinstance(made, torch.Tensor):
        tensor = made.detach().contiguous()
        return str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()
    return str(made.dtype), made.shape, made.tobytes()


def like(made, expected):
    """Tell whether two values of an operation differ by the order of sums alone."""
    each = list(zip(parts(made), parts(expected), strict=True))
    if any(bits(one)[:2] != bits(other)[:2] for one, other in each):
        return False
    return all((close if isinstance(one, torch.Tensor) else same_image)(one, other) for one, other in each)


def as_expected(operation, made, expected, setting=None):
    """Tell whether an operation makes what it made before: the very bits, where bits are promised."""
    other_kernels = setting == DETERMINISTIC and operation not in ("load", "masks", "metrics", "convert")
    return (like if other_kernels or operation in LOADED_ANEW else equal)(made, expected)


@pytest.fixture(scope="module")
def expected(world):
    """The result of an operation where nothing is set."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = OPERATIONS[name](world)
        return known[name]

    return of


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_setting_changes_nothing(operation, setting, world, expected):
    before = expected(operation)
    with SETTINGS[setting]():
        made = OPERATIONS[operation](world)
    assert as_expected(operation, made, before, setting)


def test_what_is_more_than_rounding_is_seen(world, expected):
    """So that the comparisons can fail, and those within rounding too."""
    before, decoded = expected("inpaint"), expected("decode")
    assert not like(inpaint(world, seed=6), before)
    assert not equal(before + (np.arange(before.size).reshape(before.shape) == 0), before)
    assert not like(decoded.bfloat16().float(), decoded)
    assert not like(decoded.double(), decoded)


def test_a_default_device_that_is_set_changes_nothing(world, expected):
    before = expected("load, offloaded")
    with changed(lambda: None, torch.set_default_device, "meta"):
        made = offloaded(world)
    assert like(made, before)


@pytest.mark.parametrize("operation", [*RUNS, "metrics", "masks"])
def test_autocast_around_a_run_changes_no_bit(operation, world, expected):
    before = expected(operation)
    with torch.autocast("cpu", torch.bfloat16):
        made = OPERATIONS[operation](world)
    assert equal(made, before)


def random_states():
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_random_states_of_a_process_are_neither_read_nor_advanced(operation, world, expected):
    before = expected(operation)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    states = random_states()
    made = OPERATIONS[operation](world)
    assert random_states() == states
    assert as_expected(operation, made, before)


def test_the_number_of_threads_changes_no_more_than_rounding(world):
    made = []
    for threads in (1, 2):
        with changed(torch.get_num_threads, torch.set_num_threads, threads):
            made.append(inpaint(world))
    assert same_image(*made)


def test_settings_stay_as_they_are(world):
    def settings():
        yield from (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())
        yield from (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        yield from (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
        yield from (np.geterr(), locale.setlocale(locale.LC_ALL), Path.cwd(), dict(os.environ))

    before = list(settings())
    for operation in OPERATIONS.values():
        operation(world)
    assert list(settings()) == before


@pytest.mark.parametrize("options", [{}, {"offload": True}], ids=["plain", "offloaded"])
def test_another_folder_between_loading_and_a_run(options, world, tmp_path, monkeypatch):
    Image.fromarray(IMAGE).save(world.folder / "image.png")
    Image.fromarray(np.uint8(255) * MASK).save(world.folder / "mask.png")
    monkeypatch.chdir(world.folder)
    here = sdinpaint.load("model", progress=False, **options)
    result = here.inpaint("image.png", "mask.png", "a fox", **OPTIONS)
    there = sdinpaint.load("model", progress=False, **options)
    monkeypatch.chdir(tmp_path)
    for image in (
        result.again().image,
        here.inpaint(IMAGE, MASK, "a fox", **OPTIONS).image,
        there.inpaint(IMAGE, MASK, "a fox", **OPTIONS).image,
    ):
        assert same_image(image, result.image)
    assert result.save("out.png") == [Path("out.png")]
    assert (tmp_path / "out.png").is_file()
    sdinpaint.save_diffusers("saved", there)
    assert (tmp_path / "saved/unet").is_dir()


def test_files_are_for_those_that_the_umask_says(world, tmp_path):
    with changed(lambda: os.umask(0o027), os.umask, 0o027):
        sdinpaint.convert(world.model, tmp_path / "out.safetensors", progress=False)
        sdinpaint.convert(world.model, tmp_path / "out", progress=False)
        world.pipe.inpaint(IMAGE, MASK, "a fox", **OPTIONS).save(tmp_path / "out.png")
        Mask(MASK).save(tmp_path / "mask.png")
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


PLAIN_C = """
import sys
from pathlib import Path
import numpy as np, sdinpaint
from sdinpaint.images.files import read_settings
from painting import IMAGE, MASK

folder = Path(sys.argv[1])
pipe = sdinpaint.load(folder / "model", progress=False)
prompt = "un zorro rojo, \\N{HIRAGANA LETTER KI}\\N{FOX FACE}"
result = pipe.inpaint(IMAGE, MASK, prompt, steps=2, seed=5, progress=False)
for name in ("out.png", "out.webp"):
    result.save(folder / name)
    assert read_settings(folder / name)["prompt"] == result.settings["prompt"]
sdinpaint.save_diffusers(folder / "again", pipe)
sdinpaint.convert(folder / "again", folder / "again.safetensors", dtype="float16", overwrite=True, progress=False)
assert sdinpaint.load(folder / "again", progress=False).tokenizer.merges == pipe.tokenizer.merges
sys.stdout.buffer.write(np.asarray(result.image).tobytes())
"""


def test_files_are_utf_8_whatever_the_locale_is(world):
    """In the locale C without Python's own mode for it, where text files are ASCII if nobody says otherwise."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", PLAIN_C, str(world.folder)],
        check=False,
        capture_output=True,
        env=os.environ | plain | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=SECONDS,
    )
    assert made.returncode == 0, made.stderr
    own = [
        line for line in made.stderr.decode().splitlines() if "EncodingWarning" in line and "site-packages" not in line
    ]
    assert own == []
    prompt = "un zorro rojo, \N{HIRAGANA LETTER KI}\N{FOX FACE}"
    here = load(world).inpaint(IMAGE, MASK, prompt, **OPTIONS).image
    assert same_image(np.frombuffer(made.stdout, np.uint8).reshape(np.asarray(here).shape), here)
