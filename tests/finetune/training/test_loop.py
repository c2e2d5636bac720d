"""The loop: exact resume, clipping, accumulation, rates, sheets; alone, on the CPU, and on two processes."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sdkernels
from finetune.training import muon
from finetune.training.history import History
from finetune.training.loop import make_accelerator, on_the_cpu, train
from finetune.training.states import STATE, load_state, save_state, saved_states
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from tests.finetune import toy
from tests.finetune.toy import PLAIN, Killed, Regression, dying, losses, same

ROOT = Path(__file__).parents[3]


# Resume


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_killed_anywhere_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(muon, "SHORTEST", 2)
    config = replace(toy.CONFIG, checkpointing_steps=3, optimizer=optimizer)
    whole, history = toy.run(tmp_path / "whole", config)
    average = load_state(saved_states(tmp_path / "whole")[-1])["average"]
    assert len(history.rows) == 12 and losses(history)[-1] < losses(history)[0]
    for deadly in (0, 5, 6, 7, 13, 23):
        folder = tmp_path / str(deadly)
        with pytest.raises(Killed):
            toy.run(folder, config, batches=dying(deadly))
        resumed, rest = toy.run(folder, config)
        assert rest.rows == history.rows and same(resumed, whole), deadly
        assert same(load_state(saved_states(folder)[-1])["average"], average)
    moments = load_state(saved_states(tmp_path / "whole")[-1])["optimizer"]
    assert ("momentum" in moments["first.weight"]) == (optimizer == "muon") and "exp_avg" in moments["first.bias"]


def test_running_means_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Normed(Regression):
        def __init__(self, dropout: float) -> None:
            super().__init__(dropout)
            self.norm = torch.nn.BatchNorm1d(4)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().forward((self.norm(batch[0]), batch[1]))

    monkeypatch.setattr(toy, "Regression", Normed)
    whole, _ = toy.run(tmp_path / "whole")
    with pytest.raises(Killed):
        toy.run(tmp_path / "killed", batches=dying(13))
    resumed, _ = toy.run(tmp_path / "killed")
    again, _ = toy.run(tmp_path / "killed")  # which is at its end
    assert float(whole.get_buffer("norm.running_mean").abs().max()) > 1e-3
    assert same(resumed, whole) and same(again, whole)


def test_sigkill_and_resume_are_exact(tmp_path: Path):
    expected, history = toy.run(tmp_path / "whole")
    program = [sys.executable, "-m", "tests.finetune.toy", str(tmp_path / "killed"), "12", "0.05"]
    process = subprocess.Popen(program, cwd=ROOT, env=toy.environment())
    wait_for(tmp_path / "killed", 4, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = load_state(saved_states(tmp_path / "killed")[-1])["step"]
    assert 4 <= done < 12
    resumed, rest = toy.run(tmp_path / "killed")
    assert rest.rows == history.rows and same(resumed, expected)


def wait_for(output: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has written the checkpoint of ``step``, or a later one."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        if any(int(p.name.split("-")[1]) >= step for p in saved_states(output)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step}, exit status {process.poll()}")


def test_the_gradient_scaler_is_resumed(tmp_path: Path):
    """accelerate makes one for fp16 on a GPU; here it is given one for the CPU, which grows and overflows often."""

    def run(folder: Path, deadly: int | None = None) -> tuple[toy.Regression, History, float]:
        accelerator, network = make_accelerator(config), Regression()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
        history = train(accelerator, network, dying(deadly), config, folder).history
        return network, history, accelerator.scaler.get_scale()

    config = replace(toy.CONFIG, checkpointing_steps=3, max_grad_norm=0.0)
    whole, history, scale = run(tmp_path / "whole")
    assert scale != 2.0**124 and any(not np.isfinite(row.grad_norm) for row in history.rows)
    with pytest.raises(Killed):
        run(tmp_path / "killed", deadly=15)
    resumed, rest, scale_again = run(tmp_path / "killed")
    assert same(resumed, whole) and losses(rest) == losses(history) and scale_again == scale


def test_bfloat16_trains_weights_in_float32(tmp_path: Path):
    half, history = toy.run(tmp_path / "bf16", replace(PLAIN, mixed_precision="bf16"), dropout=0.0)
    toy.forget_accelerate()
    _, expected = toy.run(tmp_path / "no", PLAIN, dropout=0.0)
    assert half.first.weight.dtype == torch.float32
    assert losses(history) != losses(expected) and losses(history) == pytest.approx(losses(expected), rel=0.05)


def test_a_state_of_another_run_is_refused(tmp_path: Path):
    toy.run(tmp_path, PLAIN, facts={"data": "mine"})
    message = (
        r"run with learning_rate 0\.05, now 0\.1, data 'mine', now 'yours'; choose another output folder, or --no-r"
    )
    with pytest.raises(CheckpointError, match=message):
        toy.run(tmp_path, replace(PLAIN, learning_rate=0.1), facts={"data": "yours"})
    longer, history = toy.run(tmp_path, replace(PLAIN, max_train_steps=15, logging_steps=1), facts={"data": "mine"})
    whole, expected = toy.run(tmp_path / "x", replace(PLAIN, max_train_steps=15))
    assert same(longer, whole) and history.rows == expected.rows
    with pytest.raises(CheckpointError, match="max_train_steps 12, now 15"):
        cosine = replace(PLAIN, lr_scheduler="cosine")
        toy.run(tmp_path / "cosine", cosine)
        toy.run(tmp_path / "cosine", replace(cosine, max_train_steps=15))


def test_a_damaged_state_is_set_aside_for_the_one_before(tmp_path: Path):
    config = replace(toy.CONFIG, checkpointing_steps=3, checkpoints_total_limit=1)
    whole, history = toy.run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        toy.run(tmp_path / "run", replace(config, checkpoints_total_limit=2), batches=dying(20))
    newest = tmp_path / "run" / "checkpoint-9" / STATE
    newest.write_bytes(newest.read_bytes()[:2000])

    message = rf"{newest}: .*; kept as {tmp_path}/run/damaged-checkpoint-9, going on from {tmp_path}/run/checkpoint-6"
    with pytest.warns(UserWarning, match=message):
        resumed, rest = toy.run(tmp_path / "run", config)
    assert rest.rows == history.rows and same(resumed, whole)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-12", "damaged-checkpoint-9"]

    (tmp_path / "run" / "checkpoint-12" / STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other state is left"):
        toy.run(tmp_path / "run", config)


def test_a_run_that_has_gone_further_is_refused(tmp_path: Path):
    toy.run(tmp_path, PLAIN)
    with pytest.raises(CheckpointError, match="max_train_steps: the run has done 12 already, found 9; choose another"):
        toy.run(tmp_path, replace(PLAIN, max_train_steps=9))


def test_other_parameters_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy.run(tmp_path, PLAIN)

    class Renamed(Regression):
        def __init__(self, dropout: float) -> None:
            super().__init__(dropout)
            self.new_name = self.first
            del self.first

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.__dict__["first"] = self.new_name
            return super().forward(batch)

    def wider(dropout: float) -> Regression:
        network = Regression(dropout)
        network.last.bias = torch.nn.Parameter(torch.zeros(5))
        return network

    for network, message in (
        (Renamed, r"trained others, parameters: added new_name\.bias, new_name\.weight; removed first\.bias, first\.w"),
        (wider, r"trained others, parameters: last\.bias \(3,\), now \(5,\); choose"),
    ):
        monkeypatch.setattr(toy, "Regression", network)
        with pytest.raises(CheckpointError, match=message):
            toy.run(tmp_path, PLAIN)


def test_a_state_of_an_older_version_is_refused(tmp_path: Path):
    save_state(tmp_path, 3, {"step": 3, "identity": {}}, keep=1)
    with pytest.raises(CheckpointError, match="checkpoint-3: a state of version 1"):
        toy.run(tmp_path, PLAIN)


def test_a_run_can_begin_anew(tmp_path: Path):
    _, first = toy.run(tmp_path, PLAIN)
    _, again = toy.run(tmp_path, replace(PLAIN, learning_rate=0.01, resume=False))
    assert len(again.rows) == 12 and again.rows[-1] != first.rows[-1]
    assert [p.name for p in saved_states(tmp_path)] == ["checkpoint-12"]


# The step


def record(into: list[float], largest: bool = False) -> Callable[..., None]:
    def hook(optimizer, *_) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        into.append(float(torch.cat(gradients).norm()))

    return hook


def test_gradients_are_clipped_on_an_exploding_batch(tmp_path: Path):
    def exploding(n: int) -> tuple[Tensor, Tensor]:
        x, y = toy.batches(n)
        return x, y * (1e6 if n == 6 else 1.0)

    for largest in (0.5, 0.0):
        applied: list[float] = []
        handle = register_optimizer_step_pre_hook(record(applied))
        try:
            _, history = toy.run(tmp_path / str(largest), replace(PLAIN, max_grad_norm=largest), batches=exploding)
        finally:
            handle.remove()
        norms = [row.grad_norm for row in history.rows]
        assert norms[3] > 1e4 and norms.index(max(norms)) == 3
        limit = largest or float("inf")
        assert applied == pytest.approx([min(norm, limit) for norm in norms], rel=1e-4)
        assert min(norms) < 0.5  # what is small is left alone


def test_accumulation_is_a_larger_batch(tmp_path: Path):
    def four_times(n: int) -> tuple[Tensor, Tensor]:
        parts = [toy.batches(4 * n + i) for i in range(4)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    small, a = toy.run(tmp_path / "a", replace(PLAIN, gradient_accumulation_steps=4), dropout=0.0)
    large, b = toy.run(tmp_path / "b", replace(PLAIN, gradient_accumulation_steps=1), dropout=0.0, batches=four_times)
    assert same(small, large, 1e-5) and losses(a) == pytest.approx(losses(b), rel=1e-5)


def test_only_what_requires_a_gradient_is_trained(tmp_path: Path):
    before = toy.Regression()
    after, _ = toy.run(tmp_path, PLAIN)
    assert same(before.frozen, after.frozen) and not same(before.first, after.first)
    assert all(p.grad is None for p in after.frozen.parameters())
    state = load_state(saved_states(tmp_path)[-1])
    trained = {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert state["weights"].keys() == state["optimizer"].keys() == trained


def test_the_rate_is_applied_and_a_part_can_have_its_own(tmp_path: Path):
    seen: list[dict[int, float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append({len(g["params"]): g["lr"] for g in optimizer.param_groups})
    )
    try:
        _, history = toy.run(tmp_path, highest_rate=lambda name: 0.005 if name == "last.bias" else 0.05)
    finally:
        hook.remove()
    rates = [toy.CONFIG.rate(step) for step in range(12)]
    assert [row.learning_rate for row in history.rows] == rates
    assert seen == [{1: pytest.approx(0.1 * rate), 3: pytest.approx(rate)} for rate in rates]


def test_a_part_can_train_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A learning rate of 0 for the settings: the course is that of the part's own rate."""

    def last_alone(dropout: float) -> Regression:
        network = Regression(dropout)
        network.first.requires_grad_(False)
        return network

    monkeypatch.setattr(toy, "Regression", last_alone)
    for scheduler in ("cosine", "linear", "polynomial", "constant"):
        config = replace(toy.CONFIG, lr_scheduler=scheduler)
        found, history = toy.run(
            tmp_path / f"{scheduler}-a", replace(config, learning_rate=0), highest_rate=lambda _: 0.05
        )
        expected, theirs = toy.run(tmp_path / f"{scheduler}-b", config)
        assert same(found, expected) and history.rows == theirs.rows


