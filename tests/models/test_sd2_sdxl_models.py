"""The networks of SD2 and SDXL against diffusers' and transformers' over the same random weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from builders import as_sd2, as_sdxl
from peers import fill, ours, text_twin, unet_twin
from torch import nn

from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.families import SD2_INPAINT, SDXL, SDXL_INPAINT
from sdinpaint.models import CLIPText, UNet, clip
from sdinpaint.models.unet import timestep_embedding

pytestmark = pytest.mark.peer

TEXT, UNETS = 3e-5, 1e-4
TIMES = (0.0, 413.75, 999.0)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(*pairs):
    """The largest absolute difference; what is compared has to be of a size at which it means something."""
    for theirs, _ in pairs:
        assert 0.05 < float(theirs.std()) < 20
    return float(torch.stack([(theirs - mine).abs().max() for theirs, mine in pairs]).max())  # NaN stays NaN


# Text encoders


def prompts(config):
    """Two rows of ids as a tokenizer makes them: the end token first where the text ends, then padding."""
    end = config.vocab_size - 1
    ids = torch.randint(1, end - 1, (2, config.context_length), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = end - 1
    for row, length in enumerate((9, 40)):
        ids[row, length] = end
        ids[row, length + 1 :] = end if config.pad_id is None else config.pad_id
    return ids


def text_pair(family, number):
    name = ("text_encoder", "text_encoder_2")[number]
    theirs = fill(text_twin(diffusers_configs(family)[f"{name}/config.json"]), 8)
    return theirs, ours(CLIPText, family.texts[number], name, theirs)


def text_difference(theirs, mine, config=None):
    """Return the difference of the states that the family uses, and of the pooled text where there is one."""
    config = config or mine.config
    ids = prompts(config)
    output = theirs(ids, output_hidden_states=True)
    states = output.last_hidden_state if config.final_norm else output.hidden_states[-1 - config.skip_last]
    context, pooled = mine.encode(ids)
    assert (pooled is None) == (config.projection_dim is None)
    return largest((states, context), *([] if pooled is None else [(output.text_embeds, pooled)]))


SMALL = [(as_sd2, 0), (as_sdxl, 0), (as_sdxl, 1)]


@pytest.mark.parametrize(("make", "number"), SMALL)
def test_small_text_encoders(tiny, make, number):
    assert text_difference(*text_pair(make(tiny), number)) <= TEXT


FULL = {
    "CLIP-L as in SDXL": (SDXL, 0),
    "OpenCLIP-H": (SD2_INPAINT, 0),
    "two layers of OpenCLIP-bigG": (replace(SDXL, text_2=replace(SDXL.text_2, num_layers=2)), 1),
}


@pytest.mark.parametrize("name", list(FULL))
def test_text_encoders_at_full_width(name):
    family, number = FULL[name]
    theirs, mine = text_pair(family, number)
    assert text_difference(theirs, mine) <= TEXT
    assert mine.config == family.texts[number]


def change(**values):
    def apply(model, sabotage):
        model.config = replace(model.config, **values)

    return apply


def without_final_norm(model, sabotage):
    model.text_model.final_layer_norm = nn.Identity()


def pooled_at_the_start(model, sabotage):
    sabotage(clip, "end_positions", lambda ids: torch.zeros(len(ids), dtype=torch.int64))


def pooled_at_the_last_position(model, sabotage):
    sabotage(clip, "end_positions", lambda ids: torch.full((len(ids),), -1))


def another_gelu(model, sabotage):
    for layer in model.text_model.encoder.layers:
        other = clip.ACTIVATIONS["gelu" if model.config.activation == "quick_gelu" else "quick_gelu"]
        layer.mlp.activation = other


BROKEN_TEXTS = [
    (as_sd2, 0, change(skip_last=1)),
    (as_sd2, 0, another_gelu),
    (as_sdxl, 0, another_gelu),
    (as_sdxl, 1, without_final_norm),
    (as_sdxl, 1, pooled_at_the_start),
    (as_sdxl, 1, pooled_at_the_last_position),
]


@pytest.mark.parametrize(("make", "number", "broken"), BROKEN_TEXTS)
def test_a_broken_text_encoder_is_seen(tiny, make, number, broken, sabotage):
    theirs, mine = text_pair(make(tiny), number)
    config, mine = mine.config, copy.deepcopy(mine)
    broken(mine, sabotage)
    assert text_difference(theirs, mine, config) > 2 * TEXT


# UNets


def unet_pair(family):
    theirs = fill(unet_twin(diffusers_configs(family)["unet/config.json"]), 6)
    return theirs, ours(UNet, family.unet, "unet", theirs)


def unet_difference(theirs, mine):
    """On 6 x 10 latents, so that halving twice rounds up, and at several times."""
    config = mine.config
    x, context = draw(1, len(TIMES), config.in_channels, 6, 10), draw(2, len(TIMES), 11, config.context_dim)
    t, vector, added = torch.tensor(TIMES), None, None
    if config.vector_dim is not None:
        width = theirs.config.addition_time_embed_dim
        sizes = torch.tensor([[64, 72, 0, 8, 48, 56]]) * torch.arange(1, len(TIMES) + 1)[:, None]
        pooled = draw(3, len(TIMES), config.vector_dim - 6 * width)
        added = {"text_embeds": pooled, "time_ids": sizes}
        vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), width).unflatten(0, (-1, 6)).flatten(1)], dim=1)
    return largest((theirs(x, t, context, added_cond_kwargs=added).sample, mine(x, t, context, vector)))


def shallow(family):
    """All widths of a family, and of everything else one: 10 GB of float32 are too much for a test."""
    depth = tuple(min(depth, 1) for depth in family.unet.transformer_depth)
    return replace(family, unet=replace(family.unet, num_res_blocks=1, transformer_depth=depth, middle_depth=1))


@pytest.mark.parametrize("make", [as_sd2, as_sdxl])
def test_small_unets(tiny, make):
    assert unet_difference(*unet_pair(make(tiny))) <= UNETS


@pytest.mark.parametrize("family", [SD2_INPAINT, SDXL_INPAINT], ids=lambda family: family.name)
def test_unets_at_full_width(family):
    theirs, mine = unet_pair(shallow(family))
    assert mine.input_blocks[0][0].weight.data_ptr() == theirs.conv_in.weight.data_ptr()
    assert unet_difference(theirs, mine) <= UNETS


def heads(model, sabotage):
    for module in model.modules():
        if type(module).__name__ == "CrossAttention":
            module.heads *= 2


def deaf_to_sizes(model, sabotage):
    first = model.label_emb[0][0]
    first.weight.data[:, -6 * 14 :] = 0


@pytest.mark.parametrize(("make", "broken"), [(as_sd2, heads), (as_sdxl, heads), (as_sdxl, deaf_to_sizes)])
def test_a_broken_unet_is_seen(tiny, make, broken, sabotage):
    theirs, mine = unet_pair(make(tiny))
    mine = copy.deepcopy(mine)
    broken(mine, sabotage)
    assert unet_difference(theirs, mine) > 2 * UNETS
