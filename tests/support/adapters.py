"""Adapter files in every dialect and of every algorithm, with the weights that they make, derived in float64.

Nothing here calls sdinpaint.adapters: names come from the tables of checkpoints, and formulas are written out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from sdinpaint_weights.keymap import inverse, renamed, unet_table_for
from torch import Tensor, nn

Parts = dict[str, Tensor]
Delta = Callable[[Tensor], Tensor]
"""Weight in float64 -> what is added to it."""


class Layer(NamedTuple):
    """A module with a weight."""

    network: str
    official: str
    """Its name in the official single files."""
    diffusers: str
    module: Any


def layers(pipe: Any, kinds: type | tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> list[Layer]:
    """The modules of these kinds in all networks that adapters change."""
    found = []
    for network, model in pipe.networks.items():
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        table = inverse(unet_table_for(name for name, _ in model.named_parameters())) if network == "unet" else {}
        found += [Layer(network, name, renamed(name, table) or name, model.get_submodule(name)) for name in names]
    return found


# Dialects

PAIRS = {
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora_A.default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_A bare": (".lora_A", ".lora_B"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "_lora.down": ("_lora.down.weight", "_lora.up.weight"),
}
"""Name -> ends of the keys of a pair."""


def underscored(name: str) -> str:
    return name.replace(".", "_")


def kohya(layer: Layer, *, official: bool = False, first_text: str = "lora_te_") -> str:
    start = {"unet": "lora_unet_", "text_encoder": first_text, "text_encoder_2": "lora_te2_"}[layer.network]
    return start + underscored(layer.official if official else layer.diffusers)


def half_official(layer: Layer) -> str:
    """Half of the modules under either name."""
    return kohya(layer, official=len(layer.official) % 2 == 0)


def lycoris(layer: Layer) -> str:
    start = {"unet": "", "text_encoder": "text_encoder_", "text_encoder_2": "text_encoder_2_"}[layer.network]
    return f"lycoris_{start}{underscored(layer.diffusers)}"


def prefixed(layer: Layer) -> str:
    return f"{layer.network}.{layer.diffusers}"


def bare(layer: Layer) -> str:
    return layer.diffusers


def peft(layer: Layer) -> str:
    return f"base_model.model.{layer.diffusers}"


def generic(layer: Layer) -> str:
    starts = {
        "unet": "diffusion_model.",
        "text_encoder": "clip_l.transformer.",
        "text_encoder_2": "clip_g.transformer.",
    }
    return starts[layer.network] + layer.official


def of_2023(layer: Layer) -> str:
    """Attention's output without its number, and text encoders' projections by the UNet's names."""
    name = layer.diffusers.replace("to_out.0", "to_out")
    for one in "qkv":
        name = name.replace(f"self_attn.{one}_proj", f"self_attn.to_{one}")
    return f"{layer.network}.{name.replace('self_attn.out_proj', 'self_attn.to_out')}"


def processors(layer: Layer) -> str:
    name = layer.diffusers.replace("to_out.0", "to_out")
    return name.replace(".to_", ".processor.to_")


class Dialect(NamedTuple):
    """Spelling of modules, ends of keys, which networks it has names for, and whether it has alphas."""

    spell: Callable[[Layer], str]
    pair: str = "lora_down"
    networks: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2")
    alphas: bool = True
    attention: bool = False
    """It has names for the UNet's attention alone."""


