"""The estimate of a step's memory against what autograd keeps."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from finetune.training.config import TrainConfig
from finetune.training.memory import estimate_memory, saved_bytes
from finetune.training.muon import Muon
from sdkit.networks.attention import Transformer2DModel
from sdkit.networks.layers import ResnetBlock2D
from tests.finetune.training.networks import kept_bytes, unet


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
    memory = estimate_memory([network], 5, TrainConfig(ema_decay=0.9))
    assert (memory.frozen, memory.trained, memory.gradients, memory.optimizer, memory.average) == (
        220,
        440,
        440,
        880,
        440,
    )
    assert memory.total == 220 + 440 + 440 + 880 + 440 + 5
    assert "average" not in str(estimate_memory([network], 5, TrainConfig()))


def test_the_estimate_of_the_optimizer_is_what_it_keeps():
    network = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4))
    table, *others = network.parameters()
    groups = [{"params": [table], "matrices": False}, {"params": others, "matrices": True}]
    for name, optimizer in (("adamw", torch.optim.AdamW(network.parameters(), 1e-3)), ("muon", Muon(groups, 1e-3))):
        network(torch.arange(20)).sum().backward()
        optimizer.step()
        kept = [v for values in optimizer.state.values() for v in values.values() if v.dim()]
        assert sum(v.nbytes for v in kept) == estimate_memory([network], 0, TrainConfig(optimizer=name)).optimizer, name
