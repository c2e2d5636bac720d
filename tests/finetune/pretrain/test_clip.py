"""The contrastive loss, and the scenes and batches that it is taken on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.pretrain.clip import (
    BATCH,
    PAIRS,
    SIZES,
    TEST_SEED,
    Batch,
    ContrastiveLoss,
    Retrieval,
    Text,
    binding,
    build,
    contrast,
    distinct_scenes,
    draw_batch,
    embed_images,
    embed_text,
    load_text_encoder,
    retrieval,
    retrieval_among,
    share,
    tokenize,
    write_towers,
    zero_shot,
)
from finetune.pretrain.evaluate import reconstruct_clip
from finetune.pretrain.own_pictures import OwnPictures
from finetune.pretrain.world.captions import WRONG, captions, wrong_captions
from finetune.pretrain.world.pictures import SIZE, Pictures
from finetune.pretrain.world.scenes import Scenes, equivalent_key, sample_scenes, siblings
from sdkit.checkpoints.loading import MODELS
from sdkit.prompts.tokenizer import load_tokenizer
from tests.finetune.toy import environment

ROOT = Path(__file__).parents[3]


def test_contrast_is_smallest_where_pairs_match() -> None:
    unit = F.normalize(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    right, wrong = contrast(unit, unit, scale), contrast(unit, unit.roll(1, 0), scale)
    assert right < 0.1 < wrong
    logits = scale.exp() * unit @ unit.T
    assert right == pytest.approx((logits.logsumexp(1) - logits.diag()).mean().item(), rel=1e-5)


def test_wrong_captions_are_told_from_the_picture_and_match_none() -> None:
    unit = F.normalize(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(1.0, dtype=torch.float64)
    logits = scale.exp() * unit @ torch.cat([unit, -unit[:3]]).T
    of_images = (logits.logsumexp(1) - logits[:, :6].diag()).mean()
    of_texts = (logits[:, :6].logsumexp(0) - logits[:, :6].diag()).mean()
    found = contrast(unit, torch.cat([unit, -unit[:3]]), scale)
    assert found == pytest.approx(float(of_images + of_texts) / 2, rel=1e-6)
    assert contrast(unit, torch.cat([unit, unit[:3]]), scale) > found > contrast(unit, unit, scale)


def test_distinct_scenes_are_distinct() -> None:
    scenes = distinct_scenes(64, 3)
    assert len(scenes) == 64 == len(set(equivalent_key(scenes)))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """200 scenes, of which 40 have siblings; each picture is of one colour, the scene's number."""
    base = sample_scenes(200, 1)
    scenes = Scenes.cat([base, siblings(base[torch.arange(40)], 1)])
    numbers = torch.arange(240, dtype=torch.uint8)[:, None, None, None]
    return Pictures(numbers.expand(-1, 3, SIZE, SIZE).contiguous(), scenes, 40, torch.empty(240, 0))


def test_pairs_stand_beside_each_other_in_the_later_part(pictures: Pictures) -> None:
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")

    def drawn(pairs: bool) -> torch.Tensor:
        pixels, ids, sizes = draw_batch(pictures, tokenizer, pairs, 3)
        assert sizes == (len(pixels), len(ids))
        assert len(pixels) == BATCH and len(ids) == (2 * BATCH if pairs else BATCH)  # each has a wrong one too
        return ((pixels[:, 0, 0, 0] + 1) * 127.5).round().long()

    assert drawn(False).max() < 200
    later = drawn(True)
    assert torch.equal(later[:PAIRS] + 200, later[PAIRS : 2 * PAIRS]) and later[:PAIRS].unique().numel() == PAIRS


def test_the_loss_reaches_both_towers(pictures: Pictures) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    loss = ContrastiveLoss(build(tokenizer))
    pixels, ids, (_, texts) = draw_batch(pictures, tokenizer, True, 0)
    loss(Batch(pixels[:8], ids, (8, texts))).backward()
    for name, p in loss.named_parameters():
        moved = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert moved == (name != "model.text_projection.weight") or "k_proj.bias" in name, name


def test_of_few_own_pictures_none_is_drawn_twice() -> None:
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    numbers = torch.arange(90, dtype=torch.uint8)[:, None, None, None]
    own = OwnPictures(numbers.expand(-1, 3, 8, 8).contiguous(), ["a red cube"] * 90)
    pixels, ids, _ = draw_batch(own, tokenizer, True, 3)
    assert len(pixels) == len(ids) == 90 == pixels[:, 0, 0, 0].unique().numel()


def test_two_processes_share_the_rows_and_the_last_fills_up() -> None:
    batch = Batch(torch.arange(5.0)[:, None], torch.arange(7)[:, None], (5, 7))
    parts = [share(batch, process, 2) for process in range(2)]
    assert [part.pixels.flatten().tolist() for part in parts] == [[0, 2, 4], [1, 3, 4]]
    assert [part.ids.flatten().tolist() for part in parts] == [[0, 2, 4, 6], [1, 3, 5, 6]]
    assert all(part.sizes == (5, 7) for part in parts)


