"""Tags of extra networks in a prompt."""

from __future__ import annotations

import pytest

from sdkit.errors import ConfigError
from sdkit.prompts.tags import ExtraNetwork, split_extra_networks


@pytest.mark.parametrize(
    ("prompt", "rest", "networks"),
    [
        ("a cat", "a cat", []),
        ("a <lora:ink:0.8> cat", "a  cat", [ExtraNetwork("lora", "ink", 0.8)]),
        (
            "<hypernet:fur>cat<lora:my style v1.2 : -.5 >",
            "cat",
            [ExtraNetwork("hypernet", "fur", 1.0), ExtraNetwork("lora", "my style v1.2", -0.5)],
        ),
        ("(cat <LoRA:a:1>:1.3)", "(cat :1.3)", [ExtraNetwork("lora", "a", 1.0)]),
        ("<lora:a><lora:a:0>", "", [ExtraNetwork("lora", "a", 1.0), ExtraNetwork("lora", "a", 0.0)]),
        ("a <cat-toy> <lora> 1 < 2: so > 0", "a <cat-toy> <lora> 1 < 2: so > 0", []),
        ("a <lyco:ink:0.8> <LyCO:fur> cat", "a   cat", [ExtraNetwork("lora", "ink", 0.8), ExtraNetwork("lora", "fur")]),
    ],
)
def test_tags_are_taken_out(prompt: str, rest: str, networks: list[ExtraNetwork]) -> None:
    assert split_extra_networks(prompt) == (rest, networks)


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:>",
        "<lora: :1>",
        "<lora::1>",
        "<lora:a:>",
        "<lora:a:b>",
        "<lora:a:1:1>",
        "<lora:a:nan>",
        "<lora:a:1",
        "<lora:a",
        "<hypernet:a:1,2>",
        "<lora:a:" + "9" * 400 + ">",
        "<lora:<lora:a:1>",
    ],
)
def test_a_malformed_tag_is_quoted(tag: str) -> None:
    with pytest.raises(ConfigError, match=r"expected <(lora|hypernet):NAME> or") as caught:
        split_extra_networks(f"a {tag} cat")
    assert f"found '{tag[:6]}" in str(caught.value)
