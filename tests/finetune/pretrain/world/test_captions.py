"""Captions of tabletop scenes: the grammar against the objects and their positions."""

from __future__ import annotations

import re
from collections import Counter

from finetune.pretrain.world.captions import (
    PLURALS,
    WORDS,
    WRONG,
    captions,
    group_prompt,
    pair_prompt,
    single_prompt,
    wrong_captions,
)
from finetune.pretrain.world.scenes import COLORS, MATERIALS, SHAPES, SIZES, sample_scenes
from tests.finetune.pretrain.world.drawn import pairs

SYNONYM = {word: shape for shape in SHAPES for word in WORDS[shape]}
ADJECTIVES = "|".join(word for name in SIZES + MATERIALS for word in WORDS[name])
NOUN = re.compile(rf"\b({'|'.join(COLORS)})(?: (?:{ADJECTIVES})){{0,2}} ({'|'.join(SYNONYM)})\b")


def test_captions_name_every_object_and_nothing_else() -> None:
    scenes = sample_scenes(1500, 7)
    for i, caption in enumerate(captions(scenes, 8)):
        named = [(color, SYNONYM[noun]) for color, noun in NOUN.findall(caption)]
        assert sorted(named) == sorted(pairs(scenes[i : i + 1])), caption
        assert re.fullmatch(r"[a-z, ]+", caption) and "  " not in caption, caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
        words = set(re.findall(r"\w+", caption))
        count = int(scenes.count[i])
        for names, attribute in ((SIZES, scenes.size[i]), (MATERIALS, scenes.material[i])):
            for k, name in enumerate(names):
                assert not words & set(WORDS[name]) or k in attribute[:count].tolist(), caption


def test_relations_in_captions_are_true_of_the_positions() -> None:
    scenes = sample_scenes(1500, 9, counts=(0.0, 1.0, 0.0))
    told = dict.fromkeys(("left of", "right of", "in front of", "behind", "on the left and", "on the right and"), 0)
    for i, caption in enumerate(captions(scenes, 10)):
        phrase = next((p for p in told if p in caption), None)
        if phrase is None:
            continue
        told[phrase] += 1
        slots = {pair: k for k, pair in enumerate(pairs(scenes[i : i + 1]))}
        first, second = (slots[color, SYNONYM[noun]] for color, noun in NOUN.findall(caption))
        dx, dz = (scenes.position[i, first] - scenes.position[i, second]).tolist()
        side = -dx if "left" in phrase else dx if "right" in phrase else -dz if "front" in phrase else dz
        assert side > 0.045 and side >= max(abs(dx), abs(dz)), caption
    assert sum(told.values()) > 0.5 * len(scenes) and min(told.values()) > 5


def test_plain_captions_are_common() -> None:
    scenes = sample_scenes(2000, 12)
    item = rf"an? (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
    plain = re.compile(rf"{item}(?:(?:, {item})? and {item})?(?: on a (?:white|grey|black|wooden) table)?")
    share = sum(bool(plain.fullmatch(c)) for c in captions(scenes, 13)) / 2000
    assert 0.22 < share < 0.42
    assert plain.fullmatch(single_prompt("orange", "cone"))
    assert single_prompt("orange", "cone") == "an orange cone"
    assert pair_prompt(("red", "sphere"), ("blue", "cube")) == "a red sphere and a blue cube"
    assert pair_prompt(("red", "sphere"), ("blue", "cube"), "front") == "a red sphere in front of a blue cube"


