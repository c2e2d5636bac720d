"""The training script, from a folder of pictures to a LoRA."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

import finetune
from finetune.data.config import DataConfig
from finetune.lora.adapters import layers
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets, places_in, targets_of
from finetune.lora.writing import write_lora
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.facts import PLACES
from finetune.recipe.run import RECOMPUTED, SampleConfig
from finetune.train_lora import RECIPES, LoraModel, LoraOptions, add_adapter, app, highest_rate
from finetune.training.config import TrainConfig
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from sdkit.errors import CheckpointError
from tests.conftest import read_image
from tests.finetune import toy
from tests.finetune.commands import call, flag, two_pictures
from tests.finetune.tiny import drawn_updates, model
from tests.finetune.training.test_loop import wait_for

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
    sd = StableDiffusion.from_pretrained("tabletop")
    side = sd.picture_size[0]
    assert f"2: 1 of {side}×{side}, 1 of {3 * side // 4}×{5 * side // 4}" in printed
    trained = match_targets(targets_of(sd.unet, "unet"), "cross_attention")
    numbers = sum(2 * sum(sd.unet.get_submodule(target.path).weight.shape) for target in trained)
    assert f"{numbers:,} parameters" in printed
    for name in (
        "lora.safetensors",
        "report.md",
        "overview.png",
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
    plain = sd.text_to_image("a red cube", seed=0, num_inference_steps=2, output_type="latent").latents
    finetune.load_lora(sd, output / "lora.safetensors")
    assert not torch.allclose(
        sd.text_to_image("a red cube", seed=0, num_inference_steps=2, output_type="latent").latents, plain, atol=1e-3
    )


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.toml")))
def test_a_recipe_is_trained_by(pictures: Path, tmp_path: Path, recipe: str):
    output = tmp_path / "run"
    beside = ("--train-batch-size", 1, "--rank", 2, "--lr-warmup-steps", 0)
    call(("--recipe", recipe, "--data", pictures, "--output", output, *QUICK, *beside))
    asked = tomllib.loads((RECIPES / f"{recipe}.toml").read_text())
    done = tomllib.loads((output / "config.toml").read_text())
    given = {"train_batch_size": 1, "rank": 2, "lr_warmup_steps": 0, "max_train_steps": 3}
    assert {name: done[name] for name in given} == given
    for name, value in asked.items():
        key = name.replace("-", "_")
        assert done[key] == given.get(key, value)


def test_the_written_config_makes_the_run_again(pictures: Path, tmp_path: Path):
    options = (
        "--data",
        pictures,
        "--max-train-steps",
        3,
        "--logging-steps",
        1,
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
    lora = LoraOptions(loraplus_lr_ratio=16.0, train_text_encoder=True, text_encoder_lr=0.5)
    for network, rate in ((sd.unet, 1.0), (sd.text_encoder, 0.5)):
        place = "unet" if network is sd.unet else "context.text_encoder"
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        found = [highest_rate(f"{place}.{name}", lora, 1.0) for name in names]
        assert found == [rate * (16 if name.endswith("lora_B.default.weight") else 1) for name in names]
        assert found.count(rate) == found.count(16 * rate) == len(found) / 2 > 0


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A LoRA of the shipped model, of two ranks and scales."""
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    chosen = match_targets(targets_of(sd.unet, "unet"), ["attn1.to_q", "conv1"])
    updates = drawn_updates(chosen, lambda t: 2 if "conv" in t.path else 3, lambda t: 0.5 if "up" in t.path else 2.0)
    write_lora(updates, tmp_path / "first.safetensors")
    return tmp_path / "first.safetensors"


