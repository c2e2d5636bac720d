"""Training a word's vectors: gradients against diffusers' way of it, a widened embedding table; the script."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from finetune.data.batches import Batch
from finetune.data.cache import weights_hash
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig, draw_noise
from finetune.seeds import seeded
from finetune.textual_inversion import LearnedWord, initial_vectors, vocabulary_norm
from finetune.train_textual_inversion import (
    InversionModel,
    InversionTraining,
    WordOptions,
    app,
    fill_templates,
    learned_word,
)
from finetune.training.config import TrainConfig
from finetune.training.loop import make_accelerator, train
from finetune.training.states import load_state, saved_states
from sdkit import StableDiffusion
from sdkit.checkpoints.textual_inversion import load_textual_inversion
from sdkit.errors import ConfigError
from tests.conftest import draw, read_image, relative_error
from tests.finetune import tiny, toy
from tests.finetune.commands import call, flag

TOKEN = "<zorb>"
CAPTIONS = ["a red <zorb>, on a table", "two <zorb> <ZORB>", "the <zorb>"]
QUICK = ("--max-train-steps", 3, "--num-inference-steps", 2, "--logging-steps", 1)
NEW = ("--token", TOKEN, "--init", "torus")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures, one of them with a caption."""
    (tmp_path / "data").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "red.txt").write_text("a red <zorb>")
    return tmp_path / "data"


def batch(captions: Sequence[str] = CAPTIONS, seed: int = 0) -> Batch:
    """Latents, and the same noise at every call."""
    latents = draw("latents", (len(captions), 4, 8, 8)).float()
    generators = [seeded(seed, i) for i in range(len(captions))]
    return Batch(
        latents, list(captions), torch.ones(len(captions)), torch.zeros(len(captions), dtype=torch.bool), generators
    )


def word_for(sd: StableDiffusion, count: int = 2, max_norm: float | None = None) -> LearnedWord:
    return learned_word(sd, WordOptions(TOKEN, "torus", count, max_norm), clip_skip=0)


def hashes(sd: StableDiffusion) -> list[str]:
    return [weights_hash(part) for part in (sd.unet, sd.vae, sd.text_encoder)]


