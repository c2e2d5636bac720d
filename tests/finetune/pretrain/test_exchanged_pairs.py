"""Scenes beside their exchanged ones, and what is said of them."""

import copy

import torch

from finetune.pretrain.exchanged_pairs import find_halves, pair_captions, paired_scenes, plain_caption
from finetune.pretrain.world.captions import OPPOSITE
from finetune.pretrain.world.pictures import GRID
from finetune.pretrain.world.scenes import COLORS, RELATIONS, SHAPES, relations, valid
from sdkit.checkpoints import loading
from sdkit.prompts.tokenizer import load_tokenizer
from sdkit.viewing.attention_maps import prompt_words


def test_a_scene_and_its_exchanged_one_differ_in_the_places_alone() -> None:
    scenes = paired_scenes(200, 1)
    pairs = len(scenes) // 2
    before, after = scenes[:pairs], scenes[pairs:]
    assert pairs > 30 and bool(valid(scenes).all())
    assert torch.equal(before.position[:, [1, 0]], after.position[:, :2])
    for name in ("shape", "color", "size", "material", "radius", "table", "camera", "light"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    kinds = [[RELATIONS[k] for k in relations(part)[:, 0, 1].tolist()] for part in (before, after)]
    assert set(kinds[0]) == set(OPPOSITE) and kinds[1] == [OPPOSITE[str(kind)] for kind in kinds[0]]


def test_captions_of_a_pair_differ_in_the_side_alone() -> None:
    scenes = paired_scenes(200, 2)
    pairs = len(scenes) // 2
    both = scenes[torch.stack([torch.arange(pairs), torch.arange(pairs) + pairs], 1).flatten()]
    texts = pair_captions(both, seed=3)
    assert texts == pair_captions(both, seed=3) != pair_captions(both, seed=4)

    def turned(text: str) -> list[str]:
        words = text.replace("in front of", "front").split()
        return [OPPOSITE.get(word, word) for word in words]

    stated = 0
    for one, other in zip(texts[::2], texts[1::2], strict=True):
        assert turned(one) == other.replace("in front of", "front").split()
        stated += one != other
    assert stated > 0.7 * pairs


def test_a_plain_caption_may_begin_with_either_object() -> None:
    scene = paired_scenes(50, 5)[:1]
    side = str(RELATIONS[int(relations(scene)[0, 0, 1])])
    first, second = (f"{COLORS[int(scene.color[0, k])]} {SHAPES[int(scene.shape[0, k])]}" for k in range(2))
    one, other = plain_caption(scene, side), plain_caption(scene, side, turned=True)
    assert one.index(first) < one.index(f"to the {side} of") < one.index(second)
    assert other.index(second) < other.index(f"to the {OPPOSITE[side]} of") < other.index(first)


def test_the_words_of_the_second_object_have_its_half() -> None:
    tokenizer = load_tokenizer(loading.MODELS / "tabletop" / "tokenizer")
    scenes = paired_scenes(120, 6)
    texts = pair_captions(scenes, seed=7)  # neighbours are no pairs here, and each caption is true all the same
    halves = find_halves(tokenizer, texts, scenes)
    stated = [bool({"left", "right"} & set(text.split())) for text in texts]
    assert len(halves.sample.unique()) == sum(stated) > 0.2 * len(texts)

    for cover in halves.cover:
        assert {float(cover[:, : GRID // 2].mean()), float(cover[:, GRID // 2 :].mean())} == {0.0, 1.0}

    scene = copy.deepcopy(scenes[:1])
    scene.color[0, :2] = torch.tensor([COLORS.index("red"), COLORS.index("blue")])
    scene.shape[0, :2] = torch.tensor([SHAPES.index("cube"), SHAPES.index("cone")])
    scene.position[0, :2, 0] = torch.tensor([-0.1, 0.1])
    sideways, listed, deep = (f"a red cube {how} a blue cone" for how in ("to the left of", "and", "in front of"))
    found = find_halves(tokenizer, [sideways], scene)
    words = prompt_words(tokenizer, sideways, weighted=False)
    names = [word.text for token in found.token for word in words if token in word.positions]
    assert names == ["blue", "cone"] and not found.cover[:, :, : GRID // 2].any()
    for text in (listed, deep):
        assert not len(find_halves(tokenizer, [text], scene).sample)
