"""The training loop of the pretraining scripts: resumable to the bit, with a progress bar and samples as it goes.

Every random draw of a step comes from generators seeded with (seed, step), so the state of a run is its weights,
its optimizer, its moving average and the number of steps done.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """AdamW's settings. The rate warms up linearly, stays, and falls as a half cosine from ``decay_from`` on."""

    steps: int
    learning_rate: float
    warmup: int = 200
    decay_from: float = 0.0  # share of the steps after which the rate begins to fall
    final_rate: float = 0.01  # of learning_rate
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    ema_decay: float | None = None

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, relative to ``learning_rate``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.decay_from * self.steps
        progress = max(0.0, (step - start) / max(1.0, self.steps - start))
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def autocast() -> AbstractContextManager[Any]:
    """bfloat16 autocast where the processor multiplies bfloat16, else float32: emulated, it is 100 times slower."""
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if native else nullcontext()


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 7919 + 17)


def save_atomically(state: Any, path: Path) -> None:
    """torch.save under a temporary name, then rename: a killed run never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class MovingAverage:
    """The exponential moving average of a module's parameters, faster at first."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in module.parameters()]

    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, module.parameters(), strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for value, parameter in zip(self.values, module.parameters(), strict=True):
                parameter.copy_(value)


def train(
    module: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    recipe: Recipe,
    folder: Path,
    *,
    rates: Callable[[str], float] = lambda name: 1.0,
    on_sample: Callable[[int, MovingAverage | None], None] | None = None,
    save_seconds: float = 120.0,
    sample_seconds: float = 600.0,
) -> MovingAverage | None:
    """Train ``module`` and return its moving average, if the recipe asks for one.

    ``loss(step)`` gives the loss and figures to show; ``rates(parameter name)`` a factor on the learning rate.
    The state lies in ``folder/state.pt``; a run that finds one goes on from there, exactly as if never stopped. Raises
    ValueError when it was made by another recipe, ArithmeticError when the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.pt"
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    factors = sorted({rates(name) for name, _ in named})
    groups = [{"params": [p for n, p in named if rates(n) == f], "factor": f} for f in factors]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    average = MovingAverage(module, recipe.ema_decay) if recipe.ema_decay else None
    done, history, running = 0, list[tuple[int, float]](), math.nan
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != repr(recipe):
            raise ValueError(f"{state_file}: made with {state['recipe']}, not {recipe}; remove it to begin anew")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        done, history, running = state["step"], state["history"], state["running"]
        if average is not None:
            average.values = state["average"]

    def save(step: int) -> None:
        state = {
            "module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "history": history,
            "recipe": repr(recipe), "running": running, "average": average.values if average is not None else None,
        }  # fmt: skip
        save_atomically(state, state_file)

    module.train()
    saved = sampled = time.monotonic()
    bar = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, desc=folder.name, mininterval=5.0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate(step) * group["factor"]
        value, figures = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], recipe.clip)
        optimizer.step()
        if average is not None:
            average.update(module, step)
        running = value.item() if math.isnan(running) else 0.98 * running + 0.02 * value.item()
        if not math.isfinite(running):
            raise ArithmeticError(f"{folder.name}: the loss is not finite at step {step}")
        if (step + 1) % 50 == 0:
            history.append((step + 1, running))
            bar.set_postfix({"loss": f"{running:.4f}"} | {k: f"{v:.3f}" for k, v in figures.items()})
        if time.monotonic() - saved > save_seconds:
            save(step + 1)
            saved = time.monotonic()
        if on_sample is not None and time.monotonic() - sampled > sample_seconds:
            on_sample(step + 1, average)
            module.train()
            sampled = time.monotonic()
    save(recipe.steps)
    if on_sample is not None:
        on_sample(recipe.steps, average)
    return average