def test_objects_that_are_alike_are_named_together() -> None:
    scenes = sample_scenes(1500, 17, counts=(0.0, 0.5, 0.5), repeats=1.0)
    numbers, seen = (
        {"two": 2, "2": 2, "three": 3, "3": 3},
        dict.fromkeys(("two", "2", "three", "3", "tori", "boxes"), 0),
    )
    plural = {name: shape for shape in SHAPES for word in WORDS[shape] for name in PLURALS.get(word, (f"{word}s",))}
    group = re.compile(rf"\b({'|'.join(numbers)}) ([a-z ]*?)\b({'|'.join(plural)})\b")
    for i, caption in enumerate(captions(scenes, 18)):
        words = caption.split()
        seen |= {word: seen[word] + (word in words) for word in seen}
        ((number, adjectives, noun),) = group.findall(caption)
        expected = Counter(pairs(scenes[i : i + 1]))
        ((color, shape), count) = expected.most_common(1)[0]
        assert (numbers[number], plural[noun]) == (count, shape) and color in adjectives.split(), caption
        rest = [(color, SYNONYM[noun]) for color, noun in NOUN.findall(caption)]
        assert sorted(rest) == sorted(pair for pair, times in expected.items() if times == 1), caption
        assert "there is two" not in caption and "there are a" not in caption, caption

        alike = [k for k, pair in enumerate(pairs(scenes[i : i + 1])) if pair == (color, shape)]
        for names, attribute in ((SIZES, scenes.size[i]), (MATERIALS, scenes.material[i])):
            for k, name in enumerate(names):
                said = any(word in adjectives.split() for word in WORDS[name])
                assert not said or attribute[alike].tolist() == [k] * count, caption
    assert min(seen.values()) > 20, seen
    assert group_prompt(3, "blue", "cube") == "three blue cubes"


def test_a_relation_of_alike_objects_is_true_of_each() -> None:
    scenes = sample_scenes(3000, 19, counts=(0.0, 0.0, 1.0), repeats=1.0)
    told = 0
    for i, caption in enumerate(captions(scenes, 20)):
        found = re.search(r"(two|2) .* (left|right) of an? ", caption)
        if found is None:
            continue
        told += 1
        x = scenes.position[i, :, 0]
        assert (x[:2].max() < x[2]) if found[2] == "left" else (x[:2].min() > x[2]), caption
    assert told > 10


def named(caption: str) -> list[tuple[str, str]]:
    return [(color, SYNONYM[noun]) for color, noun in NOUN.findall(caption)]


def test_wrong_captions_have_one_thing_exchanged_and_the_other_words() -> None:
    scenes = sample_scenes(600, 11)
    rows = zip(captions(scenes, 12), *(wrong_captions(scenes, 12, [kind]) for kind in WRONG), strict=True)
    sides = {"left": "right", "right": "left", "front of": "behind", "behind": "front of"}
    counts = dict.fromkeys(WRONG, 0)
    for k, (right, *wrong) in enumerate(rows):
        true, several = pairs(scenes[k : k + 1]), int(scenes.count[k]) > 1
        for kind, text in zip(WRONG, wrong, strict=True):
            counts[kind] += bool(text)
            assert text != right and "  " not in text
        of_sides, of_colours, of_colour, of_number = wrong

        if of_sides:  # the objects are the same, and where they stand is turned round
            assert several and sorted(named(of_sides)) == sorted(true)
            assert any(a in right and b in of_sides for a, b in sides.items()), (right, of_sides)
        if of_colours and not re.search("two|2", of_colours):  # the same shapes and colours, otherwise together
            colours, shapes = zip(*named(of_colours), strict=True)
            assert several and (sorted(colours), sorted(shapes)) == tuple(map(sorted, zip(*true, strict=True)))
            assert sorted(named(of_colours)) != sorted(true)
        assert sorted(shape for _, shape in named(of_colour)) == sorted(shape for _, shape in true)
        assert not {*true} & {*named(of_colour)} or several
        if of_number:
            assert re.search(r"\b(two|2)\b", of_number) and not re.search(r"\b(two|2)\b", right), (right, of_number)
    assert counts["number"] == int((scenes.count < 3).sum())
    assert counts["sides"] > 100 and counts["colours"] > 200 and counts["colour"] == 600


def test_a_wrong_caption_is_there_for_every_scene_and_of_every_kind() -> None:
    scenes = sample_scenes(400, 13, counts=(0.0, 1.0, 0.0))
    wrong, each = wrong_captions(scenes, 14), [wrong_captions(scenes, 14, [kind]) for kind in WRONG]
    assert all(wrong) and all(text in options for text, *options in zip(wrong, *each, strict=True))
    taken = [sum(a == b for a, b in zip(wrong, own, strict=True)) for own in each]
    assert min(taken) > 20, taken
    assert wrong_captions(scenes, 14) == wrong
