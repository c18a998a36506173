"""Every layer is called where anybody could tell: hooked, adapted, replaced, wrapped or compiled ones."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from builders import as_sdxl, random_pipeline, small
from networks import KINDS, network, one_of_each_kind
from painting import IMAGE, MASK
from recordings import draw
from torch import nn
from torch.nn.utils import parametrizations, prune

from sdinpaint.errors import SettingError
from sdinpaint.models import fused
from sdinpaint.models.layers import Conv3, is_plain
from sdinpaint.sampling.graphs import Graphs

ROUNDING = 1e-5
"""Relative, in float32: sums in another order."""
RUN = {"steps": 2, "seed": 1, "progress": False}


@pytest.fixture(params=KINDS)
def net(request, tiny, vocabulary):
    return network(request.param, tiny, vocabulary)


# SDXL's UNet has every kind of layer that SD2's has.
not_twice = pytest.mark.parametrize("net", [kind for kind in KINDS if kind != "UNet of SD2"], indirect=True)


@pytest.fixture
def unet(tiny, vocabulary):
    return network("UNet of SD1", tiny, vocabulary)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def pixels(result):
    return np.asarray(result.image).astype(int)


def same_image(one, other):
    """Equal to one level of 255."""
    return np.abs(pixels(one) - pixels(other)).max() <= 1


# Hooks


@torch.no_grad()
def test_a_hook_on_every_layer_fires_once_in_a_call(net):
    before, calls = net(), Counter()
    for name, layer in net.leaves.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert relative(net(), before) < ROUNDING
    assert calls == Counter(net.leaves.keys())


@not_twice
@torch.no_grad()
def test_a_hook_on_one_layer_fires_and_changes_nothing(net):
    before = net()
    for name, layer in one_of_each_kind(net.leaves).items():
        calls = []
        with layer.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            assert relative(net(), before) < ROUNDING, name
        assert calls == [1], name
    assert torch.equal(net(), before)


@torch.no_grad()
def test_a_pre_hook_and_a_hook_of_all_modules_fire_too(unet):
    calls = Counter()
    layer = unet.module.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_k")
    with layer.register_forward_pre_hook(lambda *_: calls.update(["before"])):
        unet()
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.update([module])):
        unet()
    assert calls.pop("before") == 1
    assert set(unet.leaves.values()) <= set(calls)


@torch.no_grad()
def test_what_a_hook_returns_is_what_counts(unet):
    before = unet()
    for end in ("attn1.to_v", "attn2.to_k", "in_layers.2", "out_layers.3", "skip_connection", "ff.net.2", "proj_in"):
        name = next(name for name in unet.leaves if name.endswith(end))
        with unet.leaves[name].register_forward_hook(lambda layer, given, out: 0 * out):
            assert not torch.equal(unet(), before), name


def test_a_backward_hook_sees_the_gradient(unet):
    seen = []
    layer = unet.module.get_submodule("input_blocks.1.0.in_layers.2")
    with layer.register_full_backward_hook(lambda layer, into, out: seen.append(out[0].abs().sum())):
        unet.module.requires_grad_(True)
        unet().square().sum().backward()
    assert len(seen) == 1
    assert seen[0] > 0


@torch.no_grad()
def test_what_a_hook_keeps_is_not_written_to_afterwards(net):
    kept = []
    for module in net.module.modules():
        module.register_forward_hook(lambda module, given, out: kept.append((out, copy.deepcopy(out))))
    net()
    pairs = [(one, then) for one, then in kept if isinstance(one, torch.Tensor)]
    assert len(pairs) >= len(net.leaves)
    assert all(torch.equal(*pair) for pair in pairs)


def test_features_that_are_read_in_a_run_stay(pipe):
    pipe, kept = copy.deepcopy(pipe), []
    for module in (*pipe.unet.modules(), *pipe.vae.modules()):
        module.register_forward_hook(lambda module, given, out: kept.append((out, copy.deepcopy(out))))
    pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    assert all(torch.equal(*pair) for pair in kept if isinstance(pair[0], torch.Tensor))


# Adapters


class Beside(nn.Module):
    """A layer with another one beside it, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.beside = base, copy.deepcopy(base)
        self.beside.bias = None
        self.beside.weight = nn.Parameter(0.1 * base.weight.std() * draw(3, *base.weight.shape), requires_grad=False)

    def forward(self, x):
        return self.base(x) + self.beside(x)


