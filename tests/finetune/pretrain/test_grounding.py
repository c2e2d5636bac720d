"""The loss that teaches words to look at their objects."""

from __future__ import annotations

import pytest
import torch

from finetune.pretrain.grounding import Places, attention_of, find_places, grounding_loss
from finetune.pretrain.world.captions import captions, named_objects
from finetune.pretrain.world.pictures import GRID, covered, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.networks.config import UNetConfig
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.prompts.tokenizer import load_tokenizer


def test_objects_of_captions_are_named_by_a_colour_and_a_noun() -> None:
    words = [
        "two",
        "shiny",
        "red",
        "balls",
        "behind",
        "a",
        "blue",
        "small",
        "box",
        "that",
        "is",
        "dull",
        ",",
        "with",
        "3",
        "white",
        "toruses",
    ]
    found = [(words[n.color_word], words[n.noun], COLORS[n.color], SHAPES[n.shape]) for n in named_objects(words)]
    assert found == [
        ("red", "balls", "red", "sphere"), ("blue", "box", "blue", "cube"), ("white", "toruses", "white", "torus"),
    ]  # fmt: skip
    scenes = sample_scenes(400, 3, repeats=0.3)
    for i, text in enumerate(captions(scenes, 4)):
        named = {(n.color, n.shape) for n in named_objects(text.replace(",", " ,").split())}
        pairs = zip(scenes.color[i].tolist(), scenes.shape[i].tolist(), strict=True)
        assert named == {pair for pair in pairs if pair[0] >= 0}, text


def test_places_are_where_the_words_objects_are() -> None:
    scenes = sample_scenes(24, 5, counts=(0.2, 0.5, 0.3), repeats=0.4)
    cover, texts = to_bytes(covered(render(scenes, 64).masks)), captions(scenes, 6)
    assert cover.shape == (24, 3, GRID, GRID) and cover.dtype == torch.uint8
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    ids = tokenizer(texts, padding="longest", return_tensors="pt").input_ids
    seen = torch.ones(ids.shape, dtype=torch.bool)
    found = find_places(tokenizer, texts, scenes, cover, seen)
    assert set(found.sample.tolist()) == set(range(24)) and len(found.sample) == len(found.token) == len(found.cover)

    for sample, token, where in zip(*found, strict=True):
        word = tokenizer.decode([ids[sample, token]]).strip()
        slots = [
            k
            for k in range(int(scenes.count[sample]))
            if (word in COLORS and COLORS[scenes.color[sample, k]] == word)
            or word.rstrip("s") == SHAPES[scenes.shape[sample, k]]
        ]
        if len(slots) == 1:  # else two groups share the word, or it is a synonym
            torch.testing.assert_close(where, cover[sample, slots[0]].float() / 255)
        assert 0 < where.max() <= 1

    hidden = seen.clone()
    hidden[3] = False
    assert 3 not in find_places(tokenizer, texts, scenes, cover, hidden).sample.tolist()
    assert not len(find_places(tokenizer, [""] * 24, scenes, cover, seen).sample)


def test_the_share_from_outside_is_squared() -> None:
    """Half of the word's attention comes from its object, on one grid; on the coarser one all of it."""
    cover = torch.zeros(1, 4, 4)
    cover[0, :2, :2] = 1
    places = Places(torch.tensor([1]), torch.tensor([2]), cover)
    fine, coarse = torch.zeros(2, 16, 5), torch.zeros(2, 4, 5)
    fine[1, [0, 15], 2] = 0.3
    coarse[1, 0, 2] = 0.7
    weight = torch.tensor([9.0, 0.5])
    assert grounding_loss([fine], places, weight) == pytest.approx(0.5 * 0.25)
    assert grounding_loss([fine, coarse], places, weight) == pytest.approx(0.5 * 0.25 / 2)
    nothing = Places(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert grounding_loss([fine], nothing, weight) == 0


def test_attention_is_what_the_layers_compute_and_has_a_gradient() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
    )
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 6, 16)
    plain = unet(x, t, context)
    recorded: list[torch.Tensor] = []
    with attention_of(unet) as found:
        watched = unet(x, t, context)
    for layer in (m for m in unet.modules() if getattr(m, "is_cross", False)):
        layer.recorder = recorded.append
    with torch.no_grad():
        unet(x, t, context)

    torch.testing.assert_close(watched, plain)
    assert len(found) == len(recorded) == 4
    for ours, theirs in zip(found, recorded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    places = Places(torch.tensor([0]), torch.tensor([1]), torch.eye(8)[None])
    grounding_loss(found, places, torch.ones(2)).backward()
    moved = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".attn2.to_q" in name for name in moved) and any(".attn2.to_k" in name for name in moved)
    assert not any(module._forward_pre_hooks for module in unet.modules())
