"""Every algorithm of adapters against its formula in float64, and the refusals, after which nothing has changed."""

from __future__ import annotations

import pytest
import torch
from adapters import (
    ALGORITHMS,
    CONVOLUTIONS,
    Drawn,
    assert_weights,
    dora,
    full,
    glora,
    kohya,
    layers,
    loha,
    lokr,
    lora,
    same,
    weights,
    write,
)
from builders import as_sd2, as_sdxl, for_text_to_image, random_pipeline, small
from refusals import refused
from torch import nn

from sdinpaint.adapters.deltas import weight_delta
from sdinpaint.errors import AdapterError

NORMS = (nn.GroupNorm, nn.LayerNorm)


@pytest.fixture(scope="module")
def pipe(tiny, vocabulary):
    """A small random pipeline of 9 channels."""
    return random_pipeline(small(tiny), vocabulary)


def is_conv_in(layer):
    return layer.diffusers == "conv_in"


def made_for(pipe, make, kinds=(nn.Linear, nn.Conv2d)):
    """Tensors of a file in which `make` drew the parts of every third layer, and the deltas by weight."""
    draw, tensors, deltas = Drawn(), {}, {}
    for layer in layers(pipe, kinds)[::3]:
        weight = layer.module.weight
        parts, delta = make(draw, tuple(weight.shape))
        tensors |= {f"{kohya(layer)}.{part}": one for part, one in parts.items()}
        deltas[layer.network, f"{layer.official}.weight"] = delta(weight.double())
    return tensors, deltas


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_of_linear_layers_and_convolutions(pipe, tmp_path, name):
    algorithm, make = ALGORITHMS[name]
    before = weights(pipe)
    tensors, deltas = made_for(pipe, make)
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)) as added:
        assert added.kinds == {algorithm: len(deltas)}
        assert_weights(pipe, before, deltas)
    assert same(pipe, before)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_algorithm_of_convolutions(pipe, tmp_path, name):
    algorithm, make = CONVOLUTIONS[name]
    before = weights(pipe)
    tensors, deltas = made_for(pipe, make, nn.Conv2d)
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)) as added:
        assert added.kinds == {algorithm: len(deltas)}
        assert_weights(pipe, before, deltas)


def test_norms_and_biases(pipe, tmp_path):
    before, draw, tensors, deltas = weights(pipe), Drawn(), {}, {}
    for number, layer in enumerate(layers(pipe, NORMS)):
        size, stem = len(layer.module.weight), kohya(layer)
        parts = {"w_norm": draw(size), "b_norm": draw(size)}
        if number % 3:  # LyCORIS writes both; either alone is as good
            del parts["w_norm" if number % 3 == 1 else "b_norm"]
        tensors |= {f"{stem}.{part}": one for part, one in parts.items()}
        names = {"w_norm": "weight", "b_norm": "bias"}
        deltas |= {(layer.network, f"{layer.official}.{names[part]}"): one.double() for part, one in parts.items()}
    for number, layer in enumerate(layers(pipe)):
        if layer.module.bias is not None:
            stem, bias = kohya(layer), draw(len(layer.module.bias))
            tensors[f"{stem}.diff_b"] = bias
            deltas[layer.network, f"{layer.official}.bias"] = bias.double()
            if number % 2:
                parts, delta = (full, lora, loha, lokr, glora)[number % 5](draw, tuple(layer.module.weight.shape))
                tensors |= {f"{stem}.{part}": one for part, one in parts.items()}
                deltas[layer.network, f"{layer.official}.weight"] = delta(layer.module.weight.double())
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors), 1.0):
        assert_weights(pipe, before, deltas)
    with pipe.adapted(tmp_path / "fox.safetensors", -0.5):
        assert_weights(pipe, before, {key: -0.5 * one for key, one in deltas.items()})
    assert same(pipe, before)


def test_ranks_and_alphas_differ_from_layer_to_layer(pipe, tmp_path):
    before, draw, tensors, deltas = weights(pipe), Drawn(), {}, {}
    for number, layer in enumerate(layers(pipe)):
        parts, delta = lora(draw, tuple(layer.module.weight.shape), 1 + number % 4)
        factor = (1.0, 0.25, -2.0)[number % 3]
        parts["alpha"] = parts["alpha"] * factor
        tensors |= {f"{kohya(layer)}.{part}": one for part, one in parts.items()}
        deltas[layer.network, f"{layer.official}.weight"] = factor * delta(None)
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        assert_weights(pipe, before, deltas)


