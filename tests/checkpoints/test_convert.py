"""A conversion keeps every bit, is what diffusers reads, is whole or not there, and needs no memory for the whole."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from builders import (
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    as_sd2,
    as_sdxl,
    averages,
    fill,
    for_text_to_image,
    random_pipeline,
    rewrite,
    rewrite_json,
    save_lightning,
    single_file,
    write_header,
)
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdinpaint_weights.export import export_plan
from sdinpaint_weights.files import SourceFile
from sdinpaint_weights.stream import write_stream

import sdinpaint
from sdinpaint.checkpoints import converting
from sdinpaint.checkpoints.building import find_dtype
from sdinpaint.checkpoints.converting import convert
from sdinpaint.checkpoints.diffusers_configs import controlnet_json
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.cli import main
from sdinpaint.errors import CheckpointError, SdInpaintWarning, SettingError
from sdinpaint.families import SD15_INPAINT
from sdinpaint.load_options import LoadOptions
from sdinpaint.loading import save_diffusers
from sdinpaint.models import VAE, CLIPText, ControlNet, ControlNetConfig, UNet

NAMES = ("sd1", "sd1 of 4", "sd2", "sd2-v of 4", "sdxl", "sdxl of 4")
LEFT_BEHIND = ("betas", "alphas_cumprod", "position_ids")


@pytest.fixture(scope="module")
def models(tiny, vocabulary, tmp_path_factory):
    """models(name) -> a pipeline of a family, its diffusers folder, and its single file, as others write them."""
    nine = {"sd1": tiny, "sd2": as_sd2(tiny), "sd2-v": as_sd2(tiny, "v"), "sdxl": as_sdxl(tiny)}
    families = nine | {f"{name} of 4": for_text_to_image(family) for name, family in nine.items()}
    made = {}

    def model(name):
        if name not in made:
            home = tmp_path_factory.mktemp(name.replace(" ", "-"))
            pipe = random_pipeline(families[name], vocabulary, seed=3)
            save_diffusers(home / "folder", pipe)
            tensors = {key: tensor.contiguous() for key, tensor in single_file(pipe).items()}
            save_file(tensors, home / "file.safetensors")
            made[name] = pipe, home / "folder", home / "file.safetensors"
        return made[name]

    return model


@pytest.fixture
def configs(tmp_path):
    """configs(folder) -> a folder with the JSON files that tell the sizes of its networks, and no more."""

    def copied(folder):
        for path in folder.glob("*/config.json"):
            copy = tmp_path / "configs" / path.relative_to(folder)
            copy.parent.mkdir(parents=True)
            copy.write_bytes(path.read_bytes())
        return tmp_path / "configs"

    return copied


def tensors_of(path):
    """{file, name: tensor} of a file, or of all those of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {
        (file.name if file == path else file.relative_to(path).as_posix(), name): tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key


def without_constants(tensors):
    return {key: tensor for key, tensor in tensors.items() if not any(word in key[1] for word in LEFT_BEHIND)}


def named(tensors, file):
    """Return the tensors that a file of this name has."""
    return {(file, name): tensor for (_, name), tensor in tensors.items()}


# every bit, there and back


@pytest.mark.parametrize("name", NAMES)
def test_each_layout_becomes_the_other_to_the_last_bit(models, tmp_path, name):
    """And so, there and back is what was there."""
    pipe, folder, file = models(name)
    convert(file, tmp_path / "folder", config=folder, prediction=pipe.family.schedule.prediction, progress=False)
    convert(folder, tmp_path / "file.safetensors", progress=False)
    assert_same_bits(tensors_of(tmp_path / "folder"), tensors_of(folder))
    assert_same_bits(tensors_of(tmp_path / "file.safetensors"), without_constants(tensors_of(file)))
    assert listing(tmp_path / "folder") == listing(folder)
    for path in folder.rglob("*.json"):
        again = tmp_path / "folder" / path.relative_to(folder)
        assert json.loads(again.read_text()) == json.loads(path.read_text())
    assert open_checkpoint(LoadOptions(source=tmp_path / "folder")).family == pipe.family
    assert open_checkpoint(LoadOptions(source=tmp_path / "file.safetensors", config=folder)).family == pipe.family


def test_there_and_back_is_what_was_there(models, tmp_path):
    _, _, file = models("sdxl")
    convert(file, tmp_path / "folder", config=models("sdxl")[1], progress=False)
    convert(tmp_path / "folder", tmp_path / "file.safetensors", progress=False)
    assert_same_bits(tensors_of(tmp_path / "file.safetensors"), without_constants(tensors_of(file)))


def test_the_comparison_sees_one_bit(models, tmp_path):
    """Broken on purpose."""
    _, folder, file = models("sd1")
    convert(folder, tmp_path / "file.safetensors", "ldm", progress=False)
    rewrite(
        tmp_path / "file.safetensors",
        lambda held: {
            name: torch.nextafter(tensor, tensor + 1) if name.endswith("quant_conv.bias") else tensor
            for name, tensor in held.items()
        },
    )
    with pytest.raises(AssertionError, match="quant_conv"):
        assert_same_bits(tensors_of(tmp_path / "file.safetensors"), without_constants(tensors_of(file)))


# what is kept, and what is said to be left behind


def test_sd2_says_what_the_other_layout_has_no_place_for(tiny, vocabulary, tmp_path):
    """The official files hold a 24th block and a projection, behind the states that the model was trained on."""
    family = as_sd2(tiny)
    pipe = random_pipeline(replace(family, text=replace(family.text, num_layers=24)), vocabulary)
    held = {key: tensor.contiguous() for key, tensor in single_file(pipe).items()}
    projection = {"cond_stage_model.model.text_projection": torch.zeros(28, 28)}
    save_file(held | projection, tmp_path / "file.safetensors")
    save_diffusers(tmp_path / "configs", random_pipeline(family, vocabulary))
    rewrite_json(tmp_path / "configs/text_encoder/config.json", num_hidden_layers=23)
    with pytest.warns(SdInpaintWarning, match=r"13 tensors that the model does not use .*resblocks\.23\.") as caught:
        convert(tmp_path / "file.safetensors", tmp_path / "folder", config=tmp_path / "configs", progress=False)
    assert len(caught) == 1
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", progress=False)
    again = tensors_of(tmp_path / "again.safetensors")
    before = without_constants(named(tensors_of(tmp_path / "file.safetensors"), "again.safetensors"))
    lost = before.keys() - again.keys()
    assert len(lost) == 13
    assert all(".resblocks.23." in name or name.endswith("text_projection") for _, name in lost)
    assert_same_bits(again, {key: tensor for key, tensor in before.items() if key not in lost})


def test_what_belongs_to_no_model_is_left_out_with_a_warning(models, tmp_path):
    _, folder, file = models("sd1")
    save_file(load_file(file) | {"some_other_program.state": torch.zeros(3)}, tmp_path / "junk.safetensors")
    with pytest.warns(SdInpaintWarning, match=r"some_other_program\.state"):
        convert(tmp_path / "junk.safetensors", tmp_path / "clean.safetensors", "ldm", config=folder, progress=False)
    assert_same_bits(named(tensors_of(tmp_path / "clean.safetensors"), file.name), without_constants(tensors_of(file)))


@pytest.mark.parametrize("dtype", ["fp16", torch.bfloat16])
def test_a_dtype_is_that_of_every_tensor(models, tmp_path, dtype):
    _, folder, _ = models("sdxl")
    convert(folder, tmp_path / "folder", dtype=dtype, progress=False)
    wanted = find_dtype(dtype)
    assert_same_bits(
        tensors_of(tmp_path / "folder"), {key: tensor.to(wanted) for key, tensor in tensors_of(folder).items()}
    )


def test_mixed_dtypes_stay_as_they_are(models, tmp_path):
    _, folder, file = models("sd2")
    mixed = {
        name: tensor.half() if "attn.in_proj" in name else tensor.bfloat16() if "attn1" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", tmp_path / "folder", config=folder, prediction="eps", progress=False)
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "ldm", progress=False)
    assert_same_bits(
        named(tensors_of(tmp_path / "again.safetensors"), "mixed.safetensors"),
        without_constants(tensors_of(tmp_path / "mixed.safetensors")),
    )


def test_averaged_weights_are_taken_where_they_are_asked_for(models, tiny, tmp_path):
    _, folder, file = models("sd1")
    with torch.device("meta"):
        averaged = UNet(tiny.unet)
    averaged = fill(averaged.to_empty(device="cpu"), 9)
    plain = load_file(file)
    others = {name: tensor for name, tensor in plain.items() if not name.startswith("model.diffusion_model.")}
    save_file(plain | averages(averaged), tmp_path / "both.safetensors")
    save_file(others | averages(averaged), tmp_path / "only.safetensors")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in averaged.state_dict().items()}
    cases = {("both", False): ("no", plain), ("both", True): ("yes", prefixed), ("only", False): ("yes", prefixed)}
    for (source, ema), (said, expected) in cases.items():
        target = tmp_path / f"{source}-{ema}.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdInpaintWarning)  # that `only` holds averages only
            convert(tmp_path / f"{source}.safetensors", target, ema=ema, config=folder, progress=False)
        written = load_file(target)
        for name in prefixed:
            assert torch.equal(written[name], expected[name]), name
        with safe_open(target, "pt") as opened:
            assert opened.metadata()["ema"] == said
    assert not any(name.startswith("model_ema") for name in written)
    with pytest.raises(CheckpointError) as caught:
        convert(file, tmp_path / "none.safetensors", "ldm", ema=True, config=folder, progress=False)
    assert caught.value.code == "CKPT_NO_EMA"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_becomes_a_safetensors_file(models, tmp_path, legacy):
    _, folder, file = models("sd1")
    save_lightning(tmp_path / "a.ckpt", load_file(file), legacy=legacy)
    convert(tmp_path / "a.ckpt", tmp_path / file.name, "ldm", config=folder, progress=False)
    assert_same_bits(tensors_of(tmp_path / file.name), without_constants(tensors_of(file)))


