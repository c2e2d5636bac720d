"""What the course of a run depends on, as facts that its states keep, and in words what has changed since.

Facts are plain values by name: numbers, words, what `content` makes of a hash, or further facts, such as those of each
picture by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from sdkit.errors import CheckpointError

Facts = Mapping[str, Any]

FORMAT = 2  # of a state's content; 1 had no number
SHOWN = 3  # names of each kind in a message
_CONTENT = "content "


def content(digest: str) -> str:
    """A fact about something too large to show, by its hash: of two that differ it is said that they do."""
    return _CONTENT + digest


def options_as_facts(options: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass of options, but for those ``without``; paths become text."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in without}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def changes(before: Facts, now: Facts) -> list[str]:
    """What differs, each in words: "rank 8, now 4", "pictures: added a.png; b.png: caption 'x', now 'y'"."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [_change(name, before.get(name), now.get(name)) for name in differing]


def check_same_run(
    folder: Path, state: Mapping[str, Any], facts: Facts, parameters: Mapping[str, Tensor], most: int
) -> None:
    """Raise CheckpointError, which says what has changed, unless the state is of a run like this one."""

    def expect_same(same: bool, problem: str) -> None:
        if not same:
            raise CheckpointError(f"{folder}: {problem}; choose another output folder, or --no-resume begins anew")

    found = state.get("format", 1)
    expect_same(found == FORMAT, f"a state of version {found}, of another sdkit's, this one goes on from {FORMAT}")
    changed = changes(state["facts"], facts)
    expect_same(not changed, f"of a run with {', '.join(changed)}")

    shapes = [{name: tuple(p.shape) for name, p in of.items()} for of in (state["weights"], parameters)]
    changed = changes({"parameters": shapes[0]}, {"parameters": shapes[1]})
    expect_same(not changed, f"of a run that trained others, {', '.join(changed)}")
    expect_same(state["step"] <= most, f"max_train_steps: the run has done {state['step']} already, found {most}")


def _change(name: str, before: object, now: object) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return f"{name}: {'; '.join(_inside(cast('Facts', before), cast('Facts', now)))}"
    if any(isinstance(value, str) and value.startswith(_CONTENT) for value in (before, now)):
        return f"{name}: not the same"
    return f"{name} {_text(before)}, now {_text(now)}"


def _inside(before: Facts, now: Facts) -> list[str]:
    """What differs between facts that may come and go, the first few of each kind."""
    added, removed = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    both = {name: value for name, value in before.items() if name in now}
    changed = changes(both, {name: now[name] for name in both})

    found = [f"{what} {_few(names, ', ')}" for what, names in (("added", added), ("removed", removed)) if names]
    return [*found, _few(changed, "; ")] if changed else found


def _few(items: Sequence[str], between: str) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more


def _text(value: object) -> str:
    return "none" if value is None or isinstance(value, Mapping) else repr(value)
