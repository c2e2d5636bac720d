"""Left and right: scenes beside their exchanged ones, what is said of them, and what the networks are to learn."""

import copy
from pathlib import Path

import pytest
import torch

from finetune.pretrain.exchanged_pairs import render_pairs
from finetune.pretrain.grounding import Places, of_samples
from finetune.pretrain.noise_predictor import Batch, Draws, PredictorLoss
from finetune.pretrain.sides import (
    KEPT_UP,
    TAUGHT,
    SidedDraws,
    SidedLoss,
    TextLoss,
    joined,
    share_of_sided,
    side_loss,
    text_batches,
    told_apart,
)
from finetune.pretrain.world.pictures import GRID, training_pictures
from sdkit.checkpoints import loading
from sdkit.sampling.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def parts() -> loading.Components:
    """The shipped model's."""
    return loading.load("tabletop", dtype=torch.float32)


def test_a_side_is_read_along_one_direction() -> None:
    left = torch.zeros(1, GRID, GRID)
    left[:, :, : GRID // 2] = 1
    halves = Places(torch.tensor([0, 1]), torch.tensor([2, 1]), torch.cat([left, 1 - left]))
    direction = torch.tensor([0.0, 3.0])
    hidden = torch.zeros(2, 4, 2)
    assert float(side_loss(hidden, direction, halves)) == pytest.approx(0.6931, abs=1e-4)
    hidden[0, 2, 1], hidden[1, 1, 1] = 4, -4
    assert float(side_loss(hidden, direction, halves)) < 1e-3
    assert float(side_loss(-hidden, direction, halves)) > 7
    none = of_samples(halves, torch.tensor([5]))
    assert float(side_loss(hidden, direction, none)) == 0


def test_the_text_encoder_learns_the_side_and_keeps_the_rest(parts: loading.Components) -> None:
    torch.manual_seed(0)
    encoder = copy.deepcopy(parts.text_encoder).requires_grad_(True)
    for layer in encoder.modules():  # as if it had never been taught
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.05)
    loss, batches = TextLoss(encoder), text_batches(parts.tokenizer, 500)
    trained = [{"params": [loss.direction], "lr": 3e-3}, {"params": list(encoder.parameters()), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(trained)
    values: list[float] = []
    for step in range(60):
        value = loss(batches(step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    assert all(p.grad is None for p in loss.before.parameters())


def test_batches_are_joined_with_their_words() -> None:
    def batch(rows: int, tokens: int, first: int) -> Batch:
        ids = torch.full((rows, tokens), 9)
        ids[:, 0] = torch.arange(first, first + rows)
        places = Places(torch.arange(rows), torch.full((rows,), first), torch.full((rows, 2, 2), float(first)))
        x = torch.full((rows, 1, 2, 2), float(first))
        return Batch(x, -x, torch.full((rows,), first), ids, torch.zeros(rows, tokens, dtype=torch.bool), places)

    both = joined(batch(2, 4, 1), batch(3, 6, 5))
    assert both.ids[:, 0].tolist() == [1, 2, 5, 6, 7] and both.ids[:2, 4:].eq(9).all()
    assert both.seen[:2, 4:].all() and not both.seen[2:].any()
    assert both.places is not None and both.places.sample.tolist() == [0, 1, 2, 3, 4]
    assert both.places.token.tolist() == [1, 1, 5, 5, 5] and both.x0[:, 0, 0, 0].tolist() == [1, 1, 5, 5, 5]


@pytest.fixture(scope="module")
def draws(parts: loading.Components, tmp_path_factory: pytest.TempPathFactory) -> SidedDraws:
    work: Path = tmp_path_factory.mktemp("sides")
    side = 16 * parts.vae.config.factor
    pictures = training_pictures(work, 64, 32, side)
    latents = torch.randn(len(pictures), 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    return SidedDraws(Draws(pictures, latents, parts.tokenizer, 77), render_pairs(parts.vae, 64, 8, side), teaching=10)


def test_a_scene_and_its_exchanged_one_have_the_same_noise(draws: SidedDraws) -> None:
    batch, halves, mixture = draws(3)
    assert mixture is TAUGHT
    assert len(batch.t) == TAUGHT.ordinary + 2 * TAUGHT.pairs and len(draws.pairs.latents) == 2 * draws.pairs.number
    ones, others = (slice(TAUGHT.ordinary + k, None, 2) for k in range(2))
    assert torch.equal(batch.noise[ones], batch.noise[others]) and torch.equal(batch.t[ones], batch.t[others])
    assert not torch.equal(batch.x0[ones], batch.x0[others])
    assert batch.t[TAUGHT.ordinary :].min() >= 550 and int(halves.sample.min()) >= TAUGHT.ordinary
    again = draws(3)
    assert torch.equal(again.batch.x0, batch.x0) and torch.equal(again.halves.token, halves.token)

    own = [share_of_sided(draws(3), process, 2) for process in range(2)]
    assert sum(len(part.halves.sample) for part in own) == len(halves.sample)
    for process, part in enumerate(own):
        assert torch.equal(part.batch.ids, batch.ids[process::2])
        kept = [(int(s), int(t)) for s, t in zip(halves.sample, halves.token, strict=True) if s % 2 == process]
        found = zip(part.halves.sample.tolist(), part.halves.token.tolist(), strict=True)
        assert [(2 * s + process, t) for s, t in found] == kept


def test_after_the_teaching_most_pictures_are_ordinary(draws: SidedDraws) -> None:
    last, first = draws(9), draws(10)
    assert last.mixture is TAUGHT and first.mixture is KEPT_UP
    assert len(first.batch.t) == KEPT_UP.ordinary + 2 * KEPT_UP.pairs
    assert int(first.halves.sample.min()) >= KEPT_UP.ordinary
    assert all(share_of_sided(first, process, 2).mixture is KEPT_UP for process in range(2))


def test_all_that_is_read_is_trained(parts: loading.Components, draws: SidedDraws) -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction")
    encoder = copy.deepcopy(parts.text_encoder).requires_grad_(True)
    predictor = PredictorLoss(copy.deepcopy(parts.unet).requires_grad_(True), encoder, parts.text_encoder, schedule)
    loss, batch = SidedLoss(predictor, torch.ones(encoder.config.hidden_size)), draws(0)
    value = loss(batch)
    value.backward()
    for p in (loss.row, loss.direction, *predictor.unet.parameters(), *encoder.parameters()):
        assert p.grad is not None and bool(p.grad.abs().sum() > 0)

    with torch.no_grad():
        plain = predictor(batch.batch)
        assert float(value) - float(plain) > TAUGHT.rows * 0.3  # a middle block that is read as 0 is a third off
        turned = batch.halves._replace(cover=1 - batch.halves.cover)
        assert float(loss(batch._replace(halves=turned))) != pytest.approx(float(value), abs=1e-4)


def test_sides_are_told_apart_by_the_shipped_model_alone(parts: loading.Components, draws: SidedDraws) -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction")
    predictor = PredictorLoss(parts.unet, parts.text_encoder, copy.deepcopy(parts.text_encoder), schedule)
    assert told_apart(predictor, parts.tokenizer, draws.pairs, 800) >= 80
