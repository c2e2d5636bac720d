"""Processes that are killed while they write: what was there before is there, or what they were writing, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdkit.checkpoints.loading import load
from tests.finetune.commands import two_pictures

pytestmark = pytest.mark.slow

KILLS = 5  # of each kind
ROOT = Path(__file__).parents[2]

WRITERS = {
    "saving": """
        for k in itertools.count():
            models[k % 2].save_pretrained(folder / "model")
    """,
    "one file": """
        for k in itertools.count():
            models[k % 2].save_single_file(folder / "model.safetensors")
    """,
    "converting": """
        for k, sd in enumerate(models):
            sd.save_pretrained(folder / f"source{k}")
        for k in itertools.count():
            convert(folder / f"source{k % 2}", folder / "model.safetensors")
    """,
    "an adapter": """
        sd = models[0]
        finetune.add_lora(sd, 4, name="it")
        for k in itertools.count():
            for parameter in (p for n, p in sd.unet.named_parameters() if "lora" in n):
                torch.nn.init.constant_(parameter, k % 2 + 1)
            finetune.save_lora(sd, folder / "it.safetensors", name="it")
            print("written", flush=True) if k == 1 else None
    """,
}
"""What is written again and again, by turns with ones and with twos in all weights."""

BEFORE = """
import itertools, sys
from pathlib import Path
import torch
import finetune
from sdkit.cli.files import convert
from tests.hostile.subjects import tiny

folder = Path(sys.argv[1])
models = [tiny(), tiny()]
for k, sd in enumerate(models):
    for parameter in sd.unet.parameters():
        torch.nn.init.constant_(parameter, k + 1)
"""


def killed(name: str, folder: Path, rng: random.Random) -> None:
    """Let a process write, and kill it at some moment after its first writing."""
    lines = [line[8:] for line in WRITERS[name].strip("\n").splitlines()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-c", BEFORE + "\n".join(lines), str(folder)], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        start = time.monotonic()
        while not any(folder.glob("*model*")) and not (folder / "it.safetensors").exists():
            assert process.poll() is None and time.monotonic() - start < 60
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)


def values_in(folder: Path) -> set[float]:
    """The values of the UNet's weights in what was written, read as a user reads it."""
    if (folder / "it.safetensors").exists():
        tensors = load_file(folder / "it.safetensors").values()
    else:
        path = next(path for path in (folder / "model", folder / "model.safetensors") if path.exists())
        tensors = load(path, dtype=torch.float32).unet.parameters()
    return {float(value) for tensor in tensors for value in tensor.detach().unique()}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_whole(name: str, tmp_path: Path) -> None:
    rng, found = random.Random(name), set[float]()
    for k in range(KILLS):
        folder = tmp_path / str(k)
        folder.mkdir()
        killed(name, folder, rng)
        values = values_in(folder)
        assert len(values) == 1 and values <= {1.0, 2.0}, values
        found |= values
        strange = [path.name for path in folder.iterdir() if not path.name.startswith((".", "model", "source", "it."))]
        assert not strange


# Training


def train(data: Path, output: Path) -> subprocess.Popen[bytes]:
    """A training of twelve steps that writes its state after each, in a process of its own."""
    options = ["--max-train-steps", "12", "--checkpointing-steps", "1", "--rank", "2", "--train-batch-size", "1"]
    command = [sys.executable, "-m", "finetune.train_lora", "--data", str(data), "--output", str(output), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def states(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    rng, data, output = random.Random(0), two_pictures(tmp_path / "data"), tmp_path / "killed"
    with train(data, tmp_path / "whole") as process:
        assert process.wait() == 0

    for _ in range(KILLS):
        before = states(output)
        with train(data, output) as process:
            while states(output) == before:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
    with train(data, output) as process:
        assert process.wait() == 0

    ours, expected = (load_file(tmp_path / name / "lora.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)
    assert not list(output.glob("damaged-*"))
