"""The modules that a LoRA can adapt, how one names them, and the names that files give them."""

import pytest
from diffusers.loaders.lora_conversion_utils import _convert_text_encoder_lora_key, _convert_unet_lora_key

from finetune.lora.reading import split_key
from finetune.lora.targets import Target, match_targets, published_targets
from sdkit.errors import ConfigError


@pytest.fixture(scope="module")
def sd1() -> list[Target]:
    return published_targets(768)


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


def test_kohyas_names_lead_back_to_stable_diffusions_modules() -> None:
    """diffusers' own translation, for each module of SD1; SD2 has the same names."""
    found = published_targets(768)
    names = [target.kohya for target in found]
    assert len(set(names)) == len(names)
    for target in found:
        key = f"{target.kohya}.lora_down.weight"
        theirs = (
            _convert_unet_lora_key(key)
            if target.network == "unet"
            else _convert_text_encoder_lora_key(key, target.kohya)
        )
        assert split_key(f"{target.network}.{theirs}") == (target.diffusers, "down")