@pytest.mark.filterwarnings("ignore:.*no tokenizer is written")
def test_what_the_unet_predicts_is_kept_in_both_layouts(models, configs, tmp_path):
    _, folder, _ = models("sd2-v of 4")
    assert open_checkpoint(LoadOptions(source=folder)).family.schedule.prediction == "v"
    convert(folder, tmp_path / "file.safetensors", "ldm", progress=False)
    convert(tmp_path / "file.safetensors", tmp_path / "folder", config=configs(folder), progress=False)
    table = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert table["prediction_type"] == "v_prediction"


def test_a_file_says_what_it_was_made_from(models, tmp_path):
    _, folder, file = models("sd1")
    convert(file, tmp_path / "folder", config=folder, progress=False)
    with safe_open(tmp_path / "folder" / VAE_FILE, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt",
            "made_by": f"sdinpaint {sdinpaint.__version__}",
            "source": "file.safetensors",
            "source_sha256": f"{hashlib.sha256(file.read_bytes()).hexdigest()}  file.safetensors",
            "layout": "diffusers",
            "family": "sd15-inpainting",
            "ema": "no",
            "modelspec.prediction_type": "epsilon",
        }
    convert(folder, tmp_path / "file.safetensors", "ldm", progress=False)
    with safe_open(tmp_path / "file.safetensors", "pt") as opened:
        lines = opened.metadata()["source_sha256"].split("\n")
    expected = {
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in (UNET_FILE, VAE_FILE, TEXT_FILE)
    }
    assert set(lines) == expected


