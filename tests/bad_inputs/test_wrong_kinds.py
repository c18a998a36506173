"""Every public function meets values of every wrong kind, and ends within seconds: with a coded error or a result."""

import datetime
import inspect
import io
import os
import time
import warnings
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdinpaint
from sdinpaint import LoadOptions, Mask, Pipeline, Request, metrics
from sdinpaint.errors import SdInpaintError
from sdinpaint.sampling import SAMPLERS, schedules

IMAGE = np.zeros((64, 64, 3), np.uint8)
HOLE = np.zeros((64, 64), bool)
HOLE[10:40, 10:40] = True
SECONDS = 3


class Broken(io.BytesIO):
    """An open file of another library, whose errors are its own."""

    def read(self, size=-1):
        raise Exception("connection lost")


class Hostile:
    """An object that raises whatever is asked of it."""

    def __repr__(self):
        raise RuntimeError("repr")

    def __fspath__(self):
        raise RuntimeError("fspath")

    def __array__(self, *_, **__):
        raise RuntimeError("array")


def nested(depth=3000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


KINDS = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "5,000 digits": 10**5000,
    "-5,000 digits": -(10**5000),
    "nan": float("nan"),
    "inf": float("inf"),
    "1e308": 1e308,
    "no text": "",
    "a letter": "x",
    "bytes": b"x",
    "NUL": "a\0b",
    "a lone surrogate": "a\ud800",
    "300 letters": "a" * 300,
    "5,000 letters": "a" * 5000,
    "5,000 letters as a path": Path("a" * 5000),
    "no list": [],
    "a list in a list": [[]],
    "3,000 lists": nested(),
    "a dict": {},
    "a set": {1},
    "an object": object(),
    "a hostile object": Hostile(),
    "a class": int,
    "a module": np,
    "a complex number": 1 + 2j,
    "a fraction": Fraction(1, 3),
    "a decimal": Decimal("0.5"),
    "a date": datetime.datetime(2026, 1, 1),
    "a range": range(3),
    "a tuple": (1, 2, 3),
    "a generator": (one for one in range(3)),
    "an open file": io.BytesIO(b"zz"),
    "an open file that breaks off": Broken(b"zz"),
    "/dev/zero": Path("/dev/zero"),
    "a pipe": "pipe",
    "a folder": ".",
    "numpy's nan": np.float64("nan"),
    "numpy's 3": np.int64(3),
    "an array without axes": np.array(1.0),
    "an empty array": np.array([]),
    "an array of nan": np.array([np.nan]),
    "an array of objects": np.array([None, {}], dtype=object),
    "an array of texts": np.array(["a"]),
    "an array of records": np.zeros((64, 64), dtype=[("a", "f4")]),
    "an array below 0": -np.ones((64, 64)),
    "an array of 1e300": np.full((64, 64), 1e300),
    "a tensor of 3": torch.tensor(3),
    "a tensor of 2": torch.tensor([1.0, 2.0]),
    "a sparse tensor": torch.eye(8).to_sparse(),
    "a complex tensor": torch.ones(1, 3, 64, 64, dtype=torch.complex64),
    "a meta tensor": torch.ones(1, 3, 64, 64, device="meta"),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(3, 64, 64)] * 2, layout=torch.jagged),
    "a tensor of 8-bit floats": torch.ones(1, 4, 8, 8).to(torch.float8_e4m3fn),
    "every other byte": memoryview(bytes(64))[::2],
    "a matrix": np.zeros((64, 64), np.uint8).view(np.matrix),
}


