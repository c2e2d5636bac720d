"""Where in the picture each word of the prompt was looked at: cross-attention maps, as in DAAM (arXiv 2210.04885).

with record_attention(sd.unet, images=1) as recorder:
    picture = sd.text_to_image("a red sphere and a blue cube", seed=3).images[0]
maps = recorder.maps([prompt_words(sd.tokenizer, "a red sphere and a blue cube")])
maps.word("red sphere")              # [H, W]
attention_sheet(picture, maps)       # the picture, and a panel for each word
"""

from __future__ import annotations

import unicodedata
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdkit.errors import ConfigError, SDKitError
from sdkit.networks.attention import Attention, Transformer2DModel
from sdkit.prompts.tokens import prompt_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Words


class Word(NamedTuple):
    """A word of a prompt, lower case, and where its tokens stand in the context, counted from 0."""

    text: str
    positions: tuple[int, ...]


def prompt_words(
    tokenizer: CLIPTokenizer,
    prompt: str,
    *,
    weighted: bool = True,
    embeddings: Mapping[str, Tensor] | None = None,
    max_length: int | None = None,
) -> list[Word]:
    """The words of a prompt as CLIP cuts them: punctuation marks and digits are words too. Weights, chunks beyond the
    75th token and triggers of textual inversion as in `sdkit.prompts.tokens.prompt_tokens`, which takes the same
    arguments."""
    length = int(tokenizer.model_max_length) if max_length is None else max_length
    chunks = prompt_tokens(tokenizer, prompt, weighted=weighted, embeddings=embeddings, max_length=length)

    texts: dict[int, str] = {}
    positions: dict[int, list[int]] = {}
    for c, chunk in enumerate(chunks):
        for i, token in enumerate(chunk):
            texts[token.word_index] = token.word
            positions.setdefault(token.word_index, []).append(c * length + 1 + i)  # after the chunk's begin token
    return [Word(text, tuple(positions[index])) for index, text in texts.items()]


# Recording


@dataclass(frozen=True)
class AttentionMaps:
    """The attention that each pixel gave to each token, averaged over heads, layers and network calls.

    values: [B, M, H, W] on the CPU, for M context tokens, begin, end and padding among them; sums over M are 1.
    words: those of each image's prompt.
    """

    values: Tensor
    words: tuple[tuple[Word, ...], ...]

    def tokens(self, image: int = 0) -> Tensor:
        """The maps [M, H, W] of image number ``image``."""
        return self.values[image]

    def joined(self, each: int) -> AttentionMaps:
        """The maps of every ``each`` images in a row as those of one: all their tokens, one after the other."""
        length = self.values.shape[1]
        groups = [self.words[first : first + each] for first in range(0, len(self.words), each)]
        words = tuple(
            tuple(
                Word(word.text, tuple(position + number * length for position in word.positions))
                for number, own in enumerate(group)
                for word in own
            )
            for group in groups
        )
        return AttentionMaps(self.values.unflatten(0, (-1, each)).flatten(1, 2), words)

    def word(self, text: str, image: int = 0, occurrence: int | None = None) -> Tensor:
        """The map [H, W] of a word or phrase: the mean over its tokens, wherever the prompt has it.

        ``occurrence`` picks one place, counted from 0. Case does not matter. Raises ConfigError, with the words that
        there are, for any other.
        """
        places = _places(self.words[image], text)
        if not places:
            known = ", ".join(dict.fromkeys(word.text for word in self.words[image]))
            raise ConfigError(f"attention maps: {text!r} is not in the prompt; its words: {known or 'none'}")

        if occurrence is not None:
            if not 0 <= occurrence < len(places):
                raise ConfigError(f"attention maps: {text!r} is there {len(places)} times, found {occurrence=}")
            places = [places[occurrence]]
        return self.values[image, [position for place in places for position in place]].mean(0)


def _places(words: Sequence[Word], text: str) -> list[list[int]]:
    """The positions of every run of words that reads ``text``, spaces apart: "well-known" is three words to CLIP."""
    wanted = "".join(unicodedata.normalize("NFC", text).lower().split())
    found: list[list[int]] = []
    for first in range(len(words) if wanted else 0):
        run, positions = "", list[int]()
        for word in words[first:]:
            run += "".join(word.text.split())  # a trigger of textual inversion may be several words
            positions += word.positions
            if not wanted.startswith(run):
                break
            if run == wanted:
                found.append(positions)
                break
    return found