def test_a_run_goes_on_from_a_file_and_needs_it_once(pictures: Path, first: Path, tmp_path: Path):
    """Without learning it stays the file; resumed without the file it is the run that was never stopped."""
    quick = (*QUICK[:2], "--num-validation-images", 0, "--data", pictures, "--init-lora", first)
    still = ("--learning-rate", 1e-30, "--adam-weight-decay", 0, "--output", tmp_path / "still")
    assert "first.safetensors" in call((*quick, *still))
    places = places_in(StableDiffusion.from_pretrained("tabletop", device="cpu"))
    before, after = (read_lora(path, places) for path in (first, tmp_path / "still" / "lora.safetensors"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[t].delta(), before[t].delta(), rtol=1e-5, atol=1e-7) for t in before)
    assert {(t, u.rank, u.scale) for t, u in after.items()} == {(t, u.rank, u.scale) for t, u in before.items()}

    moving = ("--learning-rate", 1e-3, "--checkpointing-steps", 1)
    toy.forget_accelerate()
    call((*quick, *moving, "--output", tmp_path / "whole"))
    toy.forget_accelerate()
    call((*quick, *moving, "--output", tmp_path / "parts"))
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3")
    first.unlink()
    toy.forget_accelerate()
    call((*quick, *moving, "--output", tmp_path / "parts"))
    whole, parts = (load_file(tmp_path / run / "lora.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    trained = read_lora(tmp_path / "whole" / "lora.safetensors", places)
    assert all(not torch.allclose(trained[t].delta(), before[t].delta(), atol=1e-6) for t in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 3), "rank: expected that of .*first.safetensors, 2, 3, or none to follow it, found 3"),
        (("--alpha", 7), "alpha: expected that of .*, 1, 1.5, 4, 6, or none to follow it, found 7"),
        (("--targets", "attention"), "targets: expected those of .*, which (has|lacks) unet.*, or none to follow it"),
        (("--targets", "attn1.to_q", "--targets", "conv_in"), "which lacks unet.conv_in,"),
        (("--use-dora",), "use_dora: expected DoRA in .*, found LoRA"),
        (("--use-rslora",), "use_rslora: does nothing beside init_lora"),
        (("--init", "gaussian"), "init: does nothing beside init_lora"),
        (("--train-text-encoder",), "train_text_encoder: expected to train .* lacks modules of the text_encoder"),
        (
            ("--train-text-encoder", "--learning-rate", 0, "--text-encoder-lr", 1e-3),
            "learning_rate: expected to train what .* is for; it has modules of the unet",
        ),
    ],
)
def test_what_the_file_is_not_is_named(pictures: Path, first: Path, tmp_path: Path, options: tuple, message: str):
    printed = call(("--data", pictures, "--output", tmp_path / "run", "--init-lora", first, *options), status=1)
    assert re.search(message, printed) and not (tmp_path / "run").exists()


def test_a_run_that_did_not_start_from_a_file_does_not_go_on_from_it(pictures: Path, first: Path, tmp_path: Path):
    """Which is said, and not that a copy of the file is missing."""
    command = (*QUICK[:2], "--num-validation-images", 0, "--data", pictures, "--output", tmp_path / "run")
    call((*command, "--rank", 3, "--targets", "attn1.to_q", "--targets", "conv1"))
    toy.forget_accelerate()
    assert re.search(
        "of a run with .*init_lora none, now '.*first.safetensors'", call((*command, "--init-lora", first), status=1)
    )
    assert not list((tmp_path / "run").glob("init_lora*"))


def test_what_the_format_cannot_hold_is_named_before_training(pictures: Path, first: Path, tmp_path: Path):
    """And not by the first state that is to be saved."""
    words = {"bundle_emb.zork.string_to_param.*": torch.zeros(1, 128)}
    save_file(load_file(first) | words, tmp_path / "words.safetensors")
    quick = (
        *QUICK[:2],
        "--num-validation-images",
        0,
        "--data",
        pictures,
        "--init-lora",
        tmp_path / "words.safetensors",
    )
    printed = call((*quick, "--output", tmp_path / "run"), status=1)
    assert "error: the embedding zork: diffusers's format has no place for it, use kohya's" in printed
    assert not (tmp_path / "run").exists()


