"""Tokens, with the words and triggers that they come from."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer

from sdkit.errors import ConfigError
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.prompts.tokens import prompt_tokens


@cache
def tokenizer(pad: int = 49407) -> CLIPTokenizer:
    return clip_tokenizer(pad)


def vectors(n: int, width: int = 4) -> Tensor:
    return torch.arange(n * width).view(n, width).float()


def found(prompt: str, **options: Any) -> list[str]:
    """The words of a prompt in order; a trigger's with its number of vectors."""
    tokens = [token for chunk in prompt_tokens(tokenizer(), prompt, **options) for token in chunk]
    runs = [list(group) for _, group in groupby(tokens, key=lambda token: token.word_index)]
    return [run[0].word + (f"*{len(run)}" if run[0].vector is not None else "") for run in runs]


@pytest.mark.parametrize("pad", [49407, 0])
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", []),
        ("A photo of an astronaut's café!", ["a", "photo", "of", "an", "astronaut", "'s", "café", "!"]),
        ("hyperrealistic 42 my-style, 日本", ["hyperrealistic", "4", "2", "my", "-", "style", ",", "日本"]),
        ("a (red:1.3) [Sphere] un(known)", ["a", "red", "sphere", "un", "known"]),
        (r"\(x\) BREAK y", ["(", "x", ")", "y"]),
    ],
)
def test_words(prompt: str, words: list[str], pad: int) -> None:
    tokens = [token for chunk in prompt_tokens(tokenizer(pad), prompt) for token in chunk]
    assert list(dict.fromkeys((token.word_index, token.word) for token in tokens)) == list(enumerate(words))


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.sampled_from([49407, 0]))
def test_tokens_are_the_tokenizers(text: str, pad: int) -> None:
    chunks = prompt_tokens(tokenizer(pad), text, weighted=False, embeddings={"\ue000": vectors(1)})
    ids: Any = tokenizer(pad)(text, add_special_tokens=False).input_ids
    if "\ue000" not in text:
        assert [token.id for chunk in chunks for token in chunk] == ids


def test_weights_and_positions() -> None:
    """Where the tokens of a word stand in the context, as a reader of attention maps counts."""
    (first, second) = prompt_tokens(tokenizer(), "cube " * 75 + "(red astronaut:1.5) sphere")
    assert len(first) == 75 and [token.weight for token in second] == [1.5, 1.5, 1.0]
    assert [(token.word, token.word_index) for token in second] == [("red", 75), ("astronaut", 76), ("sphere", 77)]
    chunks = prompt_tokens(tokenizer(), "red cube on blue", max_length=5)
    assert [[token.word for token in chunk] for chunk in chunks] == [["red", "cube", "on"], ["blue"]]


@pytest.mark.parametrize(
    ("prompt", "trigger", "words"),
    [
        ("a Style, b", "style", ["a", "style*2", ",", "b"]),
        ("my-style my_style", "sTyle", ["my", "-", "style*2", "my", "_", "style*2"]),
        ("styles style2 2style mystyle", "style", ["styles", "style", "2", "2", "style", "mystyle"]),
        ("a <toy>, x<TOY>y", "<toy>", ["a", "<toy>*2", ",", "x", "<toy>*2", "y"]),
        ("In  my\nstyle!", "my style", ["in", "my style*2", "!"]),
        ("ÉCLAT éclatant", "éclat", ["éclat*2", "éclatant"]),
        ("a+b a b", "a+b", ["a+b*2", "a", "b"]),
        ("(style:1.2)style", "style", ["style*2", "style*2"]),
        ("sty(le)", "style", ["sty", "le"]),
    ],
)
def test_triggers(prompt: str, trigger: str, words: list[str]) -> None:
    assert found(prompt, embeddings={trigger: vectors(2)}) == words


def test_the_longest_trigger_wins() -> None:
    embeddings = {"bad": vectors(1), "bad_prompt": vectors(2), "bad_prompt_2": vectors(3)}
    words = found("bad bad_prompt bad_prompt_2 bad_hand", embeddings=embeddings)
    assert words == ["bad*1", "bad_prompt*2", "bad_prompt_2*3", "bad*1", "_", "hand"]


def test_a_trigger_becomes_its_vectors_with_its_weight() -> None:
    (chunk,) = prompt_tokens(tokenizer(), "a (toy:1.2) box", embeddings={"toy": vectors(3)})
    assert [token.weight for token in chunk] == [1.0, 1.2, 1.2, 1.2, 1.0]
    stacked = torch.stack([token.vector for token in chunk[1:4] if token.vector is not None])
    assert torch.equal(stacked, vectors(3)) and chunk[0].vector is None and chunk[4].vector is None
    literal = prompt_tokens(tokenizer(), "(toy:1.2)", weighted=False, embeddings={"toy": vectors(3)})
    assert [token.word for token in literal[0]] == ["(", "toy", "toy", "toy", ":", "1", ".", "2", ")"]


@pytest.mark.parametrize(("before", "lengths"), [(67, [75]), (68, [68, 8]), (75, [75, 8]), (0, [8])])
def test_a_trigger_is_not_cut_at_a_chunks_end(before: int, lengths: list[int]) -> None:
    chunks = prompt_tokens(tokenizer(), "cube " * before + "toy", embeddings={"toy": vectors(8)})
    assert [len(chunk) for chunk in chunks] == lengths
    assert all(token.word == "toy" for token in chunks[-1][-8:])


def test_a_trigger_longer_than_a_chunk_is_cut_and_nothing_lost() -> None:
    chunks = prompt_tokens(tokenizer(), "cube toy cube", embeddings={"toy": vectors(100)})
    assert [len(chunk) for chunk in chunks] == [75, 27]
    tokens = [token.vector for chunk in chunks for token in chunk if token.vector is not None]
    assert torch.equal(torch.stack(tokens), vectors(100))


def test_a_token_added_to_the_vocabulary_is_a_word() -> None:
    added = clip_tokenizer()
    added.add_tokens("<toy>")  # type: ignore[no-untyped-call]
    (chunk,) = prompt_tokens(added, "a <toy> box")
    assert [(token.id, token.word) for token in chunk] == [(320, "a"), (49408, "<toy>"), (2063, "box")]
    (chunk,) = prompt_tokens(added, "a <toy> box", embeddings={"<toy>": vectors(1)})
    assert chunk[1].vector is not None


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({" ": vectors(1)}, "expected a word as trigger, found ' '"),
        ({3: vectors(1)}, "expected a word as trigger, found 3"),
        ({"a": torch.zeros(4)}, r"'a': expected vectors \[n, D\], found \[4\]"),
        ({"a": torch.zeros(0, 4)}, r"found \[0, 4\]"),
        ({"a": [1.0]}, "found list"),
        ({"Toy": vectors(1), "toy": vectors(1), "x": vectors(1)}, "cannot be told apart: Toy, toy$"),
        ({"a b": vectors(1), "a  b": vectors(1)}, "cannot be told apart"),
    ],
)
def test_bad_embeddings(embeddings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompt_tokens(tokenizer(), "toy", embeddings=embeddings)
