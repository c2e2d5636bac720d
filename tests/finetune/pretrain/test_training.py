"""The pretraining loop: exact resume, schedule, moving average; and the losses of its scripts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.pretrain.autoencoder import CONFIG, psnr, reconstruction_loss
from finetune.pretrain.clip import contrast, distinct_scenes
from finetune.pretrain.noise_predictor import BATCH, COUNTS, FLOOR, draw_pictures, draw_timesteps, loss_weight
from finetune.pretrain.probe import HEADS, NONE, Probe, look, matched_loss
from finetune.pretrain.training import MovingAverage, Recipe, generator, train
from finetune.pretrain.world.captions import COLORS, SHAPES, Scenes, equivalent_key, sample_scenes
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.schedule import NoiseSchedule


class Stopped(Exception):
    """Stands for SIGKILL."""


def run(folder: Path, losses: list[float], stop_at: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and moving average after 12 steps of a small regression."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise Stopped
        x = torch.randn(8, 4, generator=generator(1, step))
        value = (module(x) - x[:, :3].sin()).square().mean()
        losses.append(value.item())
        return value, {}

    recipe = Recipe(steps=12, learning_rate=0.05, warmup=3, decay_from=0.5, ema_decay=0.9)
    average = train(module, loss, recipe, folder, save_seconds=-1.0)
    assert average is not None
    return [p.detach().clone() for p in module.parameters()], average.values


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    whole: list[float] = []
    weights, average = run(tmp_path / "whole", whole)
    first: list[float] = []
    with pytest.raises(Stopped):
        run(tmp_path / "killed", first, stop_at=7)
    rest: list[float] = []
    weights_again, average_again = run(tmp_path / "killed", rest)
    assert first + rest == whole and len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(weights + average, weights_again + average_again, strict=True))
    assert whole[-1] < whole[0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ArithmeticError, match="not finite at step 0"):
        train(module, lambda _: (module.weight.sum() * float("nan"), {}), Recipe(3, 0.1), tmp_path / "x")


def test_the_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=10, decay_from=0.5, final_rate=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == pytest.approx(1.0)
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)


def test_the_moving_average_follows_its_definition() -> None:
    module, expected = nn.Linear(1, 1, bias=False), 0.0
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = MovingAverage(module, 0.5)
    for step, value in enumerate((1.0, 3.0, 2.0)):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module, step)
    average.copy_to(module)
    assert module.weight.item() == pytest.approx(expected)


def test_min_snr_weights_v_as_it_weights_epsilon_down_to_a_floor() -> None:
    """An error e of v is an error of x0 of sqrt(1 - acp) e, and the weight on x0 is min(snr, 5)."""
    schedule = NoiseSchedule(prediction_type="v_prediction")
    t = torch.tensor([0, 200, 500, 999])
    acp = schedule.alphas_cumprod[t]
    snr = acp / (1 - acp)
    expected = snr.clamp(max=5) * (1 - acp)
    expected[2:] = FLOOR
    assert acp[2] < FLOOR < acp[1] and torch.allclose(loss_weight(schedule, t).double(), expected, rtol=1e-5)


def test_batches_hold_their_shares_of_counts_and_every_part_of_the_schedule() -> None:
    count = torch.tensor([1] * 700 + [2] * 200 + [3] * 100)
    drawn = torch.cat([count[draw_pictures(count, generator(3, k))] for k in range(100)])
    shares = drawn.bincount(minlength=4)[1:] / len(drawn)
    assert torch.allclose(shares, torch.tensor(COUNTS), atol=0.03)  # 3 standard errors of 3200 draws
    t = torch.stack([draw_timesteps(1000, generator(4, k)) for k in range(300)])
    assert t.min() == 0 and t.max() == 999
    parts = (t.float() * BATCH / 1000).floor().sort(1).values
    assert (parts - torch.arange(BATCH)).abs().max() <= 1 and t[:, 0].float().mean().sub(499.5).abs() < 60


def test_contrast_is_smallest_where_pairs_match() -> None:
    unit = F.normalize(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    right, figures = contrast(unit, unit, scale)
    wrong, _ = contrast(unit, unit.roll(1, 0), scale)
    assert figures["right"] == 1.0 and right < 0.1 < wrong
    logits = scale.exp() * unit @ unit.T
    assert right == pytest.approx((logits.logsumexp(1) - logits.diag()).mean().item(), rel=1e-5)


def test_distinct_scenes_are_distinct() -> None:
    scenes = distinct_scenes(64, 3)
    assert len(scenes) == 64 == len(set(equivalent_key(scenes)))


def perfect_output(scenes: Scenes, order: list[int]) -> dict[str, Tensor]:
    """What a probe that is sure and right would answer, its slots in ``order``."""
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
    for i, verdict in enumerate(look(probe, torch.zeros(8, 3, 64, 64))):
        truth = {(COLORS[scenes.color[i, k]], SHAPES[scenes.shape[i, k]]) for k in range(2)}
        assert {(seen["color"], seen["shape"]) for seen in verdict.objects} == truth


def test_the_autoencoders_loss_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, _ = reconstruction_loss(vae, x, generator(0, 0))
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in vae.named_parameters() if "to_k.bias" not in name
    )
    assert psnr(torch.tensor(4e-4)).item() == pytest.approx(40.0)
