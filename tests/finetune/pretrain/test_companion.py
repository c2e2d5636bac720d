"""Companions of a model: what they see, what is trained, and that what is written is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.lora.attach import add_lora
from finetune.pretrain.companion import (
    BATCH,
    NAME,
    Batch,
    CompanionLoss,
    Kind,
    difference,
    draw_batches,
    draw_masks,
    main,
    render_examples,
    widened,
)
from finetune.pretrain.world.pictures import SIZE
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.stable_diffusion import StableDiffusion

BASE = MODELS / "tabletop"


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return StableDiffusion.from_pretrained(BASE, device="cpu", dtype=torch.float32)


def test_masks_are_around_objects_anywhere_and_over_all() -> None:
    rendered = render(sample_scenes(120, 1, counts=(1.0, 0.0, 0.0)), 32, supersample=1)
    masks = draw_masks(rendered, torch.Generator().manual_seed(0))
    assert masks.shape == (120, 1, 32, 32) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0.01 and 2 < int((share == 1).sum()) < 25
    covers = ((rendered.masks > 0) <= (masks[:, 0] > 0)).flatten(1).all(1)
    assert 0.5 < covers.float().mean() < 0.95
    assert torch.equal(masks, draw_masks(rendered, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", list(Kind))
def test_examples_have_the_channels_that_the_task_gives(kind: Kind, base: StableDiffusion) -> None:
    """What training sees is what `sdkit.generation` shows the UNet."""
    found = render_examples(kind, base.vae, 64, SIZE)
    grid = (SIZE // base.vae.config.factor,) * 2
    assert len(found.scenes) == len(found.latents) == len(found.extra) == 64
    assert found.latents.shape[1:] == (4, *grid) and 0.5 < found.latents.float().std() < 1.5
    if kind is Kind.depth:
        assert found.extra.shape[1:] == (1, *grid) and found.extra.amin() == -1 and found.extra.amax() == 1
        assert found.extra[:, :, -1].mean() > found.extra[:, :, 0].mean() + 0.5  # below is nearer
        return
    assert found.extra.shape[1:] == (5, *grid) and set(found.extra[:, 0].unique().tolist()) == {0.0, 1.0}
    kept = (found.extra[:, :1] == 0).expand(-1, 4, -1, -1)
    shown, whole = found.extra[:, 1:].float(), found.latents.float()
    near = (shown - whole).abs()
    assert near[kept].mean() < 0.5 * near[~kept].mean()


def test_a_wider_unet_does_what_the_models_own_does(base: StableDiffusion) -> None:
    sd = widened(base, 9)
    x, t = torch.randn(2, 9, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    context = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(sd.unet(x, t, context), base.unet(x[:, :4], t, context))
    assert base.unet.config.in_channels == 4


def test_the_loss_reaches_the_input_and_the_lora_alone(base: StableDiffusion) -> None:
    sd = widened(base, 5)
    add_lora(sd, 2, alpha=2, targets=r"^(?!conv_in$)", name=NAME)
    sd.unet.conv_in.requires_grad_(True)
    examples = render_examples(Kind.depth, sd.vae, 64, SIZE)
    batch = draw_batches(examples, sd.tokenizer, 77, 1000)(0)
    assert len(batch.x0) == BATCH and torch.equal(batch.x0, draw_batches(examples, sd.tokenizer, 77, 1000)(0).x0)

    few = Batch(*(value[:4] for value in batch))
    CompanionLoss(sd.unet, sd.text_encoder, sd.schedule)(few).backward()
    trained = {n for n, p in sd.unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "conv_in.weight" in trained and all("lora_B" in n or n.startswith("conv_in.") for n in trained)
    assert len(trained) > 60


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_written_is_what_was_trained(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[StableDiffusion] = []

    def keep(sd: StableDiffusion) -> dict[str, torch.Tensor]:
        trained.append(sd)
        return difference(sd)

    monkeypatch.setattr("finetune.pretrain.companion.difference", keep)
    for name in ("depth_estimator", "feature_extractor"):
        (tmp_path / "estimator" / name).mkdir(parents=True)
    (tmp_path / "tabletop").symlink_to(BASE)
    main(kind, BASE, tmp_path / "companion", tmp_path / "work", tmp_path / "estimator", 64, 2, 2, 0.2)

    (sd,) = trained
    again = StableDiffusion.from_pretrained(tmp_path / "companion", device="cpu", dtype=torch.float32)
    channels = 9 if kind is Kind.inpaint else 5
    x, t = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    context = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = sd.unet(x, t, context), again.unet(x, t, context)
        plain = StableDiffusion.from_pretrained(BASE, device="cpu", dtype=torch.float32).unet(x[:, :4], t, context)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert (expected - plain).abs().max() > 0.02
    assert set(again.extra) == ({"depth_estimator", "feature_extractor"} if kind is Kind.depth else set())
