"""The tiny model of a test file, ours and diffusers', and its picture without adapters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import finetune
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.tiny import latents, model, pipeline


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture(scope="module")
def base(sd: StableDiffusion) -> torch.Tensor:
    return latents(sd)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture
def clean(sd: StableDiffusion) -> Iterator[None]:
    """Takes every adapter out of ``sd`` after the test."""
    yield
    finetune.remove(sd)
