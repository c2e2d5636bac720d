"""Muon against torch's own for matrices, AdamW for the rest, and what it does not take."""

from typing import Any

import pytest
import torch
from torch import nn

from finetune.training.muon import AS_LARGE, MOMENTUM, Muon, is_matrix, orthogonal
from sdkit.errors import ConfigError


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 16, 80), (2, 80, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonal(x).float()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ found @ v.mT
    own = values.diagonal(dim1=1, dim2=2)
    assert own.min() > 0.6 and own.max() < 1.3
    torch.testing.assert_close(values, torch.diag_embed(own), atol=0.05, rtol=0)


def test_nothing_becomes_nothing() -> None:
    assert not orthogonal(torch.zeros(2, 16, 20)).any()


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g)


def test_matrices_move_as_torchs_own_muon_moves_them_and_the_rest_as_adamw() -> None:
    torch.manual_seed(1)
    layer, convolution, bias, narrow = (torch.randn(s) for s in ((32, 48), (24, 4, 3, 3), (32,), (32, 4)))
    flat = convolution.flatten(1)
    ours = [nn.Parameter(value.clone()) for value in (layer, convolution, bias, narrow)]
    theirs = [nn.Parameter(value.clone()) for value in (layer, flat, bias, narrow)]
    oracles: Any = [
        torch.optim.Muon(theirs[:2], 0.01, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[2:], 0.01, weight_decay=0.1),
    ]
    muon = Muon([{"params": ours}], 0.01, weight_decay=0.1)

    for step in range(4):
        gradients(ours, step)
        for own, their in zip(ours, theirs, strict=True):
            their.grad = own.grad.view(their.shape).clone()
        muon.step()
        for oracle in oracles:
            oracle.step()
    for own, their, moved in zip(ours, theirs, (True, True, False, False), strict=True):
        tolerance = 4 * 0.01 * 0.02 if moved else 1e-6  # bfloat16 rounds differently in another order
        torch.testing.assert_close(own.view(their.shape), their, atol=tolerance, rtol=0)
        assert ("momentum" in muon.state[own]) == moved == is_matrix(own)
        assert (own.grad is None) == moved
    assert (ours[0] - layer).square().mean().sqrt() > 2 * 0.01 * AS_LARGE


def test_groups_say_that_their_matrices_are_adamws() -> None:
    table = nn.Parameter(torch.randn(32, 32))
    other = nn.Parameter(table.detach().clone())
    muon, adamw = Muon([{"params": [table], "matrices": False}], 0.01), torch.optim.AdamW([other], 0.01)
    gradients([table], 1)
    gradients([other], 1)
    muon.step()
    adamw.step()
    torch.testing.assert_close(table, other)


def test_sharded_parameters_and_closures_are_refused() -> None:
    p = nn.Parameter(torch.randn(32, 32))
    muon = Muon([{"params": [p]}], 0.01)
    with pytest.raises(ConfigError, match="closure"):
        muon.step(lambda: 0.0)
    p.device_mesh = "a mesh"
    with pytest.raises(ConfigError, match="sharded"):
        Muon([{"params": [p]}], 0.01)
