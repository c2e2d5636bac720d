"""The grammar of the tabletop world's captions, which are true and drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.pretrain.world.scenes import COLORS, MATERIALS, RELATIONS, SHAPES, SIZES, TABLES, Scenes, alike, relations

WORDS: dict[str, tuple[str, ...]] = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box", "block"),
    "cylinder": ("cylinder", "can"),
    "cone": ("cone",),
    "torus": ("torus", "ring", "donut"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "matte": ("matte", "dull"),
    "shiny": ("shiny", "glossy", "polished"),
    "white table": ("white table", "white tabletop"),
    "grey table": ("grey table", "gray table"),
    "black table": ("black table", "black tabletop"),
    "wooden table": ("wooden table", "wood table", "table made of wood"),
}  # the first word is the plain one and the most frequent
NUMBERS = {2: ("two", "2"), 3: ("three", "3")}  # of objects that are alike; the word is the more frequent one
PLURALS = {"box": ("boxes",), "torus": ("tori", "toruses")}  # all others take an s
PREFIXES = ("a photo of", "a picture of", "an image of", "a render of", "a scene with", "there is", "a still life with")
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
BESIDE = ("next to", "beside")
RELATED = 0.75  # the share of captions of several objects that state a relation
PLAIN_SINGLE, PLAIN_LIST = 0.4, 0.5  # the share of plain captions among the others
MENTION = 0.5  # how often an optional attribute is mentioned


def single_prompt(color: str, shape: str) -> str:
    """The plain caption of one object: "a red sphere"."""
    return f"{article(color)} {color} {shape}"


def pair_prompt(first: tuple[str, str], second: tuple[str, str], relation: str = "and") -> str:
    """The plain caption of two (colour, shape) pairs: "a red sphere and a blue cube".

    ``relation`` is "and", or how the first stands to the second: "left", "right", "front" or "behind".
    """
    link = "and" if relation == "and" else RELATION_WORDS[relation][0]
    return f"{single_prompt(*first)} {link} {single_prompt(*second)}"


def group_prompt(number: int, color: str, shape: str) -> str:
    """The plain caption of two or three objects that are alike: "two red spheres"."""
    return f"{NUMBERS[number][0]} {color} {_plurals(shape)[0]}"


def captions(scenes: Scenes, seed: int, full: bool = False) -> list[str]:
    """One true caption for each scene, in lower case; every object's colour and shape are named.

    About a quarter are plain ("a red sphere and a blue cube on a wooden table"); the others draw synonyms, word order,
    a prefix and which of size, material and table to mention, and 75 % of the captions of several objects state a
    relation, from the scene's positions. Objects of one colour and shape are named together ("two red spheres"), with
    the sizes and materials that they share. ``full`` captions name every such size and material, the table, and a
    relation where one is clear.
    """
    rng = random.Random(seed)
    objects = zip(
        scenes.color.tolist(), scenes.shape.tolist(), scenes.size.tolist(), scenes.material.tolist(), strict=True
    )
    rows = zip(scenes.count.tolist(), scenes.table.tolist(), relations(scenes).tolist(), objects, strict=True)

    return [  # each from a seed of its own, so that no caption depends on what the ones before it say
        _caption(random.Random(rng.getrandbits(64)), full, count, TABLES[table], related, *attributes)
        for count, table, related, attributes in rows
    ]


class Named(NamedTuple):
    """Objects of one colour and shape in a caption: the numbers of the colour's word and the noun, and both as scenes
    have them."""

    color_word: int
    noun: int
    color: int
    shape: int


def named_objects(words: Sequence[str]) -> list[Named]:
    """The objects that the words of a caption of `captions` name, in order; a colour belongs to the next noun."""
    found: list[Named] = []
    color: tuple[int, int] | None = None
    for i, word in enumerate(words):
        if word in COLORS:
            color = i, COLORS.index(word)
        elif word in _NOUNS and color is not None:
            found.append(Named(color[0], i, color[1], _NOUNS[word]))
            color = None
    return found


WRONG = ("sides", "colours", "colour", "number")
"""What `wrong_captions` has wrong: how objects stand to each other, who has which colour, a colour, how many are
alike."""


def wrong_captions(scenes: Scenes, seed: int, kinds: Sequence[str] = WRONG) -> list[str]:
    """For each scene the words of `captions` with one thing wrong, of one of these kinds; "" where none of them can be.

    Sides are exchanged where the caption states them, colours where two shapes have them, and there is one more of the
    last object, or of three alike one less.
    """
    swapped = torch.arange(scenes.color.shape[1])
    swapped[:2] = torch.tensor([1, 0])
    unlike = (scenes.count > 1) & (scenes.shape[:, 0] != scenes.shape[:, 1])  # of two cubes both orders are true
    others = {
        "sides": replace(scenes, position=-scenes.position),  # which turns every relation round
        "colours": replace(scenes, color=torch.where(unlike[:, None], scenes.color[:, swapped], scenes.color)),
        "colour": replace(scenes, color=torch.where(scenes.color < 0, -1, (scenes.color + 1) % len(COLORS))),
        "number": _other_number(scenes),
    }
    right, wrong = captions(scenes, seed), [captions(others[kind], seed) for kind in kinds]

    rng = random.Random(seed)
    chosen: list[str] = []
    for true, options in zip(right, zip(*wrong, strict=True), strict=True):
        different = [text for text in options if text != true]
        chosen.append(rng.choice(different) if different else "")
    return chosen


def _other_number(scenes: Scenes) -> Scenes:
    """One more of the last object; of three one less, where it is like the one before; else nothing has changed."""
    rows, last = torch.arange(len(scenes)), scenes.count - 1
    full = scenes.count == scenes.color.shape[1]
    less = full & alike(scenes)[:, -2, -1]
    more = ~full[:, None] & (torch.arange(scenes.color.shape[1]) == last[:, None] + 1)

    def changed(name: str) -> Tensor:
        values = getattr(scenes, name)
        values = torch.where(more, values[rows, last, None], values)
        values[less, -1] = -1
        return values

    names = ("shape", "color", "size", "material")
    count = scenes.count + (~full).long() - less.long()
    return replace(scenes, count=count, **{name: changed(name) for name in names})


def _caption(
    rng: random.Random,
    full: bool,
    count: int,
    table: str,
    relation: list[list[int]],
    colors: list[int],
    shapes: list[int],
    sizes: list[int],
    materials: list[int],
) -> str:
    groups: dict[tuple[int, int], list[int]] = {}  # the slots of objects of one colour and shape
    for k in rng.sample(range(count), count):
        groups.setdefault((colors[k], shapes[k]), []).append(k)

    related = len(groups) > 1 and (full or rng.random() < RELATED)
    mention = 1.0 if full else MENTION
    plain = not full and not related and rng.random() < (PLAIN_LIST if count > 1 else PLAIN_SINGLE)
    names: list[str] = []
    for (color, shape), slots in groups.items():
        simple = plain or (not full and related and rng.random() < 0.2)
        shared = [{SIZES[sizes[k]] for k in slots}, {MATERIALS[materials[k]] for k in slots}]
        extra = [] if simple else [word for words in shared if len(words) == 1 for word in words]
        names.append(_objects(rng, mention, len(slots), COLORS[color], SHAPES[shape], extra, simple))

    sentence = _related(rng, names, list(groups.values()), relation) if related else _list(rng, names, plain)
    if rng.random() >= (1 / 3 if plain else mention):
        place = ""
    else:
        place = f"on {article(table)} {table} table" if plain else f"on a {_word(rng, table + ' table')}"

    if plain or rng.random() < 0.4:
        return f"{sentence} {place}".strip()
    if place and rng.random() < 0.15:
        return f"{place}, {sentence}"
    prefix = f"{rng.choice(PREFIXES)} " if rng.random() < 0.65 else ""
    if sentence.startswith(tuple(f"{word} " for words in NUMBERS.values() for word in words)):
        prefix = prefix.replace("there is", "there are")
    return f"{prefix}{sentence} {place}".strip()


def _objects(
    rng: random.Random, mention: float, number: int, color: str, shape: str, attributes: list[str], plain: bool
) -> str:
    """A noun phrase: "a small shiny red ball", "a red ball that is small and shiny", "two shiny red balls"."""
    if plain:
        return single_prompt(color, shape) if number == 1 else group_prompt(number, color, shape)

    extra = [_word(rng, word) for word in attributes if rng.random() < mention]
    noun = _word(rng, shape)
    if number > 1:
        noun = rng.choice(_plurals(noun))
    if extra and rng.random() < 0.08:
        words, clause = [color], f" that {'is' if number == 1 else 'are'} {' and '.join(extra)}"
    else:
        words, clause = [*extra, color], ""
        if rng.random() < 0.15:
            rng.shuffle(words)

    how_many = article(words[0]) if number == 1 else NUMBERS[number][rng.random() < 0.2]
    return f"{how_many} {' '.join(words)} {noun}{clause}"


def _related(rng: random.Random, names: list[str], groups: list[list[int]], relation: list[list[int]]) -> str:
    """Two groups of slots in their true relation, and a third one beside it; a list where none is clear."""
    order = range(len(groups))
    for a, b in combinations(order, 2):
        kinds = {relation[i][j] for i in groups[a] for j in groups[b]}
        how = RELATIONS[kinds.pop()] if len(kinds) == 1 else None
        if how is None:
            continue
        sentence = _relate(rng, names[a], names[b], how)
        rest = [names[k] for k in order if k not in (a, b)]
        if not rest:
            return sentence
        return f"{sentence}, with {rest[0]}" if rng.random() < 0.6 else f"{rest[0]}, and {sentence}"
    return _list(rng, names, False)


def _relate(rng: random.Random, a: str, b: str, how: str) -> str:
    draw = rng.random()
    if how in ("left", "right") and draw < 0.10:
        return f"{a} {rng.choice(BESIDE)} {b}"
    if how in ("left", "right") and draw < 0.20:
        return f"{a} on the {how} and {b} on the {OPPOSITE[how]}"
    return f"{a} {rng.choice(RELATION_WORDS[how])} {b}"


def _list(rng: random.Random, names: list[str], plain: bool) -> str:
    if len(names) == 1:
        return names[0]
    link = " and " if plain or rng.random() < 0.8 else " with "
    return ", ".join(names[:-1]) + link + names[-1]


def _word(rng: random.Random, plain: str) -> str:
    """A synonym; the plain word in 60 % of the cases."""
    words = WORDS[plain]
    return plain if len(words) == 1 or rng.random() < 0.6 else rng.choice(words[1:])


def _plurals(noun: str) -> tuple[str, ...]:
    """How several of them are called."""
    return PLURALS.get(noun, (f"{noun}s",))


def article(word: str) -> str:
    """The article of a noun phrase that begins with this word."""
    return "an" if word[0] in "aeiou" else "a"


_NOUNS = {
    noun: number for number, shape in enumerate(SHAPES) for word in WORDS[shape] for noun in (word, *_plurals(word))
}
