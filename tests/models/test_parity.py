"""Our models against diffusers' and transformers' over the same random weights, and each guard seen to fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peers import QUIET, fill, ours, pipeline_twin, text_twin, unet_twin, vae_twin
from sdinpaint_kernels import attention
from torch.nn import functional as F

from sdinpaint.families import SD15_INPAINT
from sdinpaint.loading import load
from sdinpaint.models import VAE, CLIPText, UNet, clip, fused, prepared_unet, unet, vae
from sdinpaint.models.layers import GroupNorm

pytestmark = pytest.mark.peer

TOLERANCE = {"unet": 1e-4, "vae": 1e-4, "text_encoder": 1e-5}
TIMES = (0.0, 1.0, 413.75, 999.0)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(*pairs):
    """The largest absolute difference; what is compared has to be finite and of a size at which it means something."""
    for theirs, _ in pairs:
        assert 0.05 < float(theirs.std()) < 20
    return float(torch.stack([(theirs - mine).abs().max() for theirs, mine in pairs]).max())  # NaN stays NaN


def unet_difference(theirs, mine, std=1.0):
    """On 6 x 10 latents, so that halving twice rounds up, and at several times."""
    config = mine.config
    x, context = std * draw(1, len(TIMES), config.in_channels, 6, 10), draw(2, len(TIMES), 11, config.context_dim)
    t = torch.tensor(TIMES)
    return largest((theirs(x, t, context).sample, mine(x, t, context)))


def vae_difference(theirs, mine, std=1.0):
    image, latents, scale = std * draw(3, 2, 3, 40, 64), std * draw(4, 2, 4, 6, 10), theirs.config.scaling_factor
    posterior = theirs.encode(image).latent_dist
    mean, spread = mine.posterior(image)
    return largest(
        (posterior.mean, mean / scale),
        (posterior.std, spread / scale),
        (theirs.decode(latents / scale).sample, mine.decode(latents)),
    )


def text_difference(theirs, mine, std=1.0):
    config = mine.config
    ids = torch.randint(config.vocab_size, (2, config.context_length), generator=torch.Generator().manual_seed(5))
    ids[:, 0], ids[0, 9:], ids[1, 40:] = config.vocab_size - 2, config.vocab_size - 1, config.vocab_size - 1
    return largest((theirs(ids).last_hidden_state, mine(ids)))


DIFFERENCE = {"unet": unet_difference, "vae": vae_difference, "text_encoder": text_difference}


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def pairs(tiny, vocabulary, tmp_path_factory):
    """{residual: (diffusers' pipeline, ours as loaded from the folder that diffusers saved)}."""
    folder = tmp_path_factory.mktemp("twins")
    vocabulary.save(folder / "tokenizer")
    found = {}
    for residual in (1.0, QUIET):
        theirs = pipeline_twin(tiny, folder / "tokenizer", residual)
        theirs.save_pretrained(folder / str(residual))
        found[residual] = theirs, load(folder / str(residual), device="cpu", progress=False)
    return found


def models(pair, component):
    theirs, mine = pair
    return getattr(theirs, component), getattr(mine, {"text_encoder": "text"}.get(component, component))


def test_the_loaded_family_is_the_saved_one(pairs, tiny):
    assert all(mine.family == tiny for _, mine in pairs.values())


@pytest.mark.parametrize("component", list(DIFFERENCE))
@pytest.mark.parametrize(("residual", "std"), [(1.0, 1.0), (1.0, 0.03), (QUIET, 0.03)])
def test_small_models(pairs, component, residual, std):
    assert DIFFERENCE[component](*models(pairs[residual], component), std) <= TOLERANCE[component]


def test_one_fractional_time_for_a_whole_batch(pairs):
    theirs, mine = models(pairs[1.0], "unet")
    x, context = draw(1, 2, 9, 8, 8), draw(2, 2, 77, mine.config.context_dim)
    assert largest((theirs(x, 250.5, context).sample, mine(x, torch.full((2,), 250.5), context))) <= TOLERANCE["unet"]


# At full width the twins are built from the released configuration files, and the models share their memory.


def test_unet_at_full_width(released):
    theirs = fill(unet_twin(released["unet"]), 6)
    mine = ours(UNet, SD15_INPAINT.unet, "unet", theirs)
    assert mine.input_blocks[0][0].weight.data_ptr() == theirs.conv_in.weight.data_ptr()
    assert sum(weight.numel() for weight in mine.parameters()) == 859_535_364
    assert unet_difference(theirs, mine) <= TOLERANCE["unet"]


def test_vae_at_full_width(released):
    theirs = fill(vae_twin(released["vae"]), 7)
    assert theirs.config.scaling_factor == SD15_INPAINT.vae.scaling_factor
    assert vae_difference(theirs, ours(VAE, SD15_INPAINT.vae, "vae", theirs)) <= TOLERANCE["vae"]


def test_text_encoder_at_full_width(released):
    theirs = fill(text_twin(released["text_encoder"]), 8)
    mine = ours(CLIPText, SD15_INPAINT.text, "text_encoder", theirs)
    assert text_difference(theirs, mine) <= TOLERANCE["text_encoder"]


# Broken on purpose: each change below has to be seen. `patch` is pytest's monkeypatch.


def eps(kind, attribute, value):
    """Set eps on the norms of every block of a kind; `attribute` is a path such as "in_layers.0"."""

    def apply(model, sabotage):
        for block in model.modules():
            if isinstance(block, kind):
                block.get_submodule(attribute).eps = value

    return apply


def swap(kind, one, other):
    """Exchange two submodules of every block of a kind."""

    def apply(model, sabotage):
        for block in model.modules():
            if isinstance(block, kind):
                first, second = block.get_submodule(one), block.get_submodule(other)
                setattr(block, one, second)
                setattr(block, other, first)

    return apply


def attribute(kind, name, change):
    """Change an attribute of every module of a kind."""

    def apply(model, sabotage):
        for module in model.modules():
            if isinstance(module, kind):
                setattr(module, name, change(getattr(module, name)))

    return apply


def replaced(owner, name, new):
    """Put another function in the place of one."""
    return lambda model, sabotage: sabotage(owner, name, new)


def sines_first(t, dim, shift, *, embedding=prepared_unet.timestep_embedding):
    return embedding(t, dim, shift).roll(dim // 2, -1)


def tanh_geglu(self, x):
    value, gate = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def gated_by_the_other_half(self, x):
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def mask_last(model, sabotage):
    first = model.input_blocks[0][0]
    first.weight.data = first.weight[:, [0, 1, 2, 3, 5, 6, 7, 8, 4]]


def padded_on_all_sides(self, x):
    return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


def mean_and_variance_exchanged(model, sabotage):
    outputs = model.quant_conv.weight
    model.quant_conv.weight.data = outputs.roll(len(outputs) // 2, 0)


def without_final_norm(model, sabotage):
    model.text_model.final_layer_norm = torch.nn.Identity()


def norm_alone(norm, x, addend=None, **_):
    return norm(x if addend is None else x + addend[:, :, None, None])


BREAKS = {
    "unet": {
        "eps before a residual block": eps(unet.ResBlock, "in_layers.0", 1e-6),
        "eps before the output": eps(UNet, "out.0", 1e-6),
        "eps before a transformer": eps(unet.SpatialTransformer, "norm", 1e-5),
        "sine before cosine": replaced(prepared_unet, "timestep_embedding", sines_first),
        "gelu by tanh": replaced(unet.GEGLU, "forward", tanh_geglu),
        "gelu of the other half": replaced(unet.GEGLU, "forward", gated_by_the_other_half),
        "mask as the last channel": mask_last,
        "norm2 and norm3": swap(unet.TransformerBlock, "norm2", "norm3"),
        "norm1 and norm2": swap(unet.TransformerBlock, "norm1", "norm2"),
        "keys and values": swap(unet.CrossAttention, "to_k", "to_v"),
        "heads": attribute(unet.CrossAttention, "heads", lambda heads: 2 * heads),
        "groups": attribute(GroupNorm, "num_groups", lambda groups: groups // 2),
        "silu after the norms": replaced(fused, "norm_silu", norm_alone),
    },
    "vae": {
        "eps in a residual block": eps(vae.ResBlock, "norm1", 1e-5),
        "eps before attention": eps(vae.Attention, "norm", 1e-5),
        "padding": replaced(vae.Downsample, "forward", padded_on_all_sides),
        "groups": attribute(GroupNorm, "num_groups", lambda groups: 1),
        "keys and values": swap(vae.Attention, "k", "v"),
        "scaling factor": attribute(VAE, "config", lambda config: replace(config, scaling_factor=0.18215)),
        "mean and variance": mean_and_variance_exchanged,
    },
    "text_encoder": {
        "kind of gelu": attribute(clip.MLP, "activation", lambda activation: F.gelu),
        "no causal mask": replaced(clip, "attention", lambda q, k, v, causal: attention(q, k, v)),
        "heads": attribute(clip.SelfAttention, "heads", lambda heads: 2),
        "norms": swap(clip.Layer, "layer_norm1", "layer_norm2"),
        "no final norm": without_final_norm,
    },
}


@pytest.mark.parametrize(
    ("component", "broken"), [(component, name) for component, breaks in BREAKS.items() for name in breaks]
)
def test_a_broken_model_is_seen(pairs, component, broken, sabotage):
    theirs, mine = models(pairs[QUIET], component)
    mine = copy.deepcopy(mine)
    BREAKS[component][broken](mine, sabotage)
    assert DIFFERENCE[component](theirs, mine, 0.03) > 2 * TOLERANCE[component]


def test_an_input_of_unit_variance_would_hide_a_wrong_eps(pairs):
    """A unit-variance input hides the eps that a small one shows: the reason for the small one."""
    theirs, mine = models(pairs[1.0], "unet")
    mine = copy.deepcopy(mine)
    BREAKS["unet"]["eps before a transformer"](mine, None)
    assert unet_difference(theirs, mine, 1.0) <= TOLERANCE["unet"]
