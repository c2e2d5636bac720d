"""The text encoder against transformers: its states, names, sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.text_encoder import build_text_encoder, load_text_state, pooled, text_state_dict
from tests.sdkit.clip import ASTRONAUT, ASTRONAUT_IDS, SD1, SD2, drawn, shared_tokenizer


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return drawn(build_text_encoder(SD1))  # type: ignore[return-value]  # the same object


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