def test_what_the_file_is_may_be_said(pictures: Path, first: Path, tmp_path: Path):
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    lora = LoraOptions(targets=("attn1.to_q", "conv1"), dropout=0.5)
    add_adapter(sd, lora, first)
    assert finetune.list_adapters(sd)["default"].enabled
    dropouts = {layer.lora_dropout["default"].p for _, _, layer in layers(sd)}
    assert dropouts == {0.5} and sum(p.requires_grad for p in sd.unet.parameters()) == 2 * len(layers(sd))
    with pytest.raises(CheckpointError, match="nowhere"):
        add_adapter(model(), LoraOptions(), tmp_path / "nowhere.safetensors")


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
    facts = []
    for more in ((), ("--no-gradient-checkpointing", "--clip-skip", 0, "--validation-prompt", "x")):
        toy.forget_accelerate()
        with pytest.raises(Started) as caught:
            call((*options, *more))
        loss, batches, config, output, arguments = caught.value.args
        assert loss.config == LossConfig(snr_gamma=5.0, noise_offset=0.1) and config == TrainConfig(learning_rate=0.5)
        assert output == tmp_path / "run" and not (output / "cache").exists() and (tmp_path / "cache" / "text").exists()
        assert batches(0).latents.shape[0] == 2 and set(batches(0).captions) <= {"a red cube", "a blue cube"}
        blocks = [m for m in loss.unet.modules() if isinstance(m, RECOMPUTED)]
        assert all(isinstance(m.forward, partial) != bool(more) for m in blocks) and len(blocks) > 10
        assert arguments["validate"].args[2] == (("x",) if more else ("a red cube", "a blue cube"))
        facts.append(arguments["facts"])
    assert {k for k in facts[0] if facts[0][k] != facts[1][k]} == {"clip_skip"}
    options = {f.name for kind in (LoraOptions, DataConfig, LossConfig) for f in fields(kind)} - set(PLACES)
    models = {f"the model's {network}" for network in ("unet", "vae", "text_encoder")}
    assert facts[0].keys() == options | models | {"clip_skip", "pictures", "noise schedule"}
    assert facts[0]["pictures"].keys() == {"a.png", "b.png"}


def test_the_text_encoder_can_train_alone(pictures: Path, tmp_path: Path):
    """With its own rate's warm-up and fall, and as it does beside a UNet that does not train."""
    options = ("--data", pictures, "--num-validation-images", 0, "--train-text-encoder", "--text-encoder-lr", 1e-2)
    steps = ("--max-train-steps", 3, "--logging-steps", 1, "--lr-scheduler", "linear", "--lr-warmup-steps", 1)
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.extend(group["lr"] for group in o.param_groups))
    try:
        call((*options, *steps, "--output", tmp_path / "run", "--learning-rate", 0))
    finally:
        hook.remove()
    assert rates == pytest.approx([0, 1e-2, 5e-3])
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[3]) for row in rows] == rates
    file = load_file(tmp_path / "run" / "lora.safetensors")
    assert len(file) > 0 and all(key.startswith("text_encoder.") for key in file)
    assert all(float(value.abs().max()) > 0 for key, value in file.items() if "lora_B" in key or "lora.up" in key)


def test_layers_that_clip_skip_leaves_out_get_no_adapters(pictures: Path, tmp_path: Path):
    """They would have no gradient, which is an error that names them."""
    options = ("--data", pictures, "--num-validation-images", 0, "--max-train-steps", 1, "--train-text-encoder")
    call((*options, "--clip-skip", 1, "--output", tmp_path / "run"))
    layers = StableDiffusion.from_pretrained("tabletop").text_encoder.config.num_hidden_layers
    names = {key for key in load_file(tmp_path / "run" / "lora.safetensors") if key.startswith("text_encoder.")}
    found = {int(key.split(".layers.")[1].split(".")[0]) for key in names}
    assert found == set(range(layers - 1)) and layers > 1

    printed = call((*options, "--clip-skip", 1, "--targets", f"layers.{layers - 1}.mlp.fc1", "--targets", "to_k",
                    "--output", tmp_path / "a"), status=1)  # fmt: skip
    assert f"targets: nothing matches layers.{layers - 1}.mlp.fc1" in printed


