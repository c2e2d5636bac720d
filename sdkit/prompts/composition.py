"""Several prompts in one: ``a cat AND a dog :0.5``, composable diffusion (arXiv 2206.01714) as A1111 has it."""

from __future__ import annotations

import math
import re

from sdkit.errors import ConfigError

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r":\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")


def is_composed(prompt: str) -> bool:
    """Whether the prompt has the word AND in upper case."""
    return _AND.search(prompt) is not None


def split_composition(prompt: str) -> list[tuple[str, float]]:
    """The prompts that AND joins, with their weights: "a cat AND a dog :0.5" is ("a cat ", 1), (" a dog", 0.5).

    A weight stands at the end of its prompt, after a colon, and may be negative. A prompt without AND is one of weight
    1, and what stands at its end is a part of it: A1111 reads "in 16:9" as the prompt "in 16" of weight 9.
    Raises ConfigError for a weight that is not finite.
    """
    parts = _AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]

    found: list[tuple[str, float]] = []
    for part in parts:
        match = _WEIGHT.search(part)
        weight = 1.0 if match is None else float(match[1])
        if not math.isfinite(weight):
            raise ConfigError(f"prompt {prompt[:60]!r}: a weight is not finite")
        found.append((part if match is None else part[: match.start()].rstrip(), weight))
    return found
