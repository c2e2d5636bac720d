"""The modules that a LoRA can adapt, how one names them, and the names that files give them."""

import pytest
from diffusers.loaders.lora_conversion_utils import _convert_text_encoder_lora_key, _convert_unet_lora_key

from finetune.lora.reading import split_key
from finetune.lora.targets import Target, match_targets, published_places
from sdkit.errors import ConfigError


@pytest.fixture(scope="module")
def sd1() -> list[Target]:
    return [target for target in published_places(768) if len(target.shape) > 1]


COUNTS = {"cross_attention": (64, 48), "attention": (128, 48), "transformer": (192, 72), "all": (282, 72)}


@pytest.mark.parametrize("targets", COUNTS)
def test_the_modules_of_stable_diffusion_1(sd1: list[Target], targets: str) -> None:
    """kohya's scope is 192 modules of the UNet and 72 of the text encoder."""
    chosen = match_targets(sd1, targets)
    unet = [target for target in chosen if target.network == "unet"]
    assert (len(unet), len(chosen) - len(unet)) == COUNTS[targets]
    if targets == "cross_attention":
        kinds = {target.path.split("transformer_blocks.0.")[-1] for target in unet}
        assert kinds == {"attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"}


def test_targets_by_expression_and_by_name(sd1: list[Target]) -> None:
    assert len(match_targets(sd1, r"attn[12]\.to_k$")) == 32
    assert len(match_targets(sd1, ["to_k", "fc1"])) == 32 + 12
    assert [s.path for s in match_targets(sd1, ["conv_in"])] == ["conv_in"]
    for targets, message in (
        (r"attn3", "nothing matches attn3; expected cross_attention"),
        (["to_k", "to_w", "attn2"], "nothing matches to_w, attn2"),
        ([], r"nothing matches \[\]"),
        ("to_(k", "no regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            match_targets(sd1, targets)


def test_kohyas_names_lead_back_to_stable_diffusions_modules(sd1: list[Target]) -> None:
    """diffusers' own translation, for each module of SD1; SD2 has the same names."""
    names = [target.kohya for target in published_places(768)]
    assert len(set(names)) == len(names)
    for target in sd1:
        key = f"{target.kohya}.lora_down.weight"
        theirs = (
            _convert_unet_lora_key(key)
            if target.network == "unet"
            else _convert_text_encoder_lora_key(key, target.kohya)
        )
        assert split_key(f"{target.network}.{theirs}") == (target.diffusers, "down")


@pytest.mark.parametrize("width", [768, 1024])
def test_every_layer_has_one_name_in_single_files(width: int) -> None:
    """And no spelling of one is a spelling of another."""
    found = [target for target in published_places(width) if target.network == "unet"]
    assert len({target.ldm_path for target in found} - {""}) == len(found)
    spellings = [spelling for target in published_places(width) for spelling in set(target.spellings())]
    clashes = {s for s in spellings if spellings.count(s) > 1} if len(set(spellings)) < len(spellings) else set()
    assert not clashes
    by_path = {target.path: target.ldm_path for target in found}
    for path, name in (
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.resnets.1.time_emb_proj", "input_blocks.8.0.emb_layers.1"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        ),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_out", "out.2"),
    ):
        assert by_path[path] == name
