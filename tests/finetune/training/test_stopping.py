"""Ctrl-C and SIGTERM: the run saves where it is and stops; what goes on from there is the run that never stopped."""

import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from finetune.training.states import load_state, saved_states
from tests.finetune import toy
from tests.finetune.training.test_loop import ROOT, together, wait_for

CONFIG = replace(toy.CONFIG, checkpointing_steps=100)
PROGRAM = """
import sys, time
from pathlib import Path
from dataclasses import replace
from tests.finetune import toy
from tests.finetune.training.test_stopping import CONFIG

class Slow(toy.Regression):
    def forward(self, batch):
        print("in a step", flush=True)
        time.sleep(float(sys.argv[2]))
        return super().forward(batch)

toy.Regression = Slow
toy.run(Path(sys.argv[1]), replace(CONFIG, resume=sys.argv[3] == "resume"))
"""


def started(output: Path, pause: float, resume: str = "resume") -> subprocess.Popen[str]:
    """The run as a program, whose Ctrl-C is not ignored even if ours is."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(output), str(pause), resume],
        cwd=ROOT,
        env=toy.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_pass(process: subprocess.Popen[str], count: int) -> None:
    """Until it has begun its ``count``-th pass, of which a step has two."""
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "in a step\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_saves_and_goes_on_bit_for_bit(number: signal.Signals, status: int, tmp_path: Path):
    whole, history = toy.run(tmp_path / "whole", CONFIG)

    process = started(tmp_path / "stopped", 0.1)
    wait_for_pass(process, 5)  # the first half of step 3
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    step = load_state(saved_states(tmp_path / "stopped")[-1])["step"]
    assert process.returncode == status and 3 <= step < 12 and len(saved_states(tmp_path / "stopped")) == 1
    assert f"{number.name}: stopping after this step" in said and "Traceback" not in said
    assert (
        f"stopped by {number.name} after step {step} of 12, saved in {tmp_path / 'stopped'}/checkpoint-{step}: the"
        in said
    )
    assert said.rstrip().endswith("the same command goes on from there")

    resumed, rest = toy.run(tmp_path / "stopped", CONFIG)
    assert rest.rows == history.rows and toy.same(resumed, whole)
    average, expected = (load_state(saved_states(tmp_path / n)[-1])["average"] for n in ("stopped", "whole"))
    assert toy.same(average, expected)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once(number: signal.Signals, status: int, tmp_path: Path):
    process = started(tmp_path / "run", 100)
    wait_for_pass(process, 1)
    process.send_signal(number)
    assert process.stderr is not None
    while "stopping after this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status and saved_states(tmp_path / "run") == []


def test_a_run_that_deletes_states_says_how_not_to(tmp_path: Path):
    process = started(tmp_path / "run", 0.1, "anew")
    wait_for_pass(process, 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert said.rstrip().endswith("the same command with --resume in place of --no-resume goes on from there")


def test_signals_are_what_they_were_after_a_run(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen: list[object] = []
    toy.run(tmp_path, CONFIG, batches=lambda n: (seen.append(signal.getsignal(signal.SIGTERM)), toy.batches(n))[1])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert seen[-1] not in before


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """SIGTERM to the launcher, which passes it on."""
    assert together(tmp_path / "whole", 40, 0.01).wait(300) == 0
    process = together(tmp_path / "stopped", 40, 0.2)
    wait_for(tmp_path / "stopped", 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    step = load_state(saved_states(tmp_path / "stopped")[-1])["step"]
    assert 4 <= step < 40 and capfd.readouterr().err.count(f"stopped by SIGTERM after step {step} of 40") == 1
    assert together(tmp_path / "stopped", 40, 0.01).wait(300) == 0
    whole, stopped = (torch.load(tmp_path / n / "end.pt", weights_only=True) for n in ("whole", "stopped"))
    assert toy.same(stopped["weights"], whole["weights"]) and stopped["rows"] == whole["rows"]
