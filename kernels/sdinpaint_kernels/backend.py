"""Chooses the implementation of an operation, torch's or a Triton kernel, and reports the reason.

The environment variable SDINPAINT_KERNELS sets it for the process, an operation's `kernels` argument for a call:
"torch", "triton", or "auto" (the kernel wherever it can run). Asking for Triton where it cannot run gives torch and a
warning.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sdinpaint_kernels import forms
from sdinpaint_kernels.cpu_kinds import cpu_kind

SETTINGS = ("auto", "torch", "triton")
SETTING = os.environ.get("SDINPAINT_KERNELS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton's interpreter runs kernels on the CPU, which is very slow and meant for tests."""
PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors whose memory holds the plain numbers; a subclass may store them in another form."""
CPU_DTYPES = (torch.float32, torch.bfloat16)
OLDEST_GPU = (8, 0)  # Ampere: the first with bfloat16 and asynchronous copies

_library = torch.library.Library("sdinpaint", "FRAGMENT")
_operations: list[str] = []
_failures: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()


class Choice(NamedTuple):
    """The implementation that runs, "torch" or "triton", and the reason."""

    name: str
    why: str


TRITON = Choice("triton", "supported")
REQUESTED = Choice("torch", "requested")


def choose(
    operation: str, x: Tensor, *others: Tensor | None, requested: str | None = None, obstacle: str | None = None
) -> Choice:
    """Choose the implementation for one call.

    Args:
        operation: its name.
        x: the main input.
        *others: the other inputs, on the same device.
        requested: the `kernels` argument of the call.
        obstacle: the reason why the kernel cannot take this call, if there is one.

    Returns:
        The choice.

    Raises:
        ValueError: the setting is unknown.
    """
    setting = requested or SETTING
    if setting not in SETTINGS:
        source = "kernels" if requested else "the environment variable SDINPAINT_KERNELS"
        raise ValueError(f"{source} is {setting!r}; expected one of {', '.join(SETTINGS)}")
    if setting == "torch":
        return REQUESTED
    why = _call_obstacle(x, others) or obstacle
    # A compiler must not trace checks of the machine; the registered operation checks again when it runs.
    compiling = torch.compiler.is_compiling()
    if why is None and not compiling:
        why = _machine_obstacle(operation, x.device)
    if why is None:
        return TRITON
    if setting == "triton" and not compiling and (operation, why) not in _warned:
        _warned.add((operation, why))
        warnings.warn(f"{operation} runs in torch although Triton was requested: {why}", stacklevel=3)
    return Choice("torch", why)


def on_cpu(*tensors: Tensor | None) -> bool:
    """Tell whether a call may run code written for CPU inference, which was measured on x86.

    Args:
        *tensors: the inputs of the call.

    Returns:
        True if it may.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return (
        SETTING != "torch"
        and not INTERPRETED
        and not is_transformed()
        and not is_observed()
        and all(tensor is None or _is_readable(tensor) for tensor in tensors)
        and len(dtypes) == 1
        and _cpu_supports(*dtypes)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
    )


def _is_readable(tensor: Tensor) -> bool:
    """Tell whether a tensor holds plain numbers as oneDNN reads them, which takes every vector as contiguous."""
    plain = tensor.is_cpu and type(tensor) in PLAIN and tensor.layout == torch.strided
    return plain and (tensor.ndim != 1 or tensor.is_contiguous())


def with_residual(out: Tensor, residual: Tensor | None) -> Tensor:
    """Add a residual to an output that nobody else has, in place unless a graph or a transform needs both.

    Args:
        out: the output.
        residual: a tensor of its shape, or None.

    Returns:
        The sum.
    """
    if residual is None:
        return out
    recorded = torch.is_grad_enabled() and (out.requires_grad or residual.requires_grad)
    return out + residual if recorded or is_transformed() else out.add_(residual)


def is_transformed() -> bool:
    """Tell whether a compiler, a tracer or a function transform observes the single operations of a model."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_functional()


def is_functional() -> bool:
    """Tell whether a transform of `torch.func` or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Tell whether a dispatch mode counts or replaces operations; it must then see torch's documented ones."""
    return not torch.compiler.is_compiling() and bool(torch._C._len_torch_dispatch_stack())


def cpu_report() -> str:
    """Describe what runs on the CPU: its kind, and the dtypes that it has forms for; or why it has none."""
    if SETTING == "torch" or INTERPRETED:
        return "torch alone: requested"
    dtypes = [str(dtype).removeprefix("torch.") for dtype in CPU_DTYPES if _cpu_supports(dtype)]
    if not dtypes:
        return "torch alone: torch was built without oneDNN, or the processor is no x86"
    kind = cpu_kind()
    how = "chosen by its measurements" if forms.is_measured(kind) else "prepacked, as nobody measured this kind"
    return f"{kind}, {' and '.join(dtypes)}; forms are {how}"


