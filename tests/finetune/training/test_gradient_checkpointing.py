"""Activations that are computed twice: the same gradients, less kept, under the backend of the first time."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import sdkernels
from finetune.training.gradient_checkpointing import checkpoint_activations
from sdkit.networks.attention import Transformer2DModel
from sdkit.networks.layers import ResnetBlock2D
from tests.finetune.training.networks import kept_bytes, unet


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


class Noting(nn.Module):
    """Notes the backend at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(2, 2), list[str]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(sdkernels.current())
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("thread", [False, True])
def test_activations_are_recomputed_under_the_backend_of_the_first_time(thread: bool):
    """Also when the backward pass comes after the block that set it, in a thread that has never heard of it."""
    network = Noting()
    assert checkpoint_activations(nn.ModuleList([network]), (Noting,)) == 1
    with sdkernels.backend("eager"):
        out = network(torch.ones(1, 2, requires_grad=True)).sum()

    if thread:
        worker = threading.Thread(target=out.backward)
        worker.start()
        worker.join()
    else:
        with sdkernels.backend("auto"):
            out.backward()
            assert sdkernels.current() == "auto"
    assert network.seen == ["eager", "eager"] and network.linear.weight.grad is not None


def test_activations_are_recomputed_at_every_backward_pass():
    network = Noting()
    checkpoint_activations(nn.ModuleList([network]), (Noting,))
    with sdkernels.backend("eager"):
        out = network(torch.ones(1, 2, requires_grad=True)).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert network.seen == ["eager"] * 3
