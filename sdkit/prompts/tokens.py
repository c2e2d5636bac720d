"""The tokens of a prompt's words, in chunks, with the weights of its grammar and the vectors of textual inversions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.prompts.emphasis import BREAK, parse_weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True, eq=False)
class PromptToken:
    """One token of a prompt.

    ``word`` is the word that it is a piece of, in lower case as CLIP reads it: letters ("sphere"), one digit, or
    punctuation (","); for a textual inversion the whole trigger. ``word_index`` counts the prompt's words from 0; the
    tokens of one word share it. ``vector`` [D] takes the place of the embedding of ``id``, which then means nothing.
    """

    id: int
    weight: float = 1.0
    word: str = ""
    word_index: int = -1
    vector: Tensor | None = None


def prompt_tokens(
    tokenizer: CLIPTokenizer,
    prompt: str,
    *,
    weighted: bool = True,
    embeddings: Mapping[str, Tensor] | None = None,
    max_length: int | None = None,
) -> list[list[PromptToken]]:
    """The prompt's tokens in chunks of at most ``max_length - 2``: without begin, end and padding, at least one chunk.

    Token i of chunk c stands at position ``c * max_length + 1 + i`` of the context. ``max_length`` is the tokenizer's
    ``model_max_length`` (77) when None. ``weighted`` reads A1111's grammar (`parse_weights`).

    ``embeddings`` maps the triggers of textual inversions to their vectors [n, D]. A trigger in the prompt becomes n
    tokens; they start a new chunk when the last one has no room for all of them. A trigger is found whatever its case
    and white space, the longest first, and as a whole: where it ends in a letter or a digit no other may follow, nor
    come before ("style" is in "my-style", not in "styles" or "style2").
    Raises ConfigError for embeddings without meaning, and for a weight that is not finite.
    """
    _check_embeddings(embeddings or {})
    size = (max_length or int(tokenizer.model_max_length)) - 2
    chunks: list[list[PromptToken]] = [[]]
    word_index = 0

    for segment in parse_weights(prompt) if weighted else [(prompt, 1.0)]:
        if segment is BREAK:
            chunks.append([])
            continue

        text, weight = segment
        for word, ids, vectors in _words(tokenizer, text, embeddings or {}):
            if vectors and len(ids) <= size < len(chunks[-1]) + len(ids):
                chunks.append([])
            for i, vector in zip(ids, vectors or [None] * len(ids), strict=True):
                if len(chunks[-1]) == size:
                    chunks.append([])
                chunks[-1].append(PromptToken(i, weight, word, word_index, vector))
            word_index += 1
    return chunks


def used_triggers(prompts: Iterable[str], names: Sequence[str], *, weighted: bool = True) -> set[str]:
    """Those of the triggers ``names`` that stand in prompts, by the rules of `prompt_tokens`."""
    segments = [text for prompt in prompts for text, _ in (parse_weights(prompt) if weighted else [(prompt, 1.0)])]
    return {trigger for text in segments for _, trigger in _triggers(text, names)}


def _words(
    tokenizer: CLIPTokenizer, text: str, embeddings: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """Each word with its token ids, and for a trigger its vectors. The text between triggers is tokenized by itself.

    A1111 looks for the trigger's token ids instead, and so misses "<toy>" in "<toy>,", where CLIP reads ">," as one.
    """
    end = 0
    for match, trigger in _triggers(text, list(embeddings)):
        yield from _plain_words(tokenizer, text[end : match.start()])
        vectors = list(embeddings[trigger])
        yield trigger.lower(), [0] * len(vectors), vectors
        end = match.end()
    yield from _plain_words(tokenizer, text[end:])


def _triggers(text: str, names: Sequence[str]) -> Iterator[tuple[re.Match[str], str]]:
    if not names:
        return
    names = sorted(names, key=len, reverse=True)
    pattern = "|".join(f"({_whole(name)})" for name in names)
    for match in re.finditer(pattern, text, re.IGNORECASE):
        yield match, names[(match.lastindex or 1) - 1]


def _whole(name: str) -> str:
    """The pattern of a trigger, with no letter or digit next to its own; "_" is punctuation to CLIP."""
    words = r"\s+".join(re.escape(word) for word in name.split())
    before = r"(?<![^\W_])" if name.strip()[0].isalnum() else ""
    after = r"(?![^\W_])" if name.strip()[-1].isalnum() else ""
    return before + words + after


def _plain_words(tokenizer: Any, text: str) -> Iterator[tuple[str, list[int], list[Tensor]]]:
    """The words of a text without triggers: CLIP marks a word's last token with </w>; an added token is a word."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False).input_ids
    pieces: list[str] = tokenizer.convert_ids_to_tokens(ids)
    added = tokenizer.added_tokens_decoder
    word_ends = [piece.endswith("</w>") or i in added for i, piece in zip(ids, pieces, strict=True)]
    numbers = itertools.accumulate(word_ends, initial=0)
    for _, group in itertools.groupby(zip(numbers, ids), key=lambda pair: pair[0]):  # noqa: B905  # one number more
        word = [i for _, i in group]
        yield tokenizer.decode(word).strip(), word, []


def _check_embeddings(embeddings: Mapping[str, Tensor]) -> None:
    for name, vectors in embeddings.items():
        if not isinstance(name, str) or not name.strip():  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise ConfigError(f"embeddings: expected a word as trigger, found {name!r}")
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not len(vectors):  # pyright: ignore[reportUnnecessaryIsInstance]
            found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"embeddings: {name!r}: expected vectors [n, D], found {found}")

    lower = [" ".join(name.lower().split()) for name in embeddings]
    if len(set(lower)) < len(lower):
        twice = sorted(name for name, low in zip(embeddings, lower, strict=True) if lower.count(low) > 1)
        raise ConfigError(f"embeddings: triggers that differ in case alone cannot be told apart: {', '.join(twice)}")