def test_a_rate_of_0_is_refused_for_what_trains(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"learning_rate .of first\.weight.: expected a finite number above 0, found 0"
    ):
        toy.run(tmp_path, replace(PLAIN, learning_rate=0))


def test_what_gets_no_gradient_is_named_after_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Unused(Regression):
        def __init__(self, dropout: float) -> None:
            super().__init__(dropout)
            self.beside = torch.nn.Linear(2, 2)

    monkeypatch.setattr(toy, "Regression", Unused)
    message = "2 of 6 trained parameters have no gradient, .*: beside.weight, beside.bias; leave them out"
    with pytest.raises(ConfigError, match=message):
        toy.run(tmp_path, PLAIN)
    assert saved_states(tmp_path) == []


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path):
    def broken(n: int) -> tuple[Tensor, Tensor]:
        x, y = toy.batches(n)
        return x, y * (float("nan") if n == 9 else 1.0)

    with pytest.raises(NumericalError, match="loss of step 5 is nan"):
        toy.run(tmp_path, replace(PLAIN, checkpointing_steps=1, logging_steps=100), batches=broken)
    weights = load_state(saved_states(tmp_path)[-1])["weights"]
    assert all(bool(w.isfinite().all()) for w in weights.values()) and saved_states(tmp_path)[-1].name == "checkpoint-4"


