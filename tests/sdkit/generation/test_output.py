"""What a task gives back: files that can be made again, a line that says what it is, a picture for notebooks."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.generation.output import Output
from sdkit.generation.png import read_parameters
from sdkit.stable_diffusion import StableDiffusion

FEW: dict[str, Any] = {"num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tabletop", device="cpu")


def test_saved_pictures_can_be_made_again(sd: StableDiffusion, tmp_path: Path) -> None:
    out = sd("a red cube", seed=5, num_images_per_prompt=2, **FEW)
    paths = out.save(tmp_path / "cube.png")
    assert [path.name for path in paths] == ["cube-0001.png", "cube-0002.png"]
    facts = read_parameters(paths[1])
    assert (facts["model"], facts["prompt"], facts["seed"]) == ("tabletop", "a red cube", 6)
    with Image.open(paths[1]) as written:
        assert np.array_equal(np.asarray(written), np.asarray(out.images[1]))
    (one,) = sd("a red cube", seed=5, **FEW).save(tmp_path / "one.png")
    assert one == tmp_path / "one.png"


def test_what_no_png_can_hold_is_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.jpg: expected a name that ends in \.png"):
        sd("", seed=1, **FEW).save(tmp_path / "x.jpg")
    with pytest.raises(ConfigError, match="expected pictures, found a tensor"):
        sd("", seed=1, output_type="pt", **FEW).save(tmp_path / "x.png")


def test_an_output_says_what_it_is_in_a_line(sd: StableDiffusion) -> None:
    small = FEW | {"height": 128, "width": 96}
    assert repr(sd("", seed=3, **small)) == "Output(1 picture of 96 x 128, seed 3, 2 steps)"
    assert repr(sd(["", ""], seed=3, **small)) == "Output(2 pictures of 96 x 128, seeds 3, 4, 2 steps)"
    latents = sd("", latents=torch.zeros(1, 4, 16, 16), output_type="latent", **FEW)
    assert repr(latents) == "Output(1 latents of 16 x 16, 2 steps)"


def test_a_notebook_shows_the_pictures(sd: StableDiffusion) -> None:
    small = FEW | {"height": 128, "width": 128}
    one, three = (sd([""] * count, seed=3, **small)._repr_png_() for count in (1, 3))
    assert one is not None and three is not None
    assert Image.open(BytesIO(one)).size == (128, 128) and Image.open(BytesIO(three)).width > 3 * 128
    assert Output(torch.zeros(1, 3, 8, 8), torch.zeros(1), [], 1)._repr_png_() is None


def test_a_file_is_hashed_once_for_all_pictures_and_again_when_it_changes(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr("sdkit.generation.provenance.file_hash", lambda path: hashed.append(str(path)) or "0" * 64)
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"first")
    monkeypatch.setattr(sd, "made_of", {"model": "tabletop", "vae": str(file)})
    sd(["", ""], seed=1, **FEW)
    sd("", seed=1, **FEW)
    assert hashed == [str(file)]
    file.write_bytes(b"another one")
    assert sd("", seed=1, **FEW).images[0].info["files"] == {str(file): "0" * 64} and len(hashed) == 2
