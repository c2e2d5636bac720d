"""One's own pictures: read, and the whole chain from a folder to a model that draws."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from finetune.pretrain import autoencoder, clip, noise_predictor
from finetune.pretrain.own_pictures import image_folder
from sdkit.checkpoints import loading
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion


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


def test_a_folder_becomes_a_model_that_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, work = folder_of(tmp_path / "own", 24), tmp_path / "work"
    vae_options: dict[str, Any] = {"data": folder, "size": 32, "factor": 8, "decoder_steps": 1, "batch_size": 2}
    terms: dict[str, Any] = {"perceptual_weight": 0.1, "discriminator_weight": 0.1, "discriminator_start": 1}
    autoencoder.main(work=work, steps=2, **vae_options, **terms)
    vae = loading.load_vae(work / "vae")
    assert vae.config.factor == 8 and vae.config.sample_size == 32 and vae.config.scaling_factor != 0.18215

    clip.main(work=work, data=folder, size=32, steps=2)
    kind: dict[str, Any] = {"prediction": "sample", "zero_terminal_snr": True, "unconditional": True}
    noise_predictor.main(work=work, data=folder, size=32, steps=2, **kind)
    printed = capsys.readouterr().out
    assert "PSNR of 3 unseen pictures" in printed and "caption nearest to its picture among 3: " in printed

    sd = StableDiffusion.from_pretrained(work / "model", device="cpu")
    assert (sd.schedule.prediction_type, sd.schedule.rescale_betas_zero_snr) == ("sample", True)
    assert sd.unet.config.sample_size == 4 and sd.tokenizer("colour number 7").input_ids[1:-1]
    assert sd.text_to_image("colour number 7", num_inference_steps=2, seed=0).images[0].size == (32, 32)

    # A VAE that goes on from it stays what it is where nothing moves it.
    autoencoder.main(work=tmp_path / "more", steps=1, learning_rate=1e-9, init=work / "vae", **vae_options)
    again = loading.load_vae(tmp_path / "more" / "vae").state_dict()
    assert all(torch.allclose(again[name], value, atol=1e-3) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (autoencoder, {"factor": 6}, "--factor: expected 4 or 8"),
        (autoencoder, {"size": 60, "factor": 8}, "--factor: expected 4 or 8, which divides --size"),
        (autoencoder, {"data": Path("somewhere"), "scenes": 64}, "--scenes: does nothing with --data"),
        (autoencoder, {"discriminator_start": 5}, "discriminator_start: does nothing without discriminator_weight"),
        (clip, {"size": 60}, "--size: expected a multiple of 8"),
        (noise_predictor, {"zero_terminal_snr": True, "prediction": "epsilon"}, "of noise alone epsilon says nothing"),
        (noise_predictor, {"prediction": "noise"}, "prediction_type: expected one of"),
        (noise_predictor, {"beta_schedule": "cosine"}, "beta_schedule"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    command: ModuleType, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((typer.BadParameter, ConfigError), match=message):
        command.main(work=tmp_path, **options)
    assert not list(tmp_path.iterdir())
