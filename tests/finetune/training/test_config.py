"""The settings: the learning rate's course, and values without meaning."""

import pytest
import torch
from torch import nn

from finetune.training.config import TrainConfig
from sdkit.errors import ConfigError


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps: expected a whole number of at least 1, found 0"),
        ({"validation_steps": 2.5}, "validation_steps: expected a whole number"),
        ({"ema_decay": 1.0}, "ema_decay: expected"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: expected"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**wrong)
