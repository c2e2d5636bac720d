"""Batches: which pictures, how often, cut and captioned how; all from seed and number."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.data.batches import TrainingData
from finetune.data.config import DataConfig
from finetune.data.folders import Picture
from sdkit.errors import ConfigError
from tests.finetune.data.painted import dataset, filled, paint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures in two buckets, one of them shown three times."""
    for i in range(4):
        paint(tmp_path / "data" / f"{i}.png", (48, 48), i).with_suffix(".txt").write_text(f"square, {i}, red, round")
    for i in range(2):
        paint(tmp_path / "data" / f"w{i}.png", (96, 48), i).with_suffix(".txt").write_text(f"wide, {i}")
    paint(tmp_path / "data" / "3_often" / "o.png", (40, 40))
    return tmp_path / "data"


def test_which_latents_are_trained_on_is_a_choice(tmp_path: Path):
    paint(tmp_path / "a" / "a.png").with_suffix(".txt").write_text("x")
    config = DataConfig(data=tmp_path / "a")
    data = dataset(tmp_path / "a", config)
    cache, (view,) = filled(data, tmp_path / "a"), data.views()
    assert all(torch.equal(data.batch(n, cache).latents[0], cache(view)) for n in range(3))
    sampled = dataset(tmp_path / "a", replace(config, latents="sample"))
    assert len({sampled.batch(n, cache).latents.sum().item() for n in range(3)}) == 3


def test_an_epoch_shows_each_picture_as_often_as_it_should(folder: Path):
    data = dataset(folder, DataConfig(data=folder, train_batch_size=3))
    cache = filled(data, folder)
    assert {bucket: len(p) for bucket, p in data.buckets.items()} == {(48, 48): 7, (64, 32): 2}
    assert data.batches_per_epoch == 3 + 1
    epochs = [[data.batch(n, cache) for n in range(4 * e, 4 * e + 4)] for e in range(2)]
    for epoch in epochs:
        assert sum(float(b.weights.sum()) for b in epoch) == pytest.approx(7 + 2)
        seen = Counter(caption.split(",")[1] if "," in caption else caption for b in epoch for caption in b.captions)
        assert all(seen[f" {i}"] >= 1 for i in range(4)) and seen["often"] >= 3
        assert sum(seen.values()) == 12  # 7 and 2, each filled up to a multiple of 3
        assert all(len({"wide" in caption for caption in b.captions}) == 1 for b in epoch)  # one bucket a batch
    together = [{frozenset(b.captions) for b in epoch} for epoch in epochs]
    assert together[0] != together[1]  # other pictures side by side, not only the batches in another order
    assert {tuple(b.latents.shape) for b in epochs[0]} == {(3, 4, 24, 24), (3, 4, 16, 32)}


