"""Text against transformers, diffusers, and an independent reading of the merges."""

from __future__ import annotations

import gzip
import itertools
import json
import unicodedata
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdkit.checkpoints.presets import FOLDER
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from sdkit.networks.text_encoder import build_text_encoder, load_text_state, pooled, text_state_dict
from sdkit.prompts.encoding import _apply_weights, encode_prompts
from sdkit.prompts.tokenizer import clip_tokenizer, load_tokenizer, save_tokenizer

ASTRONAUT = "a photo of an astronaut riding a horse on mars"
ASTRONAUT_IDS = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
ODD = [
    "",
    "   ",
    "A  Photo\tof\n\na CAT ",
    "it's they're we'll I'd don't 'sup",
    "!!! wow!!! (parentheses) [brackets] {braces} a_b-c/d\\e",
    "1234567890 3.14 ²³ ½ \uff14\uff12",
    "naïve café cafe\u0301 Übergröße İstanbul ΣΊΣΥΦΟΣ",
    "日本語 русский العربية हिन्दी 한국어",
    "🙂👩‍👩‍👧‍👦 🇫🇷 ☃️",
    "zero\u200bwidth non\u00a0breaking \u3000ideographic",
    "control\x07char \x00 nul",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis " * 8,
    "<|endof|> <b>html</b> &amp; http://example.com?q=1&r=2",
]
SD1 = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
    "projection_dim": 32,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0",
}
SD2 = SD1 | {"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": 512, "intermediate_size": 128}


@cache
def shared_tokenizer(pad: int) -> CLIPTokenizer:
    return clip_tokenizer(pad)


@pytest.fixture
def sd1_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(49407)


@pytest.fixture
def sd2_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(0)


def drawn(model: nn.Module) -> nn.Module:
    """float64 weights that depend on each parameter's name alone; norms near 1, so that layers stay of order 1."""
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("text_model.").encode()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.3 if "embedding" in name else parameter.shape[-1] ** -0.5
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.2 * values if is_norm else scale * values
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return drawn(build_text_encoder(SD1))  # type: ignore[return-value]  # the same object


def manual_ids(tokenizer: CLIPTokenizer, tokens: list[int]) -> Tensor:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return torch.tensor([[49406, *tokens, end, *[pad] * (75 - len(tokens))]])


# Tokenizer


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


# Encoder


@pytest.mark.parametrize(("config", "pad"), [(SD1, 49407), (SD2, 0)], ids=["sd1", "sd2"])
def test_equals_transformers(config: dict[str, Any], pad: int) -> None:
    tokenizer, prompts = shared_tokenizer(pad), [ASTRONAUT, "", "a red sphere, (blurry:1.3) [sketch]!"]
    reference = drawn(CLIPTextModel(CLIPTextConfig.from_dict(dict(config))))
    model = drawn(build_text_encoder(config))
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = reference(ids).last_hidden_state
    cond, uncond = encode_prompts(tokenizer, model, prompts, prompts[::-1], weighted=False)  # type: ignore[arg-type]
    assert torch.equal(cond, expected)
    torch.testing.assert_close(uncond, expected.flip(0), rtol=0, atol=1e-12)
    assert cond.dtype == torch.float64 and cond.shape == (3, 77, 32)


def test_sd2_form_is_the_penultimate_layer_of_the_full_network(sd2_tokenizer: CLIPTokenizer) -> None:
    full, stored = (drawn(build_text_encoder(SD2 | {"num_hidden_layers": n})) for n in (4, 3))
    penultimate, _ = encode_prompts(sd2_tokenizer, full, [ASTRONAUT], None, clip_skip=1)  # type: ignore[arg-type]
    last, _ = encode_prompts(sd2_tokenizer, stored, [ASTRONAUT], None)  # type: ignore[arg-type]
    torch.testing.assert_close(penultimate, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_skip", [0, 1, 3])
def test_equals_diffusers(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, clip_skip: int) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=sd1_tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts, negatives = [ASTRONAUT, "A red  cube's shadow"], ["blurry", ""]
    added = "text_model" not in dir(encoder)
    if added:  # diffusers 0.42 reads the level that transformers 5.6 took out of the model
        encoder.__dict__["text_model"] = encoder
    try:
        # one call each: diffusers does not apply clip_skip to negative prompts
        skip = clip_skip or None
        expected = [pipe.encode_prompt(p, "cpu", 1, False, clip_skip=skip)[0] for p in (prompts, negatives)]
    finally:
        if added:
            del encoder.__dict__["text_model"]
    actual = encode_prompts(sd1_tokenizer, encoder, prompts, negatives, clip_skip=clip_skip)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [SD1, SD2 | {"eos_token_id": 49407}], ids=["argmax", "first end"])
