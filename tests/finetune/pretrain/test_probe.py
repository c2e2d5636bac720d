"""The probe: a loss that does not care for the order of objects, and verdicts in words."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.pretrain.probe import BATCH, HEADS, NONE, Probe, ProbeLoss, draw_batch, look, matched_loss, objects_of
from finetune.pretrain.world.pictures import SIZE, Pictures
from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, sample_scenes


def perfect_output(scenes: Scenes, order: list[int]) -> dict[str, Tensor]:
    """The answer of a probe that is sure and right, its slots in ``order``."""
    out = {name: torch.zeros(len(scenes), 3, size) for name, size in HEADS.items()}
    for b in range(len(scenes)):
        for slot, k in enumerate(order):
            present = bool(scenes.shape[b, k] >= 0)
            out["shape"][b, slot, scenes.shape[b, k] if present else NONE] = 50.0
            if present:
                out["place"][b, slot] = scenes.position[b, k] / 0.1
                for name in ("color", "size", "material"):
                    out[name][b, slot, getattr(scenes, name)[b, k]] = 50.0
    out["table"] = 50.0 * F.one_hot(scenes.table, 4).float()
    return out


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
def test_the_probes_loss_does_not_care_for_order(order: list[int]) -> None:
    scenes = sample_scenes(16, 5, held_out="include")
    assert matched_loss(perfect_output(scenes, order), scenes) < 1e-4
    other = sample_scenes(16, 6, held_out="include")
    assert matched_loss(perfect_output(scenes, order), other) > 10


def test_the_probes_verdict_names_the_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = sample_scenes(8, 7, counts=(0.0, 1.0, 0.0))
    probe = Probe()
    monkeypatch.setattr(probe, "forward", lambda _x: perfect_output(scenes, [1, 2, 0]))
    for i, verdict in enumerate(look(probe, torch.zeros(8, 3, SIZE, SIZE))):
        truth = {(COLORS[scenes.color[i, k]], SHAPES[scenes.shape[i, k]]) for k in range(2)}
        assert {(seen["color"], seen["shape"]) for seen in verdict.objects} == truth


def test_a_batch_has_its_share_of_held_out_pairs() -> None:
    pictures = Pictures(torch.zeros(20, 3, SIZE, SIZE, dtype=torch.uint8), sample_scenes(20, 1), 0, torch.empty(20, 0))
    held_out = sample_scenes(10, 2, held_out="only")
    x, scenes = draw_batch(pictures, torch.ones(10, 3, SIZE, SIZE), held_out, 5)
    assert len(x) == len(scenes) == BATCH and (x.mean((1, 2, 3)) > 0).tolist() == [False] * 28 + [True] * 4
    named = {(o["color"], o["shape"]) for i in range(28, 32) for o in objects_of(scenes, i)[:1]}
    assert named <= {(o["color"], o["shape"]) for i in range(10) for o in objects_of(held_out, i)[:1]}


def test_the_loss_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    loss, scenes = ProbeLoss(Probe()), sample_scenes(4, 3)
    loss((torch.rand(4, 3, SIZE, SIZE) * 2 - 1, scenes)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in loss.parameters())


def test_larger_pictures_have_as_many_cells() -> None:
    out = Probe(128)(torch.zeros(2, 3, 128, 128))
    assert {name: tuple(x.shape[:2]) for name, x in out.items()} == dict.fromkeys(HEADS, (2, 3)) | {"table": (2, 4)}
