"""Compute fingerprints: SHA-256 digests of weights, vocabularies and pixels."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from sdinpaint.checkpoints.sources import COMPONENTS
from sdinpaint.images.input_image import InputImage
from sdinpaint.latent_diffusion import LatentDiffusion
from sdinpaint.masks.text import Soft
from sdinpaint.models.weights import Snapshot, all_weights, is_replaced, release
from sdinpaint.text.tokenizer import Tokenizer

__all__ = ["fingerprint", "weights_of"]

_THREADS = 4
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Snapshot, str]] = WeakKeyDictionary()
"""Network -> the state of its weights when their fingerprint was computed last, and that fingerprint."""
_VOCABULARIES: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()
COMPILED = "_orig_mod."
"""The part that `torch.compile` adds to the names of weights."""


def fingerprint(module: nn.Module, original: Callable[[Any], Any] = lambda weight: weight) -> str:
    """Compute a SHA-256 digest of a network's weights: their names, dtypes, shapes and bytes.

    Device and memory layout do not change the digest. Weights that are on a GPU or not contiguous are copied, a few
    at a time.

    Args:
        module: the network.
        original: returns what a weight was before adapters changed it.

    Returns:
        The digest in hexadecimal digits.
    """
    state = sorted((name.replace(COMPILED, ""), tensor) for name, tensor in module.state_dict(keep_vars=True).items())
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib releases the interpreter's lock
        digests = pool.map(lambda tensor: _bytes_sha256(original(tensor)), (tensor for _, tensor in state))
        rows = [
            (name, str(getattr(tensor, "dtype", "")), list(getattr(tensor, "shape", ())), digest)
            for (name, tensor), digest in zip(state, digests, strict=True)
        ]
    return _json_sha256(rows)


def weights_of(pipe: LatentDiffusion) -> dict[str, str]:
    """Compute the fingerprint of every component as it is now but without adapters, and of the vocabulary.

    A fingerprint from before is returned again while the weights are known to be the same, bit for bit.

    Args:
        pipe: the model with its components.

    Returns:
        Component name -> fingerprint, with "controlnet" where there is one, and "tokenizer".
    """
    modules: dict[str, nn.Module] = dict(zip(COMPONENTS, (pipe.unet, pipe.vae, *pipe.condition.encoders), strict=False))
    if pipe.controlnet is not None:
        modules["controlnet"] = pipe.controlnet
    found = {}
    for name, module in modules.items():
        known = _KNOWN.get(module)
        owners = list(all_weights(module))
        own = [pipe.adapters.at_rest(weight) for weight in owners]
        if known is None or not known[0].holds(own, owners):
            snapshot = Snapshot(own, owners)
            with pipe.using(module):
                known = _KNOWN[module] = snapshot, fingerprint(module, pipe.adapters.original)
        found[name] = known[1]
    if pipe.tokenizer not in _VOCABULARIES:
        _VOCABULARIES[pipe.tokenizer] = _vocabulary_sha256(pipe.tokenizer)
    return found | {"tokenizer": _VOCABULARIES[pipe.tokenizer]}


def _bytes_sha256(tensor: Any) -> str:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:  # the state of a quantized layer
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return hashlib.sha256(buffer.getbuffer()).hexdigest()
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
    digest = hashlib.sha256(flat.numpy().data).hexdigest()
    if is_replaced(tensor):
        release(tensor.detach())
    return digest


def _vocabulary_sha256(tokenizer: Tokenizer) -> str:
    padding = tokenizer.pad_id, tokenizer.pad_is_special
    return _json_sha256([sorted(tokenizer.vocab.items()), list(tokenizer.merges), padding])


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def pixels_sha256(given: InputImage | Soft) -> str:
    planes = [given] if isinstance(given, np.ndarray) else [given.rgb, given.alpha]
    digest = hashlib.sha256()
    for plane in planes:
        if plane is not None:
            digest.update(f"{plane.dtype} {plane.shape} ".encode())
            digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()
