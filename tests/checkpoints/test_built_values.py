"""The configurations beside weights are what runs, or are refused: key by key."""

from __future__ import annotations

import inspect as signatures
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import as_sdxl, fill, random_pipeline, rewrite_json, small, write_header
from places import DATA
from refusals import NAN, inpaint, load, refused
from released import native_shapes, shapes_of
from safetensors.torch import save_file

import sdinpaint
from sdinpaint.checkpoints.built_values import CONTROLNET, SCHEDULER, SCHEDULERS, TABLES, TEXT, UNET, VAE, Table
from sdinpaint.checkpoints.configs import text_config, unet_config
from sdinpaint.checkpoints.diffusers_configs import controlnet_json, diffusers_configs
from sdinpaint.checkpoints.opening import open_checkpoint
from sdinpaint.checkpoints.schedule_config import schedule_config
from sdinpaint.errors import CheckpointError, SdInpaintWarning
from sdinpaint.families import FAMILIES, SD2_INPAINT, SD15, SDXL, ControlNetConfig, deviations
from sdinpaint.load_options import LoadOptions
from sdinpaint.models import ControlNet
from sdinpaint.provenance.manifest import differences

FILES = {"scheduler": "scheduler/scheduler_config.json", "tokenizer": "tokenizer/tokenizer_config.json"}


def file_of(component):
    return FILES.get(component, f"{component}/config.json")


def few_layers(tiny):
    """Return a small family whose text encoder has layers to leave out."""
    family = small(tiny)
    return replace(family, text=replace(family.text, num_layers=3))


@pytest.fixture(scope="module")
def source(tiny, vocabulary, tmp_path_factory):
    """A model as a diffusers folder; not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    sdinpaint.save_diffusers(folder, random_pipeline(few_layers(tiny), vocabulary))
    return folder


@pytest.fixture(scope="module")
def usual(source):
    """Its pipeline, and the image that this makes."""
    pipe = load(source)
    return pipe, np.asarray(inpaint(pipe, steps=2).image)


@pytest.fixture(scope="module")
def xl_source(tiny, vocabulary, tmp_path_factory):
    """One of SDXL's structure."""
    folder = tmp_path_factory.mktemp("good") / "xl"
    sdinpaint.save_diffusers(folder, random_pipeline(as_sdxl(few_layers(tiny)), vocabulary))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def xl_folder(xl_source, tmp_path):
    return shutil.copytree(xl_source, tmp_path / "xl")


def changed(folder, component, **values):
    """The folder with other values in one of its configurations."""
    rewrite_json(folder / file_of(component), **values)
    return folder


def opened(source, **options):
    """The family of a checkpoint of which no tensor is read."""
    return open_checkpoint(LoadOptions(source=source, **options)).family


# The tables are complete


@pytest.mark.peer
@pytest.mark.parametrize("name", ["unet", "vae", "controlnet", "text_encoder"])
def test_every_argument_of_a_class_is_in_its_table(name):
    """In exactly one part of it, with the class's default first among what is built."""
    import diffusers
    import transformers

    kind = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "controlnet": "ControlNetModel"}.get(name)
    defaults = defaults_of(transformers.CLIPTextConfig if kind is None else getattr(diffusers, kind))
    table = TABLES[name]
    assert defaults.keys() - table.known == set()
    for key, values in table.built.items():
        assert key not in defaults or values[0] == defaults[key], key
    own = {"in_channels", "eos_token_id", "sample_size"}  # told by the weights, in any case
    assert {key: defaults[key] for key in table.read if key not in own} == {
        key: value for key, value in table.read.items() if key not in own
    }