@functools.cache
def _cpu_supports(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN computes with this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return dtype == torch.float32 or (dtype in CPU_DTYPES and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def define(
    schema: str, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register a custom operation that torch.compile does not break up.

    Without a usable GPU, and after the kernel has failed once, the reference runs. All three functions take the
    arguments of the schema in order, and return outputs of the same shapes, strides and dtypes.

    Args:
        schema: as in `torch.library`.
        kernel: runs the Triton kernel.
        reference: computes the same in torch.
        fake: returns empty outputs, for tracing.

    Returns:
        The operation.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        if _machine_obstacle(name, arguments[0].device) is not None:
            return reference(*arguments)
        try:
            return kernel(*arguments)
        except torch.OutOfMemoryError:
            raise
        except kernel_errors() as error:
            _failures[name] = f"the kernel failed: {type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"{name} runs in torch from now on: {_failures[name]}", stacklevel=2)
            return reference(*arguments)

    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(schema, tags=tags)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sdinpaint::{name}", fake, lib=_library)
    _operations.append(name)
    return getattr(torch.ops.sdinpaint, name).default


def report() -> dict[str, str]:
    """Return by operation what runs supported calls on this machine: "triton", or "torch: " and the reason."""
    if not torch.cuda.is_available():
        return dict.fromkeys(sorted(_operations), "torch: there is no GPU that torch can use")
    x = torch.empty(0, device="cuda")
    choices = {name: choose(name, x) for name in sorted(_operations)}
    return {name: found.name if found == TRITON else f"{found.name}: {found.why}" for name, found in choices.items()}


def _call_obstacle(x: Tensor, others: tuple[Tensor | None, ...]) -> str | None:
    """Return the reason why this call needs torch, on any machine."""
    device = x.device.type
    if device != "cuda" and not (INTERPRETED and device == "cpu"):
        return f"the tensors are on the {device}"
    if is_functional():
        return "a function transform is active"
    if is_observed():
        return "a dispatch mode counts or replaces operations"
    if torch.is_grad_enabled():
        for tensor in (x, *others):
            if tensor is not None and tensor.requires_grad:
                return "gradients are needed"
    if torch.is_autocast_enabled(device):
        return "autocast chooses the dtypes"
    return None


def _machine_obstacle(operation: str, device: torch.device) -> str | None:
    """Return the reason why no call of this operation can run a kernel on this device."""
    return _failures.get(operation) or _device_obstacle(device.type, device.index)


@functools.cache
def _device_obstacle(kind: str, index: int | None) -> str | None:
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        return f"the tensors are on the {kind}"
    try:
        import triton  # noqa: F401, PLC0415 - takes a sixth of a second, and is needed only with a GPU
    except (ImportError, OSError, RuntimeError) as error:
        return f"triton cannot be imported: {error}"
    if kind != "cuda":
        return None
    if torch.version.hip:
        return "only NVIDIA GPUs are supported"
    found = torch.cuda.get_device_capability(index)
    return None if found >= OLDEST_GPU else "compute capability {}.{} is below {}.{}".format(*found, *OLDEST_GPU)


def kernel_errors() -> tuple[type[Exception], ...]:
    """Return what Triton raises when it cannot compile or launch, for example for lack of a compiler or registers."""
    from triton.errors import TritonError  # noqa: PLC0415

    return (TritonError, RuntimeError, OSError, AssertionError, ImportError)


def check_same(operation: str, x: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are floating point, of one dtype (except under autocast), and on one device.

    Args:
        operation: its name, for the error.
        x: the main input.
        **others: the other inputs by name.

    Raises:
        ValueError: they are not.
    """
    if not x.is_floating_point():
        raise ValueError(f"{operation} takes floating-point numbers, not x of dtype {x.dtype}")
    for name, other in others.items():
        if other is None:
            continue
        same = other.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if other.device != x.device or not same:
            raise ValueError(
                f"{operation} takes tensors of one dtype on one device, not x in {x.dtype} on {x.device} "
                f"and {name} in {other.dtype} on {other.device}"
            )


def power_of_two(number: int) -> int:
    """Round up to a power of two, which the sizes of Triton's tiles must be.

    Args:
        number: at least 1.

    Returns:
        The smallest power of two that is not less.
    """
    return 1 << (number - 1).bit_length()
