"""A1111's weights in a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdkit.prompts.emphasis import BREAK, escaped, parse_weights


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [("", 1)]),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[un(balanced", [("un", 1 / 1.1), ("balanced", 1)]),
        ("stray) ]", [("stray) ]", 1)]),
        (r"\(literal\] \\ \[x\)", [(r"(literal] \ [x)", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", 1 / 1.21)]),
        ("(a:1.0)b", [("ab", 1)]),
        ("(a : .5 )(b:-2)(c:+3.)", [("a ", 0.5), ("b", -2), ("c", 3)]),
        ("a:1.3) 4:3 (x:y)", [("a:1.3) 4:3 ", 1), ("x:y", 1.1)]),
        ("(1.2.3:1.2.3)", [("1.2.3:1.2.3", 1.1)]),
        (
            "a (house:1.3) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.3),
                (" ", 1),
                ("on", 1 / 1.1),
                (" a ", 1),
                ("hill", 0.5),
                (", sun, ", 1),
                ("sky", 1.331),
                (".", 1),
            ],
        ),
        ("a (house:1.3 (b", [("a ", 1), ("house:1.3 ", 1.1), ("b", 1.21)]),
        ("a BREAK b BREAKING", [("a", 1), BREAK, ("b BREAKING", 1)]),
        ("(a BREAK b:2)", [("a", 2), BREAK, ("b", 2)]),
    ],
)
def test_grammar(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(st.text(alphabet="ab()[]\\ ", max_size=12))
def test_escaped_text_stands_for_itself(text: str) -> None:
    assert parse_weights(escaped(text)) == [(text, 1.0)]
