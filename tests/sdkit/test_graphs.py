"""Recorded functions: replayed on what static tensors hold, kept while the network is what it was, one user each."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdkernels
from sdkit.graphs import MOST, Graphs, State, state_of, static_like

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_a_replay_computes_from_what_the_static_tensors_hold() -> None:
    graphs, x = Graphs(), torch.ones(2, 3)
    graph = graphs.record(lambda: (x + 1, 2 * x), CPU)
    first, where = graph.result, [t.data_ptr() for t in graph.result]
    x.fill_(5)
    graph.replay()
    assert graph.result is first and [t.data_ptr() for t in first] == where
    assert torch.equal(first[0], torch.full((2, 3), 6.0)) and torch.equal(first[1], torch.full((2, 3), 10.0))


def test_results_hold_until_another_graph_is_recorded_or_replayed() -> None:
    graphs, x = Graphs(), torch.ones(2)
    a = graphs.record(lambda: x + 1, CPU)
    b = graphs.record(lambda: (x + 2, torch.ones(2, dtype=torch.int64)), CPU)
    assert a.result.isnan().all()
    a.replay()
    assert torch.equal(a.result, torch.full((2,), 2.0))
    assert b.result[0].isnan().all() and (b.result[1] == -1).all()


def test_static_tensors_are_written_in_and_out_of_inference_mode() -> None:
    graphs = Graphs()
    with torch.inference_mode():
        x = static_like(torch.ones(2))
        graph = graphs.record(lambda: x + 1, CPU)
        graph.replay()
    x.fill_(3)
    graph.replay()
    assert torch.equal(graph.result, torch.full((2,), 4.0)) and not graph.result.is_inference()


# ---- calls -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer with a plain value, which counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.factor = 2.0
        self.settings = {"deep": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.linear(x)


def test_a_call_is_recorded_the_second_time_and_returns_new_tensors() -> None:
    graphs, layer = Graphs(), Layer()
    inputs = [torch.randn(4, 3) for _ in range(4)]
    eager: list[bool] = []

    def function(x: Tensor) -> Tensor:
        eager.append(any(x is given for given in inputs))
        return layer(x)

    results = [graphs.call("layer", layer, function, x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, layer(x))
    assert len(graphs) == 1 and eager == [True, False, False, False, False]  # recorded, and replayed three times
    graphs.call("layer", layer, layer, torch.randn(5, 3))
    assert len(graphs) == 1, "another shape is another call, this one its first"


CHANGES: dict[str, Any] = {
    "weight": lambda layer: setattr(layer.linear, "weight", nn.Parameter(layer.linear.weight.clone())),
    "weight's data": lambda layer: setattr(layer.linear.weight, "data", layer.linear.weight.clone()),
    "layout": lambda layer: setattr(layer.linear.weight, "data", layer.linear.weight.data.t().contiguous().t()),
    "dtype": lambda layer: layer.double(),
    "plain value": lambda layer: setattr(layer, "factor", 3.0),
    "value deep inside": lambda layer: layer.settings["deep"].append(3),
    "module": lambda layer: setattr(layer, "linear", nn.Sequential(layer.linear)),
    "mode": lambda layer: layer.train(not layer.training),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_recorded_again(change: str) -> None:
    graphs, layer, made = Graphs(), Layer(), list[State]()
    before = state_of(layer)
    assert before == state_of(layer) and before.why_not is None

    def make(state: State) -> int:
        made.append(state)
        return len(made)

    assert [graphs.recall("key", before, lambda: make(before)) for _ in range(2)] == [1, 1]
    CHANGES[change](layer)
    after = state_of(layer)
    assert after != before
    assert graphs.recall("key", after, lambda: make(after)) == 2 and len(graphs) == 1


def test_values_written_in_place_change_nothing() -> None:
    layer = Layer()
    before = state_of(layer)
    layer.linear.weight.mul_(2)
    assert state_of(layer) == before


def test_kernels_in_force_are_part_of_the_state() -> None:
    layer = Layer()
    with sdkernels.backend("eager"):
        eager = state_of(layer)
    with sdkernels.backend("triton"):
        assert state_of(layer) != eager


def test_the_one_that_was_not_used_for_longest_goes_first() -> None:
    graphs, state = Graphs(), state_of(Layer())
    for key in range(MOST):
        graphs.recall(key, state, lambda key=key: key)
    graphs.recall(0, state, lambda: -1)
    graphs.recall(MOST, state, lambda: MOST)
    assert len(graphs) == MOST
    assert [graphs.recall(key, state, lambda: -1) for key in (0, 2, MOST)] == [0, 2, MOST]
    assert graphs.recall(1, state, lambda: -1) == -1
    graphs.free()
    assert len(graphs) == 0


# ---- eager where it must be ------------------------------------------------------------------------------------------

REASONS: dict[str, Any] = {
    "hooks": lambda layer: layer.linear.register_forward_hook(lambda *_: None),
    "has hooks": lambda layer: layer.linear.register_forward_pre_hook(lambda *_: None),
    "function of its own, forward": lambda layer: setattr(layer.linear, "forward", lambda x: x),
    "function of its own, key_value": lambda layer: setattr(layer, "key_value", print),
    "dropout": lambda layer: layer.add_module("drop", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_network_with_python_of_its_own_runs_eagerly(reason: str) -> None:
    layer = Layer()
    REASONS[reason](layer)
    assert reason in (state_of(layer).why_not or "")
    graphs = Graphs()
    for _ in range(3):
        graphs.call("layer", layer, layer, torch.randn(4, 3))
    assert len(graphs) == 0


def test_dropout_that_is_off_may_be_recorded() -> None:
    layer = Layer()
    layer.add_module("drop", nn.Dropout(0.5))
    assert state_of(layer.eval()).why_not is None


def test_gradients_and_autocast_run_eagerly() -> None:
    with torch.enable_grad():
        assert state_of(Layer()).why_not == "gradients are on"
    with torch.autocast("cpu", torch.bfloat16):
        assert state_of(Layer()).why_not == "autocast is on"


def test_one_user_at_a_time() -> None:
    graphs, others = Graphs(), list[Graphs | None]()

    def look() -> None:
        with graphs.lent() as mine:
            others.append(mine)

    with graphs.lent() as mine:
        assert mine is graphs
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert others == [None, None, graphs]


def test_without_memory_to_record_it_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Graphs, *_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Graphs, "record", record)
    graphs, layer, x = Graphs(), Layer(), torch.randn(4, 3)
    graphs.call("layer", layer, layer, x)
    with pytest.warns(UserWarning, match="out of memory while a graph was recorded"):
        assert torch.equal(graphs.call("layer", layer, layer, x), layer(x))
