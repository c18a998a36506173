"""Options for LoRAs and textual inversions: how they are written, that they reach the model, and how they fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import random_pipeline, small
from click.testing import CliRunner
from closeness import same_image
from PIL import Image
from safetensors.torch import load_file, save_file

import sdinpaint
from sdinpaint import cli
from sdinpaint.cli.values import EMBEDDING, LORA
from sdinpaint.images.files import read_settings
from sdinpaint.loading import save_diffusers

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MODULE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture(scope="module")
def home(tiny, vocabulary, tmp_path_factory):
    """A model, a LoRA and an embedding in a folder."""
    home = tmp_path_factory.mktemp("home")
    pipe = random_pipeline(small(tiny), vocabulary, seed=6)
    save_diffusers(home / "model", pipe)
    width = pipe.family.unet.model_channels * pipe.family.unet.channel_mult[-1]
    save_file(
        {f"{MODULE}.lora_down.weight": torch.ones(1, width), f"{MODULE}.lora_up.weight": torch.ones(width, 1)},
        home / "style.safetensors",
    )
    save_file({"emb_params": torch.randn(2, 28, generator=torch.Generator().manual_seed(1))}, home / "cat.safetensors")
    return home


@pytest.fixture(autouse=True)
def workplace(home, tmp_path, monkeypatch):
    """A folder with an image, its mask, the LoRA and the embedding, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    for name in ("style.safetensors", "cat.safetensors"):
        Path(name).write_bytes((home / name).read_bytes())


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


def paint(home, command="vary", *more, **changed):
    given = {"prompt": "a cat", "model": home / "model", "out": "out.png", "steps": 1, "seed": 3, "device": "cpu"}
    return run(command, "photo.png", *(f"--{name}={value}" for name, value in (given | changed).items()), *more)


def recorded(path="out.png"):
    return [
        (one["kind"], one["name"], one["source"], one["weight"], one["text_weight"])
        for one in read_settings(path)["manifest"]["adapters"]
    ]


# how they are written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("fox.safetensors", ("fox.safetensors",)),
        ("fox.safetensors:0.7", ("fox.safetensors", 0.7)),
        ("fox.safetensors:-1:0", ("fox.safetensors", -1.0, 0.0)),
        ("C:\\loras\\fox.safetensors", ("C:\\loras\\fox.safetensors",)),
        ("C:\\fox.safetensors:1e-1:2", ("C:\\fox.safetensors", 0.1, 2.0)),
        ("owner/name:fox.safetensors:.5", ("owner/name:fox.safetensors", 0.5)),
        ("fox:2.safetensors", ("fox:2.safetensors",)),
        ("fox:3:0.5:0.25", ("fox:3", 0.5, 0.25)),
        ("fox:", ("fox:",)),
        ("there:2", ("there:2",)),
        ("there:2:0.5", ("there:2", 0.5)),
    ],
)
def test_numbers_at_the_end_are_weights(text, value):
    Path("there:2").mkdir()
    assert LORA.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cat.pt", ("cat.pt", None)),
        ("<cat>=cat.pt", ("cat.pt", "<cat>")),
        ("my cat=a=b.pt", ("a=b.pt", "my cat")),
        ("there=cat.pt", ("there=cat.pt", None)),
    ],
)
def test_a_token_is_before_the_first_sign(text, value):
    Path("there=cat.pt").touch()
    assert EMBEDDING.convert(text, None, None) == value


@pytest.mark.parametrize("option", ["--lora=:0.5", "--lora=", "--embedding==cat.pt", "--embedding=cat="])
def test_without_a_file_they_cannot_be_parsed(option, home):
    done = paint(home, "vary", option)
    assert done.exit_code == 2
    assert option.partition("=")[0] in done.stderr


# what they do


def test_every_command_that_runs_has_them(home):
    options = ["--lora=style.safetensors:0.5:0.25", "--embedding=<cat>=cat.safetensors"]
    expected = [
        ("lora", "style", "style.safetensors", 0.5, 0.25),
        ("embedding", "<cat>", "cat.safetensors", None, None),
    ]
    for command, more in {"inpaint": ["--mask=mask.png"], "vary": [], "outpaint": ["--right=8"]}.items():
        done = paint(home, command, *options, *more, prompt="a <cat>")
        assert done.exit_code == 0, done.output
        assert recorded() == expected
    again = run("replay", "out.png", "--device=cpu")
    assert again.exit_code == 0, again.output
    page = " ".join(run("inspect", "out.png").stdout.split())
    assert "adapters lora style, style.safetensors: weight=0.5, text_weight=0.25, sha256 " in page
    assert "embedding <cat>, cat.safetensors: sha256 " in page
    pipe = sdinpaint.load(home / "model", device="cpu", loras=[("style.safetensors", 0.5, 0.25)])
    pipe.add_embedding("cat.safetensors", "<cat>")
    mine = pipe.outpaint("photo.png", "a <cat>", right=8, steps=1, seed=3, progress=False)
    assert same_image(mine.image, Image.open("out.png"))