def defaults_of(kind):
    parameters = list(signatures.signature(kind.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


@pytest.mark.peer
def test_every_scheduler_is_known_or_refused():
    from diffusers import schedulers

    for name, kind in vars(schedulers).items():
        if not isinstance(kind, type) or not name.endswith("Scheduler"):
            continue
        if name not in SCHEDULERS:
            table = {"_class_name": name}
            refused(CheckpointError, "CKPT_NOT_BUILT", lambda: schedule_config(table, SD15.schedule, "here"), name)  # noqa: B023
        elif name != "DPMSolverSDEScheduler":  # it needs another package to have a signature
            defaults = defaults_of(kind)
            assert defaults.keys() - SCHEDULER.known == set(), name
            read = {key: defaults[key] for key in SCHEDULERS[name]}
            assert read == SCHEDULERS[name], name
            assert {"clip_sample", "set_alpha_to_one"} & defaults.keys() <= SCHEDULERS[name].keys() | ONLY_FALSE.get(
                name, set()
            )


ONLY_FALSE = {
    "HeunDiscreteScheduler": {"clip_sample"},
    "LCMScheduler": {"clip_sample"},
    "TCDScheduler": {"clip_sample"},
}
"""Classes -> what is false by default in them, as in the released families."""


@pytest.mark.parametrize("table", [UNET, VAE, TEXT, CONTROLNET, SCHEDULER], ids=lambda table: table.title)
def test_no_key_is_in_two_parts_of_a_table(table: Table):
    parts = [*table.built, *table.rows, *table.read, *table.proven, *table.unused]
    assert len(parts) == len(set(parts))


@pytest.mark.filterwarnings("error")
def test_the_released_configurations_load_without_a_word(folder):
    """Sizes aside, which are those of the weights."""
    sizes = {"attention_head_dim", "norm_num_groups", "num_attention_heads", "sample_size"}
    for component, table in json.loads((DATA / "released_configs.json").read_text()).items():
        changed(folder, component, **{key: value for key, value in table.items() if key not in sizes})
        assert TABLES[component].unknown(table) == []
    load(folder)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_what_is_written_is_built_and_known(family):
    for file, table in diffusers_configs(family).items():
        if known := TABLES.get(file.partition("/")[0]):
            known.settings(table, file)
            assert known.unknown(table) == []


# What is not built


UNBUILT = {
    "unet": {
        "_class_name": ["UNet3DConditionModel", 3],
        "act_fn": ["gelu", "mish", 3],
        "addition_embed_type": ["text_time", "text", "image"],
        "attention_type": ["gated", "gated-text-image"],
        "center_input_sample": [True, 1, "false"],
        "class_embed_type": ["timestep", "projection"],
        "class_embeddings_concat": [True],
        "cross_attention_norm": ["layer_norm", "group_norm"],
        "down_block_types": [["AttnDownBlock2D"] * 3, ["DownBlock2D", "KDownBlock2D"], "none"],
        "downsample_padding": [0, True],
        "dual_cross_attention": [True],
        "encoder_hid_dim": [4],
        "encoder_hid_dim_type": ["text_proj"],
        "flip_sin_to_cos": [False, 0, None],
        "freq_shift": [2, 7.5],
        "mid_block_only_cross_attention": [True],
        "mid_block_scale_factor": [1.4142, NAN],
        "mid_block_type": ["UNetMidBlock2DSimpleCrossAttn", None],
        "num_attention_heads": [2],
        "num_class_embeds": [10],
        "only_cross_attention": [True, [False, True, True]],
        "resnet_out_scale_factor": [2.0],
        "resnet_skip_time_act": [True],
        "resnet_time_scale_shift": ["scale_shift"],
        "time_cond_proj_dim": [256],
        "time_embedding_act_fn": ["gelu"],
        "time_embedding_type": ["fourier"],
        "timestep_post_act": ["silu"],
        "up_block_types": [["AttnUpBlock2D"] * 3],
    },
    "vae": {
        "_class_name": ["AutoencoderTiny", "ConsistencyDecoderVAE"],
        "act_fn": ["gelu"],
        "down_block_types": [["AttnDownEncoderBlock2D"] * 4],
        "mid_block_add_attention": [False, None],
        "shift_factor": [0.1159, -1],
        "use_post_quant_conv": [False, None],
        "use_quant_conv": [False, None],
        "up_block_types": [["AttnUpDecoderBlock2D"] * 4],
    },
    "text_encoder": {
        "hidden_act": ["relu", "gelu_new", 3, [], {}],
        "is_decoder": [True],
        "model_type": ["clip", "t5"],
    },
    "scheduler": {
        "_class_name": ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "NobodysScheduler", 3, []],
        "beta_schedule": ["linear", "squaredcos_cap_v2", "sigmoid", [], None],
        "final_sigmas_type": ["sigma_min"],
        "interpolation_type": ["log_linear"],
        "prediction_type": ["sample", "flow_prediction", 3, [], {}],
        "sigma_max": [14.6],
        "thresholding": [True],
        "timestep_spacing": ["AYS"],
        "timestep_type": ["continuous"],
        "trained_betas": [[0.1] * 1000],
        "use_flow_sigmas": [True],
        "variance_type": ["learned", "learned_range"],
    },
    "tokenizer": {
        "additional_special_tokens": [["<cat>"]],
        "bos_token": ["!", {"content": "<start>"}],
        "do_lower_case": [False],
        "eos_token": ["<|startoftext|>"],
        "split_special_tokens": [True],
        "pad_token": ["[PAD]", {"content": "other"}],
        "tokenizer_class": ["T5Tokenizer"],
    },
}


@pytest.mark.parametrize(
    ("component", "key"), [(component, key) for component, keys in UNBUILT.items() for key in keys]
)
def test_a_value_that_is_not_built(folder, component, key):
    path = folder / file_of(component)
    if component == "tokenizer":
        (folder / "tokenizer/special_tokens_map.json").unlink()
    good = path.read_text()
    for value in UNBUILT[component][key]:
        path.write_text(good)
        changed(folder, component, **{key: value})
        error = refused(CheckpointError, "CKPT_NOT_BUILT", lambda: load(folder), folder, f"{component}: {key} is")
        assert error.expected
    ours = sdinpaint.inspect(folder)
    assert key in ours.problem


def test_a_value_that_is_not_built_alone(folder, tmp_path):
    """A VAE and a ControlNet are read by other ways, too."""
    changed(folder, "vae", use_quant_conv=False)
    for way in (
        lambda: load(folder / "unet", base=folder),
        lambda: load("demo", vae=folder / "vae"),
        lambda: sdinpaint.convert(folder / "vae", tmp_path / "vae", progress=False),
    ):
        refused(CheckpointError, "CKPT_NOT_BUILT", way, "vae: use_quant_conv is false")


def test_null_is_the_default_of_the_class(folder):
    built = {component: dict.fromkeys(keys) for component, keys in UNBUILT.items() if component != "tokenizer"}
    for component, keys in built.items():
        switches = [key for key, values in TABLES[component].built.items() if values[0] is True]
        for key in (*TABLES[component].null_is_a_value, *switches, "beta_schedule"):
            keys.pop(key, None)
        changed(folder, component, **keys)
    changed(folder, "vae", scaling_factor=None)
    changed(folder, "text_encoder", num_hidden_layers=None)
    pipe = load(folder)
    assert deviations(pipe.family) == {}
    changed(folder, "scheduler", _class_name="DDIMScheduler", beta_start=None, set_alpha_to_one=None, clip_sample=False)
    found = load(folder).family.schedule
    assert (found.beta_start, found.beta_end, found.end_at_zero) == (0.0001, 0.012, True)


def test_a_key_that_nobody_knows_is_told_with_its_name(folder):
    changed(folder, "unet", **{"rope_theta": 1, "new\x1bkey": True, "_internal": 3})
    changed(folder, "scheduler", sharpness=2)
    with pytest.warns(SdInpaintWarning) as caught:
        load(folder)
    said = [str(one.message).partition(": ")[2] for one in caught]
    assert said == [
        r"unet/config.json: what is not known here is ignored: 'rope_theta', 'new\x1bkey'",
        "scheduler/scheduler_config.json: what is not known here is ignored: 'sharpness'",
    ]


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_component_without_a_configuration(folder, component, empty):
    file = folder / file_of(component)
    file.write_text("{}") if empty else file.unlink()
    refused(CheckpointError, "CKPT_NO_CONFIG", lambda: load(folder), folder, file_of(component), "config=FOLDER")
    assert "no " + file_of(component) in sdinpaint.inspect(folder).problem


def test_a_configuration_of_another_folder_serves(folder, source):
    (folder / "vae/config.json").unlink()
    assert load(folder, config=source).family == load(source).family
    refused(CheckpointError, "CKPT_NO_CONFIG", lambda: load(source, vae=folder / "vae"), folder / "vae")


def test_padding_of_another_folder_serves(folder, source, tmp_path):
    """Where it has no tokenizer, the padding of the model counts."""
    sdinpaint.convert(source, tmp_path / "model.safetensors", progress=False)
    changed(folder, "tokenizer", pad_token="!")
    (folder / "tokenizer/special_tokens_map.json").unlink()
    for model in (tmp_path / "model.safetensors", source):
        assert opened(model, config=folder).text.pad_id == 0
    shutil.move(folder / "tokenizer", tmp_path)
    assert opened(source, config=folder).text.pad_id is None


def test_a_unet_alone_has_the_schedule_of_its_base(folder, tmp_path):
    """It has none of its own, other than a UNet in the folder of its model."""
    changed(folder, "scheduler", prediction_type="v_prediction", beta_end=0.02)
    shutil.copytree(folder / "unet", tmp_path / "alone")
    sdinpaint.convert(folder, tmp_path / "base.safetensors", progress=False)
    weights = "diffusion_pytorch_model.safetensors"
    for unet in (tmp_path / "alone", tmp_path / "alone" / weights):
        for base in (folder, tmp_path / "base.safetensors"):
            assert opened(unet, base=base).schedule == opened(folder).schedule
    other = shutil.copytree(folder, tmp_path / "other")
    changed(other, "scheduler", prediction_type="epsilon")
    for unet in ("unet", f"unet/{weights}"):
        assert opened(folder / unet, base=other).schedule == opened(folder).schedule


def test_a_file_has_no_configuration_by_nature(folder, source):
    """A file alone is taken as one of the released family; a folder's other files serve it."""
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    other = shutil.copy(weights, folder / "vae.safetensors")
    changed(folder, "vae", scaling_factor=0.5)
    assert load(source, vae=folder).family.vae.scaling_factor == 0.5
    assert load(folder, vae=other).family.vae.scaling_factor == 0.5


def test_a_vae_has_the_scaling_of_its_own_class(xl_folder, source):
    """Not that of the UNet's family: SD1's files do not name it, as it is the default."""
    shutil.copytree(source / "vae", xl_folder / "other")
    rewrite_json(xl_folder / "other/config.json", scaling_factor=None)
    assert load(xl_folder, vae=xl_folder / "other").family.vae.scaling_factor == 0.18215 != SDXL.vae.scaling_factor


@pytest.fixture(scope="module")
def control(tiny):
    return fill(random_control(small(tiny).unet), 5)


def random_control(unet):
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig(unet=replace(unet, in_channels=4), hint_widths=(6, 8, 10, 12)))
    return net.to_empty(device="cpu")


