"""The training script, from a folder of pictures to a LoRA."""

import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

import finetune
from finetune.data.batches import DataConfig
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.run import RECOMPUTED, SampleConfig
from finetune.train_lora import LoraModel, LoraOptions, add_adapter, app, rate_factor
from finetune.training.config import TrainConfig
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from tests.conftest import read_image
from tests.finetune import toy
from tests.finetune.commands import call, two_pictures
from tests.finetune.tiny import model

ROOT = Path(__file__).parents[2]
QUICK = ("--max-train-steps", "3", "--num-inference-steps", "2", "--num-validation-images", "1", "--logging-steps", "1")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return two_pictures(tmp_path / "data")


def test_a_folder_of_pictures_becomes_a_lora(pictures: Path, tmp_path: Path):
    output = tmp_path / "run"
    options = (
        "--data",
        pictures,
        "--output",
        output,
        *QUICK,
        "--snr-gamma",
        5,
        "--noise-offset",
        0.05,
        "--random-flip",
        "--learning-rate",
        0.01,
        "--rank",
        2,
        "--gradient-checkpointing",
        "--checkpointing-steps",
        2,
    )
    printed = call(options)
    assert "2: 1 of 64×64, 1 of 48×80" in printed and "15,872 parameters" in printed
    for name in (
        "lora.safetensors",
        "report.md",
        "loss.png",
        "losses.csv",
        "config.toml",
        "samples/step-000000.png",
        "samples/step-000003.png",
        "checkpoint-2/lora.safetensors",
        "checkpoint-3/state.pt",
    ):
        assert (output / name).is_file(), name
    before, after = (read_image(output / f"samples/step-{n:06d}.png").tobytes() for n in (0, 3))
    assert before != after
    file = load_file(output / "lora.safetensors")
    state = load_state(saved_states(output)[-1])["weights"]
    assert len(file) >= len(state) > 0 and any(float(v.abs().max()) > 0 for k, v in file.items() if "lora_B" in k)
    sd = StableDiffusion.from_pretrained("tabletop")
    plain = sd.text_to_image("a red wall", seed=0, num_inference_steps=2, output_type="latent").latents
    finetune.load_lora(sd, output / "lora.safetensors")
    assert not torch.allclose(
        sd.text_to_image("a red wall", seed=0, num_inference_steps=2, output_type="latent").latents, plain, atol=1e-3
    )


