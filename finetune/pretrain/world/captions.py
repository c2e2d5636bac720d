"""The grammar of the tabletop world's captions, which are true and drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from finetune.pretrain.world.scenes import COLORS, MATERIALS, RELATIONS, SHAPES, SIZES, TABLES, Scenes, relations

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
PREFIXES = ("a photo of", "a picture of", "an image of", "a render of", "a scene with", "there is", "a still life with")
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
BESIDE = ("next to", "beside")
RELATED = 0.6  # the share of captions of several objects that state a relation
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


def captions(scenes: Scenes, seed: int, full: bool = False) -> list[str]:
    """One true caption for each scene, in lower case; every object's colour and shape are named.

    About 30 % are plain ("a red sphere and a blue cube on a wooden table"); the others draw synonyms, word order,
    a prefix and which of size, material and table to mention, and 60 % of the captions of several objects state a
    relation, from the scene's positions. ``full`` captions name every size, material and table, and a relation where
    one is clear.
    """
    rng = random.Random(seed)
    objects = zip(
        scenes.color.tolist(), scenes.shape.tolist(), scenes.size.tolist(), scenes.material.tolist(), strict=True
    )
    rows = zip(scenes.count.tolist(), scenes.table.tolist(), relations(scenes).tolist(), objects, strict=True)

    return [
        _caption(rng, full, count, TABLES[table], related, *attributes) for count, table, related, attributes in rows
    ]


WRONG = ("sides", "colours", "colour")
"""What `wrong_captions` has wrong: how objects stand to each other, who has which colour, a colour."""


def wrong_captions(scenes: Scenes, seed: int, kinds: Sequence[str] = WRONG) -> list[str]:
    """For each scene the words of `captions` with one thing wrong, of these kinds; "" where none of them can be.

    Sides are exchanged where the caption states them, colours where two shapes have them; half of the time the next
    kind that can be is taken instead.
    """
    swapped = torch.arange(scenes.color.shape[1])
    swapped[:2] = torch.tensor([1, 0])
    unlike = (scenes.count > 1) & (scenes.shape[:, 0] != scenes.shape[:, 1])  # of two cubes both orders are true
    others = {
        "sides": replace(scenes, position=-scenes.position),  # which turns every relation round
        "colours": replace(scenes, color=torch.where(unlike[:, None], scenes.color[:, swapped], scenes.color)),
        "colour": replace(scenes, color=torch.where(scenes.color < 0, -1, (scenes.color + 1) % len(COLORS))),
    }
    right, wrong = captions(scenes, seed), [captions(others[kind], seed) for kind in kinds]

    rng = random.Random(seed)
    chosen: list[str] = []
    for true, options in zip(right, zip(*wrong, strict=True), strict=True):
        different = [text for text in options if text != true]
        chosen.append(different[int(len(different) > 1 and rng.random() < 0.5)] if different else "")
    return chosen


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
    related = count > 1 and (full or rng.random() < RELATED)
    mention = 1.0 if full else MENTION
    plain = not full and not related and rng.random() < (PLAIN_LIST if count > 1 else PLAIN_SINGLE)
    order = rng.sample(range(count), count)
    names = {
        k: single_prompt(COLORS[colors[k]], SHAPES[shapes[k]])
        if plain or (not full and related and rng.random() < 0.2)
        else _object(rng, mention, COLORS[colors[k]], SHAPES[shapes[k]], SIZES[sizes[k]], MATERIALS[materials[k]])
        for k in order
    }

    sentence = _related(rng, names, relation) if related else _list(rng, [names[k] for k in order], plain)
    if rng.random() >= (1 / 3 if plain else mention):
        place = ""
    else:
        place = f"on {article(table)} {table} table" if plain else f"on a {_word(rng, table + ' table')}"

    if plain or rng.random() < 0.4:
        return f"{sentence} {place}".strip()
    if place and rng.random() < 0.15:
        return f"{place}, {sentence}"
    prefix = f"{rng.choice(PREFIXES)} " if rng.random() < 0.65 else ""
    return f"{prefix}{sentence} {place}".strip()


def _object(rng: random.Random, mention: float, color: str, shape: str, size: str, material: str) -> str:
    """A noun phrase: "a small shiny red ball", "a red ball that is small and shiny"."""
    extra = [_word(rng, word) for word in (size, material) if rng.random() < mention]
    noun = _word(rng, shape)
    if extra and rng.random() < 0.08:
        return f"{article(color)} {color} {noun} that is {' and '.join(extra)}"

    words = extra + [color]
    if rng.random() < 0.15:
        rng.shuffle(words)
    return f"{article(words[0])} {' '.join(words)} {noun}"


def _related(rng: random.Random, names: dict[int, str], relation: list[list[int]]) -> str:
    """Two objects in their true relation, and a third one beside it; a list where none is clear."""
    order = list(names)
    for a, b in ((order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))):
        how = RELATIONS[relation[a][b]]
        if how is None:
            continue
        sentence = _relate(rng, names[a], names[b], how)
        rest = [names[k] for k in order if k not in (a, b)]
        if not rest:
            return sentence
        return f"{sentence}, with {rest[0]}" if rng.random() < 0.6 else f"{rest[0]}, and {sentence}"
    return _list(rng, list(names.values()), False)


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


def article(word: str) -> str:
    """The article of a noun phrase that begins with this word."""
    return "an" if word[0] in "aeiou" else "a"