def test_a_controlnet_of_another_convention(source, control, tmp_path):
    save_file(control.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    table = controlnet_json(control.config)
    for change in (
        {"flip_sin_to_cos": False},
        {"controlnet_conditioning_channel_order": "bgr"},
        {"global_pool_conditions": True},
        {"_class_name": "ControlNetUnionModel"},
        {"act_fn": "gelu"},
        {"mid_block_type": None},
        {"encoder_hid_dim_type": "text_proj"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(table | change))
        words = f"controlnet: {next(iter(change))} is"
        refused(CheckpointError, "CKPT_NOT_BUILT", lambda: load(source, controlnet=tmp_path), tmp_path, words)
    (tmp_path / "config.json").unlink()
    refused(CheckpointError, "CKPT_NO_CONFIG", lambda: load(source, controlnet=tmp_path), "controlnet/config.json")


def test_a_controlnet_of_differences(source, control, tmp_path):
    state = {f"control_model.{name}": tensor for name, tensor in control.state_dict().items()}
    save_file(state, tmp_path / "control.safetensors")
    load(source, controlnet=tmp_path / "control.safetensors")
    for marker in ("difference", "control_model.difference"):
        save_file(state | {marker: torch.zeros(1)}, tmp_path / "control.safetensors")
        way = lambda: load(source, controlnet=tmp_path / "control.safetensors")  # noqa: E731
        refused(CheckpointError, "CKPT_NOT_BUILT", way, marker, "stored as differences")


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_controlnet_whose_yaml_averages_its_residuals(source, control, tmp_path, suffix):
    """The released one for shuffled images says so nowhere else."""
    state = {f"control_model.{name}": tensor for name, tensor in control.state_dict().items()}
    save_file(state, tmp_path / "control.safetensors")
    yaml = tmp_path / f"control.{suffix}"
    yaml.write_text("model:\n  params:\n    global_average_pooling: False\n", encoding="utf-8")
    load(source, controlnet=tmp_path / "control.safetensors")
    yaml.write_text("model:\n  params:\n    global_average_pooling: True\n", encoding="utf-8")
    for way in (
        lambda: load(source, controlnet=tmp_path / "control.safetensors"),
        lambda: sdinpaint.convert(tmp_path / "control.safetensors", tmp_path / "out", progress=False),
    ):
        refused(CheckpointError, "CKPT_NOT_BUILT", way, "global_average_pooling")


def test_sd2_ends_before_its_last_block(tmp_path):
    """Whatever the file holds: 23 of 24 blocks are right, and 24 are not built."""
    for file, table in diffusers_configs(SD2_INPAINT).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(table))
    for component, name in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "text_encoder_no_position_ids")):
        shapes = shapes_of(f"sd2_inpainting.diffusers.{name}")
        last = {key.replace(".22.", ".23."): shape for key, shape in shapes.items() if ".layers.22." in key}
        write_header(tmp_path / component / "model.safetensors", shapes | last)
    found = open_checkpoint(LoadOptions(source=tmp_path))
    assert (found.family, found.notes) == (SD2_INPAINT, ())
    changed(tmp_path, "text_encoder", num_hidden_layers=24)
    way = lambda: open_checkpoint(LoadOptions(source=tmp_path))  # noqa: E731
    refused(CheckpointError, "CKPT_NOT_BUILT", way, "num_hidden_layers is 24")