def put(module, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


@not_twice
@torch.no_grad()
def test_an_adapter_beside_any_layer_equals_the_merged_weights(net):
    before = net()
    layers = {name: one for name, one in net.leaves.items() if isinstance(one, nn.Linear | nn.Conv2d)}
    layers = one_of_each_kind(layers)
    for name, layer in layers.items():
        adapter = Beside(layer)
        put(net.module, name, adapter)
        adapted = net()
        put(net.module, name, layer)
        weight = layer.weight.clone()
        layer.weight += adapter.beside.weight
        merged = net()
        layer.weight.copy_(weight)
        assert relative(adapted, merged) < ROUNDING, name
        assert not torch.equal(adapted, before), name


def test_adapters_all_have_gradients(unet):
    for name, layer in unet.leaves.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            put(unet.module, name, Beside(layer))
    unet.module.requires_grad_(True)
    unet().square().mean().backward()
    assert all(weight.grad is not None for weight in unet.module.parameters())


@pytest.mark.parametrize("replace", ["method", "class"])
@torch.no_grad()
def test_a_forward_that_is_replaced_is_the_one_that_runs(unet, monkeypatch, replace):
    """LyCORIS and kohya's scripts put another forward into the instance, other programs into the class."""
    before, layer = unet(), unet.module.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    if replace == "method":
        layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight)
    else:
        linear = nn.functional.linear
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: linear(x, 2 * self.weight, self.bias))
    assert not torch.equal(unet(), before)


@torch.no_grad()
def test_pruned_and_parametrized_layers_are_what_runs(unet):
    before, module = unet(), unet.module
    for change in (
        lambda: prune.l1_unstructured(module.input_blocks[1][0].out_layers[3], "weight", 0.5),
        lambda: parametrizations.spectral_norm(module.input_blocks[1][0].in_layers[2]),
        lambda: parametrizations.weight_norm(module.input_blocks[1][1].transformer_blocks[0].attn1.to_v),
    ):
        change()
        now = unet()
        assert torch.isfinite(now).all()
    assert not torch.equal(now, before)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantized_linear_layers_are_what_runs(unet):
    before = unet()
    quantized = torch.ao.quantization.quantize_dynamic(unet.module, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(one) is nn.Linear for one in quantized.modules())
    assert 1e-4 < relative(unet(quantized), before) < 0.3


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_run_with_quantized_layers_has_a_manifest(pipe):
    pipe = copy.deepcopy(pipe)
    before = pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)
    after = pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    assert before.settings["manifest"]["weights"]["unet"] != after.settings["manifest"]["weights"]["unet"]


@pytest.mark.peer
def test_peft_trains_and_merges_all_that_it_adapts(unet):
    import peft

    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    adapted = [name for name in unet.leaves if name.endswith(tuple(names))]
    before = unet()
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, unet.module)
    out = unet(model)
    out.square().mean().backward()
    adapters = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(adapted) > 0
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapters.values())
    assert not torch.equal(out, before)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.merge()
        assert relative(unet(model), out) < ROUNDING


def test_layers_can_be_made_of_the_class_of_a_layer():
    """LyCORIS makes the layers that it puts beside convolutions in this way."""
    conv = Conv3(4, 8)
    for sizes, options in (
        ((4, 8, 1), {"bias": False}),
        ((4, 8, 3, 1, 1), {"bias": False}),
        ((4, 8, (3, 3), 2, 1), {}),
    ):
        made, right = type(conv)(*sizes, **options), nn.Conv2d(*sizes, **options)
        assert type(made) is nn.Conv2d
        made.load_state_dict(right.state_dict())
        assert torch.equal(made(draw(1, 2, 4, 8, 8)), right(draw(1, 2, 4, 8, 8)))
    assert (
        type(copy.deepcopy(conv)) is type(pickle.loads(pickle.dumps(conv))) is type(type(conv)(4, 8, 3, 1, 1)) is Conv3
    )