def test_pooled_equals_transformers(config: dict[str, Any]) -> None:
    tokenizer, model = shared_tokenizer(49407), drawn(build_text_encoder(config))
    ids = tokenizer([ASTRONAUT, "x"], padding="max_length", return_tensors="pt").input_ids
    output = model(ids)
    eos = config["eos_token_id"]
    assert torch.equal(pooled(output.last_hidden_state, ids, eos), output.pooler_output)
    assert torch.equal(pooled(output.last_hidden_state, ids, eos)[0], output.last_hidden_state[0, 11])
    with pytest.raises(ConfigError, match="no end token"):
        pooled(output.last_hidden_state, torch.zeros_like(ids), 49407)


def test_full_size_counts() -> None:
    clip_l = SD1 | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    open_clip_h = SD2 | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
    }
    for config, count, tensors in ((clip_l, 123_060_480, 196), (open_clip_h, 340_387_840, 372)):
        with torch.device("meta"):
            model = build_text_encoder(config)
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(text_state_dict(model)) == tensors


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_is_read_with_and_without_the_prefix(encoder: CLIPTextModel, prefix: str, device: str) -> None:
    state = {k.replace("text_model.", prefix): v for k, v in text_state_dict(encoder).items()}
    projection = torch.ones(32, 32)
    extra = {f"{prefix}embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": projection}
    with torch.device(device):
        model = build_text_encoder(SD1)
    model = model.double()
    unused = load_text_state(model, state | extra)
    assert list(unused) == ["text_projection.weight"] and unused["text_projection.weight"] is projection
    ids = torch.tensor([ASTRONAUT_IDS])
    assert torch.equal(model(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_written_names_are_those_of_the_format(tmp_path: Path, encoder: CLIPTextModel) -> None:
    """The projection model kept the level that files have: its names are the reference. And transformers reads it."""
    from safetensors.torch import save_file

    reference = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(SD1))).state_dict()
    state = text_state_dict(encoder)
    assert set(state) == set(reference) - {"text_projection.weight"}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(SD1 | {"torch_dtype": "float64"}))
    loaded: Any = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([ASTRONAUT_IDS])
    assert torch.equal(again.double()(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_a_wrong_state_is_named(encoder: CLIPTextModel) -> None:
    state = text_state_dict(encoder)
    norm = "text_model.final_layer_norm.bias"
    wrong = {
        "missing final_layer_norm.bias": {k: v for k, v in state.items() if k != norm},
        "not understood: visual_projection.weight": state | {"visual_projection.weight": torch.ones(1)},
        r"final_layer_norm.bias is \[7\] where \[32\]": state | {norm: torch.ones(7)},
        "twice": state | {"final_layer_norm.bias": state[norm]},
        "and 65 more": {},
    }
    for message, bad in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            load_text_state(build_text_encoder(SD1), bad)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "t5"},
        {"hidden_act": "nope"},
        {"hidden_size": 33},
        {"hidden_size": "32"},
        {"use_attention_mask": True},
        {"num_attention_heads": 0},
    ],
)
def test_a_wrong_config_is_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="text encoder config") as caught:
        build_text_encoder(SD1 | change)
    assert "\n" not in str(caught.value)


# Prompts


