"""The contrastive loss, and the scenes and batches that it is taken on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.pretrain.clip import (
    BATCH,
    PAIRS,
    ContrastiveLoss,
    Retrieval,
    build,
    contrast,
    distinct_scenes,
    draw_batch,
    retrieval,
    retrieval_among,
    zero_shot,
)
from finetune.pretrain.evaluate import reconstruct_clip
from finetune.pretrain.own_pictures import OwnPictures
from finetune.pretrain.world.pictures import SIZE, Pictures
from finetune.pretrain.world.scenes import Scenes, equivalent_key, sample_scenes, siblings
from sdkit.checkpoints.loading import MODELS
from sdkit.prompts.tokenizer import load_tokenizer


def test_contrast_is_smallest_where_pairs_match() -> None:
    unit = F.normalize(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    right, wrong = contrast(unit, unit, scale), contrast(unit, unit.roll(1, 0), scale)
    assert right < 0.1 < wrong
    logits = scale.exp() * unit @ unit.T
    assert right == pytest.approx((logits.logsumexp(1) - logits.diag()).mean().item(), rel=1e-5)


def test_distinct_scenes_are_distinct() -> None:
    scenes = distinct_scenes(64, 3)
    assert len(scenes) == 64 == len(set(equivalent_key(scenes)))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """200 scenes, of which 40 have siblings; each picture is of one colour, the scene's number."""
    base = sample_scenes(200, 1)
    scenes = Scenes.cat([base, siblings(base[torch.arange(40)], 1)])
    numbers = torch.arange(240, dtype=torch.uint8)[:, None, None, None]
    return Pictures(numbers.expand(-1, 3, SIZE, SIZE).contiguous(), scenes, 40)


def test_pairs_stand_beside_each_other_in_the_later_part(pictures: Pictures) -> None:
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")

    def drawn(pairs: bool) -> torch.Tensor:
        pixels, ids = draw_batch(pictures, tokenizer, pairs, 3)
        assert len(pixels) == len(ids) == BATCH
        return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long()

    assert drawn(False).max() < 200
    later = drawn(True)
    assert torch.equal(later[:PAIRS] + 200, later[PAIRS : 2 * PAIRS]) and later[:PAIRS].unique().numel() == PAIRS


def test_the_loss_reaches_both_towers(pictures: Pictures) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    loss = ContrastiveLoss(build(tokenizer))
    pixels, ids = draw_batch(pictures, tokenizer, True, 0)
    loss((pixels[:8], ids[:8])).backward()
    for name, p in loss.named_parameters():
        moved = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert moved == (name != "model.text_projection.weight") or "k_proj.bias" in name, name


def test_of_few_own_pictures_none_is_drawn_twice() -> None:
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    numbers = torch.arange(90, dtype=torch.uint8)[:, None, None, None]
    own = OwnPictures(numbers.expand(-1, 3, 8, 8).contiguous(), ["a red cube"] * 90)
    pixels, ids = draw_batch(own, tokenizer, True, 3)
    assert len(pixels) == len(ids) == 90 == pixels[:, 0, 0, 0].unique().numel()


def test_retrieval_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions both lie nearest to the first picture, whose own is the first; the second picture has its own."""
    text = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.4]]), dim=-1)
    image = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]), dim=-1)
    monkeypatch.setattr("finetune.pretrain.clip.embed_text", lambda *_: text)
    monkeypatch.setattr("finetune.pretrain.clip.embed_images", lambda *_: image)
    monkeypatch.setattr("finetune.pretrain.clip.tokenize", lambda *_: None)
    model: Any = type("Towers", (), {"text_model": None})
    assert retrieval_among(model, model, torch.zeros(2), ["a", "b"]) == Retrieval(picture=0.5, caption=1.0)


def test_the_shipped_towers_find_and_name() -> None:
    towers = reconstruct_clip(MODELS / "tabletop")
    found = retrieval(*towers, rounds=1)
    assert min(found) > 0.8 and 0.5 < zero_shot(*towers, count=64) <= 1
