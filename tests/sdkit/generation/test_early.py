"""What is refused before a model is loaded, and what is left to loading it."""

import re
from pathlib import Path
from typing import Any

import pytest

from sdkit.errors import ConfigError
from sdkit.generation.early import check_early
from sdkit.generation.options import TASKS
from tests.sdkit.tiny import model

TEXT = TASKS["text_to_image"]
WRONG = [
    ({"sampler": "magic"}, "sampler: expected one of"),
    ({"sampler": "lcm", "sigmas": "karras"}, "sigmas: lcm takes none"),
    ({"sampler": "euler", "eta": 0.5}, "eta: euler takes none"),
    ({"num_inference_steps": 2000}, "num_inference_steps: expected an integer from 1 to 1000"),
    ({"width": 33}, "width 33 is not a positive multiple of 4"),
    ({"guidance_scale": -1.0}, "guidance_scale"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model().save_pretrained(path)
    return path


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_it_is_refused_by_the_configuration(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_early(TEXT, options, folder)


def test_what_is_right_passes(folder: Path) -> None:
    check_early(TEXT, {}, folder)
    check_early(TEXT, {"width": 36, "sampler": "ddim", "eta": 1.0, "num_inference_steps": 1000}, folder)
    check_early(TASKS["image_to_image"], {"strength": 0.5, "height": 32}, folder)
    check_early(TEXT, {"width": 33}, folder, own_vae=False)  # another VAE may have other cells


def test_of_what_cannot_be_read_only_the_options_are_checked(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "some.safetensors").write_bytes(b"nothing")
    for path in ("odd", "some.safetensors", "none"):
        check_early(TEXT, {"sampler": "euler"}, tmp_path / path)
        with pytest.raises(ConfigError, match="guidance_scale"):
            check_early(TEXT, {"guidance_scale": -1.0}, tmp_path / path)
        with pytest.raises(ConfigError, match="sampler"):
            check_early(TEXT, {"sampler": "magic"}, tmp_path / path)
    check_early(TEXT, {"width": 33}, tmp_path / "odd")
    with pytest.raises(ConfigError, match="width 33 is not a positive multiple of 8"):
        check_early(TEXT, {"width": 33}, tmp_path / "some.safetensors")