def test_the_example_of_dora():
    weight, down, up = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([[0.0, 4]]), torch.tensor([[1.0], [0]])
    parts = {"down": down, "up": up, "dora_scale": torch.tensor([[10.0], [1]])}
    assert torch.equal(weight + weight_delta(parts, weight), torch.tensor([[6.0, 8], [0, 1]]))


def test_the_axis_of_dora_in_a_square_weight_is_that_of_its_shape(pipe, tmp_path):
    """Where rows are as many as columns, (n, 1) and (n,) are of rows, (1, n) of columns."""
    square = [layer for layer in layers(pipe) if layer.module.weight.shape[0] == layer.module.weight.shape[1]]
    assert square
    before = weights(pipe)
    for axis, form in ((0, "dora_scale"), (1, "dora_scale"), (0, "dora_scale, one axis"), (0, "lora_magnitude_vector")):
        draw, tensors, deltas = Drawn(), {}, {}
        for layer in square:
            parts, delta = dora(draw, tuple(layer.module.weight.shape), axis=axis, form=form)
            tensors |= {f"{kohya(layer)}.{part}": one for part, one in parts.items()}
            deltas[layer.network, f"{layer.official}.weight"] = delta(layer.module.weight.double())
        with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
            assert_weights(pipe, before, deltas)


OF_4_CHANNELS = ["lora", "loha", "lokr, both full", "full", "glora", "glora, old", "ia3, columns", "tucker"]
OF_4_CHANNELS += ["loha, tucker", "dora, rows", "dora, columns", "dora of peft"]


@pytest.mark.parametrize("name", OF_4_CHANNELS)
def test_a_first_convolution_of_4_channels_is_for_the_first_4_of_9(pipe, tmp_path, name):
    _, make = (ALGORITHMS | CONVOLUTIONS)[name]
    before = weights(pipe)
    (layer,) = filter(is_conv_in, layers(pipe))
    o, _, *kernel = layer.module.weight.shape
    parts, delta = make(Drawn(), (o, 4, *kernel))
    wanted = torch.zeros(layer.module.weight.shape, dtype=torch.float64)
    wanted[:, :4] = delta(layer.module.weight[:, :4].double())
    tensors = {f"{kohya(layer)}.{part}": one for part, one in parts.items()}
    with pipe.adapted(write(tmp_path / "fox.safetensors", tensors)):
        assert_weights(pipe, before, {("unet", "input_blocks.0.0.weight"): wanted})
        now = pipe.unet.get_submodule(layer.official).weight
        assert torch.equal(now[:, 4:], before["unet", "input_blocks.0.0.weight"][:, 4:])


def test_one_of_9_channels_is_refused_by_4(tiny, vocabulary, pipe, tmp_path):
    four = random_pipeline(for_text_to_image(small(tiny)), vocabulary)
    tensors, _ = made_for(pipe, lora, nn.Conv2d)
    before, file = weights(four), write(tmp_path / "fox.safetensors", tensors)
    refused(AdapterError, "ADAPTER_SHAPE", lambda: four.add_lora(file), "conv_in")
    assert same(four, before)


# Refusals


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(stem=Q, o=36, i=36, r=2):
    return {f"{stem}.lora_down.weight": torch.ones(r, i), f"{stem}.lora_up.weight": torch.ones(o, r)}


def of_checkpoint(pipe):
    return {f"model.diffusion_model.{key}": one for key, one in pipe.unet.state_dict().items()}


NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))
HALF = {"lora_down.weight": torch.ones(2, 36), "lora_up.weight": torch.ones(36, 2)}
REFUSED = {
    "nothing": ({}, "ADAPTER_KIND", ()),
    "other tensors": ({"a": torch.ones(2), "b.c": torch.ones(2)}, "ADAPTER_KIND", ("a", "b.c")),
    "OFT": ({f"{Q}.oft_blocks": torch.ones(3, 12, 12), f"{Q}.alpha": torch.tensor(1.0)}, "ADAPTER_KIND", ("OFT",)),
    "OFT of kohya": (
        {f"{Q}.oft_blocks": torch.ones(3, 12, 12), f"{Q}.rescale": torch.ones(1)},
        "ADAPTER_KIND",
        ("OFT",),
    ),
    "BOFT": ({f"{Q}.oft_blocks": torch.ones(3, 2, 12, 12)}, "ADAPTER_KIND", ("BOFT",)),
    "OFT beside LoRA": (pair() | {f"{Q[:-1]}k.oft_blocks": torch.ones(3, 12, 12)}, "ADAPTER_KIND", ("OFT",)),
    "Control-LoRA": (
        {
            "lora_controlnet": torch.zeros(0),
            "input_blocks.0.0.up": torch.ones(2, 2),
            "input_blocks.0.0.down": torch.ones(2),
        },
        "ADAPTER_KIND",
        ("Control-LoRA",),
    ),
    "IP-Adapter": (
        {"image_proj.proj.weight": torch.ones(2, 2), "ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)},
        "ADAPTER_KIND",
        ("IP-Adapter",),
    ),
    "Flux of kohya": (pair("lora_unet_double_blocks_0_img_attn_proj"), "ADAPTER_FAMILY", ("Flux",)),
    "Flux of diffusers": (pair("transformer.transformer_blocks.0.attn.to_q"), "ADAPTER_FAMILY", ("Flux",)),
    "Flux, single blocks": (pair("transformer.single_transformer_blocks.0.attn.to_q"), "ADAPTER_FAMILY", ("Flux",)),
    "SD 3": (pair("diffusion_model.joint_blocks.0.x_block.attn.proj"), "ADAPTER_FAMILY", ("SD 3",)),
    "T5": (pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), "ADAPTER_FAMILY", ()),
    "a prior": (pair("lora_prior_unet_down_blocks_0_attentions_0"), "ADAPTER_FAMILY", ("prior",)),
    "SDXL": (
        pair("lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q"),
        "ADAPTER_FAMILY",
        ("Stable Diffusion XL",),
    ),
    "SDXL's second text encoder": (
        pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "ADAPTER_FAMILY",
        ("Stable Diffusion XL",),
    ),
    "down alone": ({f"{Q}.lora_down.weight": torch.ones(2, 36)}, "ADAPTER_INCOMPLETE", (f"{Q}.lora_down.weight",)),
    "up alone": ({f"{Q}.lora_up.weight": torch.ones(36, 2)}, "ADAPTER_INCOMPLETE", ()),
    "alpha alone": (pair() | {f"{Q[:-1]}k.alpha": torch.tensor(1.0)}, "ADAPTER_INCOMPLETE", (f"{Q[:-1]}k.alpha",)),
    "half of LoHa": (
        {f"{Q}.hada_w1_a": torch.ones(36, 2), f"{Q}.hada_w1_b": torch.ones(2, 36)},
        "ADAPTER_INCOMPLETE",
        (),
    ),
    "DoRA's magnitude alone": ({f"{Q}.dora_scale": torch.ones(36, 1)}, "ADAPTER_INCOMPLETE", ()),
    "two algorithms": (pair() | {f"{Q}.diff": torch.ones(36, 36)}, "ADAPTER_INCOMPLETE", ()),
    "unknown keys": (
        pair() | {f"lora_unet_other_{n}.alpha": torch.ones(()) for n in range(7)},
        "ADAPTER_KEYS",
        (7, "lora_unet_other_0"),
    ),
    "two names": (
        pair() | pair("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"),
        "ADAPTER_KEYS",
        (2, "middle_block_1"),
    ),
    "two dialects": (
        pair() | {Q.replace("lora_unet_", "lycoris_") + ".alpha": torch.ones(()), f"{Q}.alpha": torch.ones(())},
        "ADAPTER_KEYS",
        (1, "lycoris_"),
    ),
    "columns": (pair(i=37), "ADAPTER_SHAPE", ("mid_block.attentions.0",)),
    "rows": (pair(o=35), "ADAPTER_SHAPE", ()),
    "transposed parts": (
        {f"{Q}.lora_down.weight": torch.ones(36, 2), f"{Q}.lora_up.weight": torch.ones(2, 36)},
        "ADAPTER_SHAPE",
        (),
    ),
    "ranks": (pair() | {f"{Q}.lora_up.weight": torch.ones(36, 3)}, "ADAPTER_SHAPE", ()),
    "rank 0": (pair(r=0) | {f"{Q}.alpha": torch.tensor(1.0)}, "ADAPTER_SHAPE", ()),
    "numbers for matrices": (pair() | {f"{Q}.lora_up.weight": torch.tensor(1.0)}, "ADAPTER_SHAPE", ()),
    "several alphas": (pair() | {f"{Q}.alpha": torch.ones(2)}, "ADAPTER_SHAPE", ()),
    "no alpha in alpha": (pair() | {f"{Q}.alpha": torch.ones(0)}, "ADAPTER_SHAPE", ()),
    "DoRA of one number": (pair() | {f"{Q}.dora_scale": torch.ones(1)}, "ADAPTER_SHAPE", ()),
    "DoRA of one number on two axes": (pair() | {f"{Q}.dora_scale": torch.ones(1, 1)}, "ADAPTER_SHAPE", ()),
    "PEFT's magnitude of one number": (pair() | {f"{Q}.lora_magnitude_vector": torch.ones(1)}, "ADAPTER_SHAPE", ()),
    "DoRA of other rows": (pair() | {f"{Q}.dora_scale": torch.ones(37, 1)}, "ADAPTER_SHAPE", ()),
    "DoRA of a matrix": (pair() | {f"{Q}.dora_scale": torch.ones(36, 36)}, "ADAPTER_SHAPE", ()),
    "IA3 of one number": ({f"{Q}.weight": torch.ones(1), f"{Q}.on_input": torch.tensor(1)}, "ADAPTER_SHAPE", ()),
    "a bias where there is none": ({f"{Q}.diff_b": torch.ones(36)}, "ADAPTER_SHAPE", ("bias",)),
    "full, transposed sizes": (
        {f"{Q.replace('attn1_to_q', 'ff_net_2')}.diff": torch.ones(144, 36)},
        "ADAPTER_SHAPE",
        (),
    ),
    "NaN": (
        pair() | {f"{Q}.lora_up.weight": torch.full((36, 2), float("nan"))},
        "ADAPTER_VALUES",
        (f"{Q}.lora_up.weight",),
    ),
    "infinity": (pair() | {f"{Q}.lora_down.weight": torch.full((2, 36), float("-inf"))}, "ADAPTER_VALUES", ()),
    "NaN in alpha": (pair() | {f"{Q}.alpha": NAN}, "ADAPTER_VALUES", (f"{Q}.alpha",)),
    "infinity in alpha": (pair() | {f"{Q}.alpha": INF}, "ADAPTER_VALUES", ()),
    "NaN in fp16": (pair() | {f"{Q}.alpha": NAN.half()}, "ADAPTER_VALUES", ()),
    "beyond float32": (
        pair() | {f"{Q}.lora_up.weight": torch.full((36, 2), 1e300, dtype=torch.float64)},
        "ADAPTER_VALUES",
        (),
    ),
    "NaN in DoRA": (pair() | {f"{Q}.dora_scale": torch.full((36, 1), float("nan"))}, "ADAPTER_VALUES", ()),
}


