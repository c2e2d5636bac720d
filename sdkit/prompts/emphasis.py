"""A1111's weights in a prompt: ``(more)``, ``[less]``, ``(so much:1.3)``, and BREAK."""

from __future__ import annotations

import math
import re

from sdkit.errors import ConfigError
from sdkit.prompts.tags import NUMBER

Segment = tuple[str, float]
BREAK: Segment = ("BREAK", -1.0)  # recognised by identity: starts a new chunk

_GRAMMAR = re.compile(
    r"\\[\\()\[\]]?"  # an escaped character; a backslash before anything else stands for nothing
    r"|[()\[\]]"
    rf"|:\s*(?P<weight>{NUMBER})\s*\)"
    r"|[^\\()\[\]:]+"
    r"|:"
)


def escaped(text: str) -> str:
    """The text as it is written in a prompt, where its brackets are to stand for themselves."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


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
