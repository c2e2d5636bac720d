"""What is known of each op: cases and their inputs, bytes and operations, what has a gradient.

Tests, benchmarks, tuning and the compile report iterate over ``OPS``. A new op is one file and one entry here.

Hot cases are the shapes of Stable Diffusion 1 at 512 x 512 and 2 at 768 x 768, for 2 samples (one picture with
guidance) and 8; odd cases are small and awkward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Draw = Callable[..., Tensor]
"""draw(*shape, mean=0.0, std=1.0): normal float64 values on the CPU."""
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A name and the sizes that an op's ``make`` takes. ``seed`` is of the drawn values, ``mean`` of the main input."""

    name: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: of the public function, and of its definition in ``reference``.
        make: (draw, mean, **sizes) -> the op's arguments by name, floating ones in float64.
        hot, odd: the cases.
        gradients: names of the arguments that have a gradient.
        flops: sizes -> floating-point operations of a forward pass that matter (matrix products count 2 a multiply-add).
        fixed: names of tensors that keep their dtype (tables in float64, indices).
    """

    name: str
    make: Callable[..., Inputs]
    hot: tuple[Case, ...]
    odd: tuple[Case, ...]
    gradients: tuple[str, ...] = ()
    flops: Callable[..., int] = lambda **_: 0
    fixed: tuple[str, ...] = ()

    def inputs(
        self, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0, mean: float = 0.0
    ) -> Inputs:
        """The op's arguments for a case: the same values for every device, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(seed)
        meta = torch.device(device).type == "meta"

        def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            if meta:
                return torch.empty(shape, dtype=torch.float64, device="meta")
            return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

        def place(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() and name not in self.fixed else None)

        return {name: place(name, value) for name, value in self.make(draw, mean, **case.sizes).items()}


def bytes_moved(inputs: Inputs, outputs: Any) -> int:
    """Bytes of an ideal pass: each tensor of ``inputs`` read once, each of ``outputs`` written once."""
    results = outputs if isinstance(outputs, tuple | list) else (outputs,)
    tensors = [t for t in (*inputs.values(), *results) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _cases(**named: Mapping[str, Any]) -> tuple[Case, ...]:
    return tuple(Case(name, sizes) for name, sizes in named.items())


def _geglu(draw: Draw, mean: float, rows: int, width: int) -> Inputs:
    return {"x": draw(rows, 2 * width, mean=min(mean, 3.0))}


OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            name="geglu",
            make=_geglu,
            hot=tuple(
                Case(f"{model} b{batch} {side}x{side} {4 * c}", {"rows": batch * side * side, "width": 4 * c})
                for model, top in (("sd1", 64), ("sd2", 96))
                for batch in (2, 8)
                for side, c in ((top, 320), (top // 2, 640), (top // 4, 1280))
            ),
            odd=_cases(
                one={"rows": 1, "width": 1}, odd={"rows": 5, "width": 7}, c40={"rows": 3, "width": 160},
                block={"rows": 2, "width": 1024}, over={"rows": 2, "width": 1025}, c33={"rows": 77, "width": 33},
                c96={"rows": 7, "width": 96}, c320={"rows": 3, "width": 320}, c1280={"rows": 2, "width": 1280},
                narrow={"rows": 35, "width": 2}, c31={"rows": 4, "width": 31}, tall={"rows": 129, "width": 5},
            ),
            gradients=("x",),
        ),
    )
}  # fmt: skip
