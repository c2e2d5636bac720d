"""Prompt editing and alternation, against the values that A1111 documents and a restatement of its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdkit.prompts.scheduling import prompt_schedule, text_at

TURNS = [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)]
DOCUMENTED: dict[str, list[tuple[int, str]]] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": TURNS,
    "[fe|]male": [(step, "female" if step % 2 else "male") for step in range(1, 11)],
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
}
"""What the web UI's source lists for 10 steps."""


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_the_documented_schedules(prompt: str) -> None:
    assert prompt_schedule(prompt, 10) == DOCUMENTED[prompt]


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")], [(6, "a b c")]),
        ("a [b:1.5] c", [(10, "a  c")], [(3, "a  c"), (6, "a b c")]),
        ("a [b:12] c", [(10, "a  c")], [(2, "a  c"), (6, "a b c")]),
        ("a [b:12.0] c", [(10, "a  c")], [(6, "a  c")]),
        ("a [b::1]", [(1, "a b"), (10, "a ")], [(6, "a ")]),
        ("[a:b:1.]", [(10, "a")], [(6, "b")]),
        ("[a:b:0]", [(10, "b")], [(6, "b")]),
        ("[a:b:-1]", [(10, "b")], [(6, "b")]),
        ("[a:b:1e999]", [(10, "a")], [(6, "a")]),
    ],
)
def test_the_second_stage_counts_on(prompt: str, first: list[Any], second: list[Any]) -> None:
    """Parts from 1 to 2, whole numbers from the first stage's steps."""
    assert prompt_schedule(prompt, 10) == first and prompt_schedule(prompt, 6, 10) == second


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        ("[a:b:0.33]", 6),  # the product is cut, not rounded: 6.6
        ("[a:b:0.35]", 7),
        ("[a:b:.999]", 19),
        ("[a:b:19]", 19),
    ],
)
def test_a_part_of_the_steps_is_cut_down(prompt: str, steps: int) -> None:
    assert prompt_schedule(prompt, 20) == [(steps, "a"), (20, "b")]
    texts = [text_at(prompt_schedule(prompt, 20), step) for step in range(1, 21)]
    assert texts == ["a"] * steps + ["b"] * (20 - steps)


def test_turns_begin_with_the_first_step() -> None:
    schedule = prompt_schedule("a [cat|dog|] here", 5)
    expected = ["a cat here", "a dog here", "a  here", "a cat here", "a dog here"]
    assert [text_at(schedule, step) for step in range(1, 6)] == expected


@pytest.mark.parametrize(
    "prompt", ["a | b", "a|b [c:d:3", "(a|b)", "a \\", "|", "16:9 a:b", "[a]", "(a:1.2) \\[b:3\\]"]
)
def test_words_stay_words(prompt: str) -> None:
    assert prompt_schedule(prompt, 10) == [(10, prompt)]


@pytest.mark.parametrize("prompt", ["[a|b:3]", "[a:b|c:3]", "a | b [c:d:3]", "[a|(b|c)]", "[a|b] [c:3] |"])
def test_a_stray_bar_is_said(prompt: str) -> None:
    with pytest.warns(UserWarning, match="nothing in this prompt is edited"):
        assert prompt_schedule(prompt, 10) == [(10, prompt)]


def test_deep_nesting_is_no_recursion() -> None:
    deep = "[" * 5000 + "a" + ":2]" * 5000
    assert prompt_schedule(deep, 4) == [(2, ""), (4, "a")]
    assert prompt_schedule("(" * 5000, 4) == [(4, "(" * 5000)]


# Against a restatement by recursive descent: the grammar's rules, one function each, on prompts with matched brackets.


@dataclass
class Reader:
    """A1111's grammar on prompts without stray brackets, colons and bars: reads the text of one step as it goes."""

    text: str
    step: int
    steps: int
    before: int | None
    at: int = 0

    def prompt(self) -> str:
        found = ""
        while self.at < len(self.text) and self.text[self.at] not in ")]:|":
            char = self.text[self.at]
            if char == "\\":
                found, self.at = found + self.text[self.at : self.at + 2], self.at + 2
            elif char in "([":
                self.at += 1
                found += self.round() if char == "(" else self.square()
            else:
                found, self.at = found + char, self.at + 1
        return found

    def round(self) -> str:
        inner = self.prompt()
        if self.text[self.at] == ":":
            self.at += 1
            inner += ":" + self.prompt()
        self.at += 1
        return f"({inner})"

    def square(self) -> str:
        parts = [self.prompt()]
        marks = ""
        while self.text[self.at] != "]":
            marks += self.text[self.at]
            self.at += 1
            parts.append(self.prompt())
        self.at += 1
        if not marks:
            return f"[{parts[0]}]"
        if marks[0] == "|":
            return parts[(self.step - 1) % len(parts)]
        return ([*parts[:-2], ""][0] if len(parts) == 3 else "") if self.early(parts[-1]) else parts[-2]

    def early(self, when: str) -> bool:
        number = float(when)
        if "." in when:
            number = (number - (1.0 if self.before is not None else 0)) * self.steps
        else:
            number -= self.before or 0
        return self.step <= min(self.steps, int(number))


WORDS = st.text("ab ,\\3", min_size=0, max_size=4).map(lambda text: re.sub(r"\\(.|$)", r"\\(", text))
WHEN = st.sampled_from(["0.5", ".25", "1.5", "1.75", "3", " 7", "12 ", "0", "-1", "1.0", "2.", "1e0", "+4"])


def brackets(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    content = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        content.map("({})".format),
        content.map("({}:1.3)".format),
        content.map("[{}]".format),
        st.builds("[{}:{}]".format, content, WHEN),
        st.builds("[{}:{}:{}]".format, content, content, WHEN),
        st.lists(content, min_size=2, max_size=4).map("|".join).map("[{}]".format),
    )


PROMPTS = st.lists(st.recursive(WORDS, brackets, max_leaves=8), min_size=1, max_size=3).map("".join)


@given(PROMPTS, st.integers(1, 12), st.one_of(st.none(), st.integers(1, 12)))
def test_every_step_has_the_text_of_the_restatement(prompt: str, steps: int, before: int | None) -> None:
    schedule = prompt_schedule(prompt, steps, before)
    ends = [end for end, _ in schedule]
    assert ends == sorted(set(ends)) and ends[0] >= 1 and ends[-1] == steps
    expected = [Reader(prompt, step, steps, before).prompt() for step in range(1, steps + 1)]
    assert [text_at(schedule, step) for step in range(1, steps + 1)] == expected


@given(st.text("ab[]():|3.\\ ", max_size=30))
def test_any_text_has_a_schedule(prompt: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert prompt_schedule(prompt, 5)[-1][0] == 5
