"""Map diffusers' module names to those of the official single files (LDM). Standard library only.

Both layouts hold the same modules; diffusers numbers them by level, LDM consecutively. A table therefore follows from
the number of blocks in each level and from which levels have attention. A table is {diffusers module: LDM module}; the
rest of a key, after the module's name, is the same in both.

Source: ldm/modules/diffusionmodules/openaimodel.py and model.py of CompVis/latent-diffusion; cldm/cldm.py of
lllyasviel/ControlNet; UNet2DConditionModel, ControlNetModel and AutoencoderKL of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

Table = dict[str, str]


class Edit(Enum):
    """A change to a tensor between one layout and another."""

    AS_IS = "as it is"
    TRANSPOSED = "transposed: (a, b) to (b, a)"
    CONVOLUTION = "a linear layer as a 1 x 1 convolution: (a, b) to (a, b, 1, 1)"
    LINEAR = "a 1 x 1 convolution as a linear layer: (a, b, 1, 1) to (a, b)"
    Q_ROWS = "the first third of the rows"
    K_ROWS = "the second third of the rows"
    V_ROWS = "the last third of the rows"
    STACKED = "the rows of q, of k and of v, one below the other"

    @property
    def inverse(self) -> Edit:
        """Return the edit that undoes this one; STACKED undoes the three that take rows, all at once."""
        return _INVERSES.get(self, self)


QKV = (Edit.Q_ROWS, Edit.K_ROWS, Edit.V_ROWS)
_INVERSES = dict.fromkeys(QKV, Edit.STACKED) | {Edit.CONVOLUTION: Edit.LINEAR, Edit.LINEAR: Edit.CONVOLUTION}

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
# The names of 2022 come first, because `inverse` keeps the last of two names for one module.
_VAE_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"} | {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


@dataclass(frozen=True)
class Level:
    """One resolution level in the down path of a UNet.

    Args:
        blocks: number of residual blocks.
        attention: whether each of them is followed by attention.
    """

    blocks: int
    attention: bool


def unet_table(levels: tuple[Level, ...]) -> Table:
    """Make the table of a UNet.

    Args:
        levels: its levels, from full resolution downwards.

    Returns:
        {diffusers module: LDM module}.
    """
    table = dict(_UNET_ENDS)
    last = len(levels) - 1
    row = 1
    for number, level in enumerate(levels):
        for block in range(level.blocks):
            table |= _children(f"down_blocks.{number}.resnets.{block}", f"input_blocks.{row}.0", _UNET_RESNET)
            table[f"down_blocks.{number}.attentions.{block}"] = f"input_blocks.{row}.1"
            row += 1
        if number < last:
            table[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{row}.0.op"
            row += 1
    table |= _children("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    table["mid_block.attentions.0"] = "middle_block.1"
    table |= _children("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    row = 0
    for number, level in enumerate(reversed(levels)):
        for block in range(level.blocks + 1):
            table |= _children(f"up_blocks.{number}.resnets.{block}", f"output_blocks.{row}.0", _UNET_RESNET)
            if level.attention:
                table[f"up_blocks.{number}.attentions.{block}"] = f"output_blocks.{row}.1"
            row += 1
        if number < last:
            after_attention = 2 if level.attention else 1
            table[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{row - 1}.{after_attention}.conv"
    return table


def vae_table(levels: int, blocks: int) -> Table:
    """Make the table of a KL autoencoder, with both the old and the new attention names of diffusers.

    Args:
        levels: number of resolution levels.
        blocks: number of residual blocks in each level of the encoder.

    Returns:
        {diffusers module: LDM module}.
    """
    table = {f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")}
    for same in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"):
        table[same] = same
    table |= {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= _children(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", _VAE_RESNET)
        table |= _children(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        table |= _children(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", _VAE_RESNET)
    for level in range(levels):
        # LDM counts the decoder's levels from full resolution, diffusers from the lowest one.
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(blocks):
            table |= _children(f"{down}.resnets.{block}", f"encoder.down.{level}.block.{block}", _VAE_RESNET)
        for block in range(blocks + 1):
            table |= _children(f"{up}.resnets.{block}", f"decoder.up.{level}.block.{block}", _VAE_RESNET)
        table[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return table


def controlnet_table(levels: tuple[Level, ...], hint_blocks: int) -> Table:
    """Make the table of a ControlNet: half a UNet, zero convolutions, and an encoder of the conditioning image.

    Args:
        levels: its levels, from full resolution downwards.
        hint_blocks: number of convolutions in that encoder, without the first and the last one.

    Returns:
        {diffusers module: LDM module}.
    """
    hint, ldm_hint = "controlnet_cond_embedding", "input_hint_block"
    rows = sum(level.blocks for level in levels) + len(levels)  # with the first convolution, and each downsampling
    table = unet_table(levels)
    table |= {f"controlnet_down_blocks.{row}": f"zero_convs.{row}.0" for row in range(rows)}
    table["controlnet_mid_block"] = "middle_block_out.0"
    table[f"{hint}.conv_in"] = f"{ldm_hint}.0"
    # LDM counts the activations between the convolutions too.
    table |= {f"{hint}.blocks.{block}": f"{ldm_hint}.{2 * block + 2}" for block in range(hint_blocks)}
    table[f"{hint}.conv_out"] = f"{ldm_hint}.{2 * hint_blocks + 2}"
    return table


def unet_table_for(keys: Iterable[str]) -> Table:
    """Make the table of a UNet from the names of its tensors.

    Args:
        keys: names in either layout, without a prefix.

    Returns:
        {diffusers module: LDM module}.
    """
    keys = list(keys)
    return unet_table(_levels_of_diffusers(keys) or _levels_of_ldm(keys))


def controlnet_table_for(keys: Iterable[str]) -> Table:
    """Make the table of a ControlNet from the names of its tensors.

    Args:
        keys: names in either layout, without a prefix.

    Returns:
        {diffusers module: LDM module}.
    """
    keys = list(keys)
    blocks = len({key.split(".")[2] for key in keys if key.startswith("controlnet_cond_embedding.blocks.")})
    convolutions = len({key.split(".")[1] for key in keys if key.startswith("input_hint_block.")})
    levels = _levels_of_diffusers(keys) or _levels_of_ldm(keys)
    return controlnet_table(levels, blocks or max(convolutions - 2, 0))


def vae_table_for(keys: Iterable[str]) -> Table:
    """Make the table of an autoencoder from the names of its tensors.

    Args:
        keys: names in either layout, without a prefix.

    Returns:
        {diffusers module: LDM module}.
    """
    keys = list(keys)
    blocks = _numbers(keys, r"encoder\.down(?:_blocks)?\.(\d{1,3})\.(?:block|resnets)\.(\d{1,3})\.")
    return vae_table(len({level for level, _ in blocks}), len({block for _, block in blocks}))


TABLES_FOR = {"unet": unet_table_for, "vae": vae_table_for, "controlnet": controlnet_table_for}


def renamed(key: str, table: Table) -> str | None:
    """Replace the module's name in a key.

    Args:
        key: name of a tensor, without a prefix.
        table: {module name: other module name}.

    Returns:
        The key under the other name; None where the table has no module of this name.
    """
    module = key
    while module:
        if module in table:
            return table[module] + key[len(module) :]
        module = module.rpartition(".")[0]
    return None


def inverse(table: Table) -> Table:
    """Invert a table; of two diffusers names for one module, the newer one is kept.

    Args:
        table: {diffusers module: LDM module}.

    Returns:
        {LDM module: diffusers module}.
    """
    return {ldm: diffusers for diffusers, ldm in table.items()}


def _levels_of_diffusers(keys: list[str]) -> tuple[Level, ...]:
    blocks = _numbers(keys, r"down_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.")
    attending = {level for level, _ in _numbers(keys, r"down_blocks\.(\d{1,3})\.attentions\.(\d{1,3})\.")}
    levels = sorted({level for level, _ in blocks})
    return tuple(Level(sum(level == at for at, _ in blocks), level in attending) for level in levels)


def _levels_of_ldm(keys: list[str]) -> tuple[Level, ...]:
    """Read the levels from LDM's numbering, in which each level but the last one ends with a downsampling.

    Number 0 is the first convolution.
    """
    parts = _numbers(keys, r"input_blocks\.(\d{1,3})\.(\d)\.")
    halvings = sorted(row for row, _ in _numbers(keys, r"input_blocks\.(\d{1,3})\.(0)\.op\."))
    ends = [*halvings, 1 + max((row for row, _ in parts), default=0)]
    begins = [1, *(row + 1 for row in halvings)]
    rows = [range(begin, end) for begin, end in zip(begins, ends, strict=True)]
    return tuple(Level(len(level), any((row, 1) in parts for row in level)) for level in rows)


def _children(diffusers: str, ldm: str, names: Table) -> Table:
    return {f"{diffusers}.{ours}": f"{ldm}.{theirs}" for ours, theirs in names.items()}


def _numbers(keys: Iterable[str], pattern: str) -> set[tuple[int, int]]:
    matches = (re.match(pattern, key) for key in keys)
    return {(int(match[1]), int(match[2])) for match in matches if match}