def width(pipe):
    """Width of the middle block's attention."""
    return len(pipe.unet.middle_block[1].norm.weight)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_file_is_refused_by_code_and_changes_nothing(pipe, tmp_path, name):
    tensors, code, words = REFUSED[name]
    assert width(pipe) == 36
    before, file = weights(pipe), write(tmp_path / "fox.safetensors", tensors)
    refused(AdapterError, code, lambda: pipe.add_lora(file), *words)
    assert same(pipe, before)
    assert not pipe.loras


def test_a_checkpoint_is_no_adapter(pipe, tmp_path):
    """In either layout: a weight alone, which IA3 has beside another tensor, tells nothing."""
    for number, tensors in enumerate((of_checkpoint(pipe), dict(made_of_diffusers(pipe)))):
        file = write(tmp_path / f"{number}.safetensors", tensors)
        refused(AdapterError, "ADAPTER_KIND", lambda file=file: pipe.add_lora(file))


def made_of_diffusers(pipe):
    for layer in layers(pipe):
        if layer.network == "unet":
            yield f"{layer.diffusers}.weight", layer.module.weight
            if layer.module.bias is not None:
                yield f"{layer.diffusers}.bias", layer.module.bias


@pytest.mark.parametrize(
    ("made", "loaded"), [("sdxl", "sd1"), ("sdxl", "sd2"), ("sd1", "sdxl"), ("sd2", "sd1"), ("sd1", "sd2")]
)
def test_another_family_is_refused_by_its_name(tiny, vocabulary, tmp_path, made, loaded):
    """SD 1 and 2 differ in widths alone, which are those of released models."""
    kinds = {"sd1": tiny, "sd2": as_sd2(tiny), "sdxl": as_sdxl(tiny)}
    pipe = random_pipeline(small(kinds[loaded]), vocabulary)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[made]
    before, file = weights(pipe), write(tmp_path / "fox.safetensors", pair(stem, 640, width))
    names = {"sd1": "Diffusion 1", "sd2": "Diffusion 2", "sdxl": "Diffusion XL"}
    refused(AdapterError, "ADAPTER_FAMILY", lambda: pipe.add_lora(file), names[made])
    assert same(pipe, before)