def test_the_last_of_a_row_of_blocks_is_missed():
    """The others are a smaller network, which is complete."""
    shapes = native_shapes("text_encoder", "sd15_base")
    cut = {name: shape for name, shape in shapes.items() if ".layers.11." not in name}
    for table, layers in (({}, 12), ({"num_hidden_layers": 12}, 12), ({"num_hidden_layers": 11}, 11)):
        assert text_config(cut, table, SD15.text, "here").num_layers == layers
    shapes = native_shapes("unet", "sdxl_base")
    cut = {name: shape for name, shape in shapes.items() if not re.match(r"middle_block.*transformer_blocks\.9", name)}
    assert len(cut) < len(shapes)
    assert unet_config(cut, {}, SDXL.unet, "here").middle_depth == 10


def test_pooled_text_needs_every_layer(xl_folder):
    good = (xl_folder / "text_encoder_2/config.json").read_text()
    for change in ({"num_hidden_layers": 3}, {"eos_token_id": 5}):
        changed(xl_folder, "text_encoder_2", **change)
        refused(CheckpointError, "CKPT_NOT_BUILT", lambda: load(xl_folder), next(iter(change)))
        (xl_folder / "text_encoder_2/config.json").write_text(good)
    with pytest.warns(SdInpaintWarning, match="leaves out the last 1 of 3 layers"):
        assert load(changed(xl_folder, "text_encoder", num_hidden_layers=2)).family.text.skip_last == 2


