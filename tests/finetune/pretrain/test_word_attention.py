"""How it is measured whether words look at their objects."""

from __future__ import annotations

import pytest
import torch

from finetune.pretrain.word_attention import Looked, look, prompts_of, ratios
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.prompts.tokenizer import load_tokenizer
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.attention_maps import AttentionMaps, prompt_words


def test_ratios_are_of_attention_per_pixel_of_each_words_own_object() -> None:
    """Every word of the first object is looked at three times as much from its quarter of the picture, those of the
    second one evenly."""
    scenes = sample_scenes(12, 1, counts=(0.5, 0.5, 0.0))
    tokenizer, prompts = load_tokenizer(MODELS / "tabletop" / "tokenizer"), prompts_of(scenes)
    masks = torch.zeros(12, 16, 16, dtype=torch.int64)
    masks[:, :8, :8] = 1
    masks[scenes.count == 2, 8:, 8:] = 2
    values = torch.ones(12, 77, 4, 4)
    words = [prompt_words(tokenizer, prompt) for prompt in prompts]
    for i, own in enumerate(words):
        for word in own[:3]:  # "a red sphere"
            values[i, list(word.positions), :2, :2] = 3.0

    found = ratios(AttentionMaps(values, tuple(map(tuple, words))), scenes, masks)
    assert torch.allclose(found.color[:, 0], torch.tensor(3.0)) and torch.allclose(found.shape[:, 0], torch.tensor(3.0))
    two = scenes.count == 2
    assert torch.allclose(found.color[two, 1], torch.tensor(1.0)) and bool(found.shape[~two, 1].isnan().all())
    share = 100 * (~two).float().mean().item()
    assert found.good() == pytest.approx(dict.fromkeys(("colour words", "shape words", "all words"), share))


def test_a_scene_counts_where_all_of_its_words_do() -> None:
    nan = float("nan")
    looked = Looked(
        torch.tensor([[2.5, nan], [2.5, 1.0], [1.9, nan]]), torch.tensor([[1.0, nan], [9.0, 2.0], [3.0, nan]])
    )
    good = looked.good()
    assert [round(good[name]) for name in ("colour words", "shape words", "all words")] == [33, 67, 0]


def test_the_shipped_model_is_asked_with_the_scenes_captions() -> None:
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu", dtype=torch.float32)
    scenes = sample_scenes(4, 2, counts=(0.5, 0.5, 0.0))
    found, again = look(sd, scenes, 3), look(sd, scenes, 3)
    there = torch.arange(2) < scenes.count[:, None]
    for ratio, same in zip(found, again, strict=True):
        assert torch.equal(ratio.isnan(), ~there) and bool((ratio[there] > 0).all())
        torch.testing.assert_close(ratio, same, equal_nan=True)
