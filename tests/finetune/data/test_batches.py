"""Training data: folders and what is wrong with them, buckets, caches that cannot be stale, and the batches."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.batches import DataConfig, TrainingData, read_pictures
from finetune.data.buckets import bucket_sizes, nearest_bucket, prepare
from finetune.data.cache import LatentCache, TextCache, weights_hash
from finetune.data.folders import read_folder
from sdkit import AutoencoderKL, VAEConfig
from sdkit.checkpoints.loading import MODELS
from sdkit.errors import CheckpointError, ConfigError
from sdkit.images.pixels import fit, to_tensor
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tokenizer import load_tokenizer
from tests.conftest import draw_weights

STEP = 16


def paint(path: Path, size: tuple[int, int] = (48, 48), seed: int = 0) -> Path:
    """A picture of smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def vae(seed: int = 0) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False, **blocks)
    return draw_weights(AutoencoderKL(config), seed)


@pytest.fixture(scope="module")
def words():
    """The shipped tokenizer and a small text encoder."""
    config = json.loads((MODELS / "tabletop" / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    return load_tokenizer(MODELS / "tabletop" / "tokenizer"), build_text_encoder(config | {"num_hidden_layers": 1})


def dataset(folder: Path, config: DataConfig | None = None, **arguments) -> TrainingData:
    config = config or DataConfig(data=folder)
    return TrainingData(read_pictures(config), config, **({"resolution": 48, "step": STEP, "seed": 0} | arguments))


# Folders


def test_every_layout_gives_captions_and_repeats(tmp_path: Path):
    paint(tmp_path / "train" / "a.png")
    paint(tmp_path / "train" / "deep" / "b.jpg")
    lines = [{"file_name": "a.png", "text": "from  metadata"}, {"file_name": "deep/b.jpg", "text": "deep"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    paint(tmp_path / "c.webp").with_suffix(".txt").write_text("\ufeffbeside\nit\n", encoding="utf-8")
    paint(tmp_path / "d.png").with_suffix(".caption").write_text("also beside")
    paint(tmp_path / "10_red cup" / "e.png")
    paint(tmp_path / "10_red cup" / "f.png").with_suffix(".txt").write_text("its own")
    paint(tmp_path / "0_never" / "g.png")
    paint(tmp_path / "10_red cup" / "2_blue" / "i.png")
    paint(tmp_path / "h.png", (64, 32))
    paint(tmp_path / ".hidden" / "x.png")
    found = {p.path.name: p for p in read_folder(tmp_path, "for all")}
    assert {name: (p.caption, p.repeats) for name, p in found.items()} == {
        "a.png": ("from metadata", 1),
        "b.jpg": ("deep", 1),
        "c.webp": ("beside it", 1),
        "d.png": ("also beside", 1),
        "e.png": ("red cup", 10),
        "f.png": ("its own", 10),
        "g.png": ("never", 0),
        "h.png": ("for all", 1),
        "i.png": ("blue", 2),
    }
    assert found["h.png"].size == (64, 32)
    shown = Counter(p.path.name for p in dataset(tmp_path, DataConfig(data=tmp_path, instance_prompt="x")).samples)
    assert shown == {name: p.repeats for name, p in found.items() if p.repeats}


def test_another_column_holds_the_captions(tmp_path: Path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "no", "prompt": "yes"}))
    assert read_folder(tmp_path, None, "prompt")[0].caption == "yes"


def test_all_problems_are_listed_at_once(tmp_path: Path):
    paint(tmp_path / "good.png").with_suffix(".txt").write_text("fine")
    whole = paint(tmp_path / "cut.png", (200, 200))
    whole.write_bytes(whole.read_bytes()[:-1500])
    whole.with_suffix(".txt").write_text("x")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "text.txt").write_text("x")
    paint(tmp_path / "mute.png")
    paint(tmp_path / "empty.png").with_suffix(".txt").write_text(" \n")
    paint(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    lines = ['{"file_name": "gone.png", "text": "x"}', "{", '{"text": "x"}', '{"file_name": "good.png", "text": ""}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    other = tmp_path.parent / f"{tmp_path.name}-class"
    paint(other / "mute too.png")
    with pytest.raises(ConfigError) as caught:
        read_pictures(DataConfig(data=tmp_path, class_data=other))
    message = str(caught.value)
    for name in ("cut.png", "text.jpg", "mute.png", "empty.txt", "latin.txt", "gone.png", "mute too.png"):
        assert message.count(f"{name}:") == 1 and name in message, message
    for line in (2, 3, 4):
        assert f"line {line}:" in message
    assert "9 problems" in message and "1 problem " in message and "good.png:" not in message


def test_folders_that_hold_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_folder(tmp_path / "x", None)
    with pytest.raises(ConfigError, match="no pictures here"):
        read_folder(tmp_path, None)
    paint(tmp_path / "0_x" / "a.png")
    with pytest.raises(ConfigError, match="0 repeats"):
        dataset(tmp_path)


# Buckets


@given(st.integers(2, 16), st.sampled_from([8, 16, 64]), st.integers(1, 6), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_buckets_are_all_the_sizes_that_fit_and_cannot_grow(blocks: int, step: int, low: int, more: int):
    resolution, shortest, longest = blocks * step, low * step, (low + more) * step
    sides = range(shortest, longest + 1, step)
    fitting = {(w, h) for w in sides for h in sides if w * h <= resolution**2}
    grown = {(w, h) for w, h in fitting if (w + step, h) in fitting and (w, h + step) in fitting}
    try:
        found = bucket_sizes(resolution, step, shortest, longest)
    except ConfigError:
        assert not fitting
        return
    assert set(found) <= fitting - grown and len(found) == len(set(found))
    assert {w for w, _ in found} == {w for w, _ in fitting}  # every side that is possible is there
    assert {(h, w) for w, h in found} == set(found)


def test_buckets_of_sd1_hold_the_known_ones():
    found = bucket_sizes(512, 64, 256, 1024)
    assert {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024), (768, 320)} <= set(found)
    with pytest.raises(ConfigError, match="multiple of 64 pixels, found 500"):
        bucket_sizes(500, 64, 256, 1024)


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_no_bucket_is_nearer(width: int, height: int):
    buckets = bucket_sizes(512, 64, 256, 1024)
    wanted = width / height
    error = {b: max(wanted / (b[0] / b[1]), (b[0] / b[1]) / wanted) for b in buckets}
    assert error[nearest_bucket((width, height), buckets)] == pytest.approx(min(error.values()))


def test_a_picture_is_scaled_and_cut_in_the_middle(tmp_path: Path):
    image = Image.open(paint(tmp_path / "a.png", (150, 80)))
    pixels = prepare(image, (48, 32), None, False, "x")
    expected = to_tensor(fit(image, 48, 32))
    assert pixels.shape == (1, 3, 32, 48) and float((pixels - expected).abs().max()) < 0.06
    assert torch.equal(prepare(image, (48, 32), None, True, "x"), pixels.flip(-1))
    crops = [prepare(image, (32, 32), k, False, "x") for k in (0, 1, 0)]
    assert torch.equal(crops[0], crops[2]) and not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], prepare(image, (32, 32), 0, False, "another file"))
    scaled = to_tensor(image.resize((60, 32), Image.Resampling.LANCZOS))
    assert any(torch.equal(crops[0], scaled[..., left : left + 32]) for left in range(29))  # a cut, at full height


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert float(prepare(clear, (32, 32), None, False, "x").min()) == 1.0


# Caches


def test_cached_latents_are_those_of_the_encoder(tmp_path: Path):
    paint(tmp_path / "a" / "a.png", (60, 48)).with_suffix(".txt").write_text("x")
    data, encoder = dataset(tmp_path / "a"), vae()
    cache = LatentCache(encoder, tmp_path)
    (view,) = data.views()
    assert cache.fill([view, view]) == 1 and cache.fill([view]) == 0
    with torch.no_grad():
        posterior = encoder.encode(prepare(Image.open(view[0].path), view[1], None, False, view[0].digest))
    scale = encoder.config.scaling_factor
    expected = posterior.sample(torch.Generator().manual_seed(3))[0] * scale
    assert torch.allclose(cache(view, torch.Generator().manual_seed(3)), expected, atol=1e-6)
    assert torch.allclose(cache(view), posterior.mean[0] * scale, atol=1e-6)


def test_which_latents_are_trained_on_is_a_choice(tmp_path: Path):
    paint(tmp_path / "a" / "a.png").with_suffix(".txt").write_text("x")
    config = DataConfig(data=tmp_path / "a")
    data = dataset(tmp_path / "a", config)
    cache, (view,) = filled(data, tmp_path / "a"), data.views()
    assert all(torch.equal(data.batch(n, cache).latents[0], cache(view)) for n in range(3))
    sampled = dataset(tmp_path / "a", replace(config, latents="sample"))
    assert len({sampled.batch(n, cache).latents.sum().item() for n in range(3)}) == 3
    assert sampled.fingerprint != data.fingerprint


def test_a_stale_latent_is_not_used(tmp_path: Path):
    folder = tmp_path / "a"
    paint(folder / "a.png").with_suffix(".txt").write_text("x")

    def encoded(config: DataConfig, encoder: AutoencoderKL, **arguments) -> int:
        return LatentCache(encoder, tmp_path).fill(dataset(folder, config, **arguments).views())

    plain = DataConfig(data=folder)
    assert encoded(plain, vae()) == 1 and encoded(plain, vae()) == 0
    assert encoded(plain, vae(seed=1)) == 1  # other weights
    assert encoded(plain, vae(), resolution=64) == 1  # another size
    assert encoded(replace(plain, random_flip=True), vae()) == 1  # the mirrored one is new
    assert encoded(replace(plain, random_crops=3), vae()) == 3
    scaled = vae()
    scaled.config = replace(scaled.config, scaling_factor=0.5)
    assert encoded(plain, scaled) == 1
    quant = vae()
    with torch.no_grad():
        quant.quant_conv.bias.add_(1.0)
    assert encoded(plain, quant) == 1
    before = LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    (folder / "a.txt").write_text("another caption")
    assert encoded(plain, vae()) == 0
    paint(folder / "a.png", seed=1)  # same name and size, other bytes
    with pytest.raises(CheckpointError, match="start again"):
        LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    assert encoded(plain, vae()) == 1
    after = LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    assert not torch.equal(before, after)


def test_a_damaged_file_is_encoded_again(tmp_path: Path):
    paint(tmp_path / "a" / "a.png").with_suffix(".txt").write_text("x")
    cache, views = LatentCache(vae(), tmp_path), dataset(tmp_path / "a").views()
    cache.fill(views)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert cache.fill(views) == 1 and cache.fill(views) == 0


def test_processes_share_the_work(tmp_path: Path):
    for i in range(5):
        paint(tmp_path / "a" / f"{i}.png", seed=i).with_suffix(".txt").write_text("x")
    views = dataset(tmp_path / "a").views()
    assert LatentCache(vae(), tmp_path).fill(views, slice(0, None, 2)) == 3
    assert LatentCache(vae(), tmp_path).fill(views) == 2


def test_cached_contexts_are_those_of_the_encoder(tmp_path: Path, words):
    tokenizer, encoder = words
    captions = ["a red cube", "a (red:2) cube " * 30, ""]
    cache = TextCache(tokenizer, encoder, tmp_path)
    assert cache.fill(captions) == 3 and cache.fill(captions) == 0
    with torch.no_grad():
        expected, _ = encode_prompts(tokenizer, encoder, captions, None, weighted=False)
    length = int(encoder.config.max_position_embeddings)
    assert expected.shape[1] > length  # several chunks
    assert torch.allclose(cache(captions), expected, atol=1e-5)
    assert cache(captions[:1]).shape[1] == length
    assert cache.fill(["new"]) == 1
    assert TextCache(tokenizer, encoder, tmp_path, clip_skip=0).fill(["new"]) == 0
    with torch.no_grad():
        weight = next(encoder.parameters())
        weight.add_(1)
        assert TextCache(tokenizer, encoder, tmp_path).fill(["new"]) == 2  # it and the empty caption
        weight.sub_(1)


def test_weights_hash_sees_values_names_and_dtypes():
    plain = torch.nn.Linear(2, 2)
    hashes = {weights_hash(plain), weights_hash(torch.nn.Sequential(plain)), weights_hash(plain.double())}
    with torch.no_grad():
        plain.bias[1] += 1
    assert len(hashes | {weights_hash(plain)}) == 4


# Batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures in two buckets, one of them shown three times."""
    for i in range(4):
        paint(tmp_path / "data" / f"{i}.png", (48, 48), i).with_suffix(".txt").write_text(f"square, {i}, red, round")
    for i in range(2):
        paint(tmp_path / "data" / f"w{i}.png", (96, 48), i).with_suffix(".txt").write_text(f"wide, {i}")
    paint(tmp_path / "data" / "3_often" / "o.png", (40, 40))
    return tmp_path / "data"


def filled(data: TrainingData, folder: Path) -> LatentCache:
    cache = LatentCache(vae(), folder.parent)
    cache.fill(data.views(), progress=False)
    return cache


def test_an_epoch_shows_each_picture_as_often_as_it_should(folder: Path):
    data = dataset(folder, DataConfig(data=folder, train_batch_size=3))
    cache = filled(data, folder)
    assert {bucket: len(p) for bucket, p in data.buckets.items()} == {(48, 48): 7, (64, 32): 2}
    assert data.batches_per_epoch == 3 + 1
    epochs = [[data.batch(n, cache) for n in range(4 * e, 4 * e + 4)] for e in range(2)]
    for epoch in epochs:
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
    assert data.fingerprint == again.fingerprint != other.fingerprint


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


def test_the_prior_class_is_half_and_weighted(folder: Path, tmp_path: Path):
    for i in range(2):
        paint(tmp_path / "class" / f"c{i}.png", seed=10 + i)
    config = DataConfig(data=folder, class_data=tmp_path / "class", class_prompt="a cup", prior_loss_weight=0.25)
    data = dataset(folder, config)
    cache = filled(data, folder)
    assert sum(p.is_prior for p in data.samples) == 9 == sum(not p.is_prior for p in data.samples)
    batches = [data.batch(n, cache) for n in range(data.batches_per_epoch)]
    weights = Counter((b.captions[0] == "a cup", float(b.weights[0])) for b in batches)
    assert weights == {(True, 0.25): 9, (False, 1.0): 9}
    for b in batches:
        assert b.prior.tolist() == [c == "a cup" for c in b.captions]
    for i in range(2, 12):
        paint(tmp_path / "class" / f"c{i}.png", seed=10 + i)
    shown = Counter((p.is_prior, p.digest) for p in dataset(folder, config).samples)
    assert Counter({k: v for k, v in shown.items() if k[0]}.values()) == {1: 12}  # none of the prior's is left out
    assert sum(v for k, v in shown.items() if not k[0]) == 12


def test_without_buckets_all_is_square(folder: Path):
    assert set(dataset(folder, DataConfig(data=folder, aspect_buckets=False)).buckets) == {(48, 48)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout: expected a share"),
        ({"train_batch_size": 0}, "train_batch_size: expected at least 1"),
        ({"random_crops": -1}, "random_crops: expected at least 0"),
        ({"class_prompt": "x"}, "expected a class_data"),
        ({"num_class_images": 3, "class_data": Path("x")}, "expected a class_prompt"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig(data=Path("x"), **wrong)


def test_the_fingerprint_sees_what_changes_batches(folder: Path):
    config = DataConfig(data=folder)
    prints = {dataset(folder, c).fingerprint for c in (config, replace(config, caption_dropout=0.1))}
    prints.add(dataset(folder, config, resolution=64).fingerprint)
    (folder / "0.txt").write_text("new")
    prints.add(dataset(folder, config).fingerprint)
    paint(folder / "1.png", seed=99)
    prints.add(dataset(folder, config).fingerprint)
    assert len(prints) == 5
    moved = folder.parent / "moved"
    folder.rename(moved)
    assert dataset(moved, replace(config, data=moved, cache_dir=Path("x"))).fingerprint in prints