# What is built: it is named, written and read back, and makes another image

MEAN, STD = [0.1, -0.2, 0.3, 0.05], [0.9, 1.1, 0.8, 1.2]
BUILT = [
    ("unet", {"freq_shift": 1}, {"unet.freq_shift": 1}),
    ("unet", {"norm_eps": 0.5}, {"unet.norm_eps": 0.5}),
    ("vae", {"scaling_factor": 0.5}, {"vae.scaling_factor": 0.5}),
    (
        "vae",
        {"latents_mean": MEAN, "latents_std": STD},
        {"vae.latents_mean": tuple(MEAN), "vae.latents_std": tuple(STD)},
    ),
    ("text_encoder", {"layer_norm_eps": 0.5}, {"text.norm_eps": 0.5}),
    ("text_encoder", {"num_hidden_layers": 2}, {"text.skip_last": 1}),
    ("text_encoder", {"hidden_act": "gelu"}, {"text.activation": "gelu"}),
    ("tokenizer", {"pad_token": "!"}, {"text.pad_id": 0}),
    ("scheduler", {"set_alpha_to_one": True}, {"schedule.end_at_zero": True}),
    ("scheduler", {"clip_sample": True, "clip_sample_range": 0.5}, {"schedule.clip_range": 0.5}),
    ("scheduler", {"beta_end": 0.02}, {"schedule.beta_end": 0.02}),
    ("scheduler", {"steps_offset": 0}, {"schedule.steps_offset": 0}),
    # runs are the same, but other programs rescale the schedule
    ("scheduler", {"rescale_betas_zero_snr": True}, {"schedule.zero_snr": True}),
]


