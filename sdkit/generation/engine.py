"""A stage's network calls by recorded graphs, without Python between their launches.

`RecordedCalls` makes the calls of `sdkit.sampling.plan.Calls`, and computes the same numbers. A whole call is one
graph: the network's input (`sdkernels.prepare_step`), the network, the sampler's step in place, and the step counted
on. All of them read static tensors, in which a plan's numbers are tables: steps, sampler, guidance scale, prompt and
seed are data, and pictures of one size share a graph. Where guidance is more than uncond + scale (cond - uncond), and
where prompts are joined by AND, the network alone is a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import sdkernels
from sdkit.devices import fast_layout
from sdkit.generation.prediction import Predictor, Rows, rows_of
from sdkit.graphs import Graph, Graphs, State, state_of, static_like
from sdkit.networks.unet import ContextKeyValues
from sdkit.sampling.plan import Calls

FEWEST_ROWS = 64


class Watched(NamedTuple):
    """What happens between the calls. estimates: somebody asks for a call's estimate of the clean latents. callback:
    code of the user's runs, which may change the model."""

    estimates: bool
    callback: bool


def calls_by_graphs(calls: Calls, predict: Predictor, graphs: Graphs, watched: Watched) -> Calls:
    """These calls, made by graphs where that can be.

    They stay as they are where there are none, where the batch goes through the network in parts, where the network has
    to run eagerly (`sdkit.graphs.state_of`), and, with a warning, where a GPU's memory does not suffice.
    """
    state = state_of(predict.unet)
    splits = predict.splitter.size is not None and predict.splitter.size < calls.registers.shape[1]
    if not calls.times or splits or state.why_not is not None:
        return calls

    try:
        return RecordedCalls(calls, predict, graphs, state, watched)
    except torch.OutOfMemoryError:
        graphs.run_out()
        return calls


# Static tensors


class StaticRun:
    """What the calls of a stage work on, and its plan as tables, in static tensors; of a size that fits ``calls``."""

    def __init__(self, calls: Calls, predict: Predictor) -> None:
        count, rows = calls.plan.num_registers, table_rows(calls)
        with torch.inference_mode(False):
            work = calls.registers.new_zeros
            self.registers, self.noise = work(calls.registers.shape), work(calls.registers.shape[1:])
            self.coefficients = work(rows, count, count + 2)
            self.input_scale, self.guidance = work(rows), work(rows)
            self.step = work((), dtype=torch.int64)
            self.times = work(rows, sum(widths_of(predict)), dtype=predict.dtype)
            self.extra = None if predict.extra is None else static_like(predict.extra)

    def load(self, calls: Calls, predict: Predictor) -> None:
        """Put the numbers of a run here, before its first call."""
        count = len(calls.times)
        self.registers.copy_(calls.registers)
        self.step.zero_()
        if self.extra is not None and predict.extra is not None:
            self.extra.copy_(predict.extra)

        self.coefficients[:count] = calls.coefficients
        self.input_scale[:count] = calls.plan.input_scale.to(self.input_scale)
        self.guidance[:count] = self.guidance.new_tensor([now.scale for now in calls.guidance])
        self.times[:count] = torch.cat(predict.times, dim=1)


def table_rows(calls: Calls) -> int:
    """How many rows the tables have: a power of two, so that runs of most numbers of steps share a graph."""
    return max(FEWEST_ROWS, 1 << (len(calls.times) - 1).bit_length())


def widths_of(predict: Predictor) -> list[int]:
    """The width of each ResNet block's time projection."""
    return [projection.shape[1] for projection in predict.times]


class StaticNetwork:
    """The UNet on static tensors: its input of this shape, its time row, keys and values. A call gives the prediction.

    owners [N]: for each row of the input the image that it belongs to, one of ``batch`` in turn.
    """

    def __init__(self, predict: Predictor, shape: tuple[int, ...], batch: int, context: ContextKeyValues) -> None:
        self.unet = predict.unet
        device, dtype, widths = self.unet.device, predict.dtype, widths_of(predict)
        on_gpu = device.type == "cuda"  # on a CPU the layout that the eager calls have, and with it their last bit

        with torch.inference_mode(False):
            self.x = torch.zeros(shape, device=device, dtype=dtype)
            self.x = self.x.to(memory_format=fast_layout(device, dtype) if on_gpu else torch.contiguous_format)
            self.time = torch.zeros(1, sum(widths), device=device, dtype=dtype)
            self.owners = torch.arange(shape[0], device=device) % batch
        self.times = self.time.split(widths, dim=1)
        self.context = [[(static_like(k), static_like(v)) for k, v in layers] for layers in context]

    def __call__(self) -> Tensor:
        return self.unet(self.x, 0, None, self.context, self.times)

    def look_at(self, context: ContextKeyValues) -> None:
        """Copy keys and values in."""
        for mine, given in zip(self.context, context, strict=True):
            for pair, new in zip(mine, given, strict=True):
                pair[0].copy_(new[0])
                pair[1].copy_(new[1])


# Graphs


class Kind(NamedTuple):
    """What a graph computes: the network for a batch of so many rows, the first ``unconds`` of them unconditional, and
    with ``is_whole`` all of the call, with noise if the plan draws any."""

    rows: int
    unconds: int
    is_whole: bool
    draws: bool


