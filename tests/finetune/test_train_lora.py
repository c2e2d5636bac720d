"""The training script, from a folder of pictures to a LoRA; its options and its TOML file."""

import importlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

import finetune
from finetune.data.batches import DataConfig
from finetune.data.folders import read_folder
from finetune.recipe.command_line import command, to_toml
from finetune.recipe.diffusion_loss import LossConfig
from finetune.recipe.run import RECOMPUTED, SampleConfig, make_class_pictures
from finetune.train_lora import LoraModel, LoraOptions, add_adapter, app, rate_factor
from finetune.training.config import TrainConfig
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from sdkit.errors import ConfigError, SDKitError
from tests.finetune import toy
from tests.finetune.tiny import model

ROOT = Path(__file__).parents[2]
QUICK = ("--max-train-steps", "3", "--num-inference-steps", "2", "--num-validation-images", "1", "--logging-steps", "1")


def call(arguments: Sequence[object], program=app, status: int = 0) -> str:
    """Run the command line; everything that it printed."""
    result = CliRunner().invoke(program, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures with captions."""
    (tmp_path / "data").mkdir()
    for name, size, colour in (("a", (64, 64), "red"), ("b", (48, 80), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a {colour} wall")
    return tmp_path / "data"


# The script


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
    before, after = (Image.open(output / f"samples/step-{n:06d}.png").tobytes() for n in (0, 3))
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


def test_class_pictures_are_made_until_there_are_enough(tmp_path: Path):
    asked: list[tuple[str, int]] = []

    class Model:
        def text_to_image(self, prompt: str, seed: int, progress: bool) -> SimpleNamespace:
            asked.append((prompt, seed))
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    config = DataConfig(tmp_path, class_data=tmp_path / "class", class_prompt="a wall", num_class_images=2)
    make_class_pictures(Model(), config)
    make_class_pictures(Model(), replace(config, num_class_images=3))
    make_class_pictures(Model(), replace(config, num_class_images=0, class_data=None, class_prompt=None))
    assert asked == [("a wall", 0), ("a wall", 1), ("a wall", 2)]
    assert [p.caption for p in read_folder(tmp_path / "class", "a wall", prior=True)] == ["a wall"] * 3


def test_a_users_mistake_is_an_error_before_anything_starts(pictures: Path, tmp_path: Path):
    (pictures / "b.png").write_text("broken")
    (pictures / "a.txt").unlink()
    printed = call(("--data", pictures, "--output", tmp_path / "run"), status=1)
    assert "2 problems with the training data" in printed and "a.png: no caption" in printed and "b.png" in printed
    assert not (tmp_path / "run").exists()
    assert "loraplus_lr_ratio: expected a positive" in call(("--data", pictures, "--loraplus-lr-ratio", 0), status=1)
    assert "caption_dropout: expected a share" in call(("--data", pictures, "--caption-dropout", 2), status=1)


def test_help_has_every_option_in_its_panel():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for panel in ("Model", "LoRA", "Data", "Loss", "Training", "Samples"):
        assert f"─ {panel} ─" in shown
    kinds = (LoraModel, LoraOptions, DataConfig, LossConfig, TrainConfig, SampleConfig)
    for name in [f.name for kind in kinds for f in fields(kind)] + ["config"]:
        assert f"--{name.replace('_', '-')} " in shown, name


# What the prior class is held to


@pytest.mark.parametrize("name", ["lora", "hypernetwork", "unet"])
def test_under_the_bases_own_target_prior_pictures_cost_nothing_at_first(name: str, pictures: Path, tmp_path: Path):
    """And with the pictures as target they do, so that the base was really asked, by every script."""
    program = importlib.import_module(f"finetune.train_{name}").app
    shutil.copytree(pictures, tmp_path / "class")
    losses: dict[str, list[float]] = {}
    frozen: dict[str, str] = {}
    for kind in ("base", "picture"):
        output = tmp_path / kind
        printed = call(
            (
                "--data",
                pictures,
                "--class-data",
                tmp_path / "class",
                "--prior-loss-weight",
                1e9,
                "--prior-target",
                kind,
                "--output",
                output,
                "--max-train-steps",
                3,
                "--num-validation-images",
                0,
                "--train-batch-size",
                4,
                "--learning-rate",
                1e-3,
                "--lr-warmup-steps",
                0,
                "--logging-steps",
                1,
            ),
            program,
        )
        frozen[kind] = printed.split("(frozen ")[1].split(",")[0]
        rows = (output / "losses.csv").read_text().splitlines()[1:]
        losses[kind] = [float(row.split(",")[1]) for row in rows]
        toy.forget_accelerate()
    assert losses["base"][0] < 10 < 1e6 < min(losses["picture"])
    assert (frozen["base"] != frozen["picture"]) == (name == "unet")  # which keeps a copy of what it trains
    assert losses["base"][-1] > 100  # it has changed since, and is told


def test_the_bases_own_target_needs_prior_pictures_and_no_fsdp(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ("--data", pictures, "--output", tmp_path / "run", "--prior-target", "base")
    assert "prior_target: expected a class_data" in call(options, status=1)
    monkeypatch.setattr("finetune.recipe.run.make_accelerator", lambda config: SimpleNamespace(is_fsdp2=True))
    assert "expected picture under FSDP" in call((*options, "--class-data", pictures), status=1)


# Options


@dataclass(frozen=True)
class Things:
    needed: Annotated[Path, "Required."]
    many: Annotated[tuple[str, ...], "Repeated."] = ("x",)
    share: Annotated[float | None, "A number or none."] = None


@dataclass(frozen=True)
class More:
    on: Annotated[bool, "A switch."] = False
    text: Annotated[str, "Words."] = 'é "\\ \n'


def parsed(arguments: Sequence[object], status: int = 0) -> tuple[Things, More] | str:
    got: list[tuple[Things, More]] = []
    printed = call(arguments, command(lambda *configs: got.append(configs), {"Things": Things, "More": More}), status)
    return got[0] if status == 0 else printed


def test_options_become_dataclasses():
    assert parsed(["--needed", "p"]) == (Things(Path("p")), More())
    assert parsed(["--needed", "p", "--many", "a", "--many", "b", "--share", "1", "--on"]) == (
        Things(Path("p"), ("a", "b"), 1.0),
        More(True),
    )


def test_the_file_gives_defaults(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('needed = "p"\n[tables]\nmany = ["a", "b"]\n[tables.deep]\non = true\nshare = 2\n')
    assert parsed(["--config", file]) == (Things(Path("p"), ("a", "b"), 2.0), More(True))
    assert parsed(["--share", 3, "--config", file, "--no-on", "--many", "c"]) == (
        Things(Path("p"), ("c",), 3.0),
        More(False),
    )
    every = (Things(Path("q"), (), 0.5), More(True))
    file.write_text(to_toml(*every), encoding="utf-8")
    assert parsed(["--config", file]) == every


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nedeed = 1\nwrong = 2", "unknown options nedeed, wrong"),
        ("a = ", "cannot be read as TOML"),
        ("[a]\non = true\n[b]\non = true", "on is given twice"),
        ("needed = 'p'\nshare = 'x'", "share"),
    ],
)
def test_a_wrong_file_is_a_clear_error(tmp_path: Path, content: str, message: str):
    (tmp_path / "run.toml").write_text(content)
    assert message in " ".join(str(parsed(["--config", tmp_path / "run.toml"], status=2)).replace("│", " ").split())
    assert "Missing option" in str(parsed([], status=2))


def test_errors_of_users_end_with_status_1_and_others_are_raised():
    def fail(error: Exception):
        def run(things: Things) -> None:
            raise error

        return command(run, {"Things": Things})

    assert "error: one line" in call(["--needed", "p"], fail(ConfigError("one line")), status=1)
    assert "error: x" in call(["--needed", "p"], fail(SDKitError("x")), status=1)
    with pytest.raises(ZeroDivisionError):
        call(["--needed", "p"], fail(ZeroDivisionError()))


# Size

SD1 = """
import torch
from sdkit.checkpoint import Components
from sdkit import AutoencoderKL, StableDiffusion, UNet2DConditionModel, UNetConfig, VAEConfig
from sdkit.config import UNetConfig
from sdkit.single_file import read_preset
from sdkit.text import build_text_encoder, clip_tokenizer
import finetune.runs
from finetune.train_lora import app

def random_model(name, device, dtype):
    preset = read_preset("sd1")
    return StableDiffusion(Components(
        UNet2DConditionModel.from_config(preset["unet"]), AutoencoderKL.from_config(preset["vae"]),
        build_text_encoder(preset["text_encoder"]), clip_tokenizer(), preset["scheduler"]))

finetune.recipe.run.load_model = random_model
import sys
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
