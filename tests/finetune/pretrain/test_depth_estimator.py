"""The depth estimator: what it learns from, how it is measured, and that the depth task reads what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from finetune.pretrain.depth_estimator import TEST_SEED, DepthLoss, build, correlation, main, rendered
from sdkit.networks.depth_estimator import DepthEstimator


def test_nearer_is_larger_and_every_parameter_that_dpt_uses_learns() -> None:
    pictures, inverse = rendered(64, 32, TEST_SEED)
    assert pictures.dtype == torch.uint8 and inverse.shape == (64, 32, 32)
    assert inverse[:, -1].float().mean() > 1.1 * inverse[:, 0].float().mean()  # below is nearer

    torch.manual_seed(0)
    loss = DepthLoss(build(32))
    loss((pictures[:8].float() / 127.5 - 1, inverse[:8].float())).backward()
    left = {name for name, p in loss.network.named_parameters() if p.requires_grad and p.grad is None}
    assert not left


def test_correlation_is_one_of_a_perfect_estimate_and_minus_one_of_its_negative() -> None:
    pictures, inverse = rendered(64, 32, TEST_SEED)
    for sign in (1.0, -1.0):
        parts = iter(inverse.split(32))

        def network(_: Tensor, parts: Iterator[Tensor] = parts, sign: float = sign) -> Any:
            return SimpleNamespace(predicted_depth=sign * 3 * next(parts).float() + 2)

        assert correlation(cast("Any", network), pictures, inverse) == pytest.approx(sign, abs=1e-4)


def test_the_depth_task_reads_what_it_writes(tmp_path: Path) -> None:
    main(tmp_path, 32, 64, 2, 1e-3)
    folder = tmp_path / "depth_estimator"
    names = ("depth_estimator", "feature_extractor")
    parts = {name: {"class": "DPTForDepthEstimation", "path": folder / name} for name in names}
    estimator = DepthEstimator(parts)
    pictures = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert estimator.estimate(pictures, torch.device("cpu")).shape == (2, 32, 32)
