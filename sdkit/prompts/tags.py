"""Extra networks in a prompt: the tags ``<lora:name:0.8>`` and ``<hypernet:name:0.7>``, and those of any other kind."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from sdkit.adapter_kinds import adapter_kinds
from sdkit.errors import ConfigError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
"""A weight, here and in brackets."""

WEB_UI = ("lora", "hypernet")
"""A1111's own tags. They count as tags also where no installed package has adapters: read as words they would pass
unseen."""

OTHER_NAMES = {"lyco": "lora"}
"""Tags of A1111's extensions that stand for one of ours: LyCORIS files are LoRAs."""

_FOREIGN = re.compile(r"<([A-Za-z][\w-]*):[^<>]*>")


@dataclass(frozen=True)
class ExtraNetwork:
    """A network that a prompt asks for: its kind by its tag, its name, and its weight."""

    kind: str
    name: str
    weight: float = 1.0


def split_extra_networks(prompt: str, triggers: Collection[str] = ()) -> tuple[str, list[ExtraNetwork]]:
    """Take the tags ``<kind:name:0.8>`` out of a prompt: (the rest, the networks in order).

    The kinds are "lora" (also written "lyco"), "hypernet" and the tags of every registered
    `sdkit.adapter_kinds.AdapterKind`. The weight is 1 when it is left out, and may be negative. As in A1111 a tag
    leaves nothing behind and may stand anywhere, inside brackets too. Text in angle brackets without a colon stays, as
    <cat-toy> does, and so do the words ``triggers`` of textual inversions.
    Raises ConfigError that quotes a tag of an unknown kind, one that is not closed, has no name, or whose weight is no
    finite number.
    """
    networks: list[ExtraNetwork] = []

    def take(match: re.Match[str]) -> str:
        kind = match["kind"].lower()
        name, colon, weight = (part.strip() for part in match["rest"].partition(":"))
        valid = match["end"] and name and (not colon or re.fullmatch(NUMBER, weight))
        if not valid or not math.isfinite(number := float(weight or 1)):
            raise ConfigError(f"prompt: expected <{kind}:NAME> or <{kind}:NAME:WEIGHT>, found {match[0][:60]!r}")

        networks.append(ExtraNetwork(OTHER_NAMES.get(kind, kind), name, number))
        return ""

    kinds = sorted({*WEB_UI, *OTHER_NAMES, *(kind.tag.lower() for kind in adapter_kinds())})
    pattern = rf"<(?P<kind>{'|'.join(map(re.escape, kinds))}):(?P<rest>[^<>]*)(?P<end>>?)"
    rest = re.sub(pattern, take, prompt, flags=re.IGNORECASE)

    for match in _FOREIGN.finditer(rest):
        if not any(match[0].lower() in trigger.lower() for trigger in triggers):
            raise ConfigError(f"prompt: {match[0][:60]}: expected a tag of one of {', '.join(kinds)}")
    return rest, networks