TOGETHER = """
import sys
from pathlib import Path
import torch
from finetune.pretrain.clip import Batch, ContrastiveLoss, build, share
from finetune.pretrain.recipe import Recipe, is_main_process, train_on_the_cpu
from sdkit.checkpoints.loading import MODELS
from sdkit.prompts.tokenizer import load_tokenizer

def batch(step):
    g = torch.Generator().manual_seed(step)
    ids = torch.cat([torch.randint(1, 300, (9, 5), generator=g), torch.full((9, 1), end)], 1)
    return Batch(torch.randn(7, 3, 16, 16, generator=g), ids, (7, 9))

tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
end = tokenizer.eos_token_id
torch.manual_seed(0)
model = build(tokenizer, 16)
recipe = Recipe(max_train_steps=5, learning_rate=1e-3, lr_warmup_steps=0)
trained = train_on_the_cpu(ContrastiveLoss(model), batch, recipe, Path(sys.argv[1]), share)
if is_main_process():
    rows = [(row.loss, row.grad_norm) for row in trained.history.rows]
    torch.save({"weights": model.state_dict(), "rows": rows}, Path(sys.argv[1]) / "end.pt")
"""


@pytest.mark.slow
def test_two_processes_contrast_all_rows_as_one_does(tmp_path: Path) -> None:
    """7 pictures and 9 texts, which two cannot share evenly: losses, norms of gradients and weights of five steps."""
    (tmp_path / "program.py").write_text(TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    ways = {"one": [sys.executable], "two": [*launch, "--rdzv-endpoint", "localhost:0"]}
    in_float32 = environment(ACCELERATE_USE_CPU="true", ONEDNN_MAX_CPU_ISA="AVX2")
    ends = {}
    for name, way in ways.items():
        (tmp_path / name).mkdir()
        command = [*way, str(tmp_path / "program.py"), str(tmp_path / name)]
        subprocess.run(command, cwd=ROOT, env=in_float32, check=True, timeout=300)
        ends[name] = torch.load(tmp_path / name / "end.pt", weights_only=True)
    for own, alone in zip(ends["two"]["rows"], ends["one"]["rows"], strict=True):  # Adam would not mind a factor
        assert own == pytest.approx(alone, rel=1e-3)
    for name, value in ends["one"]["weights"].items():
        if "k_proj.bias" not in name:  # its gradient is rounding alone
            assert (ends["two"]["weights"][name] - value).abs().max() < 3e-4, name


def test_retrieval_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions both lie nearest to the first picture, whose own is the first; the second picture has its own."""
    text = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.4]]), dim=-1)
    image = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]), dim=-1)
    monkeypatch.setattr("finetune.pretrain.clip.embed_text", lambda *_: text)
    monkeypatch.setattr("finetune.pretrain.clip.embed_images", lambda *_: image)
    monkeypatch.setattr("finetune.pretrain.clip.tokenize", lambda *_: None)
    model: Any = type("Towers", (), {"text_model": None})
    assert retrieval_among(model, model, torch.zeros(2), ["a", "b"]) == Retrieval(picture=0.5, caption=1.0)


def test_the_shipped_towers_find_and_name() -> None:
    towers = reconstruct_clip(MODELS / "tabletop")
    found = retrieval(*towers, rounds=1)
    assert min(found) > 0.8 and 0.3 < zero_shot(*towers, count=64) <= 1


def test_binding_is_told_by_the_nearer_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts lie nearer to every picture the fewer letters they have; pictures are all alike."""
    monkeypatch.setattr("finetune.pretrain.clip.embed_images", lambda _, x: torch.ones(len(x), 1))
    monkeypatch.setattr("finetune.pretrain.clip.tokenize", lambda _, texts: texts)
    monkeypatch.setattr(
        "finetune.pretrain.clip.embed_text", lambda _, texts: torch.tensor([[-float(len(text))] for text in texts])
    )
    model: Any = type("Towers", (), {"text_model": None})
    scenes = sample_scenes(64, TEST_SEED, counts=(0.0, 1.0, 0.0), held_out="include")
    right, found = captions(scenes, TEST_SEED), binding(model, model, count=64)
    for kind in WRONG:
        pairs = [(a, b) for a, b in zip(right, wrong_captions(scenes, TEST_SEED, [kind]), strict=True) if b]
        assert pairs and found[kind] == pytest.approx(sum(len(a) < len(b) for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("text", list(Text))
def test_the_layers_that_condition_pictures_are_written(text: Text, tmp_path: Path) -> None:
    """The small encoder whole; of the larger one, all layers but the last, and its last norm, as OpenCLIP's is used."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    model = build(tokenizer, 64, text).eval()
    write_towers(model, tmp_path, text)
    encoder = load_text_encoder(tmp_path)
    size = SIZES[text]
    assert encoder.config.num_hidden_layers == size.used and encoder.config.hidden_size == size.width

    ids = tokenize(tokenizer, ["a red sphere"])
    tower: Any = model.text_model
    with torch.no_grad():
        states = tower(input_ids=ids, output_hidden_states=True).hidden_states
        expected = tower.final_layer_norm(states[size.used])
        torch.testing.assert_close(encoder(input_ids=ids).last_hidden_state, expected, rtol=1e-2, atol=2e-2)
        assert embed_text(tower, ids).shape == embed_images(model, torch.zeros(1, 3, 64, 64)).shape == (1, size.width)
