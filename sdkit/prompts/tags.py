"""Extra networks in a prompt: the tags ``<lora:name:0.8>`` and ``<hypernet:name:0.7>``, and those of any other kind."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sdkit.adapter_kinds import adapter_kinds
from sdkit.errors import ConfigError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
"""A weight, here and in brackets."""

WEB_UI = ("lora", "hypernet")
"""A1111's own tags. They count as tags also where no installed package has adapters: read as words they would pass
unseen."""


@dataclass(frozen=True)
class ExtraNetwork:
    """A network that a prompt asks for: its kind by its tag, its name, and its weight."""

    kind: str
    name: str
    weight: float = 1.0


def split_extra_networks(prompt: str) -> tuple[str, list[ExtraNetwork]]:
    """Take the tags ``<kind:name:0.8>`` out of a prompt: (the rest, the networks in order).

    The kinds are "lora", "hypernet" and the tags of every registered `sdkit.adapter_kinds.AdapterKind`. The weight is 1
    when it is left out, and may be negative. As in A1111 a tag leaves nothing behind and may stand anywhere, inside
    brackets too. All other text in angle brackets stays: triggers of textual inversions look like <cat-toy>.
    Raises ConfigError that quotes a tag that is not closed, has no name, or whose weight is no finite number.
    """
    networks: list[ExtraNetwork] = []

    def take(match: re.Match[str]) -> str:
        name, colon, weight = (part.strip() for part in match["rest"].partition(":"))
        valid = match["end"] and name and (not colon or re.fullmatch(NUMBER, weight))
        if not valid or not math.isfinite(number := float(weight or 1)):
            kind = match["kind"].lower()
            raise ConfigError(f"prompt: expected <{kind}:NAME> or <{kind}:NAME:WEIGHT>, found {match[0][:60]!r}")

        networks.append(ExtraNetwork(match["kind"].lower(), name, number))
        return ""

    return _tag().sub(take, prompt), networks


def _tag() -> re.Pattern[str]:
    """The pattern of a tag, of any kind that is registered now."""
    kinds = {*WEB_UI, *(kind.tag.lower() for kind in adapter_kinds())}
    return re.compile(
        rf"<(?P<kind>{'|'.join(map(re.escape, sorted(kinds)))}):(?P<rest>[^<>]*)(?P<end>>?)", re.IGNORECASE
    )