class AttentionRecorder:
    """Running sums of attention maps, one for each size of grid, on their device. Made by `record_attention`.

    ``places`` may say, before a call, for which image each row of its batch counts, and None for a row that does not;
    then an image may have several rows or none, and its map is the mean over those that it had.
    """

    def __init__(self, images: int | None) -> None:
        self._images = images
        self.places: Sequence[int | None] | None = None
        self._sums: dict[tuple[int, int], Tensor] = {}  # (h, w): [B, h w, M]
        self._counts: list[int] = []  # maps in the sums of each image: layers x network calls

    def maps(self, words: Sequence[Sequence[Word]]) -> AttentionMaps:
        """The maps so far: the mean over all layers and calls, each brought to the largest grid (bilinear).

        words: for each image those of its prompt (`prompt_words`); empty where embeddings were given for a prompt.
        Raises ConfigError when their number is not that of the images, SDKitError when no call was seen.
        """
        if not self._sums:
            raise SDKitError("attention maps: nothing was recorded; the UNet was not called inside record_attention")

        largest = max(self._sums, key=lambda size: size[0] * size[1])
        images = len(self._sums[largest])
        if len(words) != images:
            raise ConfigError(f"attention maps: expected words for {images} images, found {len(words)}")

        grids = [sums.transpose(1, 2).unflatten(2, size) for size, sums in self._sums.items()]
        total = torch.stack([F.interpolate(g, largest, mode="bilinear", align_corners=False) for g in grids]).sum(0)
        counts = torch.tensor(self._counts).clamp(min=1)[:, None, None, None].to(total)
        return AttentionMaps((total / counts).cpu(), tuple(tuple(own) for own in words))

    def add(self, size: tuple[int, int], probabilities: Tensor) -> None:
        """Add one layer's probabilities [B, h w, M], of a grid of size (h, w), to the sums."""
        images = len(probabilities) if self._images is None else self._images
        if self.places is None and images > len(probabilities):
            raise ConfigError(f"record_attention: expected a batch of at least {images}, found {len(probabilities)}")

        places = range(images) if self.places is None else self.places
        first = len(probabilities) - images if self.places is None else 0
        if size not in self._sums:
            self._sums[size] = probabilities.new_zeros(images, *probabilities.shape[1:])
        self._counts = self._counts or [0] * images
        for row, place in enumerate(places, first):
            if place is not None:
                self._sums[size][place] += probabilities[row]
                self._counts[place] += 1


@contextmanager
def record_attention(unet: nn.Module, images: int | None = None) -> Generator[AttentionRecorder]:
    """Watch every cross-attention of ``unet`` while the context lasts; the outputs stay the same up to rounding.

    images: only the last ``images`` rows of each batch count, which are the prompt's where guidance batches the
        unconditional rows before them; None: all rows.

    The network has to run layer by layer: a CUDA graph captured before is replayed unseen. Raises ConfigError for a
    network without cross-attention, or one that is being recorded already.
    """
    transformers = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
    attentions = [attention for transformer in transformers for attention in _cross_attentions(transformer)]

    if not attentions:
        raise ConfigError("record_attention: this network has no cross-attention")
    if any(attention.recorder is not None for attention in attentions):
        raise ConfigError("record_attention: this network is being recorded already")

    recorder = AttentionRecorder(images)
    hooks = [_watch(transformer, recorder) for transformer in transformers]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for attention in attentions:
            attention.recorder = None


def _watch(transformer: Transformer2DModel, recorder: AttentionRecorder) -> RemovableHandle:
    """Hand the recorder the probabilities of the cross-attentions of ``transformer``. To undo it, remove the handle and
    set their ``recorder`` to None."""
    size = (0, 0)

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal size  # tokens have lost the height and width of their grid: the transformer's input has them
        height, width = inputs[0].shape[-2:]
        size = (height, width)

    for attention in _cross_attentions(transformer):
        attention.recorder = lambda probabilities: recorder.add(size, probabilities)
    return transformer.register_forward_pre_hook(see)


def _cross_attentions(transformer: Transformer2DModel) -> list[Attention]:
    return [module for module in transformer.modules() if isinstance(module, Attention) and module.is_cross]
