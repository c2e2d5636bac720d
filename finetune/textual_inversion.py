"""Textual inversion (arXiv 2208.01618): a new word's vectors are learned, and every weight of the model stays as it is.

`LearnedWord` is the ``context`` of a `DiffusionLoss`; `sdkit.checkpoints.textual_inversion` writes it to files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdkit.checkpoints.textual_inversion import TextualInversion
from sdkit.checks import check_count
from sdkit.errors import ConfigError
from sdkit.prompts.emphasis import parse_weights
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tags import split_extra_networks
from sdkit.prompts.tokens import prompt_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class LearnedWord(nn.Module):
    """forward(captions) -> hidden states [B, M, D]; ``token`` in a caption stands for ``vectors``, the one parameter.

    Captions are taken literally, as in all of training, and encoded at every call: what they mean changes with the
    vectors. The text encoder is no part of this module, so nothing trains it or switches on its dropout.

    vectors: [n, D], their first values, D the width of the encoder; trained in float32, whatever its dtype.
    max_norm: how long a vector may become, in the encoder's units; None: as long as it will. Free vectors grow to
        several times the length of any real word; the encoder then attends to little else, and what the rest of a
        prompt says (a colour, a table) is lost. The limit is part of the formula, v * min(1, max_norm / |v|), so that
        gradients, moving averages and files all hold to it.

    Raises ConfigError for a token that prompts would not read as a word.
    """

    def __init__(
        self,
        token: str,
        vectors: Tensor,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        clip_skip: int = 0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        check_token(token)
        self.token, self.tokenizer, self.clip_skip, self.max_norm = token, tokenizer, clip_skip, max_norm
        self._encoder = (text_encoder,)  # in a tuple it is not registered
        self.vectors = nn.Parameter(vectors.detach().float().clone())

    def limited(self) -> Tensor:
        """The vectors [n, D] as captions get them."""
        if self.max_norm is None:
            return self.vectors
        return self.vectors * (self.max_norm / self.vectors.norm(dim=1, keepdim=True)).clamp(max=1)

    def forward(self, captions: Sequence[str]) -> Tensor:
        return encode_prompts(
            self.tokenizer,
            self._encoder[0],
            captions,
            None,
            clip_skip=self.clip_skip,
            weighted=False,
            embeddings={self.token: self.limited()},
        )[0]

    def inversion(self) -> TextualInversion:
        """A copy of what has been learned so far, to use or to save."""
        return TextualInversion(self.token, self.limited().detach().clone())


def check_token(token: str) -> None:
    """Raise ConfigError unless prompts have ``token`` as it is: no weights, no tag, no white space around it."""
    whole = token.strip() == token != "" and parse_weights(token) == [(token, 1.0)]
    if not whole or split_extra_networks(token)[1]:
        raise ConfigError(f"token: expected a word without a meaning of its own in prompts, found {token!r}")


def check_captions(captions: Sequence[str], token: str, tokenizer: CLIPTokenizer) -> None:
    """Raise ConfigError that quotes captions without the token: a picture that they describe would teach nothing."""
    without = [text for text in captions if not _mentions(tokenizer, text, token)]
    if without:
        quoted = ", ".join(repr(text) for text in without[:3])
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise ConfigError(f"captions: expected {token!r} in each, found {quoted}{more}")


def _mentions(tokenizer: CLIPTokenizer, caption: str, token: str) -> bool:
    chunks = prompt_tokens(tokenizer, caption, weighted=False, embeddings={token: torch.zeros(1, 1)})
    return any(piece.vector is not None for piece in chain(*chunks))


def initial_vectors(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: str, count: int) -> Tensor:
    """The first vectors of a new word, [count, D] float32: the embeddings of ``words``.

    As many words as vectors give one each; else every vector begins as the mean of the words. A word that CLIP reads
    in pieces counts as the mean of its pieces. Raises ConfigError where there is no word.
    """
    check_count("vectors", count)
    pieces: dict[int, list[int]] = {}
    for piece in chain(*prompt_tokens(tokenizer, words, weighted=False)):
        pieces.setdefault(piece.word_index, []).append(piece.id)

    if not pieces:
        raise ConfigError(f"init: expected words that are like what is learned, found {words!r}")

    table = _table(text_encoder)
    embedded = torch.stack([table[ids].mean(0) for ids in pieces.values()])
    return embedded if len(embedded) == count else embedded.mean(0).repeat(count, 1)


def vocabulary_norm(text_encoder: CLIPTextModel) -> float:
    """The mean length of the vocabulary's embeddings, about 0.4 in the encoder of SD1."""
    return float(_table(text_encoder).norm(dim=1).mean())


def _table(text_encoder: CLIPTextModel) -> Tensor:
    """Embeddings of all tokens [vocabulary, D], float32, without gradients."""
    return text_encoder.get_input_embeddings().get_parameter("weight").detach().float()
