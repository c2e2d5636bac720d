"""Random numbers that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*purpose: int | str) -> int:
    """A seed below 2**63 for what ``purpose`` names, such as ("dropout", seed, step)."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big") >> 1


def seeded(*purpose: int | str) -> torch.Generator:
    """A generator on the CPU for what ``purpose`` names: the same numbers on every machine, in any order of calls."""
    return torch.Generator().manual_seed(seed_of(*purpose))


def step_generator(run: int, step: int) -> torch.Generator:
    """A generator on the CPU for all that step ``step`` of run ``run`` draws.

    The runs of `finetune.pretrain`, each with a number of its own, have always drawn from these: the shipped model was
    made with their numbers, and is made with them again. `seeded` is for everything else.
    """
    return torch.Generator().manual_seed((run * 1_000_003 + step) * 7919 + 17)
