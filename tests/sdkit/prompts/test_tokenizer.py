"""The tokenizer against transformers and an independent reading of the merges."""

from __future__ import annotations

import gzip
import itertools
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
from transformers import CLIPTokenizer

from sdkit.checkpoints.presets import FOLDER
from sdkit.errors import CheckpointError, ConfigError
from sdkit.prompts.tokenizer import clip_tokenizer, load_tokenizer, save_tokenizer
from tests.sdkit.clip import ASTRONAUT, ASTRONAUT_IDS, ODD, shared_tokenizer


@pytest.fixture
def sd1_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(49407)


@pytest.fixture
def sd2_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(0)


@cache
def bpe_tables() -> tuple[dict[tuple[str, ...], int], dict[str, int], dict[int, str]]:
    file = FOLDER / "clip_merges.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    assert len(merges) == 49152 - 256 - 2
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    order = shown + [b for b in range(256) if b not in shown]
    symbol = {b: chr(b) if b in shown else chr(256 + order.index(b) - len(shown)) for b in order}
    names = [symbol[b] for b in order]
    ids = {name: i for i, name in enumerate([*names, *(n + "</w>" for n in names), *map("".join, merges)])}
    return ranks, ids, symbol


def bpe_ids(text: str) -> list[int]:
    """An independent, slow reading of the merges: repeatedly merge the pair of lowest rank."""
    ranks, ids, symbol = bpe_tables()
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    text = "".join(character.lower() for character in text)  # alone: no final sigma
    result: list[int] = []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text):
        parts = [symbol[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        result += [ids[part] for part in parts]
    return result


def test_known_ids(sd1_tokenizer: CLIPTokenizer, sd2_tokenizer: CLIPTokenizer) -> None:
    for tokenizer, pad in ((sd1_tokenizer, 49407), (sd2_tokenizer, 0)):
        assert tokenizer(ASTRONAUT).input_ids == ASTRONAUT_IDS
        assert tokenizer(ASTRONAUT, padding="max_length").input_ids == ASTRONAUT_IDS + [pad] * 65
        assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (49408, 49406, 49407)
    with pytest.raises(ConfigError, match="pad_token_id"):
        clip_tokenizer(1)


@pytest.mark.parametrize("text", ODD)
def test_ids_are_those_of_the_merges(sd1_tokenizer: CLIPTokenizer, text: str) -> None:
    assert sd1_tokenizer(text, add_special_tokens=False).input_ids == bpe_ids(text)
    assert sd1_tokenizer(text).input_ids == [49406, *bpe_ids(text), 49407]


@pytest.mark.parametrize("pad", [49407, 0])
def test_tokenizer_survives_a_round_trip(tmp_path: Path, pad: int) -> None:
    tokenizer = clip_tokenizer(pad)
    tokenizer.add_tokens(["<my-style>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {f.name for f in (tmp_path / "tokenizer").iterdir()} == names
    for read in (load_tokenizer, CLIPTokenizer.from_pretrained):
        again = read(str(tmp_path / "tokenizer"))
        assert (again.pad_token_id, again.model_max_length, len(again)) == (pad, 77, 49409)
        for text in [*ODD, "a cat in <my-style>!", "<|endoftext|> x <|startoftext|>"]:
            assert again(text).input_ids == tokenizer(text).input_ids
        assert again("<my-style>").input_ids == [49406, 49408, 49407]


def test_reads_tokenizer_json(tmp_path: Path, sd2_tokenizer: CLIPTokenizer) -> None:
    sd2_tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    again = load_tokenizer(tmp_path)
    assert again.pad_token_id == 0
    for text in ODD:
        assert again(text).input_ids == sd2_tokenizer(text).input_ids


def test_reads_the_folders_that_stable_diffusion_was_published_with(tmp_path: Path) -> None:
    """Old files: added tokens as objects, and in SD2 a padding token that only special_tokens_map.json has right."""
    save_tokenizer(shared_tokenizer(0), tmp_path)

    def old(content: str, **kind: str) -> dict[str, Any]:
        return kind | {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "x",
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./x.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    config |= {k: old(v, __type="AddedToken") for k, v in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({k: old(v) for k, v in names.items()} | {"pad_token": "!"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 77)
    assert tokenizer(ASTRONAUT, padding="max_length").input_ids == ASTRONAUT_IDS + [0] * 65


@pytest.mark.parametrize("damage", ["empty", "absent", "no merges", "bad vocab", "bad tokenizer.json"])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, sd1_tokenizer: CLIPTokenizer, damage: str) -> None:
    if damage not in ("empty", "absent"):
        save_tokenizer(sd1_tokenizer, tmp_path)
    if damage == "no merges":
        (tmp_path / "merges.txt").unlink()
    elif damage == "bad vocab":
        (tmp_path / "vocab.json").write_text('{"a": 0')
    elif damage == "bad tokenizer.json":
        (tmp_path / "tokenizer.json").write_text("{}")
    folder = tmp_path / "nowhere" if damage == "absent" else tmp_path
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert damage != "no merges" or "missing merges.txt" in str(caught.value)
