"""The loop: exact resume, clipping, accumulation, averages, schedules, memory; alone and on two processes."""

import builtins
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from finetune.training.averaging import MovingAverage, in_place_of
from finetune.training.gradient_checkpointing import checkpoint_activations
from finetune.training.history import History
from finetune.training.loop import TrainConfig, make_accelerator, train
from finetune.training.memory import estimate_memory, saved_bytes
from finetune.training.states import load_state, saved_states
from sdkit import UNet2DConditionModel, UNetConfig
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from sdkit.networks.attention import Transformer2DModel
from sdkit.networks.layers import ResnetBlock2D
from tests.conftest import draw_weights
from tests.finetune import toy
from tests.finetune.toy import Regression

ROOT = Path(__file__).parents[2]
PLAIN = replace(toy.CONFIG, ema_decay=None, lr_scheduler="constant", lr_warmup_steps=0, checkpointing_steps=100)


class Killed(BaseException):
    """Stands for SIGKILL."""


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor], tolerance: float = 0.0) -> bool:
    first, second = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return first.keys() == second.keys() and all(
        torch.allclose(first[k], second[k], rtol=tolerance, atol=tolerance) for k in first
    )


def losses(history: History) -> list[float]:
    return [row.loss for row in history.rows]


# Resume


def test_a_run_that_is_killed_anywhere_goes_on_bit_for_bit(tmp_path: Path):
    config = replace(toy.CONFIG, checkpointing_steps=3)
    whole, history = toy.run(tmp_path / "whole", config)
    average = load_state(saved_states(tmp_path / "whole")[-1])["average"]
    assert len(history.rows) == 12 and losses(history)[-1] < losses(history)[0]
    for deadly in (0, 5, 6, 7, 13, 23):

        def dying(n: int, deadly: int = deadly):
            if n == deadly:
                raise Killed
            return toy.batches(n)

        folder = tmp_path / str(deadly)
        with pytest.raises(Killed):
            toy.run(folder, config, batches=dying)
        resumed, rest = toy.run(folder, config)
        assert rest.rows == history.rows and same(resumed, whole), deadly
        assert same(load_state(saved_states(folder)[-1])["average"], average)


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
        def dying(n: int):
            if n == deadly:
                raise Killed
            return toy.batches(n)

        accelerator, network = make_accelerator(config), Regression()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
        history = train(accelerator, network, dying, config, folder)
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
    toy.run(tmp_path, PLAIN, identity={"data": "mine"})
    with pytest.raises(CheckpointError, match=r"data mine, not yours, learning_rate 0\.05, not 0\.1; choose another"):
        toy.run(tmp_path, replace(PLAIN, learning_rate=0.1), identity={"data": "yours"})
    longer, history = toy.run(tmp_path, replace(PLAIN, max_train_steps=15, logging_steps=1), identity={"data": "mine"})
    whole, expected = toy.run(tmp_path / "x", replace(PLAIN, max_train_steps=15))
    assert same(longer, whole) and history.rows == expected.rows
    with pytest.raises(CheckpointError, match="max_train_steps 12, not 15"):
        cosine = replace(PLAIN, lr_scheduler="cosine")
        toy.run(tmp_path / "cosine", cosine)
        toy.run(tmp_path / "cosine", replace(cosine, max_train_steps=15))


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


def test_the_average_follows_its_closed_form(tmp_path: Path):
    steps: list[Tensor] = [toy.Regression().last.bias.detach().clone()]
    shapes = {p.shape: i for i, p in enumerate([steps[0]])}

    def keep(optimizer, *_) -> None:
        (bias,) = [p for g in optimizer.param_groups for p in g["params"] if p.shape in shapes]
        steps.append(bias.detach().clone())

    handle = register_optimizer_step_post_hook(keep)
    try:
        toy.run(tmp_path)
    finally:
        handle.remove()
    decays = [min(0.9, (1 + k) / (10 + k)) for k in range(12)]
    expected = steps[0].double() * math.prod(decays)
    for k in range(12):
        expected += (1 - decays[k]) * math.prod(decays[k + 1 :]) * steps[k + 1].double()
    found = load_state(saved_states(tmp_path)[-1])["average"]["last.bias"]
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_rates_are_those_of_diffusers():
    from diffusers.optimization import get_scheduler

    for kind, cycles, power in (
        ("constant", 1, 1.0),
        ("linear", 1, 1.0),
        ("cosine", 1, 1.0),
        ("cosine_with_restarts", 3, 1.0),
        ("polynomial", 1, 2.0),
    ):
        for warmup in (0, 7):
            config = TrainConfig(
                max_train_steps=40,
                learning_rate=0.1,
                lr_scheduler=kind,
                lr_warmup_steps=warmup,
                lr_num_cycles=cycles,
                lr_power=power,
            )
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
            name = "constant_with_warmup" if kind == "constant" else kind
            theirs = get_scheduler(
                name, optimizer, num_warmup_steps=warmup, num_training_steps=40, num_cycles=cycles, power=power
            )
            for step in range(40):
                assert config.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), (kind, step)
                optimizer.step()
                theirs.step()


