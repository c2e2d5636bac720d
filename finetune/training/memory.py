"""How much memory a training step takes: estimated before, measured after."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from finetune.training.averaging import in_place_of
from finetune.training.config import TrainConfig
from finetune.training.muon import is_matrix


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its peak, by kind; what the allocator wastes is not in it."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        parts = {name: value for name, value in vars(self).items() if value}
        return f"{size(self.total)} ({', '.join(f'{name} {size(value)}' for name, value in parts.items())})"


def estimate_memory(modules: list[nn.Module], activations: int, config: TrainConfig) -> Memory:
    """For the settings' optimizer over the parameters that require a gradient; ``activations`` as ``saved_bytes``
    counts them. AdamW keeps two moments of a parameter, Muon of a matrix one."""
    parameters = [p for module in modules for p in module.parameters()]
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)

    tables = {m.weight for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    one = [p for p in parameters if p.requires_grad and p not in tables and is_matrix(p)]
    moments = 2 * trained - (sum(p.nbytes for p in one) if config.optimizer == "muon" else 0)
    return Memory(frozen, trained, trained, moments, trained if config.ema_decay is not None else 0, activations)


def saved_bytes(module: nn.Module, forward: Callable[[], object], recomputed: tuple[type[nn.Module], ...] = ()) -> int:
    """Bytes that ``forward()``, which calls ``module``, keeps for its backward pass, each tensor counted once.

    ``forward`` makes its inputs, on the CPU; nothing is computed or allocated, for all its tensors are fake. Modules of
    the kinds ``recomputed`` keep their inputs alone, and the largest of them counts whole, as they are computed again
    one by one: the state after `checkpoint_activations`, which must not have been called yet.
    """
    kept: dict[int, int] = {}  # storage -> bytes; replaced by a fresh one while a recomputed module runs
    inside = [0]
    current, alive = kept, list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            current.setdefault(storage._cdata, storage.nbytes())  # pyright: ignore[reportPrivateUsage]  # its identity
            alive.append(tensor)
        return tensor

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal current
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Tensor):
                note(leaf)
        current = {}

    def leave(*_: object) -> None:
        nonlocal current
        inside.append(sum(current.values()))
        current = kept

    blocks = [block for block in module.modules() if isinstance(block, recomputed)]
    handles = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # the buffers
            weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in module.named_parameters()}
            with in_place_of(module, weights), saved_tensors_hooks(note, lambda tensor: tensor):
                alive.append(forward())  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()

    return sum(kept.values()) + max(inside)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(nbytes: int) -> str:
    """In words: "3.1 MB", "1.25 GB"."""
    return f"{nbytes / 2**30:.2f} GB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MB"
