"""The guided UNet step and the autoencoder of each family at full size, beside plain torch and, where it is, diffusers.

    python benchmarks/step.py [--families sd15 sd2 sdxl] [--dtype bfloat16] [--quick] [--compile] [--profile] [--cpu]
                              [--out FILE]

Weights are random, scaled so that activations keep their size. Before anything is timed, its output is compared with
the plain UNet in float32: its error may be twice that of plain torch in the same dtype. Figures are medians over steps,
of two runs one after the other. The floor is the step's arithmetic (two halves of a guided batch, nothing shared) at
the rate of a large matrix product, measured first. `--profile` lists the kernels of one step instead.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sdinpaint_kernels import backend
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdinpaint.families import SD2_INPAINT, SD15_INPAINT, SDXL_INPAINT, Family
from sdinpaint.models import VAE, UNet
from sdinpaint.models.unet import timestep_embedding
from sdinpaint.models.weights import pack
from sdinpaint.sampling import Conditioning, Denoiser, schedules
from sdinpaint.sampling.graphs import Graphs

FAMILIES = {"sd15": SD15_INPAINT, "sd2": SD2_INPAINT, "sdxl": SDXL_INPAINT}
RESULTS = Path(__file__).parent / "results" / "step.jsonl"
SIGMA = 2.0
SLACK = 1e-5  # float32 is compared with itself
Call = Callable[[], Tensor]


@contextlib.contextmanager
def kernels(setting: str) -> Iterator[None]:
    """Let the operations run by torch alone, or as they are set."""
    before, backend.SETTING = backend.SETTING, setting
    try:
        yield
    finally:
        backend.SETTING = before


# what is timed


@torch.no_grad()
def random_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the meta device with weights that keep the size of activations, float32 on `device`."""
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            bound = math.sqrt(3 / weight[0].numel())
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.uniform_(*((0.7, 1.3) if name.endswith("weight") else (-0.1, 0.1)), generator=generator)
    return model


def plain(unet: UNet) -> Callable[..., Tensor]:
    """Another UNet of the same values, as the bare function that runs everything at every step, channels-first."""
    with torch.device("meta"):
        other = UNet(unet.config).eval().requires_grad_(False)
    other.load_state_dict({name: value.clone() for name, value in unet.state_dict().items()}, assign=True)
    pack(other)
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()
    return other.forward


@dataclasses.dataclass
class Step:
    """What one guided step of a family is given."""

    family: Family
    x: Tensor
    extra: tuple[Tensor, Tensor]
    cond: Conditioning
    uncond: Conditioning
    sizes: Tensor
    """What SDXL is told of the picture's size."""

    @classmethod
    def draw(cls, family: Family, device: torch.device) -> Step:
        """One picture of the family's size."""
        torch.manual_seed(1)
        side = family.size // 8
        x, masked = torch.randn(2, 1, 4, side, side, device=device).unbind()
        mask = (torch.rand(1, 1, side, side, device=device) < 0.5).float()

        sizes = torch.tensor([family.size, family.size, 0, 0, family.size, family.size], device=device)

        def condition() -> Conditioning:
            context = torch.randn(1, 77, family.unet.context_dim, device=device)
            if family.unet.vector_dim is None:
                return Conditioning(context)
            told = timestep_embedding(sizes, 256).view(1, -1)
            pooled = torch.randn(1, family.unet.vector_dim - told.shape[1], device=device)
            return Conditioning(context, torch.cat([pooled, told], dim=1))

        return cls(family, x * math.hypot(1, SIGMA), (mask, masked), condition(), condition(), sizes)

    def denoiser(self, unet: Any, dtype: torch.dtype, graphs: Graphs | None = None) -> Denoiser:
        """The step with a UNet, or a function called as one."""
        return Denoiser(
            unet,
            schedules.train_sigmas(self.family.schedule),
            self.family.schedule.prediction,
            self.cond,
            self.uncond,
            extra=self.extra,
            dtype=dtype,
            graphs=graphs,
        )

    def call(self, unet: Any, dtype: torch.dtype, graphs: Graphs | None = None, setting: str = "auto") -> Call:
        """One step as a call without arguments."""
        denoise = self.denoiser(unet, dtype, graphs)

        def run() -> Tensor:
            with kernels(setting):
                return denoise(self.x, SIGMA)

        return run


class Recordable:
    """A function called as a UNet, as one whose step is recorded: plain torch with no launches to wait for."""

    def __init__(self, unet: Callable[..., Tensor]) -> None:
        self.unet = unet

    def prepare(self, context: Tensor, vector: Tensor | None) -> Any:
        """Keeps the text as it is."""
        return _Recorded(self.unet, [context] if vector is None else [context, vector], str(id(self.unet)))