def test_a_folder_brings_its_tokenizers(models, tmp_path):
    _, folder, _ = models("sdxl")
    convert(folder, tmp_path / "folder", dtype="fp16", progress=False)
    for name in ("tokenizer", "tokenizer_2"):
        for path in (folder / name).iterdir():
            assert (tmp_path / "folder" / name / path.name).read_bytes() == path.read_bytes()


def test_without_a_vocabulary_the_folder_is_written_and_the_warning_says_so(models, configs, tmp_path):
    _, folder, file = models("sd1")
    with pytest.warns(SdInpaintWarning, match="no tokenizer is written, and transformers needs one"):
        convert(file, tmp_path / "folder", config=configs(folder), progress=False)
    assert not (tmp_path / "folder" / "tokenizer").exists()
    assert (tmp_path / "folder" / "model_index.json").is_file()


# VAEs and ControlNets alone


@pytest.fixture(scope="module")
def controlnet(tiny):
    config = ControlNetConfig(unet=replace(tiny.unet, in_channels=4), hint_widths=(5, 7, 11, 13))
    with torch.device("meta"):
        model = ControlNet(config)
    return config, fill(model.to_empty(device="cpu"), 4).state_dict()


def test_a_vae_alone_there_and_back(models, configs, tmp_path):
    pipe, folder, _ = models("sd1")
    save_file(pipe.vae.state_dict(), tmp_path / "vae.safetensors")
    unscaled = configs(folder)
    rewrite_json(unscaled / "vae/config.json", scaling_factor=None)
    with pytest.warns(SdInpaintWarning, match=r"0\.18215 is written"):
        convert(tmp_path / "vae.safetensors", tmp_path / "unscaled", config=unscaled, progress=False)
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", config=folder, progress=False)
    assert sorted(os.listdir(tmp_path / "vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == pipe.family.vae.scaling_factor
    ours, theirs = tensors_of(tmp_path / "vae"), tensors_of(folder / "vae")
    assert_same_bits(ours, theirs)
    convert(tmp_path / "vae", tmp_path / "back" / "vae.safetensors", "ldm", progress=False)
    assert_same_bits(tensors_of(tmp_path / "back/vae.safetensors"), tensors_of(tmp_path / "vae.safetensors"))


def test_a_controlnet_alone_there_and_back(controlnet, tmp_path):
    config, state = controlnet
    save_file({f"control_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "control.safetensors")
    (tmp_path / "configs/controlnet").mkdir(parents=True)
    (tmp_path / "configs/controlnet/config.json").write_text(json.dumps(controlnet_json(config)))
    convert(tmp_path / "control.safetensors", tmp_path / "control", config=tmp_path / "configs", progress=False)
    assert json.loads((tmp_path / "control/config.json").read_text()) == controlnet_json(config)
    convert(tmp_path / "control", tmp_path / "back" / "control.safetensors", "ldm", progress=False)
    assert_same_bits(tensors_of(tmp_path / "back/control.safetensors"), tensors_of(tmp_path / "control.safetensors"))


# whole, or not there


@pytest.mark.parametrize(("layout", "target"), [("ldm", "new.safetensors"), ("diffusers", "new")])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_early_leaves_nothing(models, tmp_path, layout, target, error, sabotage):
    _, folder, _ = models("sd1")
    written = []

    def fail_late(path, items, *rest):
        items = list(items)
        written.append(path)
        if layout == "ldm" or len(written) == 3:

            def produce():
                raise error

            items[-1] = replace(items[-1], produce=produce)
        write_stream(path, items, *rest)

    sabotage(converting, "write_stream", fail_late)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        convert(folder, tmp_path / target, layout, progress=False)
    assert written
    assert listing(tmp_path) == []


def test_values_that_half_precision_cannot_hold_leave_nothing(models, tmp_path):
    _, folder, file = models("sd1")
    held = load_file(file)
    held["first_stage_model.decoder.conv_out.bias"][0] = 1e6
    save_file(held, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "large.safetensors", tmp_path / "folder", dtype="float16", config=folder, progress=False)
    assert caught.value.code == "CKPT_OVERFLOW"
    assert caught.value.subject.endswith("large.safetensors")
    assert listing(tmp_path) == ["large.safetensors"]


def test_an_incomplete_checkpoint_is_refused(models, tmp_path):
    _, folder, file = models("sd1")
    held = load_file(file)
    del held["model.diffusion_model.out.2.bias"]
    save_file(held, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "incomplete.safetensors", tmp_path / "folder", config=folder, progress=False)
    assert caught.value.code == "CKPT_KEYS"
    assert listing(tmp_path) == ["incomplete.safetensors"]


def test_what_is_there_is_replaced_only_on_request(models, tmp_path):
    _, folder, _ = models("sd1")
    for layout, target in (("ldm", tmp_path / "a.safetensors"), ("diffusers", tmp_path / "a")):
        convert(folder, target, layout, progress=False)
        before = tensors_of(target)
        with pytest.raises(CheckpointError) as caught:
            convert(folder, target, layout, "fp16", progress=False)
        assert caught.value.code == "CKPT_EXISTS"
        assert "overwrite" in caught.value.hint
        assert_same_bits(tensors_of(target), before)
        convert(folder, target, layout, "fp16", overwrite=True, progress=False)
        assert {tensor.dtype for tensor in tensors_of(target).values()} == {torch.float16}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.safetensors"}


def test_a_linked_folder_is_replaced_where_it_lies(models, tmp_path):
    _, folder, _ = models("sd1")
    convert(folder, tmp_path / "real", progress=False)
    (tmp_path / "link").symlink_to("real")
    convert(folder, tmp_path / "link", dtype="fp16", overwrite=True, progress=False)
    assert (tmp_path / "link").is_symlink()
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "real").values()} == {torch.float16}
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


@pytest.mark.parametrize("target", ["a", "a.safetensors"])
def test_a_file_and_a_folder_do_not_replace_each_other(models, tmp_path, target):
    path = tmp_path / target
    path.write_bytes(b"old") if target == "a" else path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert(models("sd1")[1], path, overwrite=True, progress=False)
    assert caught.value.code == "CKPT_EXISTS"
    assert listing(tmp_path) == [target]


def test_a_folder_with_other_files_is_never_replaced(models, tmp_path):
    _, folder, _ = models("sd1")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "home", overwrite=True, progress=False)
    assert caught.value.code == "CKPT_EXISTS"
    assert "thesis.tex" in str(caught.value)
    assert listing(tmp_path) == ["home", "home/thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("a.safetensors", "diffusers"), "SETTING_TARGET"),
        (("a.ckpt",), "SETTING_TARGET"),
        (("a", "ldm"), "SETTING_TARGET"),
        (("a.ckpt", "ldm"), "SETTING_TARGET"),
        (("a", "onnx"), "SETTING_LAYOUT"),
        (("a", "diffusers", "int8"), "SETTING_DTYPE"),
        (("a", "diffusers", torch.int8), "SETTING_DTYPE"),
    ],
)
def test_requests_that_cannot_be_met(models, tmp_path, arguments, code):
    target, *rest = arguments
    with pytest.raises(SettingError) as caught:
        convert(models("sd1")[1], tmp_path / target, *rest)
    assert caught.value.code == code
    assert listing(tmp_path) == []


