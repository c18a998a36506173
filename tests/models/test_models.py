"""The models without a peer: their names and shapes are the released ones, and what their operations compute."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st
from sdinpaint_kernels import attention, group_norm
from sdinpaint_weights.errors import CheckpointError
from sdinpaint_weights.layout import identify
from sdinpaint_weights.native import check_complete, native_state, outside_keys
from torch import nn

from sdinpaint.checkpoints.configs import text_config, unet_config, vae_config
from sdinpaint.checkpoints.schedule_config import schedule_config
from sdinpaint.families import SD15, SD15_INPAINT
from sdinpaint.models import VAE, CLIPText, UNet, clip, fused
from sdinpaint.models.layers import to_map, to_tokens
from sdinpaint.models.unet import timestep_embedding

FAMILIES = {"sd15_base": SD15, "sd15_inpainting": SD15_INPAINT}
SINGLE_FILES = ("ldm", "ldm_ema_scalars", "ldm_with_ema")
FOLDERS = {
    "unet": ("unet",),
    "vae": ("vae", "vae_old_names"),
    "text_encoder": ("text_encoder", "text_encoder_flat", "text_encoder_no_position_ids"),
}
KINDS = {"unet": (UNet, "unet"), "vae": (VAE, "vae"), "text_encoder": (CLIPText, "text")}
RELEASED = [
    *((kind, ending, component) for kind in FAMILIES for ending in SINGLE_FILES for component in KINDS),
    *(
        (kind, f"diffusers.{name}", component)
        for kind in FAMILIES
        for component in KINDS
        for name in FOLDERS[component]
    ),
]
HERE = Path("here")


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on_meta(family, component):
    kind, name = KINDS[component]
    with torch.device("meta"):
        return kind(getattr(family, name))


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def claim(weights, component, **options):
    return native_state(weights, component, identify(weights.shapes()), **options)


# Names and shapes


@pytest.mark.parametrize(("kind", "ending", "component"), RELEASED)
def test_the_models_are_those_of_the_released_files(inventory, kind, ending, component):
    weights = inventory(f"{kind}.{ending}")
    state, model = claim(weights, component), on_meta(FAMILIES[kind], component)
    check_complete(state, shapes_of(model))
    assert state.shapes() == shapes_of(model)
    assert (state.unexpected, outside_keys(weights, identify(weights.shapes()))) == ((), ())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in state.shapes().items()}
    model.load_state_dict(tensors, strict=True, assign=True)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_the_averaged_weights_fit_too(inventory, kind):
    state = claim(inventory(f"{kind}.ldm_with_ema"), "unet", ema=True)
    check_complete(state, shapes_of(on_meta(FAMILIES[kind], "unet")))


@pytest.mark.parametrize(
    "name", ["vae_ft_mse.ldm", "vae_ldm_training_ckpt_with_loss_and_ema", "sd_vae_ft_mse.diffusers"]
)
def test_autoencoders_alone_fit(inventory, name):
    check_complete(claim(inventory(name), "vae"), shapes_of(on_meta(SD15, "vae")))


@pytest.mark.parametrize(
    ("component", "change", "complaint"),
    [
        ("unet", {"in_channels": 4}, "input_blocks.0.0.weight: (320, 9, 3, 3) in the file, (320, 4, 3, 3) expected"),
        ("unet", {"num_res_blocks": 3}, "missing"),
        ("unet", {"transformer_depth": (1, 1, 0, 0)}, "unexpected, e.g. input_blocks.7.1.norm.weight"),
        ("vae", {"channel_mult": (1, 2, 4)}, "unexpected, e.g. encoder.down.2.downsample.conv.weight"),
        ("text", {"num_layers": 11}, "unexpected, e.g. text_model.encoder.layers.11"),
    ],
)
def test_another_model_does_not_fit(inventory, component, change, complaint):
    family = replace(SD15_INPAINT, **{component: replace(getattr(SD15_INPAINT, component), **change)})
    name = {"text": "text_encoder"}.get(component, component)
    with pytest.raises(CheckpointError) as caught:
        check_complete(claim(inventory("sd15_inpainting.ldm"), name), shapes_of(on_meta(family, name)))
    assert complaint in caught.value.found


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("ending", ["ldm", "diffusers"])
def test_sizes_are_read_off_the_shapes(inventory, kind, ending):
    """From a family of other sizes, which keeps only what no shape tells: heads, groups, activation and scale."""
    family = FAMILIES[kind]
    unet = replace(
        family.unet,
        in_channels=1,
        out_channels=1,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        transformer_depth=(3,),
        middle_depth=2,
        context_dim=1,
        linear_projection=True,
        vector_dim=1,
    )
    vae = replace(family.vae, in_channels=1, latent_channels=1, channels=32, channel_mult=(1,), num_res_blocks=1)
    text = replace(family.text, vocab_size=1, context_length=1, width=64, mlp_width=1, num_layers=1, num_heads=1)

    def shapes(component):
        name = f"{kind}.ldm" if ending == "ldm" else f"{kind}.diffusers.{component}"
        return claim(inventory(name), component).shapes()

    assert unet_config(shapes("unet"), {}, unet, HERE) == family.unet
    assert vae_config(shapes("vae"), {}, vae, HERE) == family.vae
    assert text_config(shapes("text_encoder"), {}, text, HERE) == family.text


def test_the_released_configuration_files_say_the_same(inventory, released):
    def shapes(component):
        return claim(inventory("sd15_inpainting.ldm"), component).shapes()

    family = SD15_INPAINT
    unet = replace(family.unet, num_heads=1, norm_groups=1)
    text = replace(family.text, num_heads=1, activation="gelu")
    schedule = replace(
        family.schedule, train_steps=1, beta_start=0.5, beta_end=0.6, prediction="eps", steps_offset=0, end_at_zero=True
    )
    assert unet_config(shapes("unet"), released["unet"], unet, HERE) == family.unet
    assert vae_config(shapes("vae"), released["vae"], replace(family.vae, norm_groups=1), HERE) == family.vae
    assert text_config(shapes("text_encoder"), released["text_encoder"], text, HERE) == family.text
    assert schedule_config(released["scheduler"], schedule, HERE) == family.schedule
    assert schedule_config({"steps_offset": 0}, family.schedule, HERE).steps_offset == 0


# What the models compute


@pytest.fixture(scope="module")
def unet(tiny):
    torch.manual_seed(0)
    return UNet(tiny.unet).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae(tiny):
    torch.manual_seed(1)
    return VAE(tiny.vae).eval().requires_grad_(False)


def inputs(config, batch, height=6, width=5):
    x, context = draw(2, batch, config.in_channels, height, width), draw(3, batch, 7, config.context_dim)
    return x, torch.linspace(1, 900, batch), context


@settings(deadline=None)
@given(st.floats(0, 999, width=32), st.sampled_from([2, 24, 320]))
def test_timestep_embedding(t, dim):
    half = dim // 2
    angles = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    expected = torch.cat([angles.cos(), angles.sin()])
    # float32: an angle up to 999 is rounded by 3e-5, and frequencies by 5e-7 of themselves
    torch.testing.assert_close(timestep_embedding(torch.tensor([t]), dim)[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(9, 13), (8, 8), (1, 1), (2, 31)])
def test_unet_keeps_any_size(unet, size):
    out = unet(*inputs(unet.config, 2, *size))
    assert out.shape == (2, 4, *size)
    assert out.isfinite().all()


def test_unet_treats_a_batch_as_its_items(unet):
    x, t, context = inputs(unet.config, 4)
    order = torch.tensor([2, 0, 3, 1])
    out = unet(x, t, context)
    torch.testing.assert_close(unet(x[order], t[order], context[order]), out[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(unet(x[2:3], t[2:3], context[2:3]), out[2:3], rtol=0, atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 0.01


@pytest.mark.parametrize("position", range(3))
def test_unet_uses_each_of_its_inputs(unet, position):
    given = list(inputs(unet.config, 2))
    out = unet(*given)
    given[position] = given[position] * 0.5
    assert (unet(*given) - out).abs().max() > 1e-3


@pytest.mark.parametrize("channel", range(9))
def test_unet_uses_each_channel(unet, channel):
    x, t, context = inputs(unet.config, 1)
    other = x.clone()
    other[:, channel] += 1
    assert (unet(other, t, context) - unet(x, t, context)).abs().max() > 1e-3


def test_feature_maps_are_channels_last_where_the_weights_are(unet, vae, monkeypatch):
    """Every convolution and norm gets its input as it wants it; one that does not costs a copy in each layer."""
    unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    seen = []

    def look(module, args):
        seen.append(args[0].is_contiguous(memory_format=torch.channels_last))

    layers = [
        layer
        for model in (unet, vae)
        for layer in model.modules()
        if isinstance(layer, nn.GroupNorm) or (isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1))
    ]

    def run():
        x, t, context = inputs(unet.config, 2)
        unet(x.contiguous(memory_format=torch.channels_last), t, context)
        vae.encode(draw(4, 2, 3, 40, 24))
        vae.decode(draw(5, 2, 4, 5, 3))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers)
    assert all(seen)
    # and where layers are computed together, without a call
    seen.clear()
    for name in ("conv3", "group_norm", "upsample_conv3"):
        whole = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda x, *more, whole=whole, **options: (look(None, (x,)), whole(x, *more, **options))[1]
        )
    run()
    assert len(seen) > len(layers) / 2
    assert all(seen)


def test_vae_shapes_and_samples(vae, tiny):
    image = draw(5, 2, 3, 64, 40)
    mean, std = vae.posterior(image)
    assert mean.shape == std.shape == (2, 4, 8, 5)
    assert (std > 0).all()
    assert torch.equal(vae.encode(image), mean)
    sample = vae.encode(image, torch.Generator().manual_seed(6))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(6))
    assert torch.equal(sample, mean + std * noise)
    assert vae.decode(sample).shape == image.shape
    unscaled = vae.encoder(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(vae.quant_conv(unscaled)[:, :4] * tiny.vae.scaling_factor, mean)


def test_a_plain_text_encoder_checks_its_weights_once(tiny, monkeypatch):
    text = CLIPText(tiny.text).eval().requires_grad_(False)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    begun = []
    monkeypatch.setattr(clip, "verified", lambda weights: begun.append(len(list(weights))) or nullcontext())
    expected = text(ids)
    text.text_model.encoder.layers[0].mlp.register_forward_hook(lambda *_: None)  # it may write to weights
    assert torch.equal(text(ids), expected)
    assert begun == [len(list(text.parameters())), 0]


def test_text_encoder_is_causal(tiny):
    torch.manual_seed(7)
    text = CLIPText(tiny.text).eval().requires_grad_(False)
    ids = torch.randint(tiny.text.vocab_size, (1, 77), generator=torch.Generator().manual_seed(8))
    other = ids.clone()
    other[0, 30] = (ids[0, 30] + 1) % tiny.text.vocab_size
    difference = (text(ids) - text(other)).abs().amax(-1)[0]
    assert text(ids).shape == (1, 77, tiny.text.width)
    assert (difference[:30] == 0).all()
    assert (difference[30:] > 0).all()


# The operations


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("std", [1.0, 0.003])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm(silu, eps, std, layout):
    x = (std * draw(9, 2, 12, 5, 7)).contiguous(memory_format=layout)
    weight, bias, before = draw(10, 12), draw(11, 12), x.clone()
    groups = x.double().reshape(2, 3, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    expected = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    expected = expected / (1 + (-expected).exp()) if silu else expected
    out = group_norm(x, 3, weight, bias, eps=eps, silu=silu)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(x, before)
    wrong_eps = group_norm(x, 3, weight, bias, eps=1.1e-5 - eps, silu=silu)
    assert ((wrong_eps.double() - expected).abs().max() > 0.1) == (std < 0.1)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_has_gradients(silu):
    x, weight, bias = (
        draw(seed, *shape, dtype=torch.float64) for seed, shape in ((1, (2, 6, 3, 2)), (2, (6,)), (3, (6,)))
    )
    given = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, 2, w, b, eps=1e-5, silu=silu), given)


def softmax_attention(q, k, v, causal=False):
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 77])
def test_attention(causal, tokens):
    q, k, v = (draw(seed, 2, tokens, 3, 8) for seed in (12, 13, 14))
    out = attention(q, k, v, causal=causal)
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v, causal), rtol=0, atol=2e-6)
    if tokens > 1:
        assert (out - softmax_attention(q, k, v, not causal)).abs().max() > 0.1


def test_attention_to_another_length():
    q, k, v = draw(15, 2, 5, 3, 8), draw(16, 2, 9, 3, 8), draw(17, 2, 9, 3, 8)
    torch.testing.assert_close(attention(q, k, v).double(), softmax_attention(q, k, v), rtol=0, atol=2e-6)


def test_attention_takes_any_strides():
    packed = draw(18, 2, 9, 3, 3, 8)
    views = packed.unbind(2)
    assert not any(view.is_contiguous() for view in views)
    assert close(attention(*views), attention(*(view.contiguous() for view in views)))


def test_tokens_and_maps_are_views_of_each_other():
    x = draw(19, 2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    back = to_map(tokens, x)
    assert tokens.data_ptr() == x.data_ptr() == back.data_ptr()
    assert torch.equal(tokens[1, 2 * 5 + 3], x[1, :, 2, 3])
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)