DIALECTS = {
    "kohya": Dialect(kohya),
    "kohya, official names": Dialect(lambda layer: kohya(layer, official=True)),
    "kohya, both": Dialect(half_official),
    "kohya, te1": Dialect(lambda layer: kohya(layer, first_text="lora_te1_")),
    "lycoris": Dialect(lycoris),
    "diffusers": Dialect(prefixed, "lora_A", alphas=False),
    "diffusers with alphas": Dialect(prefixed, "lora_down"),
    "diffusers, default": Dialect(prefixed, "lora_A.default", alphas=False),
    "diffusers, mid 2023": Dialect(prefixed, "lora.down", alphas=False),
    "diffusers, linear layers": Dialect(prefixed, "lora_linear_layer", alphas=False),
    "diffusers, names of 2023": Dialect(of_2023, "lora.down", alphas=False),
    "diffusers, text of 2023": Dialect(of_2023, "_lora.down", alphas=False),
    "no prefix": Dialect(bare, "lora_A", ("unet",), alphas=False),
    "processors": Dialect(processors, "_lora.down", ("unet",), alphas=False, attention=True),
    "peft, keys": Dialect(peft, "lora_A", ("unet",), alphas=False),
    "peft, bare": Dialect(peft, "lora_A bare", ("unet",), alphas=False),
    "generic": Dialect(generic, "lora_A"),
}


def in_dialect(dialect: Dialect, layer: Layer, parts: Mapping[str, Tensor]) -> Parts:
    """A plain LoRA's tensors by key; where the dialect has no alphas, `up` holds their factor."""
    down, up, alpha = parts["lora_down.weight"], parts["lora_up.weight"], parts["alpha"]
    stem, ends = dialect.spell(layer), PAIRS[dialect.pair]
    if dialect.alphas:
        return {stem + ends[0]: down, stem + ends[1]: up, f"{stem}.alpha": alpha}
    return {stem + ends[0]: down, stem + ends[1]: up * (alpha / len(down))}


# Algorithms


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double()


def core_product(up: Tensor, core: Tensor, down: Tensor) -> Tensor:
    """(o, r), (r, s, k, k), (s, i) -> (o, i, k, k), one place of the kernel after the other."""
    out = torch.zeros(len(up), down.shape[1], *core.shape[2:], dtype=torch.float64)
    for y in range(core.shape[2]):
        for x in range(core.shape[3]):
            out[:, :, y, x] = up.double() @ core[:, :, y, x].double() @ down.double()
    return out


def kronecker(one: Tensor, two: Tensor) -> Tensor:
    """Blocks of `two`, times the numbers of `one`."""
    rows = [torch.cat([number * two.double() for number in row], 1) for row in one.double()]
    return torch.cat(rows, 0)


