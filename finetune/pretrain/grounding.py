"""Teach words to look at their objects: a loss on cross-attention, where pictures' masks are known.

The colour's word and the noun of an object should be looked at from the object's pixels: of the attention that a word
gets, the share from outside is squared (the token loss of TokenCompose, arXiv 2312.03626). Without it a network may
read the whole prompt from any token, as the text encoder lets later ones know of those before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.pretrain.world.captions import named_objects
from finetune.pretrain.world.scenes import Scenes
from sdkit.networks.attention import Attention, KeyValue
from sdkit.viewing.attention_maps import prompt_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class Places(NamedTuple):
    """K words of a batch of captions and where their objects are.

    sample, token: int64 [K], the caption's number in the batch, and the token's in the caption.
    cover: float32 [K, h, w] in [0, 1], the part of each cell that shows the word's objects.
    """

    sample: Tensor
    token: Tensor
    cover: Tensor


def of_samples(places: Places, own: Tensor) -> Places:
    """The places in some samples of a batch, int64 [M], which are numbered anew in this order."""
    same = places.sample[:, None] == own
    kept = same.any(1)
    return Places(same[kept].int().argmax(1), places.token[kept], places.cover[kept])


def find_places(tokenizer: CLIPTokenizer, texts: Sequence[str], scenes: Scenes, cover: Tensor, seen: Tensor) -> Places:
    """The colours' words and the nouns of captions of these scenes.

    cover: uint8 [B, 3, h, w], of the objects of each slot. seen: bool [B, N], the tokens that count.
    """
    found: list[tuple[int, int, Tensor]] = []
    for i, text in enumerate(texts):
        words = prompt_words(tokenizer, text, weighted=False)
        for named in named_objects([word.text for word in words]):
            slots = (scenes.color[i] == named.color) & (scenes.shape[i] == named.shape)
            where = cover[i, slots].float().sum(0).clamp(max=255) / 255
            tokens = [token for number in (named.color_word, named.noun) for token in words[number].positions]
            found += [(i, token, where) for token in tokens if token < seen.shape[1] and seen[i, token]]

    if not found:
        return Places(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), cover.new_empty(0).float())
    samples, tokens, covers = zip(*found, strict=True)
    return Places(torch.tensor(samples), torch.tensor(tokens), torch.stack(covers))


@contextmanager
def attention_of(unet: nn.Module) -> Generator[list[Tensor]]:
    """Collects, from every cross-attention that runs in the block, the probabilities [B, N, M], averaged over heads;
    gradients flow through them."""
    collected: list[Tensor] = []

    def see(module: Any, inputs: tuple[Tensor, KeyValue]) -> None:
        x, (key, _) = inputs
        query = module.to_q(x).unflatten(-1, key.shape[2:])
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        collected.append((scores.float() * query.shape[-1] ** -0.5).softmax(-1).mean(1))

    layers = [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def grounding_loss(probabilities: Sequence[Tensor], places: Places, weight: Tensor) -> Tensor:
    """The mean over layers and words of weight * (share of the word's attention from outside its objects)^2, a scalar.

    probabilities: of each layer [B, h w, M], on a grid that divides that of the places. weight [B]: of each sample.
    """
    total = weight.new_zeros(())
    if not len(places.sample):
        return total

    for layer in probabilities:
        heat = layer[places.sample, :, places.token]
        side = round(heat.shape[1] ** 0.5)
        inside = F.interpolate(places.cover[:, None], (side, side), mode="area").flatten(1)
        share = (heat * inside).sum(1) / heat.sum(1)
        total = total + (weight[places.sample] * (1 - share).square()).mean()
    return total / len(probabilities)