def test_several_add_up(home):
    Path("other.safetensors").write_bytes(Path("style.safetensors").read_bytes())
    options = ["--lora=style.safetensors", "--lora=other.safetensors:-1", "--embedding=cat.safetensors"]
    assert paint(home, "vary", *options, "--embedding=dog=cat.safetensors").exit_code == 0
    assert [one[1] for one in recorded()] == ["style", "other", "cat", "dog"]
    mixed = Image.open("out.png").copy()
    assert paint(home, "vary", "--embedding=cat.safetensors").exit_code == 0
    assert same_image(mixed, Image.open("out.png"))


def test_a_replay_takes_others_in_place_of_the_recorded(home):
    assert paint(home, "vary", "--lora=style.safetensors:0.5").exit_code == 0
    os.rename("style.safetensors", "moved.safetensors")
    gone = run("replay", "out.png", "--device=cpu", "--json")
    assert gone.exit_code == 3
    assert json.loads(gone.stdout)["error"]["code"] == "CKPT_NOT_FOUND"
    os.mkdir("new")
    os.rename("moved.safetensors", "new/style.safetensors")
    assert run("replay", "out.png", "--device=cpu", "--lora=new/style.safetensors:0.5").exit_code == 0
    other = run("replay", "out.png", "--device=cpu", "--lora=new/style.safetensors", "--json")
    assert other.exit_code == 3
    error = json.loads(other.stdout)["error"]
    assert error["code"] == "MANIFEST_ADAPTERS"
    assert "weight 0.5, here" in error["found"]
    assert all(option in error["hint"] for option in ("--lora", "--embedding"))


def test_an_output_that_is_an_adapter_is_refused(home):
    save_file(load_file("style.safetensors"), "out.png")
    done = paint(home, "vary", "--lora=out.png")
    assert done.exit_code == 3
    assert "itself" in done.stderr


# how they fail

FAILURES = {
    "CKPT_NOT_FOUND": ["--lora=none.safetensors"],
    "CKPT_UNKNOWN_FORMAT": ["--embedding=photo.png"],
    "ADAPTER_KIND": ["--lora=cat.safetensors"],
    "ADAPTER_NAME": ["--lora=style.safetensors", "--lora=style.safetensors:0.5"],
    "EMBEDDING_KIND": ["--embedding=style.safetensors"],
    "EMBEDDING_TOKEN": ["--embedding=cat.safetensors", "--embedding=cat=cat.safetensors"],
    "SETTING_WEIGHT": ["--lora=style.safetensors:nan"],
}


@pytest.mark.parametrize("code", FAILURES)
def test_errors_are_text_and_nothing_is_written(code, home):
    done = paint(home, "vary", *FAILURES[code])
    assert done.exit_code == 3, done.output
    assert done.stderr.startswith("error: ")
    assert not Path("out.png").exists()
    as_json = paint(home, "vary", "--json", *FAILURES[code])
    assert as_json.exit_code == 3
    error = json.loads(as_json.stdout)["error"]
    assert error["code"] == code
    assert error["found"] in done.stderr


def test_weights_are_checked_before_the_model_is_loaded():
    done = paint(Path("nowhere"), "vary", "--lora=style.safetensors:inf")
    assert done.exit_code == 3
    assert done.stderr.startswith("error: --lora: ")


def test_a_name_that_is_taken_says_which_options_to_give(home):
    done = paint(home, "vary", *FAILURES["EMBEDDING_TOKEN"])
    assert "--embedding TOKEN=FILE" in done.stderr


# convert and inspect


def test_convert_merges(home):
    done = run("convert", home / "model", "merged.safetensors", "--lora=style.safetensors:0.5", "-q")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    pipe = sdinpaint.load(home / "model", device="cpu", loras=[("style.safetensors", 0.5)])
    merged = sdinpaint.load("merged.safetensors", device="cpu")
    for one, other in zip(pipe.unet.parameters(), merged.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    wrong = run("convert", home / "model", "new", "--lora=cat.safetensors", "-q")
    assert wrong.exit_code == 3
    assert wrong.stderr.startswith("error: cat.safetensors")
    assert not Path("new").exists()
    over = run("convert", home / "model", "style.safetensors", "--lora=style.safetensors", "--overwrite", "-q")
    assert over.exit_code == 3
    assert list(load_file("style.safetensors")) == [f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight"]


def test_inspect_says_what_an_adapter_is(home):
    done = run("inspect", "style.safetensors")
    assert done.exit_code == 0
    assert done.stdout == f"{sdinpaint.inspect('style.safetensors')}\n"
    report = json.loads(run("inspect", "style.safetensors", "--json", "--hash").stdout)
    assert report["layout"] == "lora"
    assert list(report["sha256"]) == ["style.safetensors"]
    save_file({"a.lora_controlnet": torch.ones(1), "lora_controlnet": torch.ones(1)}, "control.safetensors")
    assert run("inspect", "control.safetensors").exit_code == 3
