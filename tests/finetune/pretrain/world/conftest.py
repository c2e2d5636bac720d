"""Scenes for all tests of the world."""

from __future__ import annotations

import pytest

from finetune.pretrain.world.scenes import Scenes, sample_scenes


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(48, 11)