def arguments(function, *others):
    """Names of the arguments that a function takes by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [one.name for one in inspect.signature(function).parameters.values() if one.kind in kinds]
    return [name for name in named if name not in ("self", *others)]


FIGURES = {
    "size": (64, 64),
    "image": IMAGE,
    "box": (1, 1, 20, 20),
    "points": [(1, 1), (20, 1), (9, 20)],
    "point": (3, 3),
    "strokes": [[(1, 1), (9, 9)]],
    "width": 3,
    "color": (0, 0, 0),
    "labels": IMAGE[..., 0],
    "ids": [0],
    "path": "mask.png",
}
MAKERS = [
    *("open", "box", "ellipse", "polygon", "strokes", "full", "empty"),
    *("from_alpha", "from_color", "from_luminance", "from_labels", "flood"),
]
VERBS = ["grow", "shrink", "feather", "smooth", "fill_holes", "drop_specks", "resize", "on_lattice", "report", "save"]
SPACINGS = ["leading", "linspace", "trailing", "karras"]
METRICS = ["psnr", "ssim", "seam", "ring_delta_e", "changed", "known_error", "scores", "to_lab", "delta_e"]
CALLED = ["on_step", "on_event", "score", "draw", "control", "noise"]
SHOWN = ("progress", "on_step", "on_event")


def calls(pipe, source):
    """Name -> (function of keywords, names of its arguments); what is not given has a good value."""
    painted = [*arguments(pipe.inpaint, *SHOWN), "kind", "on_error"]
    result = pipe.inpaint(IMAGE, HOLE, "x", steps=1, seed=1, progress=False)
    mask = Mask(HOLE)
    known, (cond,), latents = pipe.encode_image(IMAGE, HOLE), pipe.encode_prompts("x"), torch.zeros(1, 4, 8, 8)
    found = {
        "Request": (lambda **kw: Request(**{"image": IMAGE, "mask": HOLE, "prompt": "x"} | kw), painted),
        "Request, outpaint": (
            lambda **kw: Request(**{"image": IMAGE, "prompt": "x", "kind": "outpaint", "left": 8} | kw),
            arguments(pipe.outpaint, "options", "prompt", "image"),
        ),
        "inpaint": (
            lambda **kw: pipe.inpaint(
                **{"image": IMAGE, "mask": ~HOLE & HOLE, "prompt": "", "progress": False, "steps": 1} | kw
            ),
            [*SHOWN, "manifest"],
        ),
        "run": (lambda **kw: pipe.run(**{"progress": False} | kw), ["request"]),
        "LoadOptions": (lambda **kw: LoadOptions(**{"source": "demo"} | kw), arguments(LoadOptions)),
        "load": (
            lambda **kw: sdinpaint.load(**{"source": source, "progress": False} | kw),
            ["source", "config", "vae", "controlnet", "base", "tokenizer", "device", "on_event"],
        ),
        "inspect": (lambda **kw: sdinpaint.inspect(**{"source": source} | kw), arguments(sdinpaint.inspect)),
        "convert": (
            lambda **kw: sdinpaint.convert(**{"source": "nothing", "target": "out", "progress": False} | kw),
            arguments(sdinpaint.convert, "opening"),
        ),
        "to_inpainting": (
            lambda **kw: sdinpaint.to_inpainting(**{"custom": "nothing", "target": "out", "progress": False} | kw),
            arguments(sdinpaint.to_inpainting, "opening"),
        ),
        "save_diffusers": (
            lambda **kw: sdinpaint.save_diffusers(**{"folder": "saved", "pipe": None} | kw),
            arguments(sdinpaint.save_diffusers),
        ),
        "replay": (lambda **kw: sdinpaint.replay(**{"path": "nothing.png"} | kw), ["path", "image", "mask"]),
        "encode_prompts": (lambda **kw: pipe.encode_prompts(**{"prompts": "x"} | kw), ["prompts", "size"]),
        "denoiser": (
            lambda **kw: pipe.denoiser(**{"known": known, "cond": cond} | kw),
            arguments(pipe.denoiser, "sigmas"),
        ),
        "denoise": (lambda **kw: pipe.denoiser(known, cond)(**{"x": latents, "sigma": 1.0} | kw), ["x", "sigma"]),
        "encode_image": (
            lambda **kw: pipe.encode_image(**{"image": IMAGE, "mask": HOLE} | kw),
            ["image", "mask", "latents", "cover"],
        ),
        "decode": (pipe.decode, ["latents"]),
        "sample_latents": (
            lambda **kw: pipe.sample_latents(**{"image": torch.zeros(1, 3, 64, 64)} | kw),
            ["image", "draw"],
        ),
        "result.array": (result.array, ["index"]),
        "result.settings_of": (result.settings_of, ["index"]),
        "result.save_one": (lambda **kw: result.save_one(**{"index": 0, "path": "one.png"} | kw), ["index", "path"]),
        "result.best_of": (lambda **kw: result.best_of(**{"n": 1} | kw), ["n", "score"]),
        "result.save": (result.save, ["path"]),
        "result.again": (lambda **kw: result.again(progress=False, strength=0, **kw), ["sampler", "seed", "steps"]),
        "Mask": (Mask, ["values"]),
    }
    sampled = {"denoise": lambda x, sigma: x, "x": latents, "sigmas": torch.tensor([9.0, 1.0, 0.0])}
    for name in SAMPLERS:
        good = sampled | ({"noise": torch.zeros_like} if SAMPLERS[name].stochastic else {})
        found[name] = (
            partial(SAMPLERS[name].run, **good),
            ["x", "sigmas", "eta", "noise", "on_step"],
        )
    for name in SPACINGS:
        spaced = partial(getattr(schedules, name), **{"train_sigmas": pipe.train_sigmas, "steps": 3})
        found[f"schedules.{name}"] = spaced, ["train_sigmas", "steps", "end"]
    measured = {"reference": IMAGE, "original": IMAGE, "image": IMAGE, "hole": HOLE}
    for name in METRICS[:-2]:
        metric = getattr(metrics, name)
        good = {key: value for key, value in measured.items() if key in arguments(metric)}
        found[f"metrics.{name}"] = partial(metric, **good), arguments(metric)
    found["metrics.to_lab"] = metrics.to_lab, ["rgb"]
    lab = np.zeros((2, 3))
    found["metrics.delta_e"] = partial(metrics.delta_e, **{"one": lab, "other": lab}), ["one", "other"]
    for name in VERBS:
        found[f"Mask.{name}"] = getattr(mask, name), arguments(getattr(mask, name))
    for name in MAKERS:
        maker = getattr(Mask, name)
        good = {key: value for key, value in FIGURES.items() if key in arguments(maker)}
        found[f"Mask.{name}"] = lambda maker=maker, good=good, **kw: maker(**good | kw), arguments(maker)
    return found


@pytest.fixture(scope="module")
def table(pipe, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        os.mkfifo("pipe")
        Mask(HOLE).save("mask.png")
        yield calls(pipe, source)


def outcome(function, name, value):
    """Call a function; return what is wrong with how it ended, or nothing."""
    start = time.monotonic()
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**{name: value})
    except SdInpaintError as error:
        said = "" if error.code and len(str(error)) < 4000 else "no code, or a long text"
        if not isinstance(error, TypeError | ValueError | OSError | ArithmeticError):
            said = "not also an error of Python's"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:100]!r}"
    slow = time.monotonic() - start > SECONDS
    return f"{time.monotonic() - start:.1f} s" if slow else said


FUNCTIONS = [
    *("Request", "Request, outpaint", "inpaint", "run", "LoadOptions", "load", "inspect", "convert", "to_inpainting"),
    *("save_diffusers", "replay", "encode_prompts", "encode_image", "decode", "sample_latents"),
    *("denoiser", "denoise", "result.array", "result.settings_of", "result.save_one", "result.best_of"),
    *("ddim", "euler", "euler_ancestral", "dpmpp_2m", *(f"schedules.{name}" for name in SPACINGS)),
    *(f"metrics.{name}" for name in METRICS),
    *("result.save", "result.again", "Mask", *(f"Mask.{name}" for name in (*VERBS, *MAKERS))),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_of_wrong_kinds(table, function):
    call, names = table[function]
    met = {
        f"{name}={kind}": outcome(call, name, value)
        for name in names
        for kind, value in KINDS.items()
        if not (name in CALLED and callable(value))  # which is called, and may raise what it likes
    }
    assert {given: said for given, said in met.items() if said} == {}


ODD = st.recursive(
    st.sampled_from(sorted(set(KINDS) - {"a generator", "3,000 lists"})),  # names: not every value can be printed
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
REQUESTED = ["image", "mask", "prompt", "negative_prompt", "seed", "noise", "control_image", "manifest"]


def named(odd):
    """The values that names stand for, in lists and tables as they are."""
    if isinstance(odd, dict):
        return {key: named(value) for key, value in odd.items()}
    return [named(value) for value in odd] if isinstance(odd, list) else KINDS[odd]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(REQUESTED), ODD, min_size=1, max_size=3))
def test_odd_values_together(table, odd):
    call, _ = table["Request"]
    assert outcome(lambda values: call(**values), "values", named(odd)) == ""


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [("Request", "image", "fspath"), ("Mask", "values", "fspath"), ("LoadOptions", "source", "fspath")],
)
def test_the_callers_own_error_is_told(table, function, name, kind):
    call, _ = table[function]
    with pytest.raises(SdInpaintError, match=f"RuntimeError: {kind}"):
        call(**{name: Hostile()})


def test_an_array_that_cannot_be_had_says_why():
    class OnDevice:
        shape = (64, 64)

        def __array__(self, *_, **__):
            raise TypeError("implicit conversion is not allowed, use .get()")

    with pytest.raises(SdInpaintError, match=r"OnDevice that gives no array: TypeError: implicit .* use .get"):
        Mask(OnDevice())
    with pytest.raises(SdInpaintError, match=r"use .get"):
        Mask.from_labels(OnDevice(), 0)


@pytest.mark.parametrize(
    ("function", "word", "near"),
    [
        (lambda **options: Request(IMAGE, HOLE, "x", **options), "smapler", "sampler"),
        (Pipeline.inpaint, "smapler", "sampler"),
        (Pipeline.inpaint, "num_inference_steps", "steps"),
        (Pipeline.inpaint, "mask_image", "mask"),
        (Pipeline.vary, "strenght", "strength"),
        (lambda **options: Request(IMAGE, None, "x", kind="outpaint", **options), "lfet", "left"),
        (Pipeline.run, "onstep", "on_step"),
        (sdinpaint.load, "torch_dtype", "dtype"),
        (sdinpaint.save_diffusers, "dtypes", "dtype"),
        (LoadOptions, "torch_dtype", "dtype"),
        (sdinpaint.convert, "overwritten", "overwrite"),
        (sdinpaint.convert, "confg", "config"),
        (sdinpaint.to_inpainting, "progess", "progress"),
        (sdinpaint.inspect, "verfy", "verify"),
        (sdinpaint.replay, "images", "image"),
    ],
)
def test_an_unknown_keyword_is_pythons_error_with_the_near_name(function, word, near):
    with pytest.raises(TypeError, match=f"did you mean '{near}'"):
        function(**{word: 1})


def test_a_keyword_that_is_near_to_none_is_pythons_error_alone():
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'xyz'$"):
        sdinpaint.load(xyz=1)


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), np.array(3), torch.tensor(3), Fraction(3)])
def test_whatever_means_a_number_is_one(value):
    request = Request(IMAGE, HOLE, "x", steps=value, guidance_scale=value, crop=value, seed=value)
    assert (request.settings.steps, request.settings.guidance_scale, request.settings.crop) == (3, 3.0, 3)
    assert request.items[0].seed == 3


@pytest.mark.parametrize("drawn", [None, -1, np.int64(-1), torch.tensor(-1), [-1], np.array([-1])])
def test_a_seed_of_none_or_minus_one_is_drawn(drawn):
    seeds = {Request(IMAGE, HOLE, "x", seed=drawn).items[0].seed for _ in range(2)}
    assert len(seeds) == 2
    assert min(seeds) >= 0


@pytest.mark.parametrize("make", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_prompts_and_seeds_in_any_sequence(make):
    items = Request(IMAGE, HOLE, make(["a", "b"]), make(["c", "d"]), seed=make([1, 2])).items
    assert [(item.prompt, item.negative_prompt, item.seed) for item in items] == [("a", "c", 1), ("b", "d", 2)]