def test_a_batch_depends_on_seed_and_number_alone(folder: Path):
    config = DataConfig(data=folder, train_batch_size=2, random_flip=True, caption_dropout=0.5)
    data, again = dataset(folder, config), dataset(folder, config)
    cache = filled(data, folder)
    forwards = [data.batch(n, cache) for n in range(9)]
    backwards = [again.batch(n, cache) for n in reversed(range(9))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert torch.equal(a.latents, b.latents) and a.captions == b.captions
        assert [g.get_state().tolist() for g in a.generators] == [g.get_state().tolist() for g in b.generators]
    other = dataset(folder, config, seed=1)
    assert any(a.captions != other.batch(n, cache).captions for n, a in enumerate(forwards))


def test_processes_get_the_parts_of_one_batch(folder: Path):
    config = DataConfig(data=folder, train_batch_size=4, random_flip=True)
    whole = dataset(folder, config)
    cache = filled(whole, folder)
    parts = [dataset(folder, replace(config, train_batch_size=2), rank=r, world=2) for r in range(2)]
    for n in range(6):
        expected, found = whole.batch(n, cache), [p.batch(n, cache) for p in parts]
        assert torch.equal(torch.cat([b.latents for b in found]), expected.latents)
        assert [c for b in found for c in b.captions] == expected.captions
        assert [g.initial_seed() for b in found for g in b.generators] == [
            g.initial_seed() for g in expected.generators
        ]


def test_captions_are_dropped_as_often_as_asked(folder: Path):
    for share in (0.0, 0.3, 1.0):
        data = dataset(folder, DataConfig(data=folder, caption_dropout=share))
        drawn = [data._draw(data.samples[0], (48, 48), torch.Generator().manual_seed(i))[1] for i in range(1500)]
        assert abs(drawn.count("") - share * 1500) <= 4 * math.sqrt(1500 * share * (1 - share))
    cache = filled(data, folder)
    assert {caption for n in range(9) for caption in data.batch(n, cache).captions} == {""}


def test_flips_and_crops_are_drawn_evenly(folder: Path):
    data = dataset(folder, DataConfig(data=folder, random_flip=True, random_crops=3))
    picture, bucket = data.samples[0], (48, 48)
    views = [data._draw(picture, bucket, torch.Generator().manual_seed(i))[0] for i in range(1200)]
    assert set(views) <= set(data.views())
    counts = Counter((crop, flip) for _, _, crop, flip in views)
    assert len(counts) == 6 and all(abs(c - 200) < 4 * math.sqrt(200) for c in counts.values())


def test_tags_are_shuffled_and_kept(folder: Path):
    config = DataConfig(data=folder, shuffle_tags=4, keep_tags=1, caption_prefix="photo of", train_batch_size=4)
    data = dataset(folder, config)
    cache = filled(data, folder)
    seen = {caption for n in range(80) for caption in data.batch(n, cache).captions}
    assert seen == set(data.captions())
    orders = [c for c in seen if ", 0" in c and "square" in c]
    assert 2 <= len(orders) <= 4 and all(c.startswith("photo of square, ") for c in orders)
    assert all(
        sorted(c.removeprefix("photo of ").split(", ")) == sorted(["square", "0", "red", "round"]) for c in orders
    )


def test_an_empty_caption_has_no_tags_and_no_space_behind_the_prefix(folder: Path):
    (folder / "0.txt").write_text("")
    assert "" in dataset(folder, DataConfig(folder, shuffle_tags=3)).captions()
    assert "photo of" in dataset(folder, DataConfig(folder, caption_prefix="photo of")).captions()


def test_the_prior_class_is_half_and_weighted(folder: Path, tmp_path: Path):
    for i in range(2):
        paint(tmp_path / "class" / f"c{i}.png", seed=10 + i)
    config = DataConfig(data=folder, class_data=tmp_path / "class", class_prompt="a cup", prior_loss_weight=0.25)
    data = dataset(folder, config)
    cache = filled(data, folder)
    assert sum(p.is_prior for p in data.samples) == 9 == sum(not p.is_prior for p in data.samples)
    batches = [data.batch(n, cache) for n in range(data.batches_per_epoch)]
    weights = Counter[str]()
    for b in batches:
        weights[b.captions[0]] += float(b.weights[0])
    assert weights["a cup"] == pytest.approx(9 * 0.25) and weights["often"] == 3 and weights["wide, 1"] == 1
    assert sum(weights.values()) == pytest.approx(9 + 9 * 0.25)
    for b in batches:
        assert b.prior.tolist() == [c == "a cup" for c in b.captions]
    for i in range(2, 12):
        paint(tmp_path / "class" / f"c{i}.png", seed=10 + i)
    shown = Counter((p.is_prior, p.digest) for p in dataset(folder, config).samples)
    assert Counter({k: v for k, v in shown.items() if k[0]}.values()) == {1: 12}  # none of the prior's is left out
    assert sum(v for k, v in shown.items() if not k[0]) == 12


def epoch_weights(data_of_ranks: list[TrainingData], epoch: int) -> Counter[tuple[bool, str]]:
    """What the weights of each picture, by the name that is its caption, add up to over all processes."""
    weights = Counter[tuple[bool, str]]()
    first = epoch * data_of_ranks[0].batches_per_epoch
    for data in data_of_ranks:
        for n in range(first, first + data.batches_per_epoch):
            batch = data.batch(n, lambda view, generator: torch.zeros(4, 1, 1))
            for caption, weight, prior in zip(
                batch.captions, batch.weights.tolist(), batch.prior.tolist(), strict=True
            ):
                weights[prior, caption] += weight
    return weights


@given(
    st.lists(st.tuples(st.sampled_from([(48, 48), (96, 48), (40, 90)]), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_pictures_weights_of_an_epoch_are_its_repeats(
    shown: list[tuple[tuple[int, int], int]], priors: int, size: int, world: int
):
    """However often it has to be shown to fill a batch. The fewer of concept and prior class begin again until there
    are as many as of the others."""
    pictures = [Picture(Path(f"{i}"), f"{i}", n, side, f"{i}") for i, (side, n) in enumerate(shown)]
    pictures += [Picture(Path(f"p{i}"), f"{i}", 1, (48, 48), f"p{i}", is_prior=True) for i in range(priors)]
    subjects = [f"{i}" for i, (_, n) in enumerate(shown) for _ in range(n)]
    assume(subjects)
    config = DataConfig(Path("x"), class_data=Path("y"), prior_loss_weight=0.5, train_batch_size=size)
    ranks = [TrainingData(pictures, config, 48, 16, 0, rank, world) for rank in range(world)]
    most = max(len(subjects), priors)
    expected: Counter[tuple[bool, str]] = Counter()
    for i in range(most if priors else len(subjects)):
        expected[False, subjects[i % len(subjects)]] += 1
        if priors:
            expected[True, f"{i % priors}"] += 0.5  # type: ignore[assignment]  # a Counter of floats
    for epoch in (0, 3):
        assert epoch_weights(ranks, epoch) == pytest.approx(expected, rel=1e-5)


def test_a_class_that_is_never_shown_is_refused(folder: Path, tmp_path: Path):
    paint(tmp_path / "class" / "0_cup" / "a.png")
    with pytest.raises(ConfigError, match=r"class_data: no picture is shown, every folder has 0 repeats"):
        dataset(folder, DataConfig(folder, class_data=tmp_path / "class"))


def test_without_buckets_all_is_square(folder: Path):
    assert set(dataset(folder, DataConfig(data=folder, aspect_buckets=False)).buckets) == {(48, 48)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout: expected a number from 0 to 1"),
        ({"train_batch_size": 0}, "train_batch_size: expected a whole number of at least 1"),
        ({"random_crops": -1}, "random_crops: expected a whole number of at least 0"),
        ({"class_prompt": "x"}, "expected a class_data"),
        ({"num_class_images": 3, "class_data": Path("x")}, "expected a class_prompt"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig(data=Path("x"), **wrong)
