"""LoRAs for the tests of files: which modules, ranks and scales."""

from typing import Any

from finetune.lora.targets import Target, match_targets
from finetune.lora.update import Updates
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.tiny import drawn_updates, places

BAR = 1e-3


def by_depth(target: Target) -> int:
    return 6 if "up_blocks" in target.path or "layers.1" in target.path else 3


def by_kind(target: Target) -> float:
    return 1.5 if "attn" in target.path else 0.5


CASES: dict[str, dict[str, Any]] = {
    "alpha is rank": {"targets": "cross_attention"},
    "alpha is not rank": {"targets": "attention", "scale": lambda target: 0.5, "text": True},
    "mixed ranks and alphas": {"targets": "all", "rank": by_depth, "scale": by_kind},
    "mixed ranks": {"targets": "attention", "rank": by_depth, "text": True},
    "one alpha for mixed ranks": {"targets": "all", "rank": by_depth, "scale": lambda target: 4 / by_depth(target)},
    "everything": {"targets": "all", "rank": by_depth, "scale": by_kind, "text": True},
}


def case(sd: StableDiffusion, targets: str, text: bool = False, **options: Any) -> Updates:
    chosen = match_targets(places(sd), targets)
    return drawn_updates([target for target in chosen if text or target.network == "unet"], **options)
