"""An op as tests, benchmarks, tuning and the compile report see it: its cases, and the inputs of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Draw = Callable[..., Tensor]
"""draw(*shape, mean=0.0, std=1.0): normal float64 values."""
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of sizes, which are arguments of the op's ``make``, under a name."""

    name: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What a hot case's forward pass in float16 may take at most, by the static model (``static_model.md``).

    Attributes:
        case: its name.
        architectures: 90 for sm_90.
        microseconds, copies: one of them is given; a copy reads and writes as many bytes as the case.
        simulated: held against the simulated time and not against the floor.
    """

    case: str
    architectures: tuple[int, ...]
    microseconds: float | None = None
    copies: float | None = None
    simulated: bool = False


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: of the public function, and of its definition in ``reference``.
        make: (draw, mean, **sizes) -> the op's arguments by name, the floating-point ones in float64.
        hot, odd: the cases.
        gradients: names of the arguments that have a gradient.
        flops: sizes -> floating-point operations of the forward's matrix products, 2 a multiply-add.
        fixed: floating tensors that have their own dtype whatever the case's.
        targets: how fast it is to be.
    """

    name: str
    make: Callable[..., Inputs]
    hot: tuple[Case, ...]
    odd: tuple[Case, ...]
    gradients: tuple[str, ...] = ()
    flops: Callable[..., int] = lambda **_: 0
    fixed: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])
    targets: tuple[Target, ...] = ()

    @property
    def one_picture(self) -> tuple[Case, ...]:
        """The hot cases of one picture: of 2 samples, with and without the prompt, or of 1 where that is no matter."""
        return tuple(case for case in self.hot if {"b1", "b2"} & set(case.name.split()))

    def inputs(
        self, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0, mean: float = 0.0
    ) -> Inputs:
        """The op's arguments for a case, drawn on ``device`` and rounded to ``dtype``; on "meta" without data.

        ``seed`` is that of the drawn values, ``mean`` that of the op's main input.
        """
        meta = torch.device(device).type == "meta"
        generator = None if meta else torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            if meta:
                return torch.empty(shape, dtype=torch.float64, device="meta")
            return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        def place(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, self.fixed.get(name, dtype) if value.is_floating_point() else None)

        return {name: place(name, value) for name, value in self.make(draw, mean, **case.sizes).items()}


def bytes_moved(inputs: Inputs, outputs: Any) -> int:
    """Bytes of an ideal pass: each tensor of ``inputs`` read once, each of ``outputs`` written once."""
    results = outputs if isinstance(outputs, tuple | list) else (outputs,)
    tensors = [t for t in (*inputs.values(), *results) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def cases(**named: Mapping[str, Any]) -> tuple[Case, ...]:
    return tuple(Case(name, sizes) for name, sizes in named.items())