def test_the_written_config_makes_the_run_again(pictures: Path, tmp_path: Path):
    options = (
        "--data",
        pictures,
        *QUICK,
        "--num-validation-images",
        0,
        "--ema-decay",
        0.5,
        "--train-text-encoder",
        "--text-encoder-lr",
        1e-3,
        "--loraplus-lr-ratio",
        4,
        "--targets",
        "to_k",
        "--targets",
        "v_proj",
        "--caption-dropout",
        0.5,
    )
    rates: set[float] = set()
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.update(group["lr"] for group in o.param_groups))
    try:
        call((*options, "--output", tmp_path / "a"))
    finally:
        hook.remove()
    assert sorted(rates) == pytest.approx([1e-4, 4e-4, 1e-3, 4e-3])
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--max-train-steps", 2))
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b"))  # goes on for one step
    a, b = (load_file(tmp_path / run / "lora.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("text_encoder" in k for k in a) and not any("to_q" in k for k in a)
    assert not (tmp_path / "a" / "samples").exists()
    values = [tomllib.loads((tmp_path / run / "config.toml").read_text()) for run in "ab"]
    assert values[0] | {"output": ""} == values[1] | {"output": ""} and values[0]["targets"] == ["to_k", "v_proj"]


def test_the_second_matrices_may_learn_faster():
    sd = model()
    add_adapter(sd, LoraOptions(loraplus_lr_ratio=16.0, train_text_encoder=True))
    for network, factor in ((sd.unet, 1.0), (sd.text_encoder, 0.5)):
        place = "unet" if network is sd.unet else "context.text_encoder"
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        found = [rate_factor(f"{place}.{name}", LoraOptions(loraplus_lr_ratio=16.0), 0.5) for name in names]
        assert found == [factor * (16 if name.endswith("lora_B.default.weight") else 1) for name in names]
        assert found.count(factor) == found.count(16 * factor) == len(found) / 2 > 0


def test_options_reach_what_they_are_for(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Started(Exception):
        pass

    def started(accelerator, loss, batches, config, output, **arguments):
        raise Started(loss, batches, config, output, arguments)

    monkeypatch.setattr("finetune.recipe.run.train", started)
    options = (
        "--data",
        pictures,
        "--output",
        tmp_path / "run",
        "--cache-dir",
        tmp_path / "cache",
        "--snr-gamma",
        5,
        "--noise-offset",
        0.1,
        "--gradient-checkpointing",
        "--learning-rate",
        0.5,
        "--clip-skip",
        1,
        "--train-batch-size",
        2,
    )
    identities = []
    for more in ((), ("--no-gradient-checkpointing", "--clip-skip", 0, "--validation-prompt", "x")):
        toy.forget_accelerate()
        with pytest.raises(Started) as caught:
            call((*options, *more))
        loss, batches, config, output, arguments = caught.value.args
        assert loss.config == LossConfig(snr_gamma=5.0, noise_offset=0.1) and config == TrainConfig(learning_rate=0.5)
        assert output == tmp_path / "run" and not (output / "cache").exists() and (tmp_path / "cache" / "text").exists()
        assert batches(0).latents.shape[0] == 2 and set(batches(0).captions) <= {"a red wall", "a blue wall"}
        blocks = [m for m in loss.unet.modules() if isinstance(m, RECOMPUTED)]
        assert all(isinstance(m.forward, partial) != bool(more) for m in blocks) and len(blocks) > 10
        assert arguments["validate"].args[2] == (("x",) if more else ("a red wall", "a blue wall"))
        identities.append(arguments["identity"])
    assert {k for k in identities[0] if identities[0][k] != identities[1][k]} == {"clip_skip"}
    assert identities[0].keys() == {"data", "unet", "vae", "text_encoder", "options", "loss", "clip_skip"}


def test_a_users_mistake_is_an_error_before_anything_starts(pictures: Path, tmp_path: Path):
    (pictures / "b.png").write_text("broken")
    (pictures / "a.txt").unlink()
    printed = call(("--data", pictures, "--output", tmp_path / "run"), status=1)
    assert "2 problems with the training data" in printed and "a.png: no caption" in printed and "b.png" in printed
    assert not (tmp_path / "run").exists()
    assert "loraplus_lr_ratio: expected a finite number above 0" in call(
        ("--data", pictures, "--loraplus-lr-ratio", 0), status=1
    )
    assert "caption_dropout: expected a number from 0 to 1" in call(
        ("--data", pictures, "--caption-dropout", 2), status=1
    )


def test_help_has_every_option_in_its_panel():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for panel in ("Model", "LoRA", "Data", "Loss", "Training", "Samples"):
        assert f"─ {panel} ─" in shown
    kinds = (LoraModel, LoraOptions, DataConfig, LossConfig, TrainConfig, SampleConfig)
    for name in [f.name for kind in kinds for f in fields(kind)] + ["config"]:
        assert f"--{name.replace('_', '-')} " in shown, name


SD1 = """
import sys

from finetune.train_lora import app
from sdkit import AutoencoderKL, StableDiffusion, UNet2DConditionModel
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.conftest import read_image

def random_model(name, device, dtype):
    preset = read_preset("sd1")
    return StableDiffusion(Components(
        UNet2DConditionModel.from_config(preset["unet"]), AutoencoderKL.from_config(preset["vae"]),
        build_text_encoder(preset["text_encoder"]), clip_tokenizer(), preset["scheduler"]))

StableDiffusion.load = random_model
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_network_of_sd1s_size_trains_in_12_gb(pictures: Path, tmp_path: Path):
    (tmp_path / "run.py").write_text(SD1)
    program = [sys.executable, str(tmp_path / "run.py"), "--data", str(pictures), "--output", str(tmp_path / "run")]
    program += ["--max-train-steps", "1", "--num-validation-images", "0", "--gradient-checkpointing"]
    subprocess.run(program, check=True, cwd=ROOT, env=toy.environment())
    report = (tmp_path / "run" / "report.md").read_text()
    peak = float(report.split("at most ")[1].split(" GB")[0])
    widths = 5 * [320] + 5 * [640] + 6 * [1280]  # of the transformers; q and out take w to w, k and v 768 to w
    parameters = sum(8 * (2 * (w + w) + 2 * (768 + w)) for w in widths)
    assert f"{parameters:,} parameters" in report and 4 < peak < 12, report
