"""What a prompt's text says: extra-network tags, A1111's weights, and the tokens of its words, in chunks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Extra networks

# Other kinds, such as <cat-toy> or <lora> without a colon, are words: triggers of textual inversions look like them.
_TAG = re.compile(r"<(?P<kind>lora|hypernet):(?P<rest>[^<>]*)(?P<end>>?)", re.IGNORECASE)
_WEIGHT = r"[+-]?(?:\d+\.?\d*|\.\d+)"


@dataclass(frozen=True)
class ExtraNetwork:
    """A network that a prompt asks for: its kind ("lora" or "hypernet"), its name, and its weight."""

    kind: str
    name: str
    weight: float = 1.0


def split_extra_networks(prompt: str) -> tuple[str, list[ExtraNetwork]]:
    """Take the tags ``<lora:name:0.8>`` and ``<hypernet:name:0.7>`` out of a prompt: (the rest, the networks in order).

    The weight is 1 when it is left out, and may be negative. As in A1111 a tag leaves nothing behind and may stand
    anywhere, inside brackets too. All other text in angle brackets stays.
    Raises ConfigError that quotes a tag that is not closed, has no name, or whose weight is no finite number.
    """
    networks: list[ExtraNetwork] = []

    def take(match: re.Match[str]) -> str:
        name, colon, weight = (part.strip() for part in match["rest"].partition(":"))
        valid = match["end"] and name and (not colon or re.fullmatch(_WEIGHT, weight))
        if not valid or not math.isfinite(number := float(weight or 1)):
            kind = match["kind"].lower()
            raise ConfigError(f"prompt: expected <{kind}:NAME> or <{kind}:NAME:WEIGHT>, found {match[0][:60]!r}")
        networks.append(ExtraNetwork(match["kind"].lower(), name, number))
        return ""

    return _TAG.sub(take, prompt), networks


# Weights

Segment = tuple[str, float]
BREAK: Segment = ("BREAK", -1.0)  # recognised by identity: starts a new chunk

_GRAMMAR = re.compile(
    r"\\[\\()\[\]]?"  # an escaped character; a backslash before anything else stands for nothing
    r"|[()\[\]]"
    rf"|:\s*(?P<weight>{_WEIGHT})\s*\)"
    r"|[^\\()\[\]:]+"
    r"|:"
)


def parse_weights(prompt: str) -> list[Segment]:
    r"""Split a prompt in A1111's grammar into (text, weight) pairs.

    ``(a)`` weighs 1.1, ``[a]`` 1 / 1.1, ``(a:1.3)`` 1.3; they nest by multiplying. ``\(``, ``\)``, ``\[``, ``\]`` and
    ``\\`` are the characters themselves. A bracket left open reaches to the end, a closing one alone is text. The
    word ``BREAK`` becomes the pair ``BREAK`` of this module. An empty prompt is one empty text of weight 1.
    """
    pieces: list[Segment] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [piece if piece is BREAK else (piece[0], piece[1] * factor) for piece in pieces[start:]]

    for match in _GRAMMAR.finditer(prompt):
        token, weight = match[0], match["weight"]
        if token in opened:
            opened[token].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif token == ")" and opened["("]:
            close("(", 1.1)
        elif token == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            literal = token[1:] if token[0] == "\\" else token
            first, *rest = re.split(r"\s*\bBREAK\b\s*", literal)
            pieces += [(first, 1.0), *(piece for text in rest for piece in (BREAK, (text, 1.0)))]
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise ConfigError(f"prompt {prompt[:60]!r}: a weight is not finite")
    return _joined(pieces)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of equal weight become one, so that a word is not cut where nothing changes."""
    result: list[Segment] = []
    for segment in segments:
        if segment is BREAK:
            result.append(segment)
        elif result and result[-1] is not BREAK and result[-1][1] == segment[1]:
            result[-1] = (result[-1][0] + segment[0], segment[1])
        elif segment[0]:
            result.append(segment)
    return result or [("", 1.0)]


# Tokens


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


def _triggers(text: str, names: list[str]) -> Iterator[tuple[re.Match[str], str]]:
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
    """CLIP marks the token that ends a word with </w>; a token that was added to the vocabulary is a word."""
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