@dataclasses.dataclass(frozen=True)
class _Recorded:
    unet: Callable[..., Tensor]
    kept: list[Tensor]
    key: str

    def is_current(self) -> bool:
        return True

    def embed(self, t: Tensor) -> Tensor:
        return t

    def __call__(self, x: Tensor, emb: Tensor, kept: list[Tensor], control: None) -> Tensor:
        context, *vector = kept
        return self.unet(torch.cat([x, x]), emb.expand(len(context)), context, vector[0] if vector else None, None)


def diffusers_unet(step: Step, ours: UNet, compiled: bool = False) -> Callable[..., Tensor] | None:
    """diffusers' UNet with the same weights, called as ours; None where diffusers is not installed."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    from sdinpaint_weights.export import diffusers_state

    from sdinpaint.checkpoints.diffusers_configs import diffusers_configs

    config = {
        name: value for name, value in diffusers_configs(step.family)["unet/config.json"].items() if name[0] != "_"
    }
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config).eval()
    theirs.load_state_dict(diffusers_state("unet", ours.state_dict()), assign=True)

    run = torch.compile(theirs, mode="max-autotune-no-cudagraphs", dynamic=False) if compiled else theirs

    def call(x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, control: None) -> Tensor:
        added = None
        if vector is not None:
            pooled = vector[:, : -256 * len(step.sizes)]
            added = {"text_embeds": pooled, "time_ids": step.sizes.expand(len(x), -1)}
        return run(x, t, context, added_cond_kwargs=added, return_dict=False)[0]

    return call


# timing


def seconds(call: Call, rounds: int) -> list[float]:
    """Of each of `rounds` calls: device time on a GPU, where calls are queued; elsewhere wall time."""
    if not torch.cuda.is_available():
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
        return taken
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def waited_seconds(call: Call, rounds: int) -> float:
    """Median wall time where every call is waited for, as a sampler does that looks at its result."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random numbers."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    for _ in range(3):
        a @ b
    return 2 * side**3 / statistics.median(seconds(lambda: a @ b, 20 if device.type == "cuda" else 3))


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def environment(device: torch.device) -> dict[str, object]:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, object] = {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": platform.machine(),
    }
    if device.type == "cuda":
        import triton

        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton.__version__,
        }
    return found


class Report:
    """Times calls; a row for each goes to a file, and a line to the terminal."""

    def __init__(self, path: Path, device: torch.device, rate: float) -> None:
        self.path, self.environment, self.rate = path, environment(device), rate
        self.warm_up, self.rounds = (3, 20) if device.type == "cuda" else (0, 2)
        path.parent.mkdir(exist_ok=True)
        print(f"ceiling {rate / 1e12:.3g} TFLOP/s", flush=True)

    def __call__(self, row: dict[str, Any], calls: dict[str, Call], errors: dict[str, float]) -> None:
        """Time each of the calls twice, in turns."""
        runs: dict[str, list[list[float]]] = {name: [] for name in calls}
        for name, call in [*calls.items(), *calls.items()]:
            seconds(call, self.warm_up)
            runs[name].append(seconds(call, self.rounds))
        for name, taken in runs.items():
            self._add({**row, "variant": name, "error": errors[name]}, taken, waited_seconds(calls[name], self.rounds))

    def _add(self, row: dict[str, Any], taken: list[list[float]], waited: float) -> None:
        medians = [1e3 * statistics.median(run) for run in taken]
        percent = 100 * row["tflop"] * 1e15 / self.rate / min(medians)
        row |= {
            "milliseconds": medians,
            "p20_p80": [[1e3 * part for part in statistics.quantiles(run, n=5)[::3]] for run in taken],
            "waited_milliseconds": 1e3 * waited,
            "percent_of_floor": percent,
            "ceiling_tflops": self.rate / 1e12,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "environment": self.environment}) + "\n")
        print(
            f"{row['family']:5} {row['what']:7} {row['variant']:38} {medians[0]:9.3f} {medians[1]:9.3f} ms, "
            f"waited {1e3 * waited:9.3f}, {percent:5.1f}% of the floor, error {row['error']:.1e}",
            flush=True,
        )


# the families


def step_variants(step: Step, unet: UNet, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Call]:
    """Every way of running the step that is compared, ours first; "recorded": launched whole, as a CUDA graph."""
    bare = unet.forward if options.cpu else plain(unet)
    found = {"ours": step.call(unet, dtype)}
    if not options.cpu:
        found = {"ours, recorded": step.call(unet, dtype, Graphs(True)), **found}
        found["ours by torch's operations, recorded"] = step.call(unet, dtype, Graphs(True), "torch")
        found["plain torch, recorded"] = step.call(Recordable(bare), dtype, Graphs(True), "torch")
    found["plain torch"] = step.call(bare, dtype, setting="torch")
    theirs = None if options.quick else diffusers_unet(step, unet)
    if theirs is not None:
        found["diffusers"] = step.call(theirs, dtype)
        if not options.cpu:
            found["diffusers, recorded"] = step.call(Recordable(theirs), dtype, Graphs(True))
        if options.compile and not options.cpu:
            theirs = diffusers_unet(step, unet, compiled=True)
            found["diffusers compiled, recorded"] = step.call(Recordable(theirs), dtype, Graphs(True))
    return found


