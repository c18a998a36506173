"""SD2 and SDXL in whatever files they come, models that are put together, and what tells noise from v."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from builders import (
    UNET_FILE,
    VAE_FILE,
    as_sd2,
    as_sdxl,
    for_text_to_image,
    random_pipeline,
    rewrite,
    rewrite_json,
    single_file,
    small,
    states,
    write_header,
)
from click.testing import CliRunner
from closeness import close
from safetensors.torch import save_file

import sdinpaint
from sdinpaint import SdInpaintWarning
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.cli import main
from sdinpaint.errors import CheckpointError, SettingError
from sdinpaint.load_options import LoadOptions

MAKERS = {
    "sd1": small,
    "sd2-inpainting": lambda tiny: as_sd2(small(tiny)),
    "sd2-v": lambda tiny: for_text_to_image(as_sd2(small(tiny), "v")),
    "sd2": lambda tiny: for_text_to_image(as_sd2(small(tiny))),
    "sdxl-inpainting": lambda tiny: as_sdxl(small(tiny)),
    "sdxl": lambda tiny: for_text_to_image(as_sdxl(small(tiny))),
}
NAMES = list(MAKERS)[1:]


def load(source, **options):
    return sdinpaint.load(source, device="cpu", progress=False, **options)


def same_models(one, other, components=None):
    ours, theirs = states(one), states(other)
    return all(
        ours[name].keys() == theirs[name].keys()
        and all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])
        for name in components or theirs
    )


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def models(tiny, vocabulary, tmp_path_factory):
    """models(name) -> a pipeline, its diffusers folder, and its single file."""
    made = {}

    def make(name):
        if name not in made:
            pipe = random_pipeline(MAKERS[name](tiny), vocabulary, seed=len(made))
            folder = tmp_path_factory.mktemp(name) / "model"
            sdinpaint.save_diffusers(folder, pipe)
            made[name] = pipe, folder, write(folder.with_suffix(".safetensors"), single_file(pipe))
        return made[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_folders_and_single_files(models, vocabulary, name):
    pipe, folder, file = models(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        found = load(folder), load(file, config=folder, tokenizer=vocabulary)
    for loaded in found:
        assert loaded.family == pipe.family
        assert loaded.family.name == name
        assert same_models(loaded, pipe)


def test_the_text_side_of_a_loaded_model(models):
    pipe, folder, _ = models("sdxl")
    loaded = load(folder)
    assert [tokenizer.pad_id for tokenizer in loaded.condition.tokenizers] == [loaded.tokenizer.end_id, 0]
    assert sum(weight.numel() for weight in loaded.text.parameters()) == sum(
        value.numel() for name in ("text_encoder", "text_encoder_2") for value in states(pipe)[name].values()
    )
    assert json.loads((folder / "tokenizer_2/special_tokens_map.json").read_text())["pad_token"] == "!"
    assert load(models("sd2")[1]).tokenizer("")[0, -1] == 0


def test_zeros_for_no_prompt_are_a_matter_of_the_model(models, tmp_path):
    folder = shutil.copytree(models("sdxl")[1], tmp_path / "model")
    rewrite_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    loaded = load(folder)
    assert not loaded.family.zeros_for_none
    none, empty = loaded.encode_prompts([None, ""])
    assert close(none.context, empty.context)


# Put together


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl-inpainting"])
@pytest.mark.parametrize("given", ["unet file", "unet folder", "vae file", "vae folder", "part of a folder"])
def test_what_is_missing_comes_from_the_base(models, vocabulary, tiny, tmp_path, name, given):
    base, folder, file = models(name)
    mine = random_pipeline(MAKERS[name](tiny), vocabulary, seed=77)
    component = "vae" if given.startswith("vae") else "unet"
    sdinpaint.save_diffusers(tmp_path / "mine", mine)
    source = tmp_path / "mine" / component
    if given.endswith("file"):
        source = write(tmp_path / "part.safetensors", states(mine)[component])
    elif given == "part of a folder":
        source = tmp_path / "mine"
        for rest in ("vae", "text_encoder", "text_encoder_2"):
            shutil.rmtree(source / rest, ignore_errors=True)
    options = {"config": folder} if given.endswith("file") else {}
    for loaded in (load(source, base=folder, **options), load(source, base=file, config=folder, tokenizer=vocabulary)):
        assert same_models(loaded, mine, [component])
        assert same_models(loaded, base, states(base).keys() - {component})
        assert loaded.family == base.family


def test_a_part_without_a_base_names_the_remedy(models, tmp_path):
    pipe, folder, _ = models("sd2")
    for source in (write(tmp_path / "unet.safetensors", states(pipe)["unet"]), folder / "unet", folder / "vae"):
        with pytest.raises(CheckpointError) as caught:
            load(source)
        assert caught.value.code == "CKPT_NO_COMPONENT"
        assert "base=" in caught.value.hint


def test_parts_of_two_kinds_do_not_fit(models):
    with pytest.raises(CheckpointError) as caught:
        load(models("sd1")[1] / "unet", base=models("sdxl")[1] / "vae")
    assert caught.value.code == "CKPT_NO_COMPONENT"
    with pytest.raises(CheckpointError) as caught:
        load(models("sdxl")[1] / "unet", base=models("sd1")[1])
    assert "text_encoder_2" in caught.value.found


def test_an_autoencoder_with_other_latents(models, tiny, vocabulary, tmp_path):
    family = small(tiny)
    wide = random_pipeline(replace(family, vae=replace(family.vae, latent_channels=16)), vocabulary)
    source = write(tmp_path / "vae.safetensors", wide.vae.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(models("sd2")[1], vae=source)
    assert caught.value.code == "CKPT_CHANNELS"
    assert "4 to 4 channels, a VAE of 16" in caught.value.found


def test_text_encoders_of_two_vocabularies(models, tiny, vocabulary, tmp_path):
    family = as_sdxl(small(tiny))
    pipe = random_pipeline(replace(family, text_2=replace(family.text_2, vocab_size=600)), vocabulary)
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    with pytest.raises(CheckpointError, match="600 tokens") as caught:
        load(tmp_path / "model")
    assert caught.value.code == "CKPT_MISMATCH"


def test_a_pooled_text_that_does_not_fit(models, tiny, vocabulary, tmp_path):
    family = as_sdxl(small(tiny))
    pipe = random_pipeline(replace(family, text_2=replace(family.text_2, projection_dim=27)), vocabulary)
    sdinpaint.save_diffusers(tmp_path / "model", pipe)
    with pytest.raises(CheckpointError, match="the pooled text has 27") as caught:
        load(tmp_path / "model")
    assert caught.value.code == "CKPT_MISMATCH"


def test_the_refiner_is_refused_by_its_name(inventory, tmp_path):
    shapes = {name: shape for name, shape in inventory("sdxl_base.sgm").shapes().items() if "embedders.0" not in name}
    shapes = {name.replace("embedders.1.", "embedders.0."): shape for name, shape in shapes.items()}
    shapes = {name: (*shape[:-1], 1280) if "attn2.to_k" in name else shape for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match="the SDXL refiner") as caught:
        load(write_header(tmp_path / "refiner.safetensors", shapes))
    assert caught.value.code == "CKPT_WRONG_FAMILY"


# Noise or v


@pytest.fixture
def bare(models, tmp_path):
    """Options with which a small SD2 file loads, and that tell nothing of its prediction."""
    config = shutil.copytree(models("sd2")[1], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(config / "scheduler")
    return {"config": config, "tokenizer": load(models("sd2")[1]).tokenizer}


def test_noise_is_taken_and_told_where_nothing_tells(models, bare):
    with pytest.warns(SdInpaintWarning, match="prediction='v'") as caught:
        loaded = load(models("sd2")[2], **bare)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (loaded.family.name, loaded.family.schedule.prediction) == ("sd2", "eps")


def test_an_inpainting_model_predicts_noise(models, bare, tmp_path):
    file = models("sd2-inpainting")[2]
    rewrite_json(bare["config"] / "unet/config.json", in_channels=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        assert load(file, **bare).family.schedule.prediction == "eps"


def with_metadata(**metadata):
    return lambda file, config, tensors: write(file, tensors, metadata)


def with_yaml(file, config, tensors):
    write(file, tensors).with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')


def with_marker(file, config, tensors):
    write(file, tensors | {"v_pred": torch.tensor([])})


def with_scheduler(file, config, tensors):
    write(file, tensors)
    (config / "scheduler").mkdir()
    (config / "scheduler/scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')


@pytest.mark.parametrize(
    ("tell", "why"),
    [
        (with_scheduler, "scheduler_config.json: prediction_type v_prediction"),
        (with_yaml, "model.yaml: parameterization v"),
        (with_metadata(**{"modelspec.prediction_type": "v"}), "modelspec.prediction_type v"),
        (with_metadata(**{"modelspec.architecture": "stable-diffusion-v2-768-v"}), "stable-diffusion-v2-768-v"),
        (with_metadata(ss_v_parameterization="True"), "ss_v_parameterization True"),
        (with_marker, "a tensor 'v_pred'"),
    ],
)
def test_evidence_for_v(models, bare, tmp_path, tell, why):
    file = tmp_path / "model.safetensors"
    tell(file, bare["config"], single_file(models("sd2")[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        loaded, asked = load(file, **bare), load(file, prediction="eps", **bare)
    assert (loaded.family.name, loaded.family.schedule.prediction) == ("sd2-v", "v")
    assert (asked.family.name, asked.family.schedule.prediction) == ("sd2", "eps")
    assert why in open_checkpoint(LoadOptions(source=file, config=bare["config"])).prediction.why


def test_what_is_asked_for_decides_between_sources(models, bare, tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, single_file(models("sd2")[0]) | {"v_pred": torch.tensor([])}, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match=r"'v_pred'.*prediction_type epsilon"):
        load(file, **bare)
    for prediction in ("eps", "v"):
        assert load(file, prediction=prediction, **bare).family.schedule.prediction == prediction


def test_a_prediction_that_is_none(models):
    with pytest.raises(SettingError) as caught:
        load(models("sd2")[1], prediction="x0")
    assert (caught.value.code, caught.value.subject) == ("SETTING_PREDICTION", "prediction")


@pytest.mark.parametrize("tell", ["scheduler", "marker"])
def test_training_without_any_signal_is_told(models, vocabulary, tmp_path, tell):
    _, folder, _ = models("sdxl")
    folder = shutil.copytree(folder, tmp_path / "model")
    if tell == "scheduler":
        rewrite_json(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    else:
        rewrite(folder / UNET_FILE, lambda tensors: tensors | {"ztsnr": torch.tensor([])})
        with pytest.warns(SdInpaintWarning, match="no signal at all"):
            load(folder)
        folder = write(tmp_path / "m.safetensors", single_file(models("sdxl")[0]) | {"ztsnr": torch.tensor([])})
    options = {} if tell == "scheduler" else {"config": models("sdxl")[1], "tokenizer": vocabulary}
    with pytest.warns(SdInpaintWarning, match="no signal at all"):
        load(folder, **options)


# What inspect says


@pytest.mark.parametrize("name", NAMES)
def test_inspect_folders(models, name):
    pipe, folder, _ = models(name)
    report = sdinpaint.inspect(folder)
    kind = {"sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}[pipe.family.kind]
    assert (report.family, report.title) == (name, f"a {kind} model in a diffusers folder")
    assert report.parameters == {
        part: sum(value.numel() for value in tensors.values()) for part, tensors in states(pipe).items()
    }
    assert ("text_encoder_2" in report.parameters) == (pipe.family.kind == "sdxl")
    assert (report.prediction, report.has_tokenizer, report.sha256) == (pipe.family.schedule.prediction, True, {})
    assert "scheduler_config.json" in report.prediction_why
    json.dumps(report.to_json())


def test_inspect_hashes_what_it_is_asked_to(models):
    _, folder, file = models("sdxl")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    report = sdinpaint.inspect(file, hash=True)
    assert report.sha256 == {file.name: expected}
    assert not report.has_tokenizer
    assert expected in str(report)
    hashes = sdinpaint.inspect(folder, hash=True).sha256
    assert len(hashes) == 4
    assert hashes[VAE_FILE] == hashlib.sha256((folder / VAE_FILE).read_bytes()).hexdigest()


def test_inspect_on_the_command_line(models):
    _, folder, _ = models("sd2-v")
    run = CliRunner().invoke(main, ["inspect", str(folder), "--json", "--hash"])
    report = json.loads(run.stdout)
    assert (run.exit_code, report["family"], report["prediction"]) == (0, "sd2-v", "v")
    assert report["sha256"] == sdinpaint.inspect(folder, hash=True).sha256


def test_a_folder_with_a_broken_table_is_reported(models, tmp_path):
    folder = shutil.copytree(models("sdxl")[1], tmp_path / "model")
    (folder / "unet/config.json").write_text("{")
    report = sdinpaint.inspect(folder, hash=True)
    assert "not JSON" in report.problem
    assert str(folder / "unet/config.json") in report.problem
    assert (report.layout, report.in_channels, report.family) == ("diffusers", 4, "sdxl")
    assert set(report.parameters) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert len(report.sha256) == 4
    assert "does not load" in str(report)


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        sdinpaint.inspect(tmp_path)