class Steep(Regression):
    """A loss that is finite and whose gradient is not, for a batch with a target of 7 in it."""

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        steep = (0 * self.last.weight).abs().sqrt().sum() if bool((batch[1] == 7).any()) else 0
        return super().forward(batch) + steep


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
):
    def broken(n: int) -> tuple[Tensor, Tensor]:
        x, y = toy.batches(n)
        return x, torch.full_like(y, 7) if n == 9 else y

    monkeypatch.setattr(toy, "Regression", Steep)
    with pytest.raises(NumericalError, match="norm of the gradient of step 5 is nan"):
        toy.run(tmp_path, replace(PLAIN, checkpointing_steps=1, logging_steps=logging_steps), batches=broken)
    assert saved_states(tmp_path)[-1].name == "checkpoint-4"
    toy.run(tmp_path, replace(PLAIN, checkpointing_steps=1))  # goes on from there


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    def spoil(optimizer: Any, *_: object) -> None:
        if loops == 5:
            optimizer.param_groups[0]["params"][0].data[0, 0] = float("inf")

    loops = 0

    def counting(n: int) -> tuple[Tensor, Tensor]:
        nonlocal loops
        loops = n // PLAIN.gradient_accumulation_steps
        return toy.batches(n)

    hook = register_optimizer_step_pre_hook(spoil)
    try:
        with pytest.raises(NumericalError, match=r"after step \d 1 of 4 trained tensors are not finite: first.weight"):
            toy.run(tmp_path, replace(PLAIN, checkpointing_steps=1), batches=counting)
    finally:
        hook.remove()
    assert saved_states(tmp_path)[-1].name in ("checkpoint-4", "checkpoint-5")


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path):
    program = [sys.executable, "-m", "tests.finetune.toy", str(tmp_path), "100", "0.2"]
    process = subprocess.Popen(program, cwd=ROOT, env=toy.environment())
    began: list[int] = []
    try:
        wait_for(tmp_path, 2, process)
        with pytest.raises(ConfigError, match="another process is training into"):
            toy.run(tmp_path, begin=lambda: began.append(1))
    finally:
        process.kill()
        process.wait()
    assert not began
    toy.run(tmp_path, replace(PLAIN, resume=False), begin=lambda: began.append(1))  # the lock went with the process
    assert began == [1]