def dilated(layer):
    return nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=2, dilation=2)


def with_bias(layer):
    return nn.Linear(layer.in_features, layer.out_features)


REPLACEMENTS = {
    "input_blocks.1.0.in_layers.2": dilated,
    "input_blocks.1.0.out_layers.3": lambda layer: nn.Conv2d(
        layer.in_channels, layer.out_channels, 3, padding=1, bias=False
    ),
    "input_blocks.1.0.in_layers.1": lambda layer: nn.Identity(),
    "input_blocks.1.0.in_layers.0": lambda layer: nn.Identity(),
    "input_blocks.1.0.emb_layers.0": lambda layer: nn.Identity(),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": with_bias,
    "input_blocks.1.1.transformer_blocks.0.attn1.to_v": with_bias,
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k": with_bias,
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out": lambda layer: nn.Sequential(layer[0], nn.SiLU()),
    "input_blocks.1.1.transformer_blocks.0.norm2": lambda layer: nn.Identity(),
    "input_blocks.1.1.transformer_blocks.0.norm3": lambda layer: nn.LayerNorm(
        layer.normalized_shape, elementwise_affine=False
    ),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0": lambda layer: nn.Linear(
        layer.proj.in_features, layer.proj.out_features // 2
    ),
    "input_blocks.1.1.transformer_blocks.0.ff.net.1": lambda layer: nn.SiLU(),
    "input_blocks.1.1.proj_in": lambda layer: nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1),
    "time_embed.1": lambda layer: nn.Identity(),
    "out.1": lambda layer: nn.Identity(),
    "out.2": dilated,
    "output_blocks.2.1.conv": dilated,
}


@pytest.mark.parametrize("name", REPLACEMENTS)
@torch.no_grad()
def test_another_layer_of_torch_s_own_is_what_runs(unet, name):
    """In the place of one that a fusion would compute: against the same network with every layer called."""
    found = [one for one in unet.module.named_modules() if one[0].endswith(name.partition(".conv")[0])]
    if name.endswith(".conv"):  # the first upsampling, wherever it is
        name = next(one for one, layer in unet.module.named_modules() if type(layer).__name__ == "Upsample") + ".conv"
    assert found
    before = unet()
    put(unet.module, name, REPLACEMENTS.get(name, dilated)(unet.module.get_submodule(name)))
    after = unet()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        called = unet()
    assert relative(after, called) < ROUNDING
    assert relative(after, before) > 1e-4


