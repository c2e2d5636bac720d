"""Attention maps against probabilities that hooks on diffusers' UNet give, and the words that they are looked up by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import sdkit
from sdkit.errors import ConfigError, SDKitError
from sdkit.networks.attention import Attention
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.viewing.attention_maps import AttentionMaps, prompt_words, record_attention
from tests.conftest import draw, draw_weights, relative_error

CROSS_WIDTH, HEADS, TOKENS = 24, 2, 7
CONFIG: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": CROSS_WIDTH,
    "attention_head_dim": HEADS,
}
GRIDS = {9 * 14: (9, 14), 5 * 7: (5, 7)}  # of latents of an odd size: the middle block's is rounded up
TIMES = (901, 433)


def network(config: dict[str, Any] = CONFIG) -> UNet2DConditionModel:
    return draw_weights(UNet2DConditionModel.from_config(config).double().requires_grad_(False))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return network()


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return draw("x", (batch, 4, 9, 14)), 2 * draw("context", (batch, TOKENS, CROSS_WIDTH))


def reference_maps(config: dict[str, Any], x: Tensor, context: Tensor, rows: slice) -> Tensor:
    """Every layer's softmax(q k^T), each at the size of the latents, and the mean of all, from diffusers' UNet."""
    from diffusers import UNet2DConditionModel as Reference

    theirs = draw_weights(Reference(**config).double().requires_grad_(False))
    seen: dict[str, list[Tensor]] = {"to_q": [], "to_k": []}
    for name, module in theirs.named_modules():
        kind = name.rpartition(".")[2]
        if kind in seen and theirs.get_submodule(name.rpartition(".")[0]).to_k.in_features == CROSS_WIDTH:
            module.register_forward_hook(lambda _m, _i, out, kind=kind: seen[kind].append(out))
    for t in TIMES:
        theirs(x, t, context)
    maps: list[Tensor] = []
    for q, k in zip(seen["to_q"], seen["to_k"], strict=True):
        for head_q, head_k in zip(q[rows].chunk(HEADS, -1), k[rows].chunk(HEADS, -1), strict=True):
            p = (head_q @ head_k.mT / head_q.shape[-1] ** 0.5).softmax(-1)
            image = p.mT.unflatten(2, GRIDS[p.shape[1]])
            maps.append(F.interpolate(image, x.shape[-2:], mode="bilinear", align_corners=False))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("more", [{}, {"transformer_layers_per_block": 2, "only_cross_attention": True}])
def test_maps_are_the_mean_over_heads_layers_and_calls(more: dict[str, Any], guided: bool) -> None:
    config = CONFIG | more
    ours = network(config)
    x, context = inputs(4)
    with record_attention(ours, images=2 if guided else None) as recorder:
        for t in TIMES:
            ours(x, t, context)
    maps = recorder.maps([[]] * (2 if guided else 4))
    expected = reference_maps(config, x, context, slice(2, 4) if guided else slice(None))
    assert maps.values.shape == expected.shape
    assert (maps.values - expected).abs().max() < 1e-10
    assert expected.std() > 1e-3, "maps without structure would agree too"
    assert (maps.values.sum(1) - 1).abs().max() < 1e-12
    assert torch.equal(maps.tokens(1), maps.values[1])


def test_recording_leaves_the_output_alone_and_ends_with_the_context(unet: UNet2DConditionModel) -> None:
    x, context = inputs(2)
    before = unet(x, 500, context)
    with record_attention(unet) as recorder:
        assert relative_error(unet(x, 500, context), before) < 1e-13
    first = recorder.maps([[], []]).values
    assert torch.equal(unet(x, 100, context), unet(x, 100, context))
    assert torch.equal(recorder.maps([[], []]).values, first), "calls after the context do not count"
    with pytest.raises(RuntimeError, match="broken"), record_attention(unet):
        raise RuntimeError("broken")
    assert all(m.recorder is None and not m._forward_pre_hooks for m in unet.modules() if isinstance(m, Attention))
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(unet(x, 500, context), before)


def test_an_adapter_in_the_place_of_a_layer_is_recorded(unet: UNet2DConditionModel) -> None:
    x, context = inputs(1)
    with record_attention(unet) as recorder:
        unet(x, 500, context)
    expected = recorder.maps([[]]).values
    changed = network()
    for module in changed.modules():
        if isinstance(module, Attention):
            module.to_q = nn.Sequential(module.to_q)
    with record_attention(changed) as recorder:
        changed(x, 500, context)
    assert (recorder.maps([[]]).values - expected).abs().max() < 1e-13
    assert relative_error(changed(x, 500, context), unet(x, 500, context)) < 1e-13


def test_compiles_to_one_graph_when_nothing_is_recorded() -> None:
    attention = draw_weights(Attention(16, HEADS, CROSS_WIDTH).requires_grad_(False))
    x, context = draw("x", (1, 6, 16)).float(), draw("context", (1, 5, CROSS_WIDTH)).float()
    compiled: Any = torch.compile(attention, fullgraph=True, backend="eager")
    seen: list[Tensor] = []
    assert torch.equal(compiled(x, attention.key_value(context)), attention(x, attention.key_value(context)))
    attention.recorder = lambda maps: seen.append(maps)  # torch 2.11 does not trace a list's own method
    compiled(x, attention.key_value(context))
    assert len(seen) == 1 and seen[0].shape == (1, 6, 5), "and a compiled one is recorded all the same"


def test_errors_of_recording(unet: UNet2DConditionModel) -> None:
    x, context = inputs(2)
    with record_attention(unet, images=3) as recorder:
        with pytest.raises(SDKitError, match="nothing was recorded"):
            recorder.maps([])
        with pytest.raises(ConfigError, match="already"), record_attention(unet):
            pass
        with pytest.raises(ConfigError, match="at least 3, found 2"):
            unet(x, 500, context)
    with record_attention(unet, images=2) as recorder:
        unet(x, 500, context)
    with pytest.raises(ConfigError, match="words for 2 images, found 1"):
        recorder.maps([[]])
    with pytest.raises(ConfigError, match="no cross-attention"), record_attention(nn.Linear(2, 2)):
        pass


LONG = ", ".join(["a (photorealistic:1.3) painting"] * 20) + ", a lighthouse BREAK a well-known Café"


@pytest.mark.parametrize("weighted", [True, False])
def test_words_stand_where_the_text_encoder_reads_them(weighted: bool) -> None:
    """The token ids that the encoder is given, joined at a word's positions, read as the word."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    encoder = draw_weights(CLIPTextModel(config).eval())  # a new one's last norm leaves every embedding with mean 0
    ids: list[Tensor] = []
    encoder.get_input_embeddings().register_forward_pre_hook(lambda _m, args: ids.append(args[0]))
    with torch.no_grad():
        context, _ = encode_prompts(tokenizer, encoder, [LONG], None, weighted=weighted)
    read = torch.cat(ids).flatten().tolist()
    words = prompt_words(tokenizer, LONG, weighted=weighted)
    assert len(read) == context.shape[1] >= 3 * 77
    for word in words:
        assert tokenizer.decode([read[position] for position in word.positions]).strip() == word.text
    assert [len(w.positions) for w in words if w.text == "photorealistic"] == [2] * 20, "a word of two tokens"
    inside = sorted(position for word in words for position in word.positions)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert inside == [i for i, token in enumerate(read) if token not in special], "every token belongs to one word"
    assert ("1" in {word.text for word in words}) == (not weighted)