@pytest.mark.parametrize(("component", "change", "own"), BUILT, ids=lambda one: next(iter(one), "") if one else "")
@pytest.mark.filterwarnings("ignore::sdinpaint.errors.SdInpaintWarning")
def test_a_value_that_is_built(usual, folder, tmp_path, component, change, own):
    if component == "tokenizer":
        (folder / "tokenizer/special_tokens_map.json").unlink()
    (released, image), pipe = usual, load(changed(folder, component, **change))
    expected = own if "scaling_factor" in change else {"vae.scaling_factor": 0.21} | own
    assert deviations(pipe.family) == expected
    for name, value in own.items():
        assert f"{name}={value!r}" in repr(pipe)
        assert f"{name} {value}" in str(sdinpaint.inspect(folder))
        assert name not in repr(released) or name == "vae.scaling_factor"
    assert np.array_equal(inpaint(pipe, steps=2).image, image) == ("rescale_betas_zero_snr" in change)
    sdinpaint.save_diffusers(tmp_path / "saved", pipe)
    assert load(tmp_path / "saved").family == pipe.family
    for target in ("converted", "converted.safetensors"):
        sdinpaint.convert(folder, tmp_path / target, progress=False)
        assert load(tmp_path / target).family == pipe.family


def test_a_manifest_tells_other_values(source, folder):
    made = inpaint(load(source)).settings["manifest"]
    assert made["values"] == {"vae.scaling_factor": "0.21"}
    other = load(changed(folder, "vae", scaling_factor=0.18215, latents_mean=MEAN, latents_std=STD))
    said = differences(made, other)
    assert f"vae.latents_std: made with the released value, here {tuple(STD)}" in said
    assert "vae.scaling_factor: made with 0.21, here the released value" in said


def test_inspect_tells_keys_that_nobody_knows(folder):
    changed(folder, "unet", an_unknown_key=3)
    assert any("an_unknown_key" in sentence for sentence in sdinpaint.inspect(folder).why)


def test_clipping_is_told(folder):
    with pytest.warns(SdInpaintWarning, match=r"ddim clip what it predicts to 1, which latents exceed"):
        load(changed(folder, "scheduler", clip_sample=True))


@pytest.mark.parametrize(
    "change",
    [
        *({"scaling_factor": factor} for factor in (1e-5, 0.005, 11, 1e4)),
        {"latents_mean": [0] * 4, "latents_std": [1, 1, 1, 100]},
        {"latents_mean": [0] * 4, "latents_std": [1e-3] * 4},
        {"latents_mean": [0, 0, -50, 0], "latents_std": [1] * 4},
    ],
    ids=str,
)
def test_a_scaling_of_no_vae_is_refused(folder, change):
    with pytest.raises(CheckpointError, match="|".join(change)) as caught:
        load(changed(folder, "vae", **change))
    assert caught.value.code == "CKPT_BAD_CONFIG"