def test_a_source_is_not_its_own_target(models, tmp_path):
    _, folder, _ = models("sd1")
    convert(folder, tmp_path / "a" / "b", progress=False)
    for source, target in ((tmp_path / "a/b", tmp_path / "a/b"), (tmp_path / "a/b", tmp_path / "a")):
        with pytest.raises(SettingError) as caught:
            convert(source, target, overwrite=True)
        assert caught.value.code == "SETTING_TARGET"


def test_a_full_disk_is_told_before_anything_is_hashed(models, tmp_path, forbid, free_space):
    _, folder, _ = models("sd1")
    free_space(1000)
    forbid(SourceFile, "sha256")
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "new", progress=False)
    assert caught.value.code == "CKPT_NO_SPACE"
    assert listing(tmp_path) == []


# the command


def test_the_command_writes_what_the_function_writes(models, tmp_path):
    _, folder, _ = models("sd1")
    command = ["convert", str(folder), str(tmp_path / "a.safetensors")]
    done = CliRunner().invoke(main, [*command, "--dtype", "fp16"])
    assert done.exit_code == 0, done.output
    assert "a.safetensors: 0.00 GB" in done.output
    convert(folder, tmp_path / "b.safetensors", dtype="fp16", progress=False)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for options, code, words in (
        ([], 3, "--overwrite"),
        (["--layout", "diffusers"], 3, "rename it"),
        (["--dtype", "int8"], 2, "fp16"),
    ):
        done = CliRunner().invoke(main, [*command, *options])
        assert done.exit_code == code
        assert words in done.output
    done = CliRunner().invoke(main, [*command, "--overwrite", "--quiet"])
    assert (done.exit_code, done.output) == (0, "")


