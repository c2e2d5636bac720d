"""The losses of a run: written, drawn, and in TensorBoard."""

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.training.history import History
from finetune.training.loop import make_accelerator
from sdkit.errors import ConfigError, NumericalError
from tests.conftest import read_image
from tests.finetune import toy
from tests.finetune.toy import PLAIN, Killed, losses


def test_the_history_is_written_and_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    _, history = toy.run(tmp_path, PLAIN)
    history.write_csv(tmp_path / "losses.csv")
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,loss,grad_norm,learning_rate" and len(lines) == 13
    assert [float(x) for x in lines[5].split(",")] == list(history.rows[4])
    history.draw(tmp_path / "loss.png")
    assert np.asarray(read_image(tmp_path / "loss.png").convert("L")).std() > 1
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

    with pytest.raises(Killed):
        toy.run(tmp_path, config, batches=toy.dying(13))
    _, history = toy.run(tmp_path, config, validate=lambda: Image.new("RGB", (4, 4)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/loss")}
    assert found == {row.step: pytest.approx(row.loss) for row in history.rows}
    assert [e.step for e in events.Images("samples")] == [12]


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    accelerator, history = make_accelerator(PLAIN), History()
    for step, loss in ((1, 0.5), (2, float("inf")), (3, float("nan"))):
        history.add(step, torch.tensor(loss), torch.tensor(1.0), 0.1)
    with pytest.raises(NumericalError, match="the loss of step 2 is inf"):
        history.collect(accelerator)