def test_a_resumed_run_that_has_changed_says_in_what(pictures: Path, tmp_path: Path):
    """Before and now: pictures, captions, batch, resolution, the noise schedule; never a hash."""
    folder = tmp_path / "model"
    StableDiffusion.from_pretrained("tabletop").save_pretrained(folder)
    options = ("--model", folder, "--data", pictures, "--output", tmp_path / "run", "--num-validation-images", 0)
    call((*options, "--max-train-steps", 2))

    def refused(*more: object) -> str:
        toy.forget_accelerate()
        said = call((*options, "--max-train-steps", 2, *more), status=1).split("error: ")[1]
        assert "choose another output folder, or --no-resume begins anew" in said
        assert not re.search("[0-9a-f]{32}", said.replace(str(tmp_path), ""))
        return said

    toy.forget_accelerate()
    (tmp_path / "run" / "losses.csv").write_text("the user's own")
    assert "finished before, after 2 steps, and nothing is changed" in call((*options, "--max-train-steps", 2))
    assert (tmp_path / "run" / "losses.csv").read_text() == "the user's own"
    (tmp_path / "run" / "lora.safetensors").unlink()  # as if it had been killed before it was written
    toy.forget_accelerate()
    call((*options, "--max-train-steps", 2))
    assert (tmp_path / "run" / "lora.safetensors").exists()
    assert "train_batch_size 1, now 2" in refused("--train-batch-size", 2)
    said = refused("--resolution", 48, "--rank", 4)
    assert (
        "resolution none, now 48" in said
        and "rank none, now 4" in said
        and f"a.png: bucket {StableDiffusion.from_pretrained(folder).picture_size}, now (48, 48)" in said
    )
    assert "max_train_steps: the run has done 2 already, found 1" in refused("--max-train-steps", 1)

    (pictures / "a.txt").write_text("a green cube")
    (pictures / "b.png").rename(pictures / "c.png")
    (pictures / "b.txt").rename(pictures / "c.txt")
    assert "pictures: added c.png; removed b.png; a.png: caption 'a red cube', now 'a green cube'" in refused()
    (pictures / "c.png").rename(pictures / "b.png")
    (pictures / "c.txt").rename(pictures / "b.txt")
    (pictures / "a.txt").write_text("a red cube")

    Image.new("RGB", (64, 64), "yellow").save(pictures / "a.png")
    assert "pictures: a.png: content: not the same" in refused()
    Image.new("RGB", (64, 64), "red").save(pictures / "a.png")

    file = folder / "scheduler" / "scheduler_config.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps(text | {"beta_end": 0.02}))
    assert "noise schedule: beta_end 0.012, now 0.02" in refused()
    file.write_text(json.dumps(text))
    toy.forget_accelerate()
    call((*options, "--max-train-steps", 2))  # all as it was


def test_ctrl_c_saves_and_the_same_command_ends_with_the_same_file(pictures: Path, tmp_path: Path):
    options = ["--data", pictures, "--num-validation-images", 0, "--max-train-steps", 40, "--dropout", 0.2]
    options += ["--cache-dir", tmp_path / "cache", "--output", tmp_path / "stopped"]
    arguments = [str(a) for a in (*options, "--checkpointing-steps", 2)]
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.train_lora", *arguments],
        cwd=ROOT,
        env=toy.environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # even if ours is ignored
    )

    wait_for(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said and "Aborted" not in said
    assert said.rstrip().endswith("the same command goes on from there") and "stopped by SIGINT after step " in said
    assert not (tmp_path / "stopped" / "lora.safetensors").exists()

    call(options)
    toy.forget_accelerate()
    call((*options, "--output", tmp_path / "whole"))
    a, b = (load_file(tmp_path / output / "lora.safetensors") for output in ("stopped", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    losses = [(tmp_path / output / "losses.csv").read_text() for output in ("stopped", "whole")]
    assert losses[0] == losses[1]


def test_trouble_with_files_is_one_line(pictures: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").mkdir()
    quick = ("--data", pictures, "--max-train-steps", 1, "--num-validation-images", 0)
    for arguments, name, message in (
        (("--output", tmp_path / "file" / "run"), "file", "a file is where a folder should be, choose another place"),
        (("--output", tmp_path / "run"), "run/config.toml", "a folder is in the way, choose another name"),
        (("--model", tmp_path / "nowhere"), "nowhere", "no such file"),
    ):
        toy.forget_accelerate()
        printed = call((*quick, *arguments), status=1)
        line = printed.split("error: ")[1]
        assert f"{tmp_path / name}" in line and message in line and line.count("\n") == 1


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
    assert "--config " in shown
    for f in [f for kind in kinds for f in fields(kind)]:
        assert flag(f) in shown, f.name


SD1 = """
import sys

from finetune.train_lora import app
from sdkit import AutoencoderKL, StableDiffusion, UNet2DConditionModel
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.conftest import read_image

def random_model(name, device, dtype, graphs):
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
