"""The noise predictor's loss: its weights, its draws, and what it trains."""

import copy

import pytest
import torch

from finetune.pretrain.grounding import Places
from finetune.pretrain.noise_predictor import (
    BATCH,
    COUNTS,
    FLOOR,
    GROUNDING,
    QUIET,
    TOKEN_DROPOUT,
    Batch,
    Draws,
    PredictorLoss,
    by_count,
    draw_pictures,
    draw_timesteps,
    loss_weight,
    share,
    words_of,
)
from finetune.pretrain.own_pictures import OwnPictures
from finetune.seeds import step_generator
from finetune.training.min_snr import min_snr_weight
from sdkit.checkpoints.loading import MODELS
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.prompts.tokenizer import load_tokenizer
from sdkit.sampling.schedule import NoiseSchedule


def test_min_snr_weights_v_as_it_weights_epsilon_down_to_a_floor() -> None:
    """An error e of v is an error of x0 of sqrt(1 - acp) e, and the weight on x0 is min(snr, 5)."""
    schedule = NoiseSchedule(prediction_type="v_prediction")
    t = torch.tensor([0, 200, 500, 999])
    acp = schedule.alphas_cumprod[t]
    snr = acp / (1 - acp)
    expected = snr.clamp(max=5) * (1 - acp)
    expected[2:] = FLOOR
    assert acp[2] < FLOOR < acp[1] and torch.allclose(loss_weight(schedule, t).double(), expected, rtol=1e-5)


def test_the_weights_of_all_timesteps_are_those_of_the_shipped_model() -> None:
    """As they were written then, in float32: equal to the bit, and to rounding the paper's in float64."""
    schedule, t = NoiseSchedule(prediction_type="v_prediction"), torch.arange(1000)
    snr = schedule.snr(t).float()
    weight = snr.clamp(max=5.0) / (snr + 1)
    expected = torch.where(snr < 1, weight.clamp(min=FLOOR), weight)
    assert torch.equal(loss_weight(schedule, t), expected) and expected.dtype == torch.float32
    assert torch.allclose(weight.double(), min_snr_weight(schedule, t, 5.0), rtol=1e-6)


def test_one_loss_can_be_written_for_v_and_for_the_picture() -> None:
    """An error e of v is one of sqrt(1 - acp) e of x0: the weights differ by 1 - acp, the floor too."""
    of_v, of_x0 = (NoiseSchedule(prediction_type=kind) for kind in ("v_prediction", "sample"))
    t = torch.arange(1000)
    spread = 1 - of_v.alphas_cumprod
    assert torch.allclose(loss_weight(of_x0, t).double() * spread, loss_weight(of_v, t).double(), rtol=1e-5)


def test_epsilon_has_the_papers_weights_and_zero_snr_a_floor() -> None:
    t = torch.arange(1000)
    epsilon = NoiseSchedule(prediction_type="epsilon")
    assert torch.equal(loss_weight(epsilon, t), min_snr_weight(epsilon, t, 5.0, torch.float32))
    for kind in ("v_prediction", "sample"):
        zero = NoiseSchedule(prediction_type=kind, rescale_betas_zero_snr=True)
        assert loss_weight(zero, t)[-1] == pytest.approx(FLOOR) and loss_weight(zero, t).isfinite().all()


def test_batches_hold_their_shares_of_counts_and_every_part_of_the_schedule() -> None:
    count = torch.tensor([1] * 700 + [2] * 200 + [3] * 100)
    index = torch.cat([draw_pictures(by_count(count), COUNTS, step_generator(3, k)) for k in range(100)])
    drawn = count[index]
    assert len(index.unique()) > 860  # each in a group as likely as another
    shares = drawn.bincount(minlength=4)[1:] / len(drawn)
    assert torch.allclose(shares, torch.tensor(COUNTS), atol=0.03)  # 3 standard errors of 3200 draws
    t = torch.stack([draw_timesteps(1000, step_generator(4, k)) for k in range(300)])
    assert t.min() == 0 and t.max() == 999
    quiet = (t < 500).float().sum(1) / BATCH
    assert (quiet - QUIET).abs().max() <= 1 / BATCH and abs(quiet.mean() - QUIET) < 0.01
    for part, low in ((t[t < 500], 0), (t[t >= 500], 500)):
        torch.testing.assert_close(
            part.float().quantile(torch.tensor([0.25, 0.5, 0.75])),
            low + torch.tensor([125.0, 250.0, 375.0]),
            rtol=0,
            atol=12,
        )
    assert t[:, 0].float().mean().sub(575).abs() < 60  # in no order


def test_pictures_that_all_show_one_are_drawn_alike() -> None:
    groups = by_count(torch.ones(40, dtype=torch.int64))
    drawn = torch.cat([draw_pictures(groups, COUNTS, step_generator(3, k)) for k in range(40)])
    assert drawn.bincount(minlength=40).min() > 10


def test_the_shares_of_processes_are_the_batch() -> None:
    rng = torch.Generator().manual_seed(1)
    ids = torch.arange(BATCH)[:, None].repeat(1, 6)
    sample = torch.tensor([0, 3, 3, 8, 13, BATCH - 1])
    places = Places(sample, torch.arange(6), torch.rand(6, 4, 4, generator=rng))
    x0, noise = torch.randn(2, BATCH, 4, 8, 8, generator=rng)
    whole = Batch(x0, noise, torch.arange(BATCH), ids, torch.rand(BATCH, 6, generator=rng) > 0.5, places)
    words: list[tuple[int, int]] = []
    for process in range(2):
        part = share(whole, process, 2)
        assert part.t.tolist() == list(range(process, BATCH, 2))
        for own, all_of_them in zip(part[:5], whole[:5], strict=True):
            assert torch.equal(own, all_of_them[part.t])
        assert part.places is not None
        for k in range(len(part.places.sample)):
            number = int(part.places.token[k])
            words.append((int(part.ids[part.places.sample[k], 0]), number))
            assert torch.equal(part.places.cover[k], places.cover[number])
    assert sorted(words, key=lambda word: word[1]) == [(int(s), k) for k, s in enumerate(sample)]
    assert share(whole._replace(places=None), 0, 2).places is None