def test_a_precision_that_the_device_has_not_is_refused():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_accelerator(replace(PLAIN, mixed_precision="fp16"), cpu=True)
    toy.forget_accelerate()


def test_what_cannot_be_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for change, message in (
        (lambda network: network.requires_grad_(False), "no parameter requires a gradient"),
        (lambda network: network.half(), "found torch.float16 in first.weight"),
    ):
        monkeypatch.setattr(toy, "Regression", lambda dropout, change=change: change(Regression(dropout)))
        with pytest.raises(ConfigError, match=message):
            toy.run(tmp_path, PLAIN)


# What is shown and written


def test_sheets_and_exports_have_the_average(tmp_path: Path):
    network, seen, exported = toy.Regression(), [], []

    def validate() -> Image.Image:
        seen.append((bool(network.training), torch.is_grad_enabled(), network.last.bias.detach().clone()))
        return Image.new("RGB", (8, 8), (len(seen), 0, 0))

    def export(folder: Path) -> None:
        exported.append(network.last.bias.detach().clone())
        (folder / "adapter").write_text("x")

    config = replace(toy.CONFIG, validation_steps=5, checkpointing_steps=6)
    trained = train(make_accelerator(config), network, toy.batches, config, tmp_path, export=export, validate=validate)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step-{n:06d}.png" for n in (0, 5, 10, 12)]
    assert [s[:2] for s in seen] == [(False, False)] * 4 and network.training
    average = load_state(tmp_path / "checkpoint-12")["average"]["last.bias"]
    assert torch.equal(seen[-1][2], average) and torch.equal(exported[-1], average)
    assert trained.average is not None and torch.equal(trained.average.values["last.bias"], average)
    assert not torch.equal(network.last.bias, average) and network.last.bias.requires_grad
    assert [(tmp_path / f"checkpoint-{n}" / "adapter").is_file() for n in (6, 12)] == [True, True]
    _, history = toy.run(tmp_path / "plain", replace(config, validation_steps=None))
    assert losses(history) == [row[1] for row in load_state(tmp_path / "checkpoint-12")["history"]]  # nothing disturbed


