"""The moving average against its closed form, and weights that stand in for others."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune.training.averaging import MovingAverage, in_place_of
from finetune.training.states import load_state, saved_states
from tests.finetune import toy
from tests.finetune.toy import Killed


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


def test_the_average_is_forgetful_at_first():
    """Step k has at most the decay (1 + k) / (10 + k), whatever the decay is."""
    average, expected = MovingAverage({"x": torch.zeros(1)}, 0.5), 0.0
    for step, value in enumerate((1.0, 3.0, 2.0)):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        average.update({"x": torch.tensor([value])}, step)
    assert average.values["x"].item() == pytest.approx(expected)
