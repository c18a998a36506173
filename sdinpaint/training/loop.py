"""A training loop that can be stopped at any moment and resumed where it was.

All randomness of a step is drawn from (seed, step), so a resumed run goes on as an uninterrupted one would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sdinpaint_weights.atomic import atomic_write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdinpaint.progress import progress_bar

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""step -> the loss to descend, and figures to log."""


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, tail: float = 0.3) -> float:
    """Linear warm-up, constant, and a linear fall to zero over the last `tail` of all steps."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (steps * tail))


class Trainer:
    """Descends a loss over the parameters of `module`, with an exponential moving average of the weights.

    Writes `state.safetensors` (weights, averages, optimiser) and `log.jsonl` into `folder`, and resumes from them.
    """

    def __init__(
        self, module: nn.Module, folder: Path, *, steps: int, peak_lr: float, ema_decay: float = 0.999
    ) -> None:
        self.module, self.folder, self.steps, self.peak_lr, self.ema_decay = module, folder, steps, peak_lr, ema_decay
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.state_file = folder / "state.safetensors"
        if self.state_file.exists():
            self._resume()

    def fit(self, loss: Loss, *, save_every: int = 200, progress: bool = True) -> None:
        """Run to `steps`; saves every `save_every` steps, at the end, and when interrupted."""
        started = time.perf_counter()
        try:
            with progress_bar(self.steps, self.folder.name, show=progress, initial=self.step) as bar:
                while self.step < self.steps:
                    figures = self._descend(loss)
                    self.step += 1
                    bar.update()
                    bar.set_postfix_str(", ".join(f"{name}={value:.4f}" for name, value in figures.items()))
                    if self.step % 10 == 0:
                        self._log({**figures, "seconds": round(time.perf_counter() - started, 1)})
                    if self.step % save_every == 0:
                        self.save()
        finally:
            self.save()

    def use_ema(self) -> None:
        """Put the averaged weights into the module."""
        self.module.load_state_dict(self.ema)

    def _descend(self, loss: Loss) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.peak_lr)
        device = next(self.module.parameters()).device
        # The flash backward of CPUs takes longer than everything else together at these sizes.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            value, figures = loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, now in self.module.state_dict().items():
                self.ema[name].lerp_(now, 1 - decay)
        return figures

    def _log(self, figures: dict[str, float]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": self.step, **figures}) + "\n")

    def save(self) -> None:
        """Write the whole state, atomically."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        with atomic_write(self.state_file) as temporary:
            contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(contiguous, temporary, metadata={"step": str(self.step)})

    def _resume(self) -> None:
        with safe_open(self.state_file, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.module.load_state_dict(part("module."))
        for name, value in part("ema.").items():
            self.ema[name].copy_(value)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
