"""How steering is measured: what is asked of the model, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from finetune.pretrain import steering
from finetune.pretrain.probe import Probe, Verdict
from finetune.pretrain.steering import CLASSIFIER, GUIDANCE, ONE, SEEN, along_classifier, along_guidance, right, variety
from finetune.pretrain.world.scenes import HELD_OUT

PROBE = cast("Probe", None)


class Model:
    """Remembers what it was asked, and draws grey pictures."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def text_to_image(self, prompts: list[str], **options: Any) -> Any:
        self.asked.append({"prompts": prompts, **options})
        return SimpleNamespace(images=torch.full((len(prompts), 3, 4, 4), 0.5))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str] | None]:
    """What the probe says of the pictures, one after the other, again and again."""
    answers: list[tuple[str, str] | None] = []

    def look(_: Probe, images: Tensor) -> list[Verdict]:
        found = [answers[i % len(answers)] for i in range(len(images))]
        objects = [[] if pair is None else [dict(zip(("color", "shape"), pair, strict=True))] for pair in found]
        return [Verdict(own, [], [], "white") for own in objects]

    monkeypatch.setattr(steering, "look", look)
    return answers


def test_right_is_colour_and_shape_of_the_first_object(seen: list[tuple[str, str] | None]) -> None:
    seen += [("red", "cube"), None, ("red", "cone"), ("blue", "cube")]
    assert right(PROBE, torch.zeros(4, 3, 4, 4), [("red", "cube")] * 4) == 25


def test_variety_is_the_distance_from_the_mean() -> None:
    assert variety(torch.full((5, 3, 4, 4), 0.3)) == pytest.approx(0, abs=1e-4)
    halves = torch.tensor([0.2, 0.6]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert variety(halves) == pytest.approx(0.2 * 255)


def test_every_scale_of_guidance_gets_the_same_prompts(seen: list[tuple[str, str] | None]) -> None:
    seen += [SEEN[0], None]
    model: Any = Model()
    found = along_guidance(model, PROBE, 4, 7, 3)
    assert list(found) == list(GUIDANCE) and all(share == 25 for share, _ in found.values())
    assert [asked["guidance_scale"] for asked in model.asked] == [scale for scale in GUIDANCE for _ in range(2)]
    assert {tuple(asked["prompts"]) for asked in model.asked[1::2]} == {("a red sphere",) * 4}
    assert len({tuple(asked["prompts"]) for asked in model.asked[::2]}) == 1 and not set(SEEN) & HELD_OUT


def test_the_classifier_steers_pictures_without_a_prompt(seen: list[tuple[str, str] | None]) -> None:
    seen += [ONE]
    model: Any = Model()
    classifier: Any = SimpleNamespace(labels=lambda names: [name.split()[1] for name in names])
    found = along_classifier(model, classifier, PROBE, 3, 7, 3)
    assert list(found) == list(CLASSIFIER)
    assert all(asked["prompts"] == [""] * 3 and asked["guidance_scale"] == 0 for asked in model.asked)
    assert [asked.get("classifier_scale") for asked in model.asked] == [s or None for s in CLASSIFIER for _ in range(2)]
    assert model.asked[3]["class_labels"] == ["sphere"] * 3 and model.asked[2]["class_labels"] == [
        s for _, s in SEEN[:3]
    ]
