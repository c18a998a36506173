"""Map names of OpenCLIP's text encoders, as in the single files of SD2 and SDXL. Standard library only.

Source: open_clip/transformer.py of mlfoundations/open_clip; CLIPTextModelWithProjection of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sdinpaint_weights.keymap import Edit

Table = dict[str, tuple[str, Edit]]

_MODEL = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
STACKED = {"q_proj": Edit.Q_ROWS, "k_proj": Edit.K_ROWS, "v_proj": Edit.V_ROWS}
PROJECTION = ("text_projection", Edit.TRANSPOSED)
"""The projection of the pooled text: in OpenCLIP the transpose of the weight of a linear layer."""
_LAYER_NUMBER = re.compile(r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d{1,3})\.")


def openclip_table(layers: int) -> Table:
    """Make the table of a text encoder.

    Args:
        layers: number of layers.

    Returns:
        {name in transformers: (name in OpenCLIP, edit from OpenCLIP's tensor to that of transformers)}.
    """
    table = {name: (openclip, Edit.AS_IS) for name, openclip in _MODEL.items()}
    table["text_projection.weight"] = PROJECTION
    for layer in range(layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for name, edit in STACKED.items():
                table[f"{ours}.self_attn.{name}.{kind}"] = (f"{theirs}.attn.in_proj_{kind}", edit)
            for name, openclip in _LAYER.items():
                table[f"{ours}.{name}.{kind}"] = (f"{theirs}.{openclip}.{kind}", Edit.AS_IS)
    return table


def openclip_table_for(keys: Iterable[str]) -> Table:
    """Make the table of a text encoder from the names of its tensors.

    Args:
        keys: names in either layout, without a prefix.

    Returns:
        The result of `openclip_table` for its number of layers.
    """
    matches = (_LAYER_NUMBER.match(key) for key in keys)
    return openclip_table(max((int(match[1]) + 1 for match in matches if match), default=0))
