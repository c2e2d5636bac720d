"""One's own pictures: read, and the whole chain from a folder to a model that draws."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.pretrain.own_pictures import image_folder
from sdkit.checkpoints import loading
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.house import ROOT


def folder_of(folder: Path, count: int, captions: bool = True) -> Path:
    """Pictures of one colour each, whose red is five times their number."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40 + i, 32), (5 * i, 100, 255 - 5 * i)).save(folder / f"{i:02}.png")
        if captions:
            (folder / f"{i:02}.txt").write_text(f"colour number {i}")
    return folder


def reds(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_pictures_are_cut_square_with_their_captions_and_a_tenth_is_held_back(tmp_path: Path) -> None:
    pictures, unseen = image_folder(folder_of(tmp_path / "own", 31), 16)
    assert pictures.images.shape == (27, 3, 16, 16) and pictures.images.dtype == torch.uint8
    assert reds(unseen.images) == [0, 50, 100, 150]  # every tenth
    assert sorted([*reds(pictures.images), *reds(unseen.images)]) == [5 * i for i in range(31)]
    for part in (pictures, unseen):
        texts = part.captions(torch.arange(len(part)), seed=3)
        assert texts == [f"colour number {red // 5}" for red in reds(part.images)]
        assert float(part.pixels(torch.tensor([1]))[0, 0, 0, 0]) == pytest.approx(reds(part.images)[1] / 127.5 - 1)


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least 20 pictures, found 3"):
        image_folder(folder_of(tmp_path / "few", 3), 16)
    bare = folder_of(tmp_path / "bare", 20)
    (bare / "07.txt").unlink()
    with pytest.raises(ConfigError, match=r"07\.png: no caption"):
        image_folder(bare, 16)
    assert set(image_folder(bare, 16, captioned=False)[0].texts) == {""}

    (bare / "07.txt").write_text("here it is")
    (bare / "99.txt").write_text("of no picture")
    with pytest.warns(UserWarning, match=r"1 files are not used, 99\.txt first"):
        image_folder(bare, 16)


def run(name: str, *options: object) -> str:
    command = [sys.executable, "-m", f"finetune.pretrain.{name}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_becomes_a_model_that_draws(tmp_path: Path) -> None:
    folder, work = folder_of(tmp_path / "own", 24), tmp_path / "work"
    common = ["--data", folder, "--size", 32, "--work", work]
    adversarial = ["--perceptual-weight", 0.1, "--discriminator-weight", 0.1, "--discriminator-start", 1]
    few = ["--factor", 8, "--steps", 2, "--decoder-steps", 1, "--batch-size", 2]
    assert "PSNR of 3 unseen pictures" in run("autoencoder", *common, *few, *adversarial)
    vae = loading.load_vae(work / "vae")
    assert vae.config.factor == 8 and vae.config.sample_size == 32 and vae.config.scaling_factor != 0.18215

    assert "nearest among 3 unseen ones" in run("clip", *common, "--steps", 2)
    run("noise_predictor", *common, "--steps", 2, "--prediction", "sample", "--zero-terminal-snr", "--unconditional")
    sd = StableDiffusion.from_pretrained(work / "model", device="cpu")
    assert (sd.schedule.prediction_type, sd.schedule.rescale_betas_zero_snr) == ("sample", True)
    assert sd.unet.config.sample_size == 4 and sd.tokenizer("colour number 7").input_ids[1:-1]
    assert sd.text_to_image("colour number 7", num_inference_steps=2, seed=0).images[0].size == (32, 32)

    # From there with another rate: a VAE that goes on from it stays what it is where nothing moves it.
    still = ["--factor", 8, "--steps", 1, "--decoder-steps", 1, "--batch-size", 2, "--learning-rate", 1e-9]
    run("autoencoder", *common[:4], "--work", tmp_path / "more", *still, "--init", work / "vae")
    again = loading.load_vae(tmp_path / "more" / "vae").state_dict()
    assert all(torch.allclose(again[name], value, atol=1e-3) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", ["--size", 60], "--size: expected a multiple of 8"),
        ("noise_predictor", ["--zero-terminal-snr", "--prediction", "epsilon"], "of noise alone epsilon says nothing"),
        ("noise_predictor", ["--prediction", "noise"], "prediction_type: expected one of"),
        ("noise_predictor", ["--beta-schedule", "cosine"], "beta_schedule"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: list[object], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"finetune.pretrain.{name}", "--work", str(tmp_path), *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and message in " ".join(done.stderr.replace("│", " ").split()), done.stderr
    assert not list(tmp_path.iterdir())