class Drawn:
    """Random tensors of a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=self.generator)


Made = tuple[Parts, Delta]
RATIO = 0.5
"""alpha / rank, a power of two: multiplying by it rounds nothing."""


def lora(draw: Drawn, shape: tuple[int, ...], rank: int = 3) -> Made:
    o, i, *kernel = shape
    ones = [1] * len(kernel)
    down, up = draw(rank, i, *kernel), draw(o, rank, *ones)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(RATIO * rank)}
    return parts, lambda _: RATIO * matrix_product(up.flatten(1), down.flatten(1)).reshape(shape)


def tucker(draw: Drawn, shape: tuple[int, ...], rank: int = 3) -> Made:
    o, i, *kernel = shape
    down, mid, up = draw(rank, i, 1, 1), draw(rank, rank, *kernel), draw(o, rank, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.2)}
    return parts, lambda _: 1.2 / rank * core_product(up[:, :, 0, 0], mid, down[:, :, 0, 0])


def loha(draw: Drawn, shape: tuple[int, ...], rank: int = 3) -> Made:
    o, rest = shape[0], math.prod(shape[1:])
    a1, b1, a2, b2 = draw(o, rank), draw(rank, rest), draw(o, rank), draw(rank, rest)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(2.0)}
    return parts, lambda _: (2.0 / rank * matrix_product(a1, b1) * matrix_product(a2, b2)).reshape(shape)


def loha_tucker(draw: Drawn, shape: tuple[int, ...], rank: int = 3) -> Made:
    o, i, *kernel = shape
    a1, b1, a2, b2 = draw(rank, o), draw(rank, i), draw(rank, o), draw(rank, i)
    t1, t2 = draw(rank, rank, *kernel), draw(rank, rank, *kernel)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    return parts, lambda _: core_product(a1.T, t1, b1) * core_product(a2.T, t2, b2)


def lokr(
    draw: Drawn, shape: tuple[int, ...], *, low: tuple[bool, bool] = (False, False), core: bool = False, rank: int = 2
) -> Made:
    """Both full, or one or both as products; `core` makes a tucker product of the second."""
    o, i, *kernel = shape
    o1, i1 = (next(n for n in (4, 3, 2, 1) if size % n == 0) for size in (o, i))
    o2, i2 = o // o1, i // i1
    parts: Parts = {"alpha": torch.tensor(3.0)}
    if low[0]:
        a, b = draw(o1, rank), draw(rank, i1)
        parts |= {"lokr_w1_a": a, "lokr_w1_b": b}
        one = matrix_product(a, b)
    else:
        one = parts["lokr_w1"] = draw(o1, i1)
    if core:
        a, b, t = draw(rank, o2), draw(rank, i2), draw(rank, rank, *kernel)
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
        two = core_product(a.T, t, b)
    elif low[1]:
        a, b = draw(o2, rank), draw(rank, i2 * math.prod(kernel))
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
        two = matrix_product(a, b).reshape(o2, i2, *kernel)
    else:
        two = parts["lokr_w2"] = draw(o2, i2, *kernel)
    factor = 3.0 / rank if low[0] or low[1] or core else 1.0
    return parts, lambda _: factor * kronecker(one, two)


def full(draw: Drawn, shape: tuple[int, ...]) -> Made:
    diff = draw(*shape)
    return {"diff": diff, "alpha": torch.tensor(7.0)}, lambda _: diff.double()


def ia3(draw: Drawn, shape: tuple[int, ...], *, on_input: bool) -> Made:
    scale = draw(shape[1 if on_input else 0])
    parts = {"weight": scale, "on_input": torch.tensor(int(on_input))}
    if len(shape) > 2:
        parts["weight"] = scale.reshape(1, -1, 1, 1)

    def delta(weight: Tensor) -> Tensor:
        out = weight.clone()
        for at, number in enumerate(scale.double()):
            (out[:, at] if on_input else out[at]).mul_(number)
        return out

    return parts, delta


def glora(draw: Drawn, shape: tuple[int, ...], rank: int = 3, *, old: bool = False) -> Made:
    o, i, *kernel = shape
    ones = [1] * len(kernel)
    a_in, a_out = draw(i, rank), draw(rank, i)
    b_out, b_in = draw(o, rank), draw(rank, i, *kernel)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    stored = a_in.reshape(i, rank, *ones), a_out.reshape(rank, i, *ones), b_out.reshape(o, rank, *ones), b_in
    parts = {f"{name}.weight": tensor for name, tensor in zip(names, stored, strict=True)} | {
        "alpha": torch.tensor(1.5)
    }

    def delta(weight: Tensor) -> Tensor:
        through = matrix_product(a_in, a_out)
        moved = torch.zeros_like(weight)
        for place in itertools.product(*map(range, kernel)):
            moved[:, :, *place] = weight[:, :, *place] @ through
        return 1.5 / rank * (matrix_product(b_out, b_in.flatten(1)).reshape(shape) + moved)

    return parts, delta


def dora(draw: Drawn, shape: tuple[int, ...], *, axis: int, form: str = "dora_scale", inner: Any = lora) -> Made:
    """Rows (axis 0) or columns (axis 1) get the norms that the magnitude says; `form` is the name that it has."""
    parts, plain = inner(draw, shape)
    magnitude = 1 + draw(shape[axis]).abs()
    ones = [1] * (len(shape) - 2)
    if form == "dora_scale":
        parts["dora_scale"] = magnitude.reshape([-1, 1, *ones] if axis == 0 else [1, -1, *ones])
    elif form == "dora_scale, one axis":
        parts["dora_scale"] = magnitude
    else:
        parts[form] = magnitude.reshape([1, -1, *ones]) if ones else magnitude

    def delta(weight: Tensor) -> Tensor:
        out = (weight + plain(weight)).transpose(0, axis)
        norms = out.square().flatten(1).sum(1).sqrt()
        out = (out.flatten(1) * (magnitude.double() / norms)[:, None]).reshape(out.shape)
        return out.transpose(0, axis) - weight

    return parts, delta


ALGORITHMS: dict[str, tuple[str, Any]] = {
    "lora": ("lora", lora),
    "lora of rank 1": ("lora", lambda draw, shape: lora(draw, shape, 1)),
    "loha": ("loha", loha),
    "lokr, both full": ("lokr", lokr),
    "lokr, first low": ("lokr", lambda draw, shape: lokr(draw, shape, low=(True, False))),
    "lokr, second low": ("lokr", lambda draw, shape: lokr(draw, shape, low=(False, True))),
    "lokr, both low": ("lokr", lambda draw, shape: lokr(draw, shape, low=(True, True))),
    "full": ("full", full),
    "ia3, columns": ("ia3", lambda draw, shape: ia3(draw, shape, on_input=True)),
    "ia3, rows": ("ia3", lambda draw, shape: ia3(draw, shape, on_input=False)),
    "glora": ("glora", glora),
    "glora, old": ("glora", lambda draw, shape: glora(draw, shape, old=True)),
    "dora, rows": ("lora", lambda draw, shape: dora(draw, shape, axis=0)),
    "dora, rows on one axis": ("lora", lambda draw, shape: dora(draw, shape, axis=0, form="dora_scale, one axis")),
    "dora, columns": ("lora", lambda draw, shape: dora(draw, shape, axis=1)),
    "dora of peft": ("lora", lambda draw, shape: dora(draw, shape, axis=0, form="lora_magnitude_vector")),
    "dora of loha, columns": ("loha", lambda draw, shape: dora(draw, shape, axis=1, inner=loha)),
    "dora of lokr, rows": ("lokr", lambda draw, shape: dora(draw, shape, axis=0, inner=lokr)),
}
"""Name -> algorithm, and what draws its parts for a weight of a shape."""
CONVOLUTIONS: dict[str, tuple[str, Any]] = {
    "tucker": ("lora", tucker),
    "dora of tucker": ("lora", lambda draw, shape: dora(draw, shape, axis=0, inner=tucker)),
    "loha, tucker": ("loha", loha_tucker),
    "lokr, tucker": ("lokr", lambda draw, shape: lokr(draw, shape, core=True)),
    "lokr, tucker, first low": ("lokr", lambda draw, shape: lokr(draw, shape, low=(True, False), core=True)),
}
"""Algorithms that convolutions alone have, by name as in the table before."""


# Files and weights


def write(path: Any, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Any:
    """A safetensors file of these tensors."""
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def weights(pipe: Any) -> dict[tuple[str, str], Tensor]:
    """A copy of all parameters by network and name."""
    return {
        (name, key): one.detach().clone() for name, net in pipe.networks.items() for key, one in net.named_parameters()
    }


def same(pipe: Any, before: Mapping[tuple[str, str], Tensor]) -> bool:
    """Whether all parameters have the bits from before."""
    now = weights(pipe)
    return now.keys() == before.keys() and all(torch.equal(now[key], one) for key, one in before.items())


def assert_weights(pipe: Any, before: Mapping[Any, Tensor], deltas: Mapping[Any, Tensor], bound: float = 3e-6) -> None:
    """All parameters are those from before plus these deltas, and the others bit for bit those from before."""
    for key, now in weights(pipe).items():
        if key not in deltas:
            assert torch.equal(now, before[key]), key
        else:
            wanted = before[key].double() + deltas[key]
            most = float((now.double() - wanted).abs().max())
            assert most <= bound * max(1.0, float(wanted.abs().max())), (key, most)
