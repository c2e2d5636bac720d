"""A small training run for tests of the loop, in this process or as a program that can be killed or run twice at once.

python -m tests.finetune.toy OUTPUT STEPS PAUSE     in torchrun: each process takes its part of every batch
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.seeds import seeded
from finetune.training.config import TrainConfig
from finetune.training.history import History
from finetune.training.loop import make_accelerator, train

ROOT = Path(__file__).parents[2]
TOGETHER = 8  # samples of a micro-batch over all processes
CONFIG = TrainConfig(
    max_train_steps=12,
    gradient_accumulation_steps=2,
    learning_rate=0.05,
    lr_scheduler="cosine",
    lr_warmup_steps=2,
    max_grad_norm=0.5,
    ema_decay=0.9,
    seed=3,
    mixed_precision="no",
    checkpointing_steps=1,
    logging_steps=5,
)
PLAIN = replace(CONFIG, ema_decay=None, lr_scheduler="constant", lr_warmup_steps=0, checkpointing_steps=100)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


class Regression(nn.Module):
    """forward(batch) -> mean squared error of a small network with a frozen layer; dropout for what is random."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.last = nn.Linear(4, 16), nn.Dropout(dropout), nn.Linear(16, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.frozen(self.last(self.dropout(torch.tanh(self.first(x))))) - y).square().mean()


def batches(n: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This process's part of micro-batch n."""
    x = torch.randn(TOGETHER, 4, generator=seeded("toy", n))
    part = slice(rank * TOGETHER // world, (rank + 1) * TOGETHER // world)
    return x[part], x[part, :3].sin()


def run(
    output: Path,
    config: TrainConfig = CONFIG,
    dropout: float = 0.3,
    batches: Callable[[int], object] = batches,
    **arguments,
) -> tuple[Regression, History]:
    """Train it; the network as it is afterwards, and the losses."""
    network = Regression(dropout)
    return network, train(make_accelerator(config), network, batches, config, output, **arguments).history


def dying(deadly: int | None) -> Callable[[int], tuple[Tensor, Tensor]]:
    """``batches`` of a run that is killed when it asks for batch ``deadly``."""

    def batch(n: int) -> tuple[Tensor, Tensor]:
        if n == deadly:
            raise Killed
        return batches(n)

    return batch


def losses(history: History) -> list[float]:
    return [row.loss for row in history.rows]


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor], tolerance: float = 0.0) -> bool:
    """Whether both have the same tensors, to the bit or nearly."""
    first, second = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return first.keys() == second.keys() and all(
        torch.allclose(first[k], second[k], rtol=tolerance, atol=tolerance) for k in first
    )


def forget_accelerate() -> None:
    """Let the next Accelerator have other settings: they last for the process otherwise."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def environment(**more: str) -> dict[str, str]:
    """For a program that imports ours, on one core."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def main(output: str, steps: str, pause: str) -> None:
    config = replace(CONFIG, max_train_steps=int(steps))
    accelerator = make_accelerator(config)
    rank, world = accelerator.process_index, accelerator.num_processes

    def slow(n: int) -> tuple[Tensor, Tensor]:
        time.sleep(float(pause))
        return batches(n, rank, world)

    network = Regression(dropout=0.3 if world == 1 or float(pause) else 0.0)
    history = train(accelerator, network, slow, config, Path(output)).history
    if accelerator.is_main_process:
        torch.save({"weights": network.state_dict(), "rows": [tuple(r) for r in history.rows]}, Path(output) / "end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
