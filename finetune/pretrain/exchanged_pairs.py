"""Pairs of scenes that differ in the places of their two objects alone, and captions that differ in the relation alone.

For `finetune.pretrain.sides`: the relation's word is then all that tells one of a pair from the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from finetune.pretrain.grounding import Places
from finetune.pretrain.noise_predictor import scaled_latents
from finetune.pretrain.world.captions import OPPOSITE, captions, named_objects, pair_prompt
from finetune.pretrain.world.pictures import GRID, covered, from_bytes, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, RELATIONS, SHAPES, Scenes, exchanged, relations, sample_scenes
from sdkit.networks.vae import AutoencoderKL
from sdkit.viewing.attention_maps import prompt_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SIDEWAYS = ("left", "right")
PLAIN = 0.5  # share of captions as `pair_prompt` has them


class Pairs(NamedTuple):
    """Scenes of two objects, then the same with their places exchanged; latents float16 [2P, 4, h, w] and
    cover uint8 [2P, 3, GRID, GRID] of their renders."""

    scenes: Scenes
    latents: Tensor
    cover: Tensor

    @property
    def number(self) -> int:
        """How many pairs there are."""
        return len(self.scenes) // 2


def paired_scenes(count: int, seed: int) -> Scenes:
    """Of ``count`` scenes of two objects those that may change places; then the same after the change."""
    scenes = sample_scenes(count, seed, counts=(0.0, 1.0, 0.0))
    after, possible = exchanged(scenes)
    return Scenes.cat([scenes[possible], after[possible]])


@torch.no_grad()
def render_pairs(vae: AutoencoderKL, count: int, seed: int, size: int) -> Pairs:
    """`paired_scenes` and their renders of ``size`` pixels."""
    scenes = paired_scenes(count, seed)
    latents: list[Tensor] = []
    cover: list[Tensor] = []
    for index in tqdm(torch.arange(len(scenes)).split(64), desc="render", mininterval=5.0):
        rendered = render(scenes[index], size, chunk=64)
        latents.append(scaled_latents(vae, from_bytes(to_bytes(rendered.images))).half())
        cover.append(to_bytes(covered(rendered.masks)))
    return Pairs(scenes, torch.cat(latents), torch.cat(cover))


def pair_captions(pairs: Scenes, seed: int) -> list[str]:
    """A caption of each scene; of two that follow each other the captions differ in the relation alone."""
    rng, texts = random.Random(seed), list[str]()
    sides = first_to_second(pairs)
    for i in range(0, len(pairs), 2):
        pair, plain, turned, own = pairs[i : i + 2], rng.random() < PLAIN, rng.random() < 0.5, rng.getrandbits(60)
        for k in range(2):
            if plain:
                texts.append(plain_caption(pair[k : k + 1], sides[i + k], turned))
            else:
                texts += captions(pair[k : k + 1], own)
    return texts


def plain_caption(scene: Scenes, side: str, turned: bool = False) -> str:
    """How the first of a scene's two objects stands to the second, or the second to the first."""
    first, second = ((COLORS[int(scene.color[0, k])], SHAPES[int(scene.shape[0, k])]) for k in range(2))
    return pair_prompt(second, first, OPPOSITE[side]) if turned else pair_prompt(first, second, side)


def first_to_second(scenes: Scenes) -> list[str]:
    """How the first object stands to the second, "" where that is not clear."""
    return [RELATIONS[kind] or "" for kind in relations(scenes)[:, 0, 1].tolist()]


def find_halves(tokenizer: CLIPTokenizer, texts: Sequence[str], scenes: Scenes) -> Places:
    """Of captions that state a side, the words of the object that is named second: its colour's and its noun. In the
    place of what it covers is the half of the picture on that side, on a grid of GRID x GRID.

    Scenes have two objects that are not alike.
    """
    left = (torch.arange(GRID) < GRID // 2).float().expand(GRID, GRID)
    found: list[tuple[int, int, Tensor]] = []
    for i, text in enumerate(texts):
        words = prompt_words(tokenizer, text, weighted=False)
        named = named_objects([word.text for word in words])
        if len(named) < 2 or not any(word.text in SIDEWAYS for word in words):
            continue
        slot = int(((scenes.color[i] == named[1].color) & (scenes.shape[i] == named[1].shape)).nonzero()[0])
        is_left = scenes.position[i, slot, 0] < scenes.position[i, 1 - slot, 0]
        tokens = [token for number in (named[1].color_word, named[1].noun) for token in words[number].positions]
        found += [(i, token, left if is_left else 1 - left) for token in tokens]

    if not found:
        return Places(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), left[None][:0])
    samples, tokens, covers = zip(*found, strict=True)
    return Places(torch.tensor(samples), torch.tensor(tokens), torch.stack(covers))
