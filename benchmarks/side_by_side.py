"""sdinpaint beside diffusers on one full-size random SD-1.5-inpainting checkpoint: import, load, one UNet step.

    python benchmarks/side_by_side.py [import] [load] [step]

Everything is timed in turns, ours and theirs, and reported as medians. Load is timed in a process of its own each
time, with the file in the page cache for both; its peak is the kernel's VmHWM less what the imports took.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from recording import RESULTS, append

from sdinpaint.checkpoints.diffusers_configs import diffusers_configs
from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, CLIPText, UNet
from sdinpaint.sampling import Conditioning, Denoiser, schedules

IMPORTS = {
    "sdinpaint": "from sdinpaint import load",
    "diffusers": "from diffusers import StableDiffusionInpaintPipeline",
    "torch": "import torch",
}
LOADS = {
    "sdinpaint": """
from sdinpaint import load
begin()
pipe = load(folder, dtype=dtype, device="cpu", progress=False)
end(pipe.unet, pipe.vae, pipe.text)
""",
    "diffusers": """
import torch
from diffusers import StableDiffusionInpaintPipeline
begin()
pipe = StableDiffusionInpaintPipeline.from_pretrained(
    folder, torch_dtype=getattr(torch, dtype), local_files_only=True, safety_checker=None
)
end(pipe.unet, pipe.vae, pipe.text_encoder)
""",
}
PAIRS = (("float32", "float32"), ("float16", "float16"), ("float16", "bfloat16"), ("float32", "bfloat16"))
"""Dtype of the file, and dtype asked for."""
# Reading one value of every page makes both pay for what a memory map would put off.
PROBE = """
import json, os, sys, time
folder, dtype = sys.argv[1:]
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
def begin():
    global started, before
    open("/proc/self/clear_refs", "w").write("5")
    before, started = status("VmRSS"), time.perf_counter()
def end(*models):
    seconds = time.perf_counter() - started
    parameters = [p for model in models for p in model.parameters()]
    for p in parameters:
        p.flatten()[:: 4096 // p.element_size()].sum()
    weights = sum(p.numel() * p.element_size() for p in parameters)
    touched = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "touched": touched, "peak": status("VmHWM") - before, "weights": weights}))
"""


def report(row: dict[str, object]) -> None:
    """Append a row, and show it."""
    append(RESULTS / "side_by_side.jsonl", row)
    print(json.dumps(row), flush=True)


def run(code: str, *arguments: str) -> str:
    """Run Python code in a new process -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def random_models(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The full-size networks with torch's own initial weights, which keep activations finite."""
    torch.manual_seed(0)
    family = SD15_INPAINT
    models = UNet(family.unet), VAE(family.vae), CLIPText(family.text)
    return {name: model.to(dtype) for name, model in zip(family.components, models, strict=True)}


def measure_import(rounds: int = 7) -> None:
    """Seconds of each import statement in a new process, less the interpreter's own start."""
    timed = "import time; t = time.perf_counter()\n{}\nprint(time.perf_counter() - t)"
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds + 1):
        for name, statement in IMPORTS.items():
            seconds[name].append(float(run(timed.format(statement))))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first fills the cache
    report({"what": "import", "seconds": medians, "ratio": medians["sdinpaint"] / medians["diffusers"]})


def measure_load(rounds: int = 7) -> None:
    """Load time and peak memory for each pair of stored and asked dtype."""
    from sdinpaint_weights.export import write_diffusers

    from sdinpaint.text.finding import find_tokenizer

    for stored, asked in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            models = random_models(getattr(torch, stored))
            states = {name: model.state_dict() for name, model in models.items()}
            write_diffusers(folder, states, diffusers_configs(SD15_INPAINT))
            find_tokenizer().save(Path(folder) / "tokenizer")
            del models, states
            found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
            for _ in range(rounds + 1):
                for name, code in LOADS.items():
                    found[name].append(json.loads(run(PROBE + code, folder, asked).splitlines()[-1]))
        row: dict[str, object] = {"what": "load", "stored": stored, "asked": asked}
        for name, rows in found.items():
            median = {key: statistics.median(one[key] for one in rows[1:]) for key in rows[0]}
            row[name] = {**median, "peak_to_weights": median["peak"] / median["weights"]}
        report(row)


def measure_step(rounds: int = 4) -> None:
    """One guided step (batch 2) at 512 x 512 in float32 and bfloat16, outputs compared first."""
    from diffusers import UNet2DConditionModel
    from sdinpaint_weights.export import diffusers_state

    torch.manual_seed(0)
    ours = UNet(SD15_INPAINT.unet).eval()
    config = {
        name: value for name, value in diffusers_configs(SD15_INPAINT)["unet/config.json"].items() if name[0] != "_"
    }
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config).eval()
    theirs.load_state_dict(diffusers_state("unet", ours.state_dict()), assign=True)
    x, extra = torch.randn(1, 4, 64, 64), (torch.ones(1, 1, 64, 64), torch.randn(1, 4, 64, 64))
    texts = torch.randn(2, 77, 768)
    sigma = 1.5
    trained = schedules.train_sigmas(SD15_INPAINT.schedule)
    t = torch.tensor(schedules.timestep(trained, sigma))
    exact = torch.empty(0)
    for dtype in (torch.float32, torch.bfloat16):
        for model in (ours, theirs):
            model.to(dtype)
        conditions = [Conditioning(text[None]) for text in texts]
        denoise = Denoiser(ours, trained, "eps", *reversed(conditions), extra=extra, dtype=dtype)

        def step_of_diffusers(dtype: torch.dtype = dtype) -> torch.Tensor:
            """As its pipelines do it: both halves of the batch through the UNet, then guidance."""
            fed = torch.cat([x / math.hypot(1, sigma), *extra], dim=1).to(dtype)
            uncond, cond = theirs(torch.cat([fed] * 2), t, texts.to(dtype), return_dict=False)[0].float().chunk(2)
            return x - sigma * (uncond + 7.5 * (cond - uncond))

        calls = {"sdinpaint": lambda: denoise(x, sigma), "diffusers": step_of_diffusers}  # noqa: B023
        with torch.inference_mode():
            out = {name: call().float() for name, call in calls.items()}
            exact = out["diffusers"] if dtype == torch.float32 else exact
            errors = {name: float((value - exact).norm() / exact.norm()) for name, value in out.items()}
            error = errors["sdinpaint"]
            if error > max(1e-4, 2 * errors["diffusers"]):
                raise RuntimeError(f"it differs by {error:.1e} from diffusers in float32: nothing is timed")
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    started = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["sdinpaint"], seconds["diffusers"], strict=True)]
        report(
            {
                "what": "step",
                "dtype": str(dtype).removeprefix("torch."),
                "relative_difference": error,  # from diffusers in float32
                "seconds": medians,
                "all_seconds": seconds,
                "ratio": statistics.median(ratios),
            }
        )


if __name__ == "__main__":
    measures = {"import": measure_import, "load": measure_load, "step": measure_step}
    for chosen in sys.argv[1:] or measures:
        measures[chosen]()
