"""Recorded functions: a network's launches captured once in a CUDA graph, and replayed without Python.

    x = torch.empty(2, 4, 64, 64, device=device)             # static: it stays where it is
    graph = graphs.record(lambda: unet(x, t, context), device)
    x.copy_(latents)                                         # after recording, which runs the function a few times
    graph.replay()                                           # graph.result is unet(latents, t, context) now

A recorded function reads static tensors, which are written in place between replays, and the weights of a network;
it draws nothing, asks no tensor for its value and returns new tensors alone. What it returns lies in memory that all
graphs of one `Graphs` share: it holds until another of them is recorded or replayed. On a CPU the function itself runs
at each replay, and the results of the other graphs become NaN, so that a mistake shows where there is no GPU.

`Graphs.recall` keeps what was made for a key as long as the network is what it was (`state_of`, which also says which
networks have to run eagerly), and `Graphs.call` is all of this for a function that is called now and then.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

import sdkernels
from sdkit.errors import SDKitError

Made = TypeVar("Made")

MOST = 16  # a size of picture takes four: what its calls work on, the step, the decoder and the text encoder
WARM_UPS = 2


class Graph(Protocol):
    """A recorded function. result: what it returned, a tensor or a tuple of them, overwritten by each replay."""

    result: Any

    def replay(self) -> None:
        """Compute the result again from what the static tensors hold now."""
        ...


class Graphs:
    """What was recorded for one model: at most `MOST` things; the one that was not used for longest goes first.

    One user at a time: `lent` gives it out.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, tuple[State, Any]] = OrderedDict()
        self._called: dict[Hashable, State] = {}
        self._pools: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # one each: libraries keep memory for every stream
        self._replayed: WeakSet[_Replayed] = WeakSet()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        """A copy begins without any: a graph reads the memory that it was recorded on."""
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._made)

    @contextmanager
    def lent(self) -> Generator[Graphs | None]:
        """These graphs for the block; None while another thread, or a call further up, has them."""
        mine = self._lock.acquire(blocking=False)
        try:
            yield self if mine else None
        finally:
            if mine:
                self._lock.release()

    def recall(self, key: Hashable, state: State, make: Callable[[], Made]) -> Made:
        """What ``make`` made for this key before, or makes now: the first time, or again as the state is another."""
        if key in self._made and self._made[key][0] != state:
            del self._made[key]
        if key not in self._made:
            while len(self._made) >= MOST:
                self._made.popitem(last=False)
            if not self._made:
                self._pools.clear()  # no memory outlives its graphs
            self._made[key] = (state, make())

        self._made.move_to_end(key)
        return cast(Made, self._made[key][1])

    def record(self, function: Callable[[], Any], device: torch.device) -> Graph:
        """Record ``function``, which runs a few times for it: fill the static tensors afterwards."""
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode can't be written outside of it
            if device.type == "cuda":
                with torch.cuda.device(device):
                    if device not in self._streams:
                        self._streams[device] = torch.cuda.Stream(device)
                    pool = self._pools.setdefault(device, torch.cuda.graph_pool_handle())
                    return _Captured(function, pool, self._streams[device])
            return _Replayed(function, self._replayed)

    def call(self, key: Hashable, network: nn.Module | State, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), which calls ``network``, or one whose state is known; a new tensor, or a tuple of them.

        Recorded at the second call with a key and inputs of these shapes, so that one of its kind costs nothing more.
        """
        state = network if isinstance(network, State) else state_of(network)
        key = (key, *((tuple(x.shape), x.dtype, x.device) for x in inputs))
        known = self._called.get(key) == state
        self._called[key] = state
        if state.why_not is not None or not known:
            return function(*inputs)

        try:
            static, graph = self.recall(key, state, lambda: self._static_call(function, inputs))
        except torch.OutOfMemoryError:
            self.run_out()
            return function(*inputs)
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return _copied(graph.result)

    def _static_call(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Graph]:
        static = [static_like(x) for x in inputs]
        return static, self.record(lambda: function(*static), inputs[0].device)

    def run_out(self) -> None:
        """Make room, and warn, where a GPU's memory does not suffice to record."""
        self.free()
        warnings.warn("out of memory while a graph was recorded; going on without", stacklevel=3)

    def free(self) -> None:
        """Forget everything, and with it the memory."""
        self._made.clear()
        self._called.clear()
        self._pools.clear()


def static_like(x: Tensor) -> Tensor:
    """A static tensor with the values of ``x``, in its layout."""
    with torch.inference_mode(False):
        return torch.empty_like(x).copy_(x)


def _copied(result: Any) -> Any:
    return result.clone() if isinstance(result, Tensor) else tuple(map(_copied, result))


# The two kinds


class _Captured:
    """A CUDA graph."""

    def __init__(self, function: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> None:
        # Libraries choose their algorithms and kernels are compiled before the capture, which would forbid it.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)

        self.function = function  # what it reads lives as long as the graph
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result: Any = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SDKitError(
                f"graphs: this network cannot be recorded ({reason}); graphs=False does without"
            ) from error

    def replay(self) -> None:
        self.graph.replay()


class _Replayed:
    """A function that runs again at each replay, into the tensors that it returned first."""

    def __init__(self, function: Callable[[], Any], pool: WeakSet[_Replayed]) -> None:
        self.function, self.pool = function, pool
        self.result: Any = function()
        self._spoil_others()
        pool.add(self)

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for mine, new in zip(_tensors(self.result), _tensors(self.function()), strict=True):
                mine.copy_(new)
            self._spoil_others()

    def _spoil_others(self) -> None:
        for other in self.pool:
            for tensor in _tensors(other.result) if other is not self else ():
                tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [tensor for part in result for tensor in _tensors(part)]


# What a graph holds fast


@dataclass(frozen=True)
class State:
    """A network as it is now.

    held: all that a graph of it would hold fast: where its tensors lie, every plain value of its modules, and the
    process's settings that decide which kernels run. A tensor written in place changes nothing here, and nothing for a
    graph, which reads it. why_not: as in `state_of`.
    """

    held: Hashable
    why_not: str | None


def state_of(network: nn.Module) -> State:
    """The state of a network, and why it has to run eagerly, None where it can be recorded. The rule for all graphs:

    A replay runs no Python, so a network that has any of its own is not recorded: hooks, functions put into a module
    (hypernetworks and attention recorders are such), dropout at work. Nor is anything under autocast or with gradients.
    A module's class may name, in ``unread_by_forward``, values that say nothing of what it computes.
    """
    held: list[Hashable] = [_settings()]
    why_not: str | None = None
    if torch.is_grad_enabled():
        why_not = "gradients are on"
    elif torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        why_not = "autocast is on"

    for module in network.modules():
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            why_not = f"{type(module).__name__} has hooks"
        if own["training"] and isinstance(module, nn.Dropout) and module.p > 0:
            why_not = "dropout is at work"

        tensors = (*own["_parameters"].values(), *own["_buffers"].values())
        held += [None if t is None else (t.data_ptr(), t.dtype, t.stride()) for t in tensors]
        for name in own.keys() - _OF_EVERY_MODULE - getattr(type(module), "unread_by_forward", frozenset()):
            value = own[name]
            if callable(value) and not isinstance(value, nn.Module | type):
                why_not = f"{type(module).__name__} has a function of its own, {name}"
            held.append(value if type(value) in _PLAIN else _mark(value))
    return State(tuple(held), why_not)


_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (bool, int, float, str, type(None))


def _mark(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.stride()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return tuple((key, _mark(own)) for key, own in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(map(_mark, value))
    return id(value)


def _settings() -> Hashable:
    return (
        sdkernels.current(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
