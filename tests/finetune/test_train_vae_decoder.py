"""The training script of VAE decoders, from a folder of pictures to a file; the rest of it is that of LoRA."""

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

from finetune.data.cache import LatentCache
from finetune.pretrain.concept import write_concept_folder
from finetune.train_vae_decoder import (
    RECOMPUTED,
    DecoderData,
    DecoderLossConfig,
    DecoderModel,
    DecoderSamples,
    DecoderTraining,
    app,
    batch,
    check_not_trained_on,
    pixels,
    training_data,
    validation_views,
)
from finetune.training.states import load_state, saved_states
from finetune.vae_decoder.metrics import measure
from sdkit import AutoencoderKL
from sdkit.checkpoints.diffusers_folder import save_folder
from sdkit.checkpoints.loading import MODELS, load_vae
from sdkit.checkpoints.single_file import save_single_file
from sdkit.checkpoints.vae_file import load_vae_file, save_vae_file
from sdkit.errors import CheckpointError, ConfigError
from tests.conftest import draw, draw_weights, read_image
from tests.finetune import toy
from tests.finetune.commands import call, flag
from tests.finetune.tiny import VAE, model
from tests.finetune.vae_decoder.test_metrics import Inception
from tests.finetune.vae_decoder.test_perceptual import files

GAN = (
    "--discriminator-weight",
    0.5,
    "--discriminator-channels",
    4,
    "--discriminator-layers",
    1,
    "--discriminator-start",
    2,
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three without captions, one of them not square."""
    (tmp_path / "data").mkdir()
    for i, size in enumerate(((32, 32), (32, 32), (36, 20))):
        colours = (draw(f"{i}", (6, 6, 3)).clamp(-1, 1) * 127 + 128).byte().numpy()
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "data" / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    save_vae_file(draw_weights(AutoencoderKL.from_config(VAE)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def is_encoder(key: str) -> bool:
    return key.startswith(("encoder.", "quant_conv."))


def reconstruction(vae: Any, x: Tensor) -> Tensor:
    """diffusers' way through the posterior's mean."""
    with torch.no_grad():
        return vae.decode(vae.encode(x).latent_dist.mode()).sample


def test_a_folder_of_pictures_becomes_a_vae_that_diffusers_reads(pictures: Path, tmp_path: Path):
    output = tmp_path / "run"
    printed = call(
        (
            "--data",
            pictures,
            "--output",
            output,
            "--resolution",
            32,
            "--max-train-steps",
            3,
            "--learning-rate",
            1e-3,
            "--checkpointing-steps",
            2,
            "--num-validation-images",
            2,
            "--train-batch-size",
            2,
            "--logging-steps",
            1,
            "--gradient-checkpointing",
        ),
        app,
    )
    decoder = (p.numel() for name, p in load_vae("tabletop").named_parameters() if not is_encoder(name))
    assert (
        f"{sum(decoder):,} parameters" in printed
        and "3: 2 of 32×32, 1 of 40×24" in printed
        and "MS-SSIM" not in printed
    )
    assert "mse + 0.1 (1 - multi-scale SSIM)" in printed
    for name in ("report.md", "loss.png", "losses.csv", "config.toml", "checkpoint-2/vae.safetensors"):
        assert (output / name).is_file(), name
    before, after = (read_image(output / f"samples/step-{n:06d}.png").tobytes() for n in (0, 3))
    assert before != after

    base, trained = load_vae("tabletop", dtype=torch.float32), load_vae_file(output / "vae.safetensors")
    state, old = trained.state_dict(), base.state_dict()
    assert all(torch.equal(state[k], old[k]) == (is_encoder(k)) for k in state)
    average = load_state(saved_states(output)[-1])["average"]
    assert all(torch.equal(average[f"vae.{k}"], v) for k, v in state.items() if not is_encoder(k))
    views = validation_views(base, DecoderData(pictures, resolution=32))
    assert len(views) == 3
    rows = [
        f"| {name} | {a:.4g} | {b:.4g} |"
        for (name, a), b in zip(
            *(part(measure(v, map(pixels, views))) for v, part in ((base, dict.items), (trained, dict.values))),
            strict=True,
        )
    ]
    report = (output / "report.md").read_text()
    assert all(row in report and row in printed for row in rows) and len(rows) == 2
    assert "3 pictures trained on" in report

    x = pixels(views[0])
    ours = trained(x).detach()
    theirs = diffusers.AutoencoderKL.from_single_file(
        output / "vae.safetensors", config=str(MODELS / "tabletop" / "vae"), local_files_only=True
    )
    assert float((reconstruction(theirs, x) - ours).abs().max()) < 1e-5


def options_of(pictures: Path, tiny_vae: Path) -> tuple[object, ...]:
    return (
        "--model",
        tiny_vae,
        "--data",
        pictures,
        "--resolution",
        32,
        "--train-batch-size",
        2,
        "--random-flip",
        "--random-crops",
        2,
        "--learning-rate",
        0.01,
        "--discriminator-lr",
        0.002,
        *GAN,
    )


def test_a_run_goes_on_to_the_bit(pictures: Path, tiny_vae: Path, tmp_path: Path):
    options = options_of(pictures, tiny_vae)
    quick = ("--num-validation-images", 0, "--ema-decay", 0.5)
    rates: set[float] = set()
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.update(group["lr"] for group in o.param_groups))
    try:
        call((*options, *quick, "--output", tmp_path / "a", "--max-train-steps", 4), app)
    finally:
        hook.remove()
    assert sorted(rates) == pytest.approx([0.002, 0.01]) and not (tmp_path / "a" / "samples").exists()
    for steps in (1, 3, 4):  # the decoder's adversarial loss begins in between
        toy.forget_accelerate()
        call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--max-train-steps", steps), app)
    a, b = (load_state(saved_states(tmp_path / run)[-1]) for run in "ab")
    for part in ("weights", "average"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert any(k.startswith("discriminator.") for k in a["weights"]) and a["history"] == b["history"]
    assert not any("encoder" in k for k in a["weights"])
    one, two = (load_file(tmp_path / run / "vae.safetensors") for run in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    toy.forget_accelerate()
    changed = ("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--reconstruction", "l1")
    assert "of a run with reconstruction 'mse', now 'l1'" in call(changed, app, status=1)


def test_options_reach_what_they_are_for(
    pictures: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Started(Exception):
        pass

    def started(accelerator: Any, loss: Any, batches: Any, config: Any, output: Any, **arguments: Any) -> None:
        raise Started(loss, batches, config, arguments)

    monkeypatch.setattr("finetune.train_vae_decoder.train", started)
    _, vgg, weights = files(tmp_path, monkeypatch)
    options = (
        *options_of(pictures, tiny_vae),
        "--output",
        tmp_path / "run",
        "--cache-dir",
        tmp_path / "cache",
        "--gradient-accumulation-steps",
        2,
    )
    facts: list[dict[str, Any]] = []
    for more in ((), ("--lpips-vgg", vgg, "--lpips-weights", weights, "--gradient-checkpointing")):
        toy.forget_accelerate()
        with pytest.raises(Started) as caught:
            call((*options, *more), app)
        loss, batches, config, arguments = caught.value.args
        assert config == DecoderTraining(gradient_accumulation_steps=2, learning_rate=0.01)
        assert config.ema_decay == 0.999 and config.max_grad_norm == 0
        assert (loss.lpips is None, loss.discriminator is None) == (not more, False)
        assert [batches(n).step for n in range(5)] == [0, 0, 1, 1, 2]
        assert (tmp_path / "cache" / "latents").exists() and not (tmp_path / "run" / "cache").exists()
        blocks = [m for m in loss.vae.decoder.modules() if isinstance(m, RECOMPUTED)]
        assert len(blocks) == 7 and all(("forward" in vars(m)) == bool(more) for m in blocks)
        rate = arguments["highest_rate"]
        assert (rate("discriminator.layers.0.weight"), rate("vae.decoder.conv_in.weight")) == (0.002, 0.01)
        facts.append(arguments["facts"])
    assert {"pictures", "the VAE", "reconstruction"} <= facts[0].keys() == facts[1].keys()
    assert not any(str(tmp_path) in repr(found) for found in facts)  # wherever the files lie
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"LPIPS"}


@pytest.mark.parametrize("latents_are", ["mean", "sample"])
def test_latents_are_of_the_pictures_beside_them(pictures: Path, tiny_vae: Path, tmp_path: Path, latents_are: Any):
    vae = load_vae(tiny_vae, dtype=torch.float32)
    config = DecoderData(pictures, random_crops=3, random_flip=True, latents=latents_are, train_batch_size=2).config()
    data = training_data(vae, config, seed=0)
    latents = LatentCache(vae, tmp_path / "cache")
    latents.fill(data.views(), progress=False)
    seen: set[bytes] = set()
    weighed: list[float] = []
    for n in range(8):
        found = batch(data, latents, 1, n)
        with torch.no_grad():
            posterior = vae.encode(found.pixels)
        error = (found.latents / vae.config.scaling_factor - posterior.mean) / posterior.std
        low, high = (0.0, 1e-3) if latents_are == "mean" else (0.9, 1.1)
        assert low <= float(error.std()) < high and float(found.pixels.abs().max()) <= 1
        seen |= {x.numpy().tobytes() for x in found.pixels}
        assert found.weights is not None
        weighed.append(float(found.weights.sum()))
    assert len(seen) > 8
    assert sorted(weighed) == [1.0] * 4 + [2.0] * 4  # of three pictures the wide one fills a batch


def test_measures_on_pictures_apart_with_all_weights(
    pictures: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, vgg, weights = files(tmp_path, monkeypatch)
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    (tmp_path / "other").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 90, 60)).save(tmp_path / "other" / f"{i}.png")
    common = (
        "--model",
        tiny_vae,
        "--output",
        tmp_path / "run",
        "--max-train-steps",
        1,
        "--lpips-vgg",
        vgg,
        "--lpips-weights",
        weights,
        "--inception-weights",
        tmp_path / "inception.pt",
        "--resolution",
        32,
        "--num-validation-images",
        3,
    )
    printed = call((*common, "--data", pictures, "--validation-data", tmp_path / "other"), app)
    assert "5 pictures not trained on" in printed and "mse + 0.1 (LPIPS)" in printed
    assert all(f"| {name} |" in printed for name in ("PSNR", "SSIM", "LPIPS", "rFID"))
    sheet = read_image(tmp_path / "run" / "samples" / "step-000001.png")
    assert sheet.size == (3 * 40 + 8, 2 * 40 + 8) and sheet.getpixel((9, 9)) == (0, 90, 60)


def test_of_pictures_that_are_trained_on_the_first_64_are_measured(tiny_vae: Path, tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(66):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")
    vae, config = load_vae(tiny_vae, dtype=torch.float32), DecoderData(tmp_path / "a", random_crops=3, random_flip=True)
    views = validation_views(vae, config)
    assert len(views) == 64 and {(crop, flip) for _, _, crop, flip in views} == {(None, False)}
    apart = validation_views(vae, replace(config, validation_data=tmp_path / "b"))
    assert len(apart) == 66 and {picture.path.parent.name for picture, *_ in apart} == {"b"}


def test_what_is_measured_as_not_trained_on_is_not(pictures: Path, tiny_vae: Path, tmp_path: Path):
    """By its content: a copy is the picture too."""
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "other" / "a.png")
    copied = shutil.copy(next(pictures.glob("*.png")), tmp_path / "other" / "b.png")
    vae, config = load_vae(tiny_vae, dtype=torch.float32), DecoderData(pictures, validation_data=tmp_path / "other")
    shown, data = validation_views(vae, config), training_data(vae, config.config(), seed=0)
    with pytest.raises(ConfigError, match=f"validation_data: .* not trained on, found {copied}, which is {pictures}"):
        check_not_trained_on(shown, data)
    copied.unlink()
    check_not_trained_on(validation_views(vae, config), data)


def test_captions_and_their_tables_are_no_matter_to_a_vae(pictures: Path, tiny_vae: Path):
    (pictures / "metadata.csv").write_text("file_name,caption\ngone.png,x\n")
    (pictures / "0.txt").write_bytes(b"caf\xe9")
    (pictures / "2024_more").mkdir()
    Image.new("RGB", (32, 32)).save(pictures / "2024_more" / "3.png")
    vae = load_vae(tiny_vae, dtype=torch.float32)
    with pytest.raises(ConfigError, match="--no-folder-repeats"):
        training_data(vae, DecoderData(pictures).config(), seed=0)
    data = training_data(vae, DecoderData(pictures, folder_repeats=False).config(), seed=0)
    assert [(p.caption, p.repeats) for p in data.samples] == [("", 1)] * 4 and data.left_out == []


def test_a_vae_comes_from_anything_that_holds_one(tiny_vae: Path, tmp_path: Path):
    sd = model()
    save_folder(sd.components, tmp_path / "folder")
    save_single_file(sd.components, tmp_path / "whole.safetensors")
    expected = sd.vae.state_dict()
    for place in ("folder", "folder/vae", "whole.safetensors", "tiny.safetensors"):
        found = load_vae(tmp_path / place, dtype=torch.float32).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found), place
    assert all(p.dtype == torch.float32 for p in load_vae("tabletop", dtype=torch.float32).parameters())
    with pytest.raises(CheckpointError, match="nothing"):
        load_vae(tmp_path / "nothing", dtype=torch.float32)


def test_a_users_mistake_is_an_error_before_anything_starts(pictures: Path, tiny_vae: Path, tmp_path: Path):
    options = (*options_of(pictures, tiny_vae), "--output", tmp_path / "run")
    printed = call((*options, "--max-grad-norm", 1), app, status=1)
    assert "max_grad_norm: expected 0 with a discriminator" in printed
    assert "resolution: expected a positive multiple of 2 pixels" in call((*options, "--resolution", 15), app, status=1)
    (pictures / "1.png").write_text("broken")
    assert "1 problem with the training data" in call(options, app, status=1)
    assert not (tmp_path / "run").exists()


def test_help_has_every_option_in_its_panel():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    kinds = {
        "Model": DecoderModel,
        "Data": DecoderData,
        "Loss": DecoderLossConfig,
        "Training": DecoderTraining,
        "Samples": DecoderSamples,
    }
    for panel, kind in kinds.items():
        assert f"─ {panel} ─" in shown
        for f in fields(kind):
            assert flag(f) in shown, f.name


@pytest.mark.slow
def test_an_unseen_surface_comes_out_better(tmp_path: Path):
    """Stripes, which the tabletop VAE never saw: at least 1.5 dB on pictures that the decoder was not trained on."""
    write_concept_folder(tmp_path / "data", 48, 0)
    write_concept_folder(tmp_path / "unseen", 24, 77)
    output = tmp_path / "run"
    call(
        (
            "--data",
            tmp_path / "data",
            "--validation-data",
            tmp_path / "unseen",
            "--output",
            output,
            "--random-flip",
            "--max-train-steps",
            40,
            "--learning-rate",
            5e-4,
            "--lr-scheduler",
            "cosine",
            "--num-validation-images",
            0,
        ),
        app,
    )
    base, trained = load_vae("tabletop", dtype=torch.float32), load_vae_file(output / "vae.safetensors")
    views = validation_views(base, DecoderData(tmp_path / "unseen"))
    before, after = (measure(vae, map(pixels, views)) for vae in (base, trained))
    assert after["PSNR"] > before["PSNR"] + 1.5 and after["SSIM"] > before["SSIM"] + 0.01
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in trained.state_dict().items() if is_encoder(k))
