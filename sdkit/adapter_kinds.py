"""The kinds of adapters that there are: LoRA, hypernetworks, and what others register.

A kind is registered once, as one `AdapterKind`. Its tag in prompts, its option on the command line, its name in the
metadata of pictures and what ``sdkit inspect`` says about its files follow from that. `finetune.adapters.KINDS` is the
table of those that come with us; it is found by the entry point of the group ``sdkit.adapters``, as that of any other
distribution is. Nothing heavy is imported here: ``sdkit --help`` asks for the names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from sdkit.checks import expect

GROUP = "sdkit.adapters"


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter.

    name: its option on the command line, ``--NAME FILE:WEIGHT``, and its key in a picture's metadata.
    tag: its tag in prompts, ``<TAG:NAME:WEIGHT>``.
    verbs: the dotted name of the module with its functions (`finetune.adapters.Verbs`), imported when first used.
    files: for each name that ``sdkit inspect`` gives to such files, the regular expression of a key that no other file
        has.
    formats: those in which ``sdkit convert --format`` writes them, by the function ``convert`` of ``verbs``.
    """

    name: str
    tag: str
    verbs: str
    files: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    formats: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        """The module with its functions."""
        return importlib.import_module(self.verbs)


_added: list[AdapterKind] = []


def register_adapter_kind(kind: AdapterKind) -> None:
    """Add a kind that no installed distribution names, such as one that is being developed.

    Raises ConfigError when its name or tag is taken.
    """
    taken = [known for known in adapter_kinds() if known.name == kind.name or known.tag == kind.tag]
    expect(not taken or taken == [kind], "adapter kind", "a name and a tag that no other kind has", kind.name)
    if not taken:
        _added.append(kind)


def adapter_kinds() -> tuple[AdapterKind, ...]:
    """All kinds: those of installed distributions, then those that were added."""
    installed = _installed()
    return *installed, *(kind for kind in _added if kind not in installed)


@cache
def _installed() -> tuple[AdapterKind, ...]:
    """Those that entry points name. Raises ConfigError for one that is no table of kinds, or names one again."""
    found: dict[str, AdapterKind] = {}
    for point in entry_points(group=GROUP):
        table: Any = point.load()
        good = isinstance(table, Sequence) and all(isinstance(kind, AdapterKind) for kind in table)
        expect(good, f"entry point {point.name} of {GROUP}", "a sequence of AdapterKind", point.value)

        for kind in table:
            expect(found.setdefault(kind.name, kind) == kind, "adapter kind", "one of this name", kind.name)
    return tuple(found.values())