def test_weights_multiply_and_the_mean_is_restored(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    prompts = ["a (red:1.5) [sphere]", "a red sphere"]
    context, _ = encode_prompts(sd1_tokenizer, encoder, prompts, None)
    plain, _ = encode_prompts(sd1_tokenizer, encoder, ["a red sphere"] * 2, None)
    weights = torch.ones(77, 1, dtype=torch.float64)
    weights[2], weights[3] = 1.5, 1 / 1.1  # begin, a, red, sphere
    expected = plain[0] * weights
    expected *= plain[0].mean() / expected.mean()
    torch.testing.assert_close(context[0], expected, rtol=1e-6, atol=1e-9)  # the weights are float32
    torch.testing.assert_close(context[0].mean(), plain[0].mean(), rtol=1e-12, atol=0)
    assert torch.equal(context[1], plain[1])  # the neighbour in the batch is untouched
    ratio = context[0] / plain[0]
    assert bool((ratio[3] < ratio[1]).all()) and bool((ratio[1] < ratio[2]).all())


def test_weight_one_is_the_identity(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    plain, none = encode_prompts(sd1_tokenizer, encoder, ["a red sphere"], None)
    weighted, _ = encode_prompts(sd1_tokenizer, encoder, ["a (red:1.0) sphere"], None)
    assert none is None and torch.equal(plain, weighted)
    literal, _ = encode_prompts(sd1_tokenizer, encoder, ["a (red:1.5) sphere"], None, weighted=False)
    escaped, _ = encode_prompts(sd1_tokenizer, encoder, [r"a \(red:1.5\) sphere"], None)
    assert torch.equal(literal, escaped) and not torch.allclose(literal, plain)


def test_weights_that_cancel_are_an_error() -> None:
    with pytest.raises(NumericalError, match="mean 0"):
        _apply_weights(torch.ones(1, 2, 4), torch.tensor([[1.0, -1.0]]))


def test_half_precision_stays_half(sd1_tokenizer: CLIPTokenizer) -> None:
    model = build_text_encoder(SD1).bfloat16()
    with torch.no_grad():
        context, _ = encode_prompts(sd1_tokenizer, model, ["a (red:1.5) sphere"], None)
    assert context.dtype == torch.bfloat16 and bool(context.isfinite().all())


@pytest.mark.parametrize("pad", [49407, 0])
def test_long_prompts_are_chunks_joined(encoder: CLIPTextModel, pad: int) -> None:
    tokenizer = shared_tokenizer(pad)
    words = ["red", "cube", "and", "blue", "sphere"] * 32
    tokens = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(tokens) == 160
    cond, uncond = encode_prompts(tokenizer, encoder, [" ".join(words), "a cat"], ["blurry", ""])
    assert cond.shape == (2, 231, 32) and uncond is not None and uncond.shape == (2, 231, 32)

    def by_hand(*chunks: list[int]) -> Tensor:
        return torch.cat([encoder(manual_ids(tokenizer, chunk)).last_hidden_state[0] for chunk in chunks])

    cat, blurry = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a cat", "blurry"))
    for actual, expected in (
        (cond[0], by_hand(tokens[:75], tokens[75:150], tokens[150:])),
        (cond[1], by_hand(cat, [], [])),
        (uncond[0], by_hand(blurry, [], [])),
        (uncond[1], by_hand([], [], [])),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weighted, _ = encode_prompts(tokenizer, encoder, ["(" + " ".join(words) + ")"], None)
    assert weighted.shape == (1, 231, 32)


@pytest.mark.parametrize(("words", "chunks"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunk_edges(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, words: int, chunks: int) -> None:
    prompt = "cube " * words
    assert encode_prompts(sd1_tokenizer, encoder, [prompt], [""])[0].shape == (1, 77 * chunks, 32)
    assert encode_prompts(sd1_tokenizer, encoder, [""], [prompt])[0].shape == (1, 77 * chunks, 32)


def test_break_starts_a_chunk(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    context, _ = encode_prompts(sd1_tokenizer, encoder, ["a cat BREAK a dog"], None)
    parts, _ = encode_prompts(sd1_tokenizer, encoder, ["a cat", "a dog"], None)
    torch.testing.assert_close(context[0], parts.flatten(0, 1), rtol=0, atol=1e-12)


def test_shorter_models(sd1_tokenizer: CLIPTokenizer) -> None:
    """Chunks follow the tokenizer's length, and never pass the encoder's."""
    model, tokenizer = drawn(build_text_encoder(SD1 | {"max_position_embeddings": 16})), clip_tokenizer()
    for length, shape in ((77, (1, 32, 32)), (10, (1, 30, 32))):
        tokenizer.model_max_length = length
        assert encode_prompts(tokenizer, model, ["cube " * 20], None)[0].shape == shape  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a", None]}, "prompt: expected a string, found NoneType"),
        ({"prompts": "a"}, "prompt: expected a non-empty sequence"),
        ({"prompts": []}, "prompt: expected a non-empty sequence"),
        ({"prompts": ["a\ud800"]}, "not valid Unicode"),
        ({"prompts": ["(a:" + "9" * 400 + ")"]}, "not finite"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompt: expected 1 as prompts, found 2"),
        ({"negative_prompts": [3]}, "negative_prompt: expected a string, found int"),
        ({"clip_skip": 4}, "clip_skip: expected an integer from 0 to 3, found 4"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"clip_skip": 1.0}, "clip_skip"),
        ({"clip_skip": True}, "clip_skip"),
    ],
)
def test_bad_arguments(
    sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_prompts(sd1_tokenizer, encoder, **({"prompts": ["a"], "negative_prompts": None} | arguments))


def test_tokenizer_and_encoder_must_belong_together(sd1_tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match="gives token 49407, the text encoder takes only 100"):
        encode_prompts(sd1_tokenizer, build_text_encoder(SD1 | {"vocab_size": 100}), ["a"], None)
