"""OpenVINO as a baseline: diffusers' pipeline with networks converted and compiled for the CPU at the case's shapes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sdinpaint.bench.cases import Case
from sdinpaint.bench.peers import diffusers_peer
from sdinpaint.checks import require_extra
from sdinpaint.errors import SettingError

__all__ = ["OpenVino", "library"]

SILENT = "openvino_telemetry"
"""The package by which OpenVINO would report usage over the network; it works without it."""
IMPORTS = f"import sys; sys.modules['{SILENT}'] = None; {diffusers_peer.IMPORTS}; import openvino"
ADDED = ("text_embeds", "time_ids")
"""The names of SDXL's further conditioning."""
Run = Callable[..., Iterable[Tensor]]
"""A function run(forward of a network, *tensors) that returns tensors."""
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def library() -> Any:
    """Import OpenVINO and diffusers.

    Returns:
        The package openvino.

    Raises:
        SettingError: one of them is missing.
    """
    diffusers_peer.library()
    sys.modules.setdefault(SILENT, None)  # type: ignore[arg-type]
    return require_extra("openvino", extra="bench", what="the baseline openvino")


class OpenVino(diffusers_peer.Diffusers):
    """diffusers' pipeline run by OpenVINO. A network is converted when it first runs, so that a step needs no VAE.

    Raises:
        SettingError: the device or dtype is not supported here.
    """

    def __init__(self, case: Case) -> None:
        if case.device != "cpu" or case.torch_dtype not in PRECISIONS:
            found = f"{case.dtype} on {case.device}"
            raise SettingError("BENCH_PEER", "the baseline openvino", found, expected="float32 or bfloat16 on the CPU")
        super().__init__(case)
        precision = PRECISIONS[case.torch_dtype]
        vae = self.pipe.vae
        self.unet = Converted(self.pipe.unet, _unet, precision)
        self.decoder = Converted(vae.decoder, _map, precision)
        self.encoder = Converted(vae.encoder, _map, precision)
        self.texts = [Converted(encoder, _text, precision) for encoder in self.encoders]
        self.pipe.unet.forward = self._run_unet
        vae.decoder.forward = lambda z, *_: self.decoder(z)[0].to(z.dtype)
        vae.encoder.forward = lambda x: self.encoder(x)[0].to(x.dtype)
        for encoder, text in zip(self.encoders, self.texts, strict=True):
            encoder.forward = partial(self._run_text, text)

    def ready(self) -> None:
        """Convert and compile all networks."""
        x, t, contexts, added = self.fed()
        self.unet.convert(x, t, contexts, *_added(added))
        self.decoder.convert(self.inputs.latents)
        self.encoder.convert(self.inputs.image)
        for text in self.texts:
            text.convert(torch.zeros(1, self.family.text.context_length, dtype=torch.long))

    def parameters(self) -> list[Tensor]:
        """Return nothing: OpenVINO keeps the weights in a layout of its own."""
        return []

    def _run_unet(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, *, added_cond_kwargs: Any = None, **_: object
    ) -> tuple[Tensor]:
        """Run the UNet in place of diffusers' forward."""
        [output] = self.unet(x, t.float(), encoder_hidden_states, *_added(added_cond_kwargs))
        return (output.to(x.dtype),)

    def _run_text(self, text: Converted, ids: Tensor, **_: object) -> Any:
        """Run a text encoder in place of its forward."""
        first, states = (tensor.to(self.case.torch_dtype) for tensor in text(ids))
        outputs = diffusers_peer.transformers().modeling_outputs
        return outputs.BaseModelOutput(last_hidden_state=first, hidden_states=(states, first))


class Converted:
    """A network that OpenVINO runs from its first call on, at the shapes of that call; torch's weights are released."""

    def __init__(self, module: nn.Module, run: Run, precision: str) -> None:
        self._module, self._run, self._precision = module, run, precision
        self._compiled: Any = None

    @property
    def is_compiled(self) -> bool:
        """Tell whether the network was converted."""
        return self._compiled is not None

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Run the network; floating point inputs and outputs are float32, whatever precision it computes in."""
        self.convert(*given)
        found = self._compiled([_plain(tensor).numpy() for tensor in given])
        return [torch.from_numpy(found[index]) for index in range(len(found))]

    def convert(self, *given: Tensor) -> None:
        """Convert and compile the network for inputs of these shapes, once.

        The model goes through a file, as OpenVINO's users do: a file is memory-mapped, while a model in memory would
        be held beside the compiled one.

        Args:
            given: inputs, of which only shapes and dtypes count.
        """
        if self.is_compiled:
            return
        openvino, dtype = library(), next(self._module.parameters()).dtype
        options = {"INFERENCE_PRECISION_HINT": self._precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        with TemporaryDirectory(prefix="sdinpaint-bench-") as folder:
            path = Path(folder) / "network.xml"
            # float16 represents every bfloat16 number that is not tiny
            openvino.save_model(self._converted(given), path, compress_to_fp16=dtype == torch.bfloat16)
            for weight in self._module.parameters():
                weight.data = torch.empty(0, dtype=dtype)
            self._compiled = openvino.Core().compile_model(path, "CPU", options)

    @torch.no_grad()
    def _converted(self, given: Iterable[Tensor]) -> Any:
        openvino, plain = library(), tuple(_plain(tensor) for tensor in given)
        self._module.float()  # OpenVINO reduces precision itself, and cannot run every network in bfloat16
        with warnings.catch_warnings(action="ignore"), diffusers_peer.silence():  # about constants in a trace: shapes
            # OpenVINO would trace it itself, and run it three times to compare
            traced = torch.jit.trace(_Traced(self._module, self._run), plain, check_trace=False, strict=False)
        return openvino.convert_model(traced, example_input=plain, input=[tuple(tensor.shape) for tensor in plain])


class _Traced(nn.Module):
    """A network whose class' own forward is called by `run`; the instance's was replaced."""

    def __init__(self, module: nn.Module, run: Run) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(partial(type(self.module).forward, self.module), *given))


def _map(call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    return [call(x)]


def _unet(call: Callable[..., Any], x: Tensor, t: Tensor, contexts: Tensor, *added: Tensor) -> list[Tensor]:
    told = dict(zip(ADDED, added, strict=True)) if added else None
    return [call(x, t, contexts, added_cond_kwargs=told, return_dict=False)[0]]


def _text(call: Callable[..., Any], ids: Tensor) -> list[Tensor]:
    """Return what diffusers' pipelines use: the first output, and the hidden states before the last layer."""
    told = call(ids, output_hidden_states=True)
    return [told[0], told.hidden_states[-2]]


def _added(kwargs: dict[str, Tensor] | None) -> list[Tensor]:
    return [] if kwargs is None else [kwargs[name] for name in ADDED]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
