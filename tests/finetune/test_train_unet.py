"""Fine-tuning the UNet's own weights, from a folder of pictures to a model."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from finetune.train_unet import UNetModel, UNetOptions, app, unfreeze, untrained
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from sdkit.errors import ConfigError
from tests.finetune import toy
from tests.finetune.commands import call, flag
from tests.finetune.tiny import model


@pytest.mark.parametrize(("targets", "trained"), [("cross_attention", "attn2."), (r"attn2\.to_[kv]$", "attn2.to_")])
def test_only_what_is_named_changes(pictures: Path, tmp_path: Path, targets: str, trained: str):
    options = (
        "--data",
        pictures,
        "--targets",
        targets,
        "--max-train-steps",
        3,
        "--num-validation-images",
        0,
        "--learning-rate",
        1e-3,
    )
    call((*options, "--output", tmp_path / "a"), app)
    base, after = (StableDiffusion.from_pretrained(name) for name in ("tabletop", tmp_path / "a" / "model"))
    before, weights = base.unet.state_dict(), after.unet.state_dict()
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert {f"unet.{name}" for name in changed} == set(load_state(saved_states(tmp_path / "a")[-1])["weights"])
    assert changed and all(trained in name for name in changed)
    for part in ("vae", "text_encoder"):
        pairs = zip(getattr(base, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part


def test_a_stopped_run_goes_on_exactly(pictures: Path, tmp_path: Path):
    options = ("--data", pictures, "--num-validation-images", 0, "--learning-rate", 1e-3, "--ema-decay", 0.5)
    call((*options, "--max-train-steps", 4, "--output", tmp_path / "a"), app)
    for steps in (2, 4):
        toy.forget_accelerate()
        call((*options, "--max-train-steps", steps, "--output", tmp_path / "b"), app)
    a, b = (StableDiffusion.from_pretrained(tmp_path / run / "model").unet.state_dict() for run in "ab")
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_all_is_every_weight_and_a_name_without_a_layer_is_an_error():
    sd = model()
    unfreeze(sd, UNetOptions(("all",)))
    assert all(p.requires_grad for p in sd.unet.parameters())
    unfreeze(sd, UNetOptions(("attention",)))
    named = {name.split(".")[-3] for name, p in sd.unet.named_parameters() if p.requires_grad}
    assert {name for name, p in sd.unet.named_parameters() if p.requires_grad} and named <= {"attn1", "attn2", "to_out"}
    assert not any(p.requires_grad for part in (sd.vae, sd.text_encoder) for p in part.parameters())
    with pytest.raises(ConfigError, match="to_x"):
        unfreeze(sd, UNetOptions(("to_k", "to_x")))


def test_the_untrained_copy_stays_and_shares_what_is_frozen():
    sd = model()
    unfreeze(sd, UNetOptions(("attention",)))
    trained = {name for name, p in sd.unet.named_parameters() if p.requires_grad}
    base, before = untrained(sd.unet), {name: p.clone() for name, p in sd.unet.named_parameters()}
    assert {name for name, p in sd.unet.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for name in trained:
            sd.unet.get_parameter(name).add_(1.0)
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in base.named_parameters())
    for (name, p), q in zip(sd.unet.named_parameters(), base.parameters(), strict=True):
        assert (p is q) == (name not in trained), name


def test_help_has_every_option_in_its_panel():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "─ UNet ─" in shown
    for f in [f for kind in (UNetModel, UNetOptions) for f in fields(kind)]:
        assert flag(f) in shown, f.name
