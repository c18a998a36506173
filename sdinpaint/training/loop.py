"""Run a training loop that can be interrupted at any moment and resumed.

All randomness of a step depends on (seed, step), so that a resumed run continues as if it had not been interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from sdinpaint_weights.atomic import atomic_write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdinpaint.progress import progress_bar

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""A function from the step to the loss to minimise, a scalar, and numbers to log."""


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, tail: float = 0.3) -> float:
    """Compute the learning rate: linear warm-up, constant, and a linear decay to zero.

    Args:
        step: the step, from 0.
        steps: number of steps in total.
        peak: the constant learning rate in the middle.
        warmup: number of steps of the warm-up.
        tail: fraction of all steps in which the learning rate decays.

    Returns:
        The learning rate of the step.
    """
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (steps * tail))


class Trainer:
    """Minimise a loss over the parameters of a module, with an exponential moving average (EMA) of its weights.

    The trainer writes `state.safetensors` (weights, averages, optimiser) and `log.jsonl` to a folder, and resumes from
    the state there.

    Args:
        module: the module to train.
        folder: folder of the state and the log.
        steps: number of steps in total.
        peak_lr: largest learning rate; see `learning_rate`.
        ema_decay: decay of the moving average in each step.
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
        """Train up to the last step; the state is also saved at the end and on an interruption.

        Args:
            loss: the loss.
            save_every: number of steps after which the state is saved.
            progress: show a progress bar.
        """
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
        """Copy the averaged (EMA) weights into the module."""
        self.module.load_state_dict(self.ema)

    def _descend(self, loss: Loss) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.peak_lr)
        device = next(self.module.parameters()).device
        # At these sizes, the backward pass of flash attention on CPUs takes longer than everything else together.
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
        """Write the training state atomically."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(self.state_file) as file:
            file.write(save(contiguous, metadata={"step": str(self.step)}))

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