def test_a_word_is_the_mean_over_its_tokens_and_places() -> None:
    values = draw("values", (2, 40, 3, 4))
    prompts = ["a Photorealistic red sphere, a well-known RED cube", "nothing"]
    tokenizer = clip_tokenizer()
    maps = AttentionMaps(values, tuple(tuple(prompt_words(tokenizer, p)) for p in prompts))
    # begin, a, photo, realistic, red, sphere, ",", a, well, "-", known, red, cube
    for text, positions in {
        "photorealistic": [2, 3],
        "sphere": [5],
        "red": [4, 11],
        "red sphere": [4, 5],
        "Red  Cube": [11, 12],
        "well-known": [8, 9, 10],
        ",": [6],
        "a": [1, 7],
    }.items():
        assert torch.allclose(maps.word(text), values[0, positions].mean(0), atol=1e-14), text
    assert torch.equal(maps.word("red", occurrence=1), values[0, 11])
    assert torch.equal(maps.word("nothing", image=1), values[1, 1])
    for text in ("ball", "sphere cube", "spher", "here", "realistic", "", " "):
        with pytest.raises(ConfigError, match="its words: a, photorealistic, red, sphere, ,, well, -, known, cube"):
            maps.word(text)
    for occurrence in (2, -1):
        with pytest.raises(ConfigError, match="2 times"):
            maps.word("red", occurrence=occurrence)
    with pytest.raises(ConfigError, match="its words: none"):
        AttentionMaps(values, ((), ())).word("red")


@pytest.mark.slow
def test_nouns_of_the_shipped_model_lie_on_their_objects() -> None:
    """Shape words, not colours: those, the text encoder has already written into the noun behind them."""
    sd = sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")
    prompt, count = "a red sphere and a blue cube", 4
    with record_attention(sd.unet, images=count) as recorder:
        pictures = sd.text_to_image(prompt, seed=100, num_images_per_prompt=count, progress=False).images
    maps = recorder.maps([prompt_words(sd.tokenizer, prompt)] * count)
    for i, picture in enumerate(pictures):
        red, _, blue = np.moveaxis(np.asarray(picture).astype(float), 2, 0)
        on_sphere, on_cube = (red > 90) & (red > 2 * blue), (blue > 90) & (blue > 1.8 * red)
        assert min(on_sphere.sum(), on_cube.sum()) > 40, f"picture {i} does not show both"
        for word, own, other in (("sphere", on_sphere, on_cube), ("cube", on_cube, on_sphere)):
            heat = F.interpolate(maps.word(word, i)[None, None], on_cube.shape, mode="bilinear")[0, 0].numpy()
            assert heat[own].mean() > 1.05 * heat[other].mean(), f"{word} of picture {i}"