def measure_step(family: str, options: argparse.Namespace, device: torch.device, report: Report) -> None:
    """The guided step of one family."""
    dtype = getattr(torch, options.dtype)
    step = Step.draw(FAMILIES[family], device)
    with torch.device("meta"):
        unet = UNet(step.family.unet)
    unet = random_model(unet, device)
    reference = step.call(unet.forward, torch.float32, setting="torch")()
    unet.to(dtype)
    calls = step_variants(step, unet, dtype, options)
    with FlopCounterMode(display=False) as counter:
        allowed = 2 * relative_error(calls["plain torch"](), reference) + SLACK
    errors = {}
    for name, call in calls.items():
        started = time.perf_counter()
        errors[name] = relative_error(call(), reference)
        print(f"  first call of {name}: {time.perf_counter() - started:.1f} s", flush=True)
        if not errors[name] <= allowed:
            raise RuntimeError(f"{family}, {name}: error {errors[name]:.1e}, allowed {allowed:.1e}: nothing is timed")
    if options.profile:
        profile(f"{family} step, {next(iter(calls))}", next(iter(calls.values())))
        return
    row = {"what": "step", "family": family, "dtype": options.dtype, "tflop": counter.get_total_flops() / 1e12}
    report(row, calls, errors)


def measure_vae(family: str, options: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Decoding and encoding one picture."""
    dtype, config, size = getattr(torch, options.dtype), FAMILIES[family].vae, FAMILIES[family].size
    with torch.device("meta"):
        meta = VAE(config)
    vae = random_model(copy.deepcopy(meta), device)
    torch.manual_seed(2)
    given = {
        "decode": torch.randn(1, config.latent_channels, size // 8, size // 8, device=device),
        "encode": torch.rand(1, 3, size, size, device=device) * 2 - 1,
    }
    with kernels("torch"):
        references = {"decode": vae.decode(given["decode"]), "encode": vae.posterior(given["encode"])[0]}
    vae.to(dtype)
    for what, x in given.items():
        held = x.to(dtype)

        def run(setting: str, what: str = what, held: Tensor = held) -> Tensor:
            with kernels(setting):
                return vae.decode(held) if what == "decode" else vae.posterior(held)[0]

        calls = {"ours": functools.partial(run, "auto"), "torch's operations": functools.partial(run, "torch")}
        allowed = 2 * relative_error(run("torch"), references[what]) + SLACK
        with FlopCounterMode(display=False) as counter:  # which does not know all of torch's products on a GPU
            (meta.decode if what == "decode" else meta.posterior)(x.to("meta"))
        errors = {name: relative_error(call(), references[what]) for name, call in calls.items()}
        if not errors["ours"] <= allowed:
            raise RuntimeError(f"{family}, {what}: error {errors['ours']:.1e}, allowed {allowed:.1e}: nothing is timed")
        if options.profile:
            profile(f"{family} {what}", calls["ours"])
            continue
        row = {"what": what, "family": family, "dtype": options.dtype, "tflop": counter.get_total_flops() / 1e12}
        report(row, calls, errors)


def profile(name: str, call: Call, rows: int = 30) -> None:
    """Print the kernels of one call by total time."""
    from torch.profiler import ProfilerActivity

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.device_time)
    total = sum(sum(times) for times in kernels.values())
    launches = sum(len(times) for times in kernels.values())
    print(f"{name}: {launches} kernels, {total / 1e3:.3f} ms of kernel time")
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{sum(times):9.1f} us {100 * sum(times) / total:5.1f}% {len(times):5}x  {kernel[:130]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="leave out diffusers and the autoencoder")
    parser.add_argument("--compile", action="store_true", help="diffusers compiled too; takes minutes")
    parser.add_argument("--profile", action="store_true", help="list the kernels of one step, and time nothing")
    parser.add_argument("--cpu", action="store_true", help="on a CPU, roughly")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        report = Report(options.out, device, ceiling(device, getattr(torch, options.dtype)))
        for family in options.families:
            measure_step(family, options, device, report)
            torch.cuda.empty_cache()
            if not options.quick:
                measure_vae(family, options, device, report)


if __name__ == "__main__":
    main()