@pytest.fixture
def loss() -> PredictorLoss:
    """Of small networks."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
    )

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    anchor = build_text_encoder({**text, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 19})
    return PredictorLoss(unet, copy.deepcopy(anchor), anchor, NoiseSchedule(prediction_type="v_prediction"))


def batch(seed: int) -> Batch:
    rng = step_generator(0, seed)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=rng)
    ids = torch.randint(1, 18, (3, 6), generator=rng)
    ids[:, -2:] = 19
    return Batch(x0, noise, torch.tensor([10, 500, 990]), ids, torch.ones(3, 6, dtype=torch.bool))


def test_the_anchor_holds_the_text_encoder_and_is_not_trained(loss: PredictorLoss) -> None:
    assert not any(p.requires_grad for p in loss.anchor.parameters())
    value = loss(batch(1))
    value.backward()
    assert all(p.grad is not None for p in [*loss.unet.parameters(), *loss.text_encoder.parameters()])
    assert all(p.grad is None for p in loss.anchor.parameters())

    with torch.no_grad():
        for p in loss.anchor.parameters():  # another meaning of the same words is far from the text encoder's
            p.add_(0.1 * torch.randn(p.shape, generator=step_generator(0, 9)))
        assert loss(batch(1)) > value + 1e-3


def test_a_batch_has_pictures_with_their_own_captions_some_of_them_dropped() -> None:
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    texts = ["a red cube", "a blue sphere"]
    pictures = OwnPictures(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), texts)
    latents = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 4, 2, 2).half()

    ids = {text: tokenizer(text, padding="max_length", max_length=77).input_ids for text in (*texts, "")}
    dropped, lengths, seen = 0, list[int](), list[torch.Tensor]()
    for step in range(20):
        drawn = Draws(pictures, latents, tokenizer, 77)(step)
        length = drawn.ids.shape[1]
        for x0, found in zip(drawn.x0, drawn.ids.tolist(), strict=True):
            own = ids[texts[int(x0.max()) - 1]][:length]
            assert found in (own, ids[""][:length])
            dropped += found == ids[""][:length]
        lengths.append(length)
        seen.append(drawn.seen.flatten().float())
    assert 0.05 < dropped / (20 * BATCH) < 0.15
    assert set(lengths) == {77, 5} and 4 < lengths.count(5) < 16  # of five tokens, start and end among them
    assert torch.cat(seen).mean().item() == pytest.approx(1 - TOKEN_DROPOUT, abs=0.01)
    empty = Draws(pictures, latents, tokenizer, 77, dropout=1.0)(0).ids
    assert all(row == ids[""][: len(row)] for row in empty.tolist())


def test_a_token_that_is_not_seen_says_nothing(loss: PredictorLoss) -> None:
    """The text encoder still reads it: what is held to the anchor does not change."""
    given = batch(3)
    contexts: list[torch.Tensor] = []
    loss.unet.register_forward_pre_hook(lambda _, args: contexts.append(args[2]))
    seen = given.seen.clone()
    seen[0, 1] = seen[2, 3] = False
    with torch.no_grad():
        loss(given)
        loss(given._replace(seen=seen))
    whole, part = contexts
    assert not part[~seen].any() and torch.equal(part[seen], whole[seen]) and bool(whole[~seen].abs().sum() > 0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_the_schedule_says(loss: PredictorLoss, kind: str) -> None:
    """A network that predicts nothing has the target's square as its error."""
    loss.schedule = NoiseSchedule(prediction_type=kind)
    given = batch(2)
    with torch.no_grad():
        for p in loss.unet.conv_out.parameters():
            p.zero_()
        target = loss.schedule.target(given.x0, given.noise, given.t)
        expected = (loss_weight(loss.schedule, given.t) * target.square().mean(dim=(1, 2, 3))).mean()
        assert float(loss(given)) == pytest.approx(float(expected), rel=1e-2)


def test_words_that_look_elsewhere_cost(loss: PredictorLoss) -> None:
    """Of a word's attention the share from outside its object counts, the less the more noise there is."""
    given = batch(4)
    everywhere, nowhere = torch.ones(1, 8, 8), torch.zeros(1, 8, 8)

    def value(sample: int, cover: torch.Tensor) -> float:
        with torch.no_grad():
            return float(loss(given._replace(places=Places(torch.tensor([sample]), torch.tensor([1]), cover))))

    with torch.no_grad():
        plain = float(loss(given))
    assert value(0, everywhere) == pytest.approx(plain, abs=1e-5)
    signal = loss.schedule.alphas_cumprod[given.t].tolist()
    for sample in range(3):
        assert value(sample, nowhere) - plain == pytest.approx(GROUNDING * signal[sample], abs=1e-3)


def test_the_model_says_what_words_it_has_seen() -> None:
    assert words_of(["A red cube, 2 spheres", "a t-shirt"]) == ["a", "cube", "red", "shirt", "spheres", "t"]
