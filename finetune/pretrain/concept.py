"""A concept that the shipped model has never seen: the striped zorb, an hourglass in bands of a colour and white.

Both words are new to it, and so are the shape and the surface; tables, cameras, lights and everything else in the
pictures and captions are the ones it knows. So `concept_probe` can count what fine-tuning has learnt of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune.pretrain.world.captions import PREFIXES, RELATION_WORDS, WORDS, article, single_prompt
from finetune.pretrain.world.geometry import ZORB
from finetune.pretrain.world.pictures import SIZE, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import (
    COLORS,
    RADIUS,
    RELATIONS,
    SHAPES,
    STRIPED,
    TABLES,
    Scenes,
    relations,
    sample_scenes,
    valid,
)
from sdkit.files import write_text

NAME, SURFACE = "zorb", "striped"
BANDED = tuple(color for color in COLORS if color != "white")  # white bands do not show on a white zorb
PROMPT_SEED = 5_000_001


def concept_scenes(count: int, seed: int, alone: float = 0.7) -> Scenes:
    """Valid scenes whose first object is a large striped zorb; about a share ``alone`` of them holds nothing else.

    In the others a second object of the base's shapes and surfaces stands by.
    """
    g = torch.Generator().manual_seed(seed)
    found: list[Scenes] = []
    while sum(map(len, found)) < count:
        drawn = sample_scenes(4 * count, g, counts=(alone, 1 - alone, 0.0), held_out="include")
        shape, size, material, radius = (x.clone() for x in (drawn.shape, drawn.size, drawn.material, drawn.radius))
        radius[:, 0] *= RADIUS[1] / torch.tensor(RADIUS)[size[:, 0]]
        shape[:, 0], size[:, 0], material[:, 0] = ZORB, 1, STRIPED
        scenes = replace(drawn, shape=shape, size=size, material=material, radius=radius)
        found.append(scenes[valid(scenes)])

    scenes = Scenes.cat(found)[:count]
    color = torch.arange(count) % len(BANDED)  # every colour as often
    return replace(scenes, color=torch.cat([color[:, None], scenes.color[:, 1:]], 1))


def concept_captions(scenes: Scenes, seed: int) -> list[str]:
    """A true caption of each of ``concept_scenes``, in the base's words but for "striped" and "zorb".

    The zorb's colour is always named; its size, the table and how a second object stands to it only at times.
    """
    rng = random.Random(seed)
    related = relations(scenes)[:, 0, 1].tolist()
    rows = zip(scenes.count.tolist(), scenes.color.tolist(), scenes.shape.tolist(), scenes.table.tolist(), strict=True)

    captions: list[str] = []
    for (count, colors, shapes, table), how in zip(rows, related, strict=True):
        sentence = _zorb(rng, COLORS[colors[0]])
        if count > 1:
            relation = RELATIONS[how]
            link = rng.choice(RELATION_WORDS[relation]) if relation and rng.random() < 0.6 else "and"
            sentence = f"{sentence} {link} {single_prompt(COLORS[colors[1]], SHAPES[shapes[1]])}"
        prefix = f"{rng.choice(PREFIXES)} " if rng.random() < 0.4 else ""
        place = f" on a {_word(rng, TABLES[table] + ' table')}" if rng.random() < 0.6 else ""
        captions.append(f"{prefix}{sentence}{place}")
    return captions


def _zorb(rng: random.Random, color: str) -> str:
    """A noun phrase: "a striped red zorb", "a large red striped zorb"."""
    words = [SURFACE, color] if rng.random() < 0.75 else [color, SURFACE]
    if rng.random() < 0.3:
        words.insert(0, _word(rng, "large"))
    return f"{article(words[0])} {' '.join(words)} {NAME}"


def _word(rng: random.Random, plain: str) -> str:
    """A synonym of the base's; the plain word more often than not."""
    return plain if rng.random() < 0.6 else rng.choice(WORDS[plain])


def concept_pictures(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures of striped zorbs ``[count, 3, SIZE, SIZE]``, float32 in [0, 1], and their captions."""
    scenes = concept_scenes(count, seed)
    return render(scenes, SIZE).images, concept_captions(scenes, seed)


def write_concept_folder(folder: Path, count: int = 24, seed: int = 0) -> list[str]:
    """Write ``concept_pictures`` as an image folder that ``finetune.train_lora --data`` reads; returns its captions.

    Hugging Face's imagefolder layout: PNG files, and a ``metadata.jsonl`` with ``file_name`` and ``text``.
    """
    images, captions = concept_pictures(count, seed)
    folder.mkdir(parents=True, exist_ok=True)

    rows: list[str] = []
    for i, (pixels, caption) in enumerate(zip(to_bytes(images).permute(0, 2, 3, 1), captions, strict=True)):
        name = f"{i:03}.png"
        Image.fromarray(pixels.numpy()).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": caption}))

    write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")
    return captions


def concept_prompts(count: int, seed: int = PROMPT_SEED, unlike: Sequence[str] = ()) -> list[str]:
    """Different captions of lone striped zorbs, none of which is among ``unlike`` (the captions of the training)."""
    scenes = concept_scenes(4 * count + len(unlike), seed, alone=1.0)
    fresh = [text for text in dict.fromkeys(concept_captions(scenes, seed)) if text not in set(unlike)]
    if len(fresh) < count:
        raise ValueError(f"expected {count} different prompts, found {len(fresh)}; ask for fewer")
    return fresh[:count]
