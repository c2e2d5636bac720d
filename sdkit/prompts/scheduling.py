"""A1111's prompt editing: ``[a:b:0.5]`` becomes another word on the way, ``[a|b]`` takes turns at every step.

The grammar is that of the web UI, timelines of version 1.6 and later. In square brackets

    [a:b:when]   is a up to the step ``when``, then b
    [b:when]     is nothing, then b
    [a::when]    is a, then nothing
    [a|b|c]      is a at step 1, b at step 2, c at step 3, a again at step 4; each but the first may be left out

They nest, hold weights in brackets and stand in them. ``when`` with a point in it is a part of all steps, without one
a number of steps. Brackets that say none of this are left to `sdkit.prompts.emphasis`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field

Schedule = list[tuple[int, str]]
"""(last step, text) in order; steps count from 1, and the last entry ends with the last step."""

_TOKEN = re.compile(r"\\.|[^\\\[\]():|]+|[\[\]():|]", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class _Edit:
    """``before`` up to the step that ``when`` stands for, then ``after``."""

    before: _Nodes
    after: _Nodes
    when: str


@dataclass(frozen=True)
class _Turns:
    """One choice at each step, in turn."""

    choices: list[_Nodes]


_Node = str | _Edit | _Turns
_Nodes = list[_Node]


def prompt_schedule(prompt: str, steps: int, steps_before: int | None = None) -> Schedule:
    """What a prompt says at each of ``steps`` steps, as A1111 cuts it: ``"a [b:3]"`` in 10 is (3, "a "), (10, "a b").

    steps_before: for the second stage (hires) the steps of the first; there whole numbers count on from those, and
    parts run from 1.0 to 2.0, so that [a:b:0.5] is b in all of it and [a:b:1.5] changes half-way.

    A ``|`` outside of such brackets, or a backslash at the end, makes the whole prompt plain, as it does there; where
    the prompt has square brackets this is a warning. Of a prompt with stray brackets A1111's parser chooses one of
    several readings; here every bracket that can be an edit is one.
    """
    nodes = _parse(prompt)
    if nodes is None:
        if re.search(r"\[.*[:|].*\]", prompt, re.DOTALL):
            warnings.warn(
                f"prompt {prompt[:60]!r}: a | that stands in no [a|b] of its own: nothing in this prompt is edited",
                stacklevel=2,
            )
        return [(steps, prompt)]

    boundaries = {steps}
    for node in _all_nodes(nodes):
        if isinstance(node, _Turns):
            boundaries.update(range(1, steps + 1))
        elif isinstance(node, _Edit) and (step := _step(node.when, steps, steps_before)) >= 1:
            boundaries.add(step)
    return [(step, _text_at(nodes, step, steps, steps_before)) for step in sorted(boundaries)]


def text_at(schedule: Schedule, step: int) -> str:
    """The text of a step, counted from 1.

    That is what A1111's manual says and what its schedule is made for; its sampling loop counts from 0 there, so that
    every change comes one step later than written.
    """
    return next((text for end, text in schedule if step <= end), schedule[-1][1])


def _step(when: str, steps: int, steps_before: int | None) -> int:
    """The last step before the change; 0 or less where it is made from the start."""
    value = float(when)
    if "." in when:
        value = (value - (0 if steps_before is None else 1)) * steps
    else:
        value -= steps_before or 0
    return int(max(-1.0, min(steps, value)))


def _text_at(nodes: _Nodes, step: int, steps: int, steps_before: int | None) -> str:
    text: list[str] = []
    waiting = nodes[::-1]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            text.append(node)
        elif isinstance(node, _Turns):
            waiting += node.choices[(step - 1) % len(node.choices)][::-1]
        else:
            early = step <= _step(node.when, steps, steps_before)
            waiting += (node.before if early else node.after)[::-1]
    return "".join(text)


def _all_nodes(nodes: _Nodes) -> _Nodes:
    """The nodes, and those inside them."""
    found: _Nodes = []
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, _Edit):
            waiting += node.before + node.after
        elif isinstance(node, _Turns):
            waiting += [inner for choice in node.choices for inner in choice]
    return found


# Reading


@dataclass
class _Frame:
    """A bracket that is still open: its parts, and the marks ``:`` or ``|`` that part them."""

    bracket: str
    parts: list[_Nodes] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list[str])

    def flat(self) -> _Nodes:
        """Its content as it was written."""
        first, *rest = self.parts
        return first + [node for mark, part in zip(self.marks, rest, strict=True) for node in (mark, *part)]

    def closed(self) -> _Nodes | None:
        """What it stands for now that it is closed; None where that is nothing."""
        close = _CLOSING[self.bracket]
        if not self.marks or (self.bracket == "(" and self.marks == [":"]):
            return [self.bracket, *self.flat(), close]
        if self.bracket == "(":
            return None
        if set(self.marks) == {"|"}:
            return [_Turns(self.parts)]

        when = _WHEN.fullmatch("".join(n if isinstance(n, str) else "[" for n in self.parts[-1]))
        if set(self.marks) != {":"} or len(self.marks) > 2 or when is None:
            return None
        return [_Edit(self.parts[0] if len(self.marks) == 2 else [], self.parts[-2], when[1])]


def _parse(prompt: str) -> _Nodes | None:
    """The prompt as text, edits and turns; None where a ``|`` or a backslash stands for nothing."""
    whole = _Frame("")
    opened = [whole]

    def give_up() -> None:
        """No bracket that is open now can be closed: they are text."""
        for frame in opened[1:]:
            whole.parts[-1] += [frame.bracket, *frame.flat()]
        del opened[1:]

    end = 0
    for match in _TOKEN.finditer(prompt):
        if match.start() != end:
            return None  # a backslash without a character after it
        token, end, top = match[0], match.end(), opened[-1]

        if token in _CLOSING:
            opened.append(_Frame(token))
        elif token in "])":
            inner = top.closed() if token == _CLOSING.get(top.bracket) else None
            if inner is None:
                give_up()
                whole.parts[-1].append(token)
            else:
                opened.pop()
                opened[-1].parts[-1] += inner
        elif token in ":|" and top is not whole:
            top.marks.append(token)
            top.parts.append([])
        else:
            top.parts[-1].append(token)

    give_up()
    return None if "|" in whole.parts[0] or end != len(prompt) else whole.parts[0]