def test_sheets_lie_where_the_pattern_says(tmp_path: Path):
    def validate() -> Image.Image:
        return Image.new("RGB", (4, 4))

    toy.run(tmp_path, replace(PLAIN, validation_steps=7), validate=validate, sheets="shown/sheet-{step:04d}.png")
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == [f"sheet-{n:04d}.png" for n in (0, 7, 12)]


# Batches, devices and processes


def test_batches_are_made_in_a_thread_under_the_backend_in_force(tmp_path: Path):
    found: set[tuple[str, bool]] = set()

    def batches(n: int) -> tuple[Tensor, Tensor]:
        found.add((sdkernels.current(), threading.current_thread() is threading.main_thread()))
        return toy.batches(n)

    with sdkernels.backend("eager"):
        toy.run(tmp_path, PLAIN, batches=batches)
    assert found == {("eager", False)}


def test_a_run_on_the_cpu_leaves_the_settings_of_the_process_alone(tmp_path: Path):
    """accelerate has one choice of device and precision for a process; inside the block there is another."""
    ours = make_accelerator(replace(PLAIN, mixed_precision="bf16"))
    before, device = ours.state.__dict__.copy(), ours.device
    network = Regression()
    with on_the_cpu(PLAIN) as accelerator:
        assert accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
        train(accelerator, network, toy.batches, PLAIN, tmp_path / "a")
    assert ours.state.__dict__ == before and (ours.device, ours.mixed_precision) == (device, "bf16")

    with pytest.raises(Killed), on_the_cpu(PLAIN):
        raise Killed
    assert ours.state.__dict__ == before

    toy.forget_accelerate()
    expected, _ = toy.run(tmp_path / "b", PLAIN)
    assert same(network, expected)


def test_nothing_is_chosen_for_the_process_by_a_run_on_the_cpu():
    from accelerate.state import is_initialized

    toy.forget_accelerate()
    with on_the_cpu(PLAIN):
        assert is_initialized()
    assert not is_initialized()


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_in_place_of_two_is_told(tmp_path: Path):
    """accelerate's own does, on a CPU; asked for one it starts one, and all is well."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "no"]
    program = ["-m", "tests.finetune.toy", str(tmp_path), "2", "0"]
    for number, status in (("2", 1), ("1", 0)):
        command = [*launcher, "--num_processes", number, *program]
        done = subprocess.run(command, cwd=ROOT, env=toy.environment(), capture_output=True, text=True)
        told = "told of several processes, it has started one" in done.stderr
        assert (done.returncode, told) == (status, bool(status)), done.stderr


def together(output: Path, steps: int, pause: float) -> subprocess.Popen:
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]

    program += ["-m", "tests.finetune.toy", str(output), str(steps), str(pause)]
    return subprocess.Popen(program, cwd=ROOT, env=toy.environment(ACCELERATE_USE_CPU="true"))


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path: Path):
    assert together(tmp_path / "two", 12, 0).wait(300) == 0
    alone, history = toy.run(tmp_path / "one", dropout=0.0)
    two = torch.load(tmp_path / "two" / "end.pt", weights_only=True)
    assert same(two["weights"], alone, 1e-5)
    assert [row[1] for row in two["rows"]] == pytest.approx(losses(history), rel=1e-5)


@pytest.mark.slow
def test_two_processes_killed_go_on_bit_for_bit(tmp_path: Path):
    assert together(tmp_path / "whole", 12, 0.01).wait(300) == 0
    process = together(tmp_path / "killed", 12, 0.2)
    wait_for(tmp_path / "killed", 4, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        each.kill()
    process.wait()
    assert len(everyone) == 3 and psutil.wait_procs(everyone, 30)[1] == []
    assert load_state(saved_states(tmp_path / "killed")[-1])["step"] < 12
    assert together(tmp_path / "killed", 12, 0.01).wait(300) == 0
    whole, killed = (torch.load(tmp_path / n / "end.pt", weights_only=True) for n in ("whole", "killed"))
    assert same(killed["weights"], whole["weights"]) and killed["rows"] == whole["rows"]