# The word


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_the_loss_and_its_gradient_are_those_of_new_rows_of_the_embedding_table(clip_skip: int):
    """diffusers' way: tokens are added to the tokenizer, rows to the table, and the rows are trained."""
    sd, pipe = tiny.model(), tiny.pipeline()
    word = learned_word(sd, replace(WordOptions(TOKEN, "torus"), vectors=2), clip_skip)
    word.vectors.data += draw("moved", tuple(word.vectors.shape)).float()
    loss = DiffusionLoss(sd.unet, word, sd.schedule, LossConfig())(batch())
    loss.backward()

    names = ["<zorb-0>", "<zorb-1>"]
    pipe.tokenizer.add_tokens(names)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    new = pipe.tokenizer.convert_tokens_to_ids(names)
    table.data[new] = word.vectors.detach()
    wide = [caption.lower().replace(TOKEN, " ".join(names)) for caption in CAPTIONS]
    ids = pipe.tokenizer(wide, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    context = pipe.text_encoder.final_layer_norm(states[-1 - clip_skip])
    shown = batch()
    t, noise = draw_noise(shown.latents.shape, shown.generators, 1000)
    scheduler: Any = diffusers.DDPMScheduler(**tiny.SCHEDULE)
    theirs = pipe.unet(scheduler.add_noise(shown.latents, noise, t), t, context).sample
    expected = torch.nn.functional.mse_loss(theirs, noise)
    (gradient,) = torch.autograd.grad(expected, table)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert word.vectors.grad is not None and relative_error(word.vectors.grad, gradient[new]) < 1e-4


def test_only_the_vectors_train_and_every_weight_stays_to_the_bit(tmp_path: Path):
    sd = tiny.model()
    before = hashes(sd)
    word = word_for(sd)
    first = word.vectors.detach().clone()
    loss = DiffusionLoss(sd.unet, word, sd.schedule, LossConfig())
    assert [name for name, p in loss.named_parameters() if p.requires_grad] == ["context.vectors"]
    config = TrainConfig(max_train_steps=25, learning_rate=0.1, mixed_precision="no")
    history = train(make_accelerator(config), loss, lambda n: batch(), config, tmp_path).history  # one batch
    losses = [row.loss for row in history.rows]
    assert losses[-1] < 0.97 * losses[0] and losses[-1] == min(losses[0], *losses[-3:])
    assert hashes(sd) == before and not sd.text_encoder.training
    assert all(p.grad is None for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters())
    assert not (word.vectors == first).any()
    assert torch.equal(word.inversion().vectors, word.vectors) and word.inversion().token == TOKEN


def test_vectors_begin_as_words():
    sd = StableDiffusion.from_pretrained("tabletop")
    table = sd.text_encoder.get_input_embeddings().weight.detach()

    def rows(word: str) -> Tensor:
        return table[sd.tokenizer(word, add_special_tokens=False).input_ids]

    def begin(words: str, count: int) -> Tensor:
        return initial_vectors(sd.tokenizer, sd.text_encoder, words, count)

    red, cone, zorb = rows("red")[0], rows("cone")[0], rows("zorb")
    assert len(zorb) == 3  # in pieces
    assert torch.equal(begin("cone", 1), cone[None]) and torch.equal(begin("Cone", 3), cone.expand(3, -1))
    assert torch.equal(begin("red cone", 2), torch.stack([red, cone]))
    assert relative_error(begin("red cone", 1), (red + cone)[None] / 2) < 1e-6
    assert relative_error(begin("red cone", 3), ((red + cone) / 2).expand(3, -1)) < 1e-6
    assert relative_error(begin("zorb cone", 2), torch.stack([zorb.mean(0), cone])) < 1e-6
    assert vocabulary_norm(sd.text_encoder) == pytest.approx(table.square().sum(1).sqrt().mean().item(), rel=1e-6)
    with pytest.raises(ConfigError, match="vectors: expected a whole number of at least 1, found 0"):
        begin("cone", 0)
    with pytest.raises(ConfigError, match="init: expected words that are like"):
        begin("  ", 1)


def test_no_vector_is_longer_than_the_limit_and_none_is_moved_by_it_otherwise():
    sd = tiny.model()
    mean = vocabulary_norm(sd.text_encoder)
    word = word_for(sd, max_norm=1.5)
    short, long = word.vectors.detach()[0] * 0.9 * 1.5 * mean / word.vectors[0].norm(), word.vectors.detach()[1] * 50
    word.vectors.data = torch.stack([short, long]).detach()
    found = word.inversion().vectors
    assert torch.equal(found[0], short)
    assert relative_error(found[1], long * 1.5 * mean / long.norm()) < 1e-6
    free = LearnedWord(TOKEN, found, sd.tokenizer, sd.text_encoder)
    assert relative_error(word(CAPTIONS), free(CAPTIONS)) < 1e-5  # captions get what is written
    (gradient,) = torch.autograd.grad(word(CAPTIONS).square().sum(), word.vectors)
    along, all_of_it = gradient[1] @ long / long.norm(), gradient[1].norm()
    assert all_of_it > 0 and abs(along) < 1e-4 * all_of_it  # it turns, and can't grow


@pytest.mark.parametrize("token", ["", " <zorb>", "(zorb)", "zo[rb", "BREAK", "<lora:zorb:1>", "zo\\rb"])
def test_tokens_that_prompts_would_not_read_as_they_are(token: str):
    with pytest.raises(ConfigError, match=r"token: expected a word without a meaning of its own|expected <lora"):
        WordOptions(token, "torus")


def test_a_caption_that_is_the_token_alone_is_put_into_templates():
    options = WordOptions(TOKEN, "torus", templates=("a {}", "the {}, here"))
    captions = [TOKEN] * 40 + ["a red <zorb>"]
    found, again = (fill_templates(batch(captions), options).captions for _ in range(2))
    assert found == again and found[-1] == "a red <zorb>" and set(found[:-1]) == {"a <zorb>", "the <zorb>, here"}
    assert fill_templates(batch(captions, seed=1), options).captions != found


def test_vectors_train_in_float32_under_an_encoder_in_bfloat16():
    sd = tiny.model()
    sd.text_encoder.bfloat16()
    word = word_for(sd)
    states = word(CAPTIONS)
    states.float().square().sum().backward()
    assert states.dtype == torch.bfloat16 and word.inversion().vectors.dtype == torch.float32
    assert word.vectors.grad is not None and word.vectors.grad.dtype == torch.float32
    assert float(word.vectors.grad.norm()) > 0


# The script


def test_a_folder_of_pictures_becomes_a_word(pictures: Path, tmp_path: Path):
    output = tmp_path / "run"
    printed = call(
        (
            "--data",
            pictures,
            "--output",
            output,
            *NEW,
            "--vectors",
            2,
            *QUICK,
            "--learning-rate",
            0.05,
            "--train-batch-size",
            2,
            "--checkpointing-steps",
            2,
            "--gradient-checkpointing",
            "--ema-decay",
            0.5,
            "--validation-prompt",
            "a blue <zorb>",
            "--max-norm",
            1,
        ),
        app,
    )
    assert "<zorb>, 2 vector(s) that begin as 'torus'" in printed and "256 parameters in 1 tensors" in printed
    assert "activations" in printed
    for name in ("report.md", "loss.png", "losses.csv", "config.toml", "checkpoint-2/zorb.pt"):
        assert (output / name).is_file(), name
    before, after = (read_image(output / f"samples/step-{n:06d}.png").tobytes() for n in (0, 3))
    assert before != after
    sd = StableDiffusion.from_pretrained("tabletop")
    mean = vocabulary_norm(sd.text_encoder)
    average = load_state(saved_states(output)[-1])["average"]["context.vectors"]
    expected = average * (mean / average.norm(dim=1, keepdim=True)).clamp(max=1)
    assert float(average.norm(dim=1).min()) > mean  # so the limit is at work
    for file in ("zorb.safetensors", "zorb.pt"):
        found = load_textual_inversion(output / file, width=128)
        assert found.token == TOKEN and torch.equal(found.vectors, expected)
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "latent", "progress": False}
    sd.words = None  # that it does not know this one is no news
    pieces = sd.text_to_image("a <zorb>", **arguments).latents
    assert sd.load_textual_inversion(output / "zorb.safetensors") == TOKEN
    learned = sd.text_to_image("a <zorb>", **arguments).latents
    assert not torch.allclose(learned, pieces, atol=1e-3)