def test_the_rate_is_applied_and_a_part_can_have_its_own(tmp_path: Path):
    seen: list[dict[int, float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append({len(g["params"]): g["lr"] for g in optimizer.param_groups})
    )
    try:
        _, history = toy.run(tmp_path, rate_factor=lambda name: 0.1 if name == "last.bias" else 1.0)
    finally:
        hook.remove()
    rates = [toy.CONFIG.rate(step) for step in range(12)]
    assert [row.learning_rate for row in history.rows] == rates
    assert seen == [{1: pytest.approx(0.1 * rate), 3: pytest.approx(rate)} for rate in rates]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path):
    def broken(n: int) -> tuple[Tensor, Tensor]:
        x, y = toy.batches(n)
        return x, y * (float("nan") if n == 9 else 1.0)

    with pytest.raises(NumericalError, match="loss of step 5 is nan"):
        toy.run(tmp_path, replace(PLAIN, checkpointing_steps=1, logging_steps=100), batches=broken)
    weights = load_state(saved_states(tmp_path)[-1])["weights"]
    assert all(bool(w.isfinite().all()) for w in weights.values()) and saved_states(tmp_path)[-1].name == "checkpoint-4"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps: expected at least 1"),
        ({"ema_decay": 1.0}, "ema_decay: expected"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict, message: str):
    if wrong.get("mixed_precision") and torch.cuda.is_available():
        pytest.skip("fp16 has a meaning here")
    with pytest.raises(ConfigError, match=message):
        make_accelerator(replace(PLAIN, **wrong))


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
    train(make_accelerator(config), network, toy.batches, config, tmp_path, export=export, validate=validate)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step-{n:06d}.png" for n in (0, 5, 10, 12)]
    assert [s[:2] for s in seen] == [(False, False)] * 4 and network.training
    average = load_state(tmp_path / "checkpoint-12")["average"]["last.bias"]
    assert torch.equal(seen[-1][2], average) and torch.equal(exported[-1], average)
    assert not torch.equal(network.last.bias, average) and network.last.bias.requires_grad
    assert [(tmp_path / f"checkpoint-{n}" / "adapter").is_file() for n in (6, 12)] == [True, True]
    _, history = toy.run(tmp_path / "plain", replace(config, validation_steps=None))
    assert losses(history) == [row[1] for row in load_state(tmp_path / "checkpoint-12")["history"]]  # nothing disturbed


def test_weights_are_put_back_whatever_happens():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = dict(network.named_parameters())
    with pytest.raises(Killed), in_place_of(network, {"0.bias": torch.full((2,), 7.0)}):
        assert network[0].bias.tolist() == [7.0, 7.0] and network(torch.zeros(1, 2)).requires_grad
        raise Killed
    assert all(before[name] is p for name, p in network.named_parameters())


def test_an_average_without_steps_is_the_start():
    average = MovingAverage({"x": torch.tensor([2.0])}, 0.9)
    assert average.values["x"].tolist() == [2.0]


def test_the_history_is_written_and_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    _, history = toy.run(tmp_path, PLAIN)
    history.write_csv(tmp_path / "losses.csv")
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,loss,grad_norm,learning_rate" and len(lines) == 13
    assert [float(x) for x in lines[5].split(",")] == list(history.rows[4])
    history.draw(tmp_path / "loss.png")
    assert np.asarray(Image.open(tmp_path / "loss.png").convert("L")).std() > 1
    assert history.recent(3) == pytest.approx(np.mean(losses(history)[-3:]))


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        toy.run(tmp_path, replace(PLAIN, report_to="tensorboard"))


def test_tensorboard_gets_every_step_once(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]  # optional

    config = replace(PLAIN, report_to="tensorboard", checkpointing_steps=4, logging_steps=1)

    def dying(n: int):
        if n == 13:
            raise Killed
        return toy.batches(n)

    with pytest.raises(Killed):
        toy.run(tmp_path, config, batches=dying)
    _, history = toy.run(tmp_path, config, validate=lambda: Image.new("RGB", (4, 4)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/loss")}
    assert found == {row.step: pytest.approx(row.loss) for row in history.rows}
    assert [e.step for e in events.Images("samples")] == [12]


# Memory


def unet() -> UNet2DConditionModel:
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return draw_weights(UNet2DConditionModel(config))


def kept_bytes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps, each storage once and parameters left out; and the result."""
    saved: dict[int, tuple[Tensor, int]] = {}

    def note(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            saved.setdefault(t.untyped_storage()._cdata, (t, t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward()
    return sum(nbytes for _, nbytes in saved.values()), out


def test_checkpointed_activations_give_equal_gradients():
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    plain, checkpointed = unet(), unet()
    assert checkpoint_activations(checkpointed, (ResnetBlock2D, Transformer2DModel)) == 12
    kept = []
    for network in (plain, checkpointed):
        nbytes, out = kept_bytes(partial(network, *inputs))
        kept.append(nbytes)
        out.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert kept[1] < 0.5 * kept[0]


def test_the_estimate_counts_what_is_kept():
    network = unet()
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 12))
    expected, _ = kept_bytes(partial(network, *inputs))

    def forward() -> Tensor:
        return network(torch.empty(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), torch.empty(2, 5, 12))

    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    assert saved_bytes(network, forward) == pytest.approx(expected, rel=0.02)
    less = saved_bytes(network, forward, (ResnetBlock2D, Transformer2DModel))
    assert 0.05 * expected < less < 0.7 * expected
    assert before == {name: p.data_ptr() for name, p in network.named_parameters()}


def test_the_estimate_adds_up():
    network = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10).half().requires_grad_(False))
    memory = estimate_memory([network], activations=5, average=True)
    assert (memory.frozen, memory.trained, memory.gradients, memory.optimizer, memory.average) == (
        220,
        440,
        440,
        880,
        440,
    )
    assert memory.total == 220 + 440 + 440 + 880 + 440 + 5
    assert "average" not in str(estimate_memory([network], 5, False))


# Several processes


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
