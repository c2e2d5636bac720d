"""CLIP's tokenizer: transformers' own class, built from what ships with us, read and written without a network."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.files import write_text
from sdkit.importing import quick_imports

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_MERGES = Path(__file__).parents[1] / "presets" / "clip_merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token_id: int = 49407) -> CLIPTokenizer:
    """CLIP's tokenizer (49,408 tokens, 77 a sequence) from the merges that ship with us.

    ``pad_token_id`` is 49407, the end token (SD1), or 0, the token "!" (SD2). With 0, transformers takes every "!" in
    a prompt for the padding token, as it does for the tokenizer that SD2 is published with.
    """
    symbols = _byte_symbols()
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()[1:]
    words = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges), _START, _END]
    if pad_token_id not in (0, 49407):
        raise ConfigError(f"pad_token_id: expected 49407 (SD1) or 0 (SD2), found {pad_token_id!r}")

    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": words[pad_token_id]}
    with tempfile.TemporaryDirectory() as folder:
        vocab = {word: i for i, word in enumerate(words)}
        _write_tokenizer(Path(folder), vocab, merges, special | {"model_max_length": 77}, special)
        tokenizer = load_tokenizer(folder)

    tokenizer.name_or_path = ""
    return tokenizer


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Read a diffusers ``tokenizer/`` folder: vocab.json with merges.txt, or tokenizer.json. Never uses a network.

    Raises CheckpointError when the files are missing, damaged, or of another kind of tokenizer.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: no tokenizer here, missing {' and '.join(missing)} (or tokenizer.json)")

    with quick_imports():
        import transformers

        # Before transformers 5, CLIPTokenizer was another, slower class that read no tokenizer.json.
        kind: Any = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)

    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        absent = [name for name in ("bos", "eos", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}: not a CLIP tokenizer ({one_line(error)})") from None
    if absent:
        raise CheckpointError(f"{folder}: not a CLIP tokenizer (no {', '.join(absent)} token)")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, the layout of diffusers.

    Old and new transformers read it; added tokens (textual inversion) are kept.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):  # the slow class of transformers 4 writes these files itself
        slow: Any = tokenizer
        slow.save_pretrained(str(folder))
        return

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {f"{name}_token": str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {
        str(index): {field: getattr(token, field) for field in fields}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    config = special | {"model_max_length": max_length(tokenizer), "added_tokens_decoder": added}

    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_tokenizer(Path(folder), model["vocab"], merges, config, special)


def max_length(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE, in the vocabulary's order (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _write_tokenizer(
    folder: Path, vocab: Mapping[str, int], merges: list[str], config: dict[str, Any], special: dict[str, str]
) -> None:
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"} | config
    files = {
        "vocab.json": json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in files.items():
        write_text(folder / name, text)