def test_the_written_config_makes_the_run_again_and_a_stopped_run_goes_on_exactly(pictures: Path, tmp_path: Path):
    options = (
        "--data",
        pictures,
        *NEW,
        "--vectors",
        2,
        "--max-train-steps",
        3,
        "--logging-steps",
        1,
        "--num-validation-images",
        0,
        "--ema-decay",
        0.5,
        "--learning-rate",
        0.01,
        "--max-norm",
        2,
        "--clip-skip",
        1,
        "--templates",
        "a {}",
        "--templates",
        "the {}",
    )
    call((*options, "--output", tmp_path / "a"), app)
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--max-train-steps", 2), app)
    toy.forget_accelerate()
    other = ("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b", "--init", "cone")
    assert "of a run with init 'torus', now 'cone'" in call(other, app, status=1)
    toy.forget_accelerate()
    call(("--config", tmp_path / "a" / "config.toml", "--output", tmp_path / "b"), app)  # goes on for one step
    a, b = (load_file(tmp_path / run / "zorb.safetensors") for run in "ab")
    assert a.keys() == b.keys() == {TOKEN} and torch.equal(a[TOKEN], b[TOKEN])
    assert not (tmp_path / "a" / "samples").exists()


def test_mistakes_and_help(pictures: Path, tmp_path: Path):
    run = ("--data", pictures, "--output", tmp_path / "run", *NEW)
    assert "max_norm: expected a finite number above 0, found 0" in call((*run, "--max-norm", 0), app, status=1)
    assert "templates: expected {} once in each of one or more, found ['a']" in call(
        (*run, "--templates", "a"), app, status=1
    )
    assert "class_data: expected none" in call((*run, "--class-data", pictures), app, status=1)
    assert "caption_dropout: expected 0" in call((*run, "--caption-dropout", 0.1), app, status=1)
    assert "expected '<toy>' in each, found 'a red <zorb>'" in call((*run, "--token", "<toy>"), app, status=1)
    assert "found 'a cat'" in call((*run, "--instance-prompt", "a cat"), app, status=1)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for f in [f for kind in (InversionModel, WordOptions, InversionTraining) for f in fields(kind)]:
        assert flag(f) in shown, f.name


def test_files_are_named_after_the_token():
    assert WordOptions("<cat-toy>", "cat").files == ("cat-toy.safetensors", "cat-toy.pt")
    assert (
        WordOptions("a/b c", "cat").files[0] == "abc.safetensors" and WordOptions("*", "cat").files[1] == "embedding.pt"
    )
