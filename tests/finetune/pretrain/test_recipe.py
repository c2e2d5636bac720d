"""The training of the shipped model's networks: its rate, and the loop's promises for a run on the CPU."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.pretrain.latent_classifier import Batch
from finetune.pretrain.recipe import Recipe, every_nth, train_on_the_cpu
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from finetune.training.loop import Trained
from finetune.training.states import load_state, saved_states
from sdkit.errors import CheckpointError, NumericalError
from tests.finetune.toy import Killed, environment, losses

ROOT = Path(__file__).parents[3]

RECIPE = Recipe(
    max_train_steps=12, learning_rate=0.05, lr_warmup_steps=3, decay_from=0.5, ema_decay=0.9, checkpointing_steps=1
)


class Regression(nn.Module):
    """forward(x) -> mean squared error of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) - x[:, :3].sin()).square().mean()


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=step_generator(1, step))


def run(folder: Path, recipe: Recipe = RECIPE, deadly: int | None = None) -> tuple[Regression, Trained]:
    """A run that is killed at step ``deadly``."""

    def deadly_batch(step: int) -> Tensor:
        if step == deadly:
            raise Killed
        return batch(step)

    loss = Regression()
    return loss, train_on_the_cpu(loss, deadly_batch, recipe, folder)


def values(loss: nn.Module, trained: Trained) -> list[Tensor]:
    """Weights and their average."""
    assert trained.average is not None
    return [*loss.parameters(), *trained.average.values.values()]


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    loss, whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", deadly=7)
    assert [p.name for p in saved_states(tmp_path / "killed")] == ["checkpoint-7"]
    again, rest = run(tmp_path / "killed")
    assert losses(rest.history) == losses(whole.history) and losses(whole.history)[-1] < losses(whole.history)[0]
    assert all(torch.equal(a, b) for a, b in zip(values(loss, whole), values(again, rest), strict=True))


def test_the_steps_are_those_that_made_the_shipped_model(tmp_path: Path) -> None:
    """The loop of that time, written out: AdamW, the rate, the clipping and the average, to the bit."""
    loss, trained = run(tmp_path)
    expected = Regression()
    average = [p.detach().clone() for p in expected.parameters()]
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    for step in range(12):
        optimizer.param_groups[0]["lr"] = RECIPE.rate(step)
        value = expected(torch.randn(8, 4, generator=step_generator(1, step)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(expected.parameters()), 1.0)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for a, p in zip(average, expected.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - decay)

    assert all(
        torch.equal(a, b) for a, b in zip(values(loss, trained), [*expected.parameters(), *average], strict=True)
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="the loss of step 1 is nan"):
        train_on_the_cpu(Regression(), lambda _: torch.full((8, 4), float("nan")), RECIPE, tmp_path)
    assert saved_states(tmp_path) == []


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    for other in (replace(RECIPE, max_train_steps=13), replace(RECIPE, decay_from=0.4), replace(RECIPE, seed=1)):
        with pytest.raises(CheckpointError, match="choose another output folder"):
            run(tmp_path, other)
    run(tmp_path, replace(RECIPE, checkpointing_steps=5, validation_steps=None))
    assert load_state(saved_states(tmp_path)[-1])["step"] == 12


def test_the_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe(max_train_steps=100, learning_rate=1.0, lr_warmup_steps=10, decay_from=0.5, final_rate=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == pytest.approx(1.0)
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert replace(recipe, learning_rate=0.5).rate(75) == pytest.approx(0.275)


TOGETHER = """
import sys
from pathlib import Path
import torch
from finetune.pretrain.recipe import is_main_process, main_process_first, train_on_the_cpu
from tests.finetune.pretrain.test_recipe import RECIPE, Regression, batch

folder, log = Path(sys.argv[1]), Path(sys.argv[1]) / "order"
with main_process_first():
    log.write_text((log.read_text() if log.exists() else "") + ("main " if is_main_process() else "other "))
loss = Regression()
share = (lambda x, process, processes: x[process::processes]) if sys.argv[2] == "shared" else None
train_on_the_cpu(loss, batch, RECIPE, folder, share=share)
if is_main_process():
    torch.save(loss.state_dict(), folder / "end.pt")
"""


def together(tmp_path: Path, how: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", str(tmp_path / "program.py"), str(tmp_path), how]
    return subprocess.run(
        command, cwd=ROOT, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=300
    )


def test_processes_share_a_batch_by_its_rows() -> None:
    scenes = sample_scenes(6, 3)
    x, own = every_nth((torch.arange(6), scenes), 1, 2)
    assert x.tolist() == [1, 3, 5] and torch.equal(own.color, scenes.color[1::2])
    batch = Batch(*(torch.arange(4) + k for k in range(4)))
    parts = [every_nth(batch, process, 2) for process in range(2)]
    assert all(isinstance(part, Batch) for part in parts)
    assert [part.classes.tolist() for part in parts] == [[3, 5], [4, 6]]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    done = together(tmp_path, "shared")
    assert done.returncode == 0, done.stderr
    alone, _ = run(tmp_path / "alone")
    two = torch.load(tmp_path / "end.pt", weights_only=True)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "order").read_text() == "main other "


@pytest.mark.slow
def test_a_network_that_is_trained_by_one_process_refuses_two(tmp_path: Path) -> None:
    done = together(tmp_path, "alone")
    assert done.returncode != 0 and "expected one process, found 2" in done.stderr
