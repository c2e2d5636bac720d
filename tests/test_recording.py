"""Numbers do not move: pictures of every sampler, task and option, and files, are those of an earlier version.

Its recording lies beside this file; `tests.recording` made it, and says how two versions are compared to the bit.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.recording import TESTS, cases, small_files


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(TESTS / "recorded.npz"))


def test_pictures_are_those_that_were_recorded(recorded: dict[str, np.ndarray], tmp_path: Path):
    """To float16's precision: processors differ in the last bits of float32."""
    made = cases(tmp_path, steps=3)
    assert made.keys() == recorded.keys()
    for name, make in made.items():
        expected = recorded[name].astype(np.float32)
        error = np.abs(make().latents.numpy() - expected).max() / np.abs(expected).max()
        assert error < 2e-3, f"{name}: {error}"


def test_files_are_those_that_were_recorded(tmp_path: Path):
    """To the bit."""
    assert small_files(tmp_path) == json.loads((TESTS / "recorded.json").read_text())
