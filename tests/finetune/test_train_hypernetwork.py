"""The training script of hypernetworks, from a folder of pictures to a file; the rest of it is that of LoRA."""

from dataclasses import fields
from pathlib import Path

import torch
from typer.testing import CliRunner

from finetune.hypernetwork.attach import list_hypernetworks, load_hypernetwork
from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import Hypernetwork
from finetune.train_hypernetwork import HypernetworkModel, HypernetworkOptions, HypernetworkTraining, app, hypernetwork
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from tests.conftest import read_image
from tests.finetune import toy
from tests.finetune.commands import call, flag
from tests.finetune.hypernetwork.a1111 import check_like_a1111
from tests.finetune.tiny import model

QUICK = ("--max-train-steps", 3, "--lr-warmup-steps", 1, "--num-inference-steps", 2, "--logging-steps", 1)


def test_a_folder_of_pictures_becomes_a_hypernetwork(pictures: Path, tmp_path: Path):
    output = tmp_path / "fur"
    printed = call(
        (
            "--data",
            pictures,
            "--output",
            output,
            *QUICK,
            "--num-validation-images",
            1,
            "--learning-rate",
            0.01,
            "--gradient-checkpointing",
            "--checkpointing-steps",
            2,
            "--no-whiten",
        ),
        app,
    )
    assert f"{4 * (128 * 256) + 2 * (128 + 256):,} parameters in 8 tensors" in printed
    for name in ("report.md", "loss.png", "losses.csv", "config.toml", "checkpoint-2/hypernetwork.pt"):
        assert (output / name).is_file(), name
    before, after = (read_image(output / f"samples/step-{n:06d}.png").tobytes() for n in (0, 3))
    assert before != after
    assert "Written: `hypernetwork.pt`" in (output / "report.md").read_text()
    check_like_a1111(output / "hypernetwork.pt")
    network = read_hypernetwork(output / "hypernetwork.pt")
    weights = load_state(saved_states(output)[-1])["weights"]
    assert {key.removeprefix("beside."): v for key, v in weights.items()}.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[f"beside.{key}"], v) for key, v in network.state_dict().items())
    assert (network.facts["name"], network.facts["sd_checkpoint_name"]) == ("fur", "tabletop")
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    arguments = {"seed": 0, "num_inference_steps": 2, "output_type": "latent", "progress": False}
    plain = sd.text_to_image("a red cube", **arguments).latents
    load_hypernetwork(sd, output / "hypernetwork.pt")
    assert not torch.allclose(sd.text_to_image("a red cube", **arguments).latents, plain, atol=1e-3)


def test_the_written_config_makes_the_run_again_and_a_stopped_run_goes_on_exactly(pictures: Path, tmp_path: Path):
    options = (
        "--data",
        pictures,
        "--max-train-steps",
        3,
        "--lr-warmup-steps",
        1,
        "--logging-steps",
        1,
        "--num-validation-images",
        0,
        "--ema-decay",
        0.5,
        "--caption-dropout",
        0.5,
        "--widths",
        128,
        "--widths",
        160,
        "--layer-structure",
        1,
        "--layer-structure",
        0.5,
        "--layer-structure",
        1,
        "--activation-func",
        "tanh",
        "--weight-initialization",
        "Normal",
        "--is-layer-norm",
        "--activate-output",
        "--dropout-structure",
        0,
        "--dropout-structure",
        0.2,
        "--dropout-structure",
        0,
    )
    call((*options, "--output", tmp_path / "a"), app)
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--max-train-steps", 2), app)
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b"), app)  # goes on for one step
    a, b = (read_hypernetwork(tmp_path / run / "hypernetwork.pt") for run in "ab")
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert (
        a.settings
        == b.settings
        == Hypernetwork([128, 160], (1, 0.5, 1), "tanh", "Normal", True, True, (0, 0.2, 0)).settings
    )
    assert a.widths == [128, 160] and not (tmp_path / "a" / "samples").exists()
    average = load_state(saved_states(tmp_path / "a")[-1])["average"]
    for key, value in a.state_dict().items():  # the whitening lies in the first layer, in each as it trained
        assert torch.equal(average[f"beside.{key}"], value) == ("linear.0." not in key), key
    toy.forget_accelerate()
    other = ("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "a", "--activation-func", "relu")
    assert "of a run with activation_func 'tanh', now 'relu';" in call(other, app, status=1)


def test_it_begins_with_what_changes_nothing_and_trains_alone():
    sd = model()
    torch.manual_seed(3)
    network = hypernetwork(sd, HypernetworkOptions())
    first = [p.clone() for p in network.parameters()]
    assert network.widths == [32] and list(list_hypernetworks(sd).values()) == [network]
    x = torch.randn(1, 3, 32)
    assert torch.equal(network(x, x)[0], x)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert not any(p.requires_grad for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters())
    for seed in (3, 4):
        other = model()
        torch.manual_seed(seed)
        drawn = hypernetwork(other, HypernetworkOptions()).parameters()
        assert all(torch.equal(a, b) for a, b in zip(first, drawn, strict=True)) == (seed == 3)


def test_mistakes_and_help(pictures: Path, tmp_path: Path):
    run = ("--data", pictures, "--output", tmp_path / "run")
    assert "found 'glu', expected one of" in call((*run, "--activation-func", "glu"), app, status=1)
    said = call((*run, "--widths", 768), app, status=1)
    assert "of width 768; expected those of the model: " in said and "128, 160" in said
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "─ Hypernetwork ─" in shown
    for f in [f for kind in (HypernetworkModel, HypernetworkOptions, HypernetworkTraining) for f in fields(kind)]:
        assert flag(f) in shown, f.name
    defaults = HypernetworkTraining()
    assert defaults.rate(0) == 0 and defaults.rate(50) == defaults.learning_rate / 2 and defaults.max_grad_norm > 0