class Recorded(NamedTuple):
    """A graph, whose result is the prediction [rows, C, h, w], and the network in it."""

    graph: Graph
    network: StaticNetwork


class RecordedCalls(Calls):
    """Calls by graphs: those of ``calls``, whose first call is still to be made."""

    def __init__(self, calls: Calls, predict: Predictor, graphs: Graphs, state: State, watched: Watched) -> None:
        super().__init__(calls.plan, predict, calls.registers[0], calls.draw_noise)
        self.guidance = calls.guidance
        self.predictor, self.graphs, self.state, self.watched = predict, graphs, state, watched
        self.rows = [rows_of(*predict.looks(k)) for k in range(len(self.times))]
        self.seen: dict[Kind, Rows] = {}  # what each network's keys and values are those of
        self.is_live = True

        # All graphs are recorded before the run, which they would disturb; the largest first, whose memory then holds
        # the others.
        shape = (*self.registers.shape, predict.extra is None, table_rows(self))
        key = ("run", *shape, self.registers.device, self.registers.dtype, predict.dtype)
        self.static = graphs.recall(key, state, lambda: StaticRun(calls, predict))
        self.kinds = [self._kind(k) for k in range(len(self.times))]
        largest_first = sorted(set(self.kinds), key=lambda kind: -kind.rows)
        self.recorded = {kind: self._recall(kind) for kind in largest_first}

        self.static.load(calls, predict)
        self.registers = self.static.registers

    def _kind(self, k: int) -> Kind:
        uncond, cond = self.predictor.looks(k)
        is_whole = self.guidance[k].is_linear and all(look.weights == (1,) for look in cond)
        return Kind(len(self.rows[k]), len(uncond), is_whole, is_whole and any(self.draws))

    def _recall(self, kind: Kind) -> Recorded:
        context, tokens = self._context(self.kinds.index(kind)), self.predictor.conditioning.contexts.shape[1]
        return self.graphs.recall((self.static, kind, tokens), self.state, partial(self._record, kind, context))

    def _record(self, kind: Kind, context: ContextKeyValues) -> Recorded:
        static, unet = self.static, self.predictor.unet
        shape = (kind.rows, unet.config.in_channels, *self.registers.shape[3:])
        network = StaticNetwork(self.predictor, shape, self.registers.shape[1], context)

        def call() -> Tensor:
            sdkernels.prepare_step(
                static.registers[0],
                static.extra,
                network.owners,
                static.input_scale,
                static.times,
                static.step,
                (network.x, network.time),
            )
            both = network()
            sdkernels.sampler_step(
                static.registers,
                *_halves(both, kind),
                static.noise if kind.draws else None,
                static.coefficients,
                static.step,
                static.guidance,
                static.registers,
            )
            static.step.add_(1)
            return both

        static.step.zero_()
        return Recorded(self.graphs.record(call if kind.is_whole else network, unet.device), network)

    # The calls

    def make(self, k: int) -> Callable[[], Tensor]:
        if self.watched.callback and k > 0 and state_of(self.predictor.unet) != self.state:
            self.is_live = False  # the callback changed what the graphs hold fast
        static, kind = self.static, self.kinds[k]
        if not (kind.is_whole and self.is_live):
            self.registers = static.registers.clone()
            estimate = super().make(k)
            static.registers.copy_(self.registers)
            static.step.add_(1)
            self.registers = static.registers
            return estimate

        before = static.registers[0].clone() if self.watched.estimates else None
        if self.draws[k]:
            static.noise.copy_(self.draw_noise())
        elif kind.draws:
            static.noise.zero_()
        both = self._replay(k)
        return _not_kept if before is None else partial(self.estimate, k, before, *_halves(both, kind))

    def replace(self, latents: Tensor) -> None:
        self.registers[0] = latents

    def predictions(self, x_in: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        return self.predictor(x_in, k, self._network if self.is_live else None)

    def _network(self, x: Tensor, k: int, rows: Rows) -> Tensor:
        """The network alone, as `Predictor.call_unet`."""
        network = self.recorded[self.kinds[k]].network
        network.x.copy_(x)
        network.time.copy_(self.static.times[k : k + 1])
        return self._replay(k)

    def _replay(self, k: int) -> Tensor:
        """Replay the graph of call k, with the keys and values that it needs. Returns its prediction."""
        kind = self.kinds[k]
        graph, network = self.recorded[kind]
        if self.seen.get(kind) != self.rows[k]:
            network.look_at(self._context(k))
            self.seen[kind] = self.rows[k]

        graph.replay()
        return graph.result

    def _context(self, k: int) -> ContextKeyValues:
        return self.predictor.conditioning.key_values(self.predictor.unet, self.rows[k])


def _not_kept() -> Tensor:
    raise RuntimeError("RecordedCalls: asked for an estimate that nobody was said to ask for")


def _halves(both: Tensor, kind: Kind) -> tuple[Tensor | None, Tensor | None]:
    """The unconditional and the conditional predictions of a whole call."""
    uncond, cond = both[: kind.unconds], both[kind.unconds :]
    return uncond if len(uncond) else None, cond if len(cond) else None
