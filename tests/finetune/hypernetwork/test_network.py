"""Hypernetworks: A1111's formula, first weights, and arguments without meaning."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import ACTIVATIONS, INITIALIZATIONS, Hypernetwork
from sdkit.errors import ConfigError
from tests.conftest import draw, draw_weights, relative_error
from tests.finetune.hypernetwork.a1111 import CURVES, WIDTH, X, a1111, check_like_a1111


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_written_file_is_what_a1111_computes(activation: str, tmp_path: Path):
    """Every activation, and for some every option: in the file, and read again, in float64."""
    drops = [0, 0.3, 0.2, 0]
    some = itertools.product((False, True), (False, True), (None, drops)) if activation in ("linear", "swish") else ()
    for norm, output, dropout in (*some, (False, True, drops)):
        network = draw_weights(Hypernetwork([WIDTH, 4], (1, 1.5, 2, 1), activation, "Normal", norm, output, dropout))
        network.save(tmp_path / "net.pt")
        check_like_a1111(tmp_path / "net.pt")
        content = torch.load(tmp_path / "net.pt", weights_only=True)
        read = read_hypernetwork(tmp_path / "net.pt").double()
        read.multiplier = 0.7
        for x in (X, X[..., :4]):
            k, v = read(x, 3 * x)
            assert relative_error(k, a1111(content, 0, x, 0.7)) < 1e-12
            assert relative_error(v, a1111(content, 1, 3 * x, 0.7)) < 1e-12
            assert relative_error(k, x) > 0.01


def test_the_curves_are_all_that_a1111_offers_and_can_run():
    offered = {name.lower() for name in torch.nn.modules.activation.__all__} | {"linear", "swish"}
    refused = {"glu", "threshold", "multiheadattention", "softmax", "softmin", "logsoftmax", "softmax2d"}
    assert set(ACTIVATIONS) == offered - refused == {*CURVES, "linear", "prelu"}


def test_another_width_and_multiplier_0_are_exactly_the_context():
    network = draw_weights(Hypernetwork([WIDTH])).double()
    k, v = draw("k", (1, 2, 5)), draw("v", (1, 2, 5))
    assert network(k, v)[0] is k and network(k, v)[1] is v
    network.multiplier = 0.0
    assert network(X, X)[0] is X
    network.train()  # in training the multiplier counts for nothing
    assert relative_error(network(X, X)[0], X) > 0.01


def test_contexts_keep_their_dtype_and_weights_theirs():
    network = draw_weights(Hypernetwork([WIDTH]))
    k, v = network(X.bfloat16(), X.half())
    assert (k.dtype, v.dtype, network.dtype) == (torch.bfloat16, torch.float16, torch.float32)
    assert relative_error(k.float(), network(X.bfloat16().float(), X.float())[0]) < 0.01


def test_dropout_is_in_force_in_training_alone():
    network = draw_weights(Hypernetwork([WIDTH], (1, 4, 1), dropout_structure=(0, 0.5, 0)))
    x = X.float()
    assert torch.equal(network(x, x)[0], network(x, x)[0])
    torch.manual_seed(0)
    first = network.train()(x, x)[0]
    assert not torch.equal(first, network(x, x)[0])
    torch.manual_seed(0)
    assert torch.equal(first, network(x, x)[0])


def test_first_weights():
    """A1111's: deviation 0.01, or He's and Glorot's rule; norms' weights 0.01 always; biases 0."""
    width, wide = 200, 400
    expected = {
        "Zero": 0.01,
        "Normal": 0.01,
        "XavierUniform": (2 / (width + wide)) ** 0.5,
        "XavierNormal": (2 / (width + wide)) ** 0.5,
        "KaimingUniform": (2 / width) ** 0.5,
        "KaimingNormal": (2 / width) ** 0.5,
    }
    assert list(expected) == list(INITIALIZATIONS)
    for name, deviation in expected.items():
        torch.manual_seed(0)
        network = Hypernetwork([width], weight_initialization=name, is_layer_norm=True)
        linear, norm = network.layers[str(width)][1].linear[:2]
        assert abs(float(linear.weight.detach().std()) / deviation - 1) < 0.02
        peak = float(linear.weight.detach().abs().max()) / deviation
        assert 1.7 < peak < 1.74 if name.endswith("Uniform") else peak > 3.5
        assert 0.005 < float(norm.weight.detach().std()) < 0.015 and abs(float(norm.weight.detach().mean())) < 0.005
        assert not any(float(p.detach().abs().max()) for n, p in network.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("options", [{}, {"is_layer_norm": True}, {"is_layer_norm": True, "activate_output": True}])
def test_zero_changes_nothing_at_first_but_trains(options: dict[str, Any]):
    torch.manual_seed(0)
    network = Hypernetwork([WIDTH], (1, 2, 1), "relu", "Zero", **options).double()
    assert torch.equal(network(X, X)[1], X)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        sum(y.square().sum() for y in network(X, X)).backward()
        optimizer.step()
    moved = [n for n, p in network.named_parameters() if float(p.grad.abs().max()) == 0]
    assert not moved and relative_error(network(X, X)[1], X) > 0.001
    with pytest.raises(ConfigError, match="Zero would not be zero"):
        Hypernetwork([WIDTH], (1, 2, 1), "relu", "Zero", activate_output=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "widths"),
        ({"widths": [8, 8]}, "each once"),
        ({"widths": [0]}, "widths"),
        ({"layer_structure": (1,)}, "layer_structure: expected numbers from 1"),
        ({"layer_structure": (2, 1)}, "layer_structure"),
        ({"layer_structure": (1, 0.1, 1)}, "a feature at least"),
        ({"layer_structure": (1, math.inf, 1)}, "layer_structure"),
        ({"activation_func": "glu"}, "found 'glu', expected one of linear, swish"),
        ({"weight_initialization": "normal"}, "weight_initialization: expected one of Zero.*, found 'normal'"),
        ({"dropout_structure": (0, 0)}, "3 shares"),
        ({"dropout_structure": (0, 1, 0)}, "below 1"),
    ],
)
def test_arguments_without_meaning(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Hypernetwork(**{"widths": [8]} | options)