def test_a_full_disk_is_the_machine_s_fault(models, tmp_path, free_space):
    free_space(1000)
    done = CliRunner().invoke(main, ["convert", str(models("sd1")[1]), str(tmp_path / "new")])
    assert done.exit_code == 5
    assert "1.00 kB (1000 bytes) are free" in done.output


# memory

MEMORY = """
import sys
from safetensors.torch import load_file
from sdinpaint.checkpoints.converting import convert

def peak():
    # of this program; what getrusage tells may be the peak of the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) // 1024

small, large, folder = sys.argv[1:]
convert(small, f"{folder}/warm", progress=False)  # what is imported and built counts for neither
begin = peak()
convert(large, f"{folder}/streamed", progress=False)
streamed = peak() - begin
at_once = {name: tensor.clone() for name, tensor in load_file(large).items()}
print(streamed, peak() - begin - streamed)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """MB beyond a conversion of 12 MB, for one of 160 MB; reading all at once instead is seen by the same measure."""
    sizes = []
    for name, channels in (("small", 32), ("large", 96)):
        unet = replace(SD15_INPAINT.unet, model_channels=channels)
        text = replace(SD15_INPAINT.text, vocab_size=600, num_layers=1)
        family = replace(SD15_INPAINT, unet=unet, vae=replace(SD15_INPAINT.vae, channels=32), text=text)
        with torch.device("meta"):
            models = {"unet": UNet(family.unet), "vae": VAE(family.vae), "text_encoder": CLIPText(family.text)}
        shapes = {}
        for component, model in models.items():
            native = {name: tuple(value.shape) for name, value in model.state_dict().items()}
            plan = export_plan(component, native, "ldm", "sd1")
            shapes |= {target.key: native[target.names[0]] for target in plan}
        sizes.append(write_header(tmp_path / f"{name}.safetensors", shapes).stat().st_size / 1e6)
    assert sizes[0] < 50
    assert sizes[1] > 150
    command = [sys.executable, "-c", MEMORY, tmp_path / "small.safetensors", tmp_path / "large.safetensors", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    streamed, at_once = map(int, done.stdout.split())
    assert streamed < 40, streamed
    assert at_once > 100, at_once


# what others read


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_both_layouts(models, tmp_path, name):
    import diffusers

    pipe, folder, file = models(name)
    xl = "XL" if pipe.family.kind == "sdxl" else ""
    kind = getattr(diffusers, f"StableDiffusion{xl}{'' if name.endswith('of 4') else 'Inpaint'}Pipeline")
    convert(folder, tmp_path / "file.safetensors", "ldm", progress=False)
    convert(file, tmp_path / "folder", config=folder, prediction=pipe.family.schedule.prediction, progress=False)
    read = {
        "folder": kind.from_pretrained(tmp_path / "folder", local_files_only=True),
        "file": kind.from_single_file(tmp_path / "file.safetensors", config=str(folder), local_files_only=True),
    }
    before = kind.from_pretrained(folder, local_files_only=True)
    for way, theirs in read.items():
        for component in pipe.family.components:
            expected = getattr(before, component).state_dict()
            found = getattr(theirs, component).state_dict()
            assert found.keys() == expected.keys(), (way, component)
            for key, tensor in expected.items():
                assert torch.equal(found[key].float(), tensor.float()), (way, component, key)
    assert read["folder"].scheduler.config.prediction_type == before.scheduler.config.prediction_type


@pytest.mark.peer
def test_diffusers_reads_vaes_and_controlnets_alone(models, controlnet, tmp_path):
    from diffusers import AutoencoderKL, ControlNetModel

    pipe, folder, _ = models("sd1")
    config, state = controlnet
    save_file(pipe.vae.state_dict(), tmp_path / "vae.safetensors")
    save_file({f"control_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "control.safetensors")
    (tmp_path / "configs/controlnet").mkdir(parents=True)
    (tmp_path / "configs/controlnet/config.json").write_text(json.dumps(controlnet_json(config)))
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", config=folder, progress=False)
    convert(tmp_path / "control.safetensors", tmp_path / "control", config=tmp_path / "configs", progress=False)
    for kind, name, tensors in ((AutoencoderKL, "vae", pipe.vae.state_dict()), (ControlNetModel, "control", state)):
        model, report = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert sum(p.double().sum().item() for p in model.state_dict().values()) == pytest.approx(
            sum(p.double().sum().item() for p in tensors.values()), rel=1e-12
        )
