"""Fixtures of all suites: the machine's ceilings, measured once, and a memory free of the case before."""

import gc
from collections.abc import Generator

import pytest
import torch

from bench.timing import DEVICE, GPU, Ceilings, ceilings


@pytest.fixture(scope="session")
def limits() -> Ceilings:
    return ceilings(DEVICE)


@pytest.fixture
def fresh_memory() -> Generator[None]:
    torch.compiler.reset()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    yield