@torch.no_grad()
def test_circular_padding_makes_images_that_tile(pipe):
    """The common way to textures without a seam: every convolution sees the other edge of the map."""
    pipe = copy.deepcopy(pipe)
    before = pipe.decode(draw(1, 1, 4, 8, 8))
    for layer in (*pipe.unet.modules(), *pipe.vae.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
    latents = draw(1, 1, 4, 8, 8)
    after = pipe.decode(latents)
    assert relative(after, before) > 1e-3
    rolled = pipe.decode(latents.roll(3, -1))
    assert relative(rolled, after.roll(24, -1)) < 1e-4


# What is plain


CHANGES = {
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda layer: setattr(layer, "forward", layer.forward),
    "another class": lambda layer: setattr(layer, "__class__", type("Other", (type(layer),), {})),
    "a parametrization": parametrizations.weight_norm,
    "compiled": lambda layer: layer.compile(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_does_more_than_its_class_is_not_plain(unet, name):
    layer = unet.module.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    assert is_plain(unet.module)
    CHANGES[name](layer)
    assert not is_plain(unet.module)
    assert is_plain(unet.module.middle_block)


def test_fusions_that_ask_nobody_are_seen(unet, sabotage):
    """Broken on purpose: where everything counts as plain, hooks stay silent and adapters without effect."""
    for module in (fused, __import__("sdinpaint.models.unet", fromlist=["unet"])):
        sabotage(module, "is_plain", lambda *_: True)
    calls = Counter()
    for name, layer in unet.leaves.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    unet()
    assert len(calls) < len(unet.leaves)


# What is assigned to a pipeline is what runs


class Wrapper(nn.Module):
    """Hands everything on, and counts; nothing of what it wraps shows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *given, **options):
        self.calls += 1
        return self.inner(*given, **options)


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("name", ["unet", "vae", "text", "controlnet"])
def test_a_wrapper_is_what_runs(tiny, vocabulary, sdxl, name):
    pipe = random_pipeline(as_sdxl(tiny) if sdxl else small(tiny), vocabulary)
    if name == "controlnet":
        if sdxl:
            return
        pipe.controlnet = network("ControlNet", small(tiny), vocabulary).module
    before = pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    whole = getattr(pipe, name)
    wrapper = nn.ModuleList(map(Wrapper, whole)) if isinstance(whole, nn.ModuleList) else Wrapper(whole)
    setattr(pipe, name, wrapper)
    after = pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    assert same_image(before, after)
    assert all(one.calls > 0 for one in ([*wrapper] if isinstance(wrapper, nn.ModuleList) else [wrapper]))


def test_one_of_two_text_encoders_can_be_replaced(tiny, vocabulary):
    pipe = random_pipeline(as_sdxl(tiny), vocabulary)
    pipe.text[1] = Wrapper(pipe.text[1])
    pipe.encode_prompts(["a red fox"])
    assert pipe.text[1].calls == 1
    with pytest.raises(SettingError) as caught:
        pipe.text = pipe.text[0]
    assert caught.value.code == "SETTING_TEXT"


def test_a_wrapped_vae_runs_at_once_where_a_plain_one_runs_in_strips(pipe):
    pipe = copy.deepcopy(pipe)
    pipe.tile = 16
    strips = pipe.decode(draw(1, 1, 4, 16, 16))
    pipe.vae = Wrapper(pipe.vae)
    assert torch.allclose(pipe.decode(draw(1, 1, 4, 16, 16)), strips, atol=1e-4)
    assert pipe.vae.calls == 1


def test_a_block_that_is_wrapped_is_given_its_inputs(unet):
    before = unet()
    for stage in (unet.module.input_blocks[1], unet.module.middle_block, unet.module.output_blocks[2]):
        for index, layer in enumerate(stage):
            stage[index] = Wrapper(layer)
    assert relative(unet(), before) < ROUNDING


# CUDA graphs, here with one that replays by calling


def test_a_hook_that_comes_after_a_capture_is_seen(pipe, replays):
    pipe, calls = copy.deepcopy(pipe), []
    pipe.graphs = Graphs(True)
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise, x = pipe.denoiser(known, *said), draw(1, *known.masked_latents.shape)
    with torch.no_grad():
        before = denoise(x, 2.0)
        assert replays.made == 1
        with pipe.unet.out[2].register_forward_hook(lambda *_: calls.append(1)):
            assert relative(denoise(x, 2.0), before) < ROUNDING
        assert calls  # twice, because this replay, unlike a GPU's, calls the layers too
    assert replays.made == 1


def test_a_model_that_is_not_plain_is_not_captured(pipe, replays):
    pipe = copy.deepcopy(pipe)
    pipe.graphs, before = Graphs(True), pipe.inpaint(IMAGE, MASK, "a red fox", **RUN)
    replays.made = 0
    pipe.graphs = Graphs(True)
    for layer in (pipe.unet.input_blocks[0][0], pipe.vae.decoder.conv_in):
        layer.register_forward_hook(lambda *_: None)
    assert same_image(before, pipe.inpaint(IMAGE, MASK, "a red fox", **RUN))
    assert replays.made == 0


@torch.no_grad()
def test_a_hook_that_comes_between_two_steps_fires_once_in_the_next(pipe):
    pipe, calls = copy.deepcopy(pipe), Counter()
    known, said = pipe.encode_image(IMAGE, MASK), pipe.encode_prompts(["a red fox", ""])
    denoise, x = pipe.denoiser(known, *said), draw(1, *known.masked_latents.shape)
    before = denoise(x, 2.0)
    for name, layer in pipe.unet.named_modules():
        if list(layer.parameters(recurse=False)):
            layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert relative(denoise(x, 2.0), before) < ROUNDING
    assert set(calls.values()) == {1}
