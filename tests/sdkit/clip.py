"""CLIP tokenizers and small text encoders that tests share."""

from __future__ import annotations

import zlib
from functools import cache

import torch
from torch import nn
from transformers import CLIPTokenizer

from sdkit.prompts.tokenizer import clip_tokenizer

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
