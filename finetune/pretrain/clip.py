"""Train the text encoder by contrast with pictures (CLIP, arXiv 2103.00020): ``python -m finetune.pretrain.clip``, on
tabletop pictures or on your own with their captions.

A small byte-pair vocabulary is learned from captions and saved as a CLIP tokenizer. In the later part, half of each
batch are pairs of scenes that differ in one thing, and each picture is told from its own caption with colours or sides
exchanged (as in NegCLIP, arXiv 2210.01936), so that it takes who is which colour and who stands where. The text
projection is the identity: the text's embedding is the final hidden state at its end token.

There are two text encoders, as in Stable Diffusion 1 and 2: a small one, whose last layer conditions pictures, and a
larger one, as OpenCLIP's, whose last but one does.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from finetune.pretrain.gathering import gathered, rows_of
from finetune.pretrain.own_pictures import OwnPictures, TrainingPictures, image_folder
from finetune.pretrain.recipe import Recipe, autocast, is_main_process, main_process_first, train_on_the_cpu
from finetune.pretrain.world.captions import WRONG, captions, single_prompt, wrong_captions
from finetune.pretrain.world.pictures import SCENES, SCENES_HELP, SIZE, Pictures, training_pictures
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, equivalent_key, sample_scenes
from finetune.seeds import step_generator
from sdkit.checkpoints.components import text_config
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.files import read_json, write_json, write_text
from sdkit.networks.text_encoder import build_text_encoder, load_text_state, pooled, text_state_dict
from sdkit.prompts.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

LENGTH = 77
PATCHES = 8  # in a row of the picture, whatever its size
MERGES = 400
BATCH, PAIRS = 128, 32
RUN = 5  # number of the run, for `step_generator`
EASY = 0.2  # share of the steps without pairs: from the start they make both towers collapse
TEST_SEED = 1_000_001
RESULTS = "results.json"
START, END = "<|startoftext|>", "<|endoftext|>"


class Text(StrEnum):
    """A text encoder."""

    v1 = "v1"
    v2 = "v2"


class Size(NamedTuple):
    """A text encoder's size. ``used``: of its layers, those up to the one that conditions pictures."""

    width: int
    heads: int
    layers: int
    used: int
    activation: str


SIZES = {Text.v1: Size(128, 4, 3, 3, "quick_gelu"), Text.v2: Size(192, 6, 6, 5, "gelu")}
VISION = Size(128, 4, 3, 3, "quick_gelu")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Learn a byte-pair vocabulary (512 byte symbols, MERGES merges, 2 marks) and save a CLIP tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    symbols = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(texts, trainer)
    learned = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:MERGES]

    names = sorted(symbols) + [s + "</w>" for s in sorted(symbols)] + ["".join(m) for m in learned] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps({name: i for i, name in enumerate(dict.fromkeys(names))}))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, learned)]) + "\n")

    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    write_json(folder / "tokenizer_config.json", config)
    marks = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", marks)  # the last: it says that the others are there


def build(tokenizer: CLIPTokenizer, size: int = SIZE, text: Text = Text.v1) -> CLIPModel:
    """transformers' CLIPModel for the vocabulary and pictures of ``size``, text projection fixed to the identity."""
    from transformers import CLIPConfig, CLIPModel

    end, width = tokenizer.convert_tokens_to_ids(END), SIZES[text].width
    marks = {"bos_token_id": tokenizer.convert_tokens_to_ids(START), "eos_token_id": end, "pad_token_id": end}
    places = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    patches = {"image_size": size, "patch_size": size // PATCHES}

    def config(size: Size) -> dict[str, Any]:
        return {
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "hidden_act": size.activation,
            "projection_dim": width,
        }

    towers: dict[str, Any] = {
        "text_config": config(SIZES[text]) | marks | places,
        "vision_config": config(VISION) | patches,
    }
    model = CLIPModel(CLIPConfig(**towers, projection_dim=width))
    nn.init.eye_(model.text_projection.weight)
    model.text_projection.requires_grad_(False)
    return model


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder that ``main`` left in ``folder``."""
    encoder = build_text_encoder(read_json(folder / "text_encoder.json"))
    load_text_state(encoder, read_state(folder / "text_encoder.safetensors")[0])
    return encoder


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int | None = None) -> Tensor:
    """Token ids [B, N], padded with the end token to ``length`` or to the longest text, cut where they are more than
    that or than LENGTH."""
    padding = "longest" if length is None else "max_length"
    return tokenizer(
        texts, padding=padding, max_length=length or LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def embed_text(text_model: nn.Module, ids: Tensor) -> Tensor:
    """Unit embeddings [B, D] of token ids [B, N]."""
    hidden = text_model(input_ids=ids).last_hidden_state
    return F.normalize(pooled(hidden, ids, int(ids[0, -1])).float(), dim=-1)


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit embeddings [B, D] of pictures in [-1, 1]."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).float(), dim=-1)


def contrast(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross entropy of matching row i of ``image`` [B, D] with row i of ``text`` [B + W, D], all of them
    unit; the last W texts belong to no image."""
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    target = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(image)].T, target))


class Batch(NamedTuple):
    """Pictures [B, 3, H, W] and token ids [B + W, N]: row i belongs to row i, the last W rows to none. ``sizes`` are B
    and B + W, also where this is one process's part of them."""

    pixels: Tensor
    ids: Tensor
    sizes: tuple[int, int]


def share(batch: Batch, process: int, processes: int) -> Batch:
    """The rows that one of several processes embeds."""
    pixels, ids = (rows_of(rows, process, processes) for rows in batch[:2])
    return Batch(pixels, ids, batch.sizes)


class ContrastiveLoss(nn.Module):
    """forward(batch) -> the loss of both towers, over the rows of all processes."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: Batch) -> Tensor:
        with autocast():
            image, text = embed_images(self.model, batch.pixels), embed_text(self.model.text_model, batch.ids)
        pictures, texts = batch.sizes
        return contrast(gathered(image, pictures), gathered(text, texts), self.model.logit_scale)


def draw_batch(pictures: TrainingPictures, tokenizer: CLIPTokenizer, pairs: bool, step: int) -> Batch:
    """Pictures and the token ids of their captions; under ``pairs``, where there are such, half of the pictures differ
    in one thing from another, and wrong captions follow the right ones."""
    rng, singles = step_generator(RUN, step), len(pictures) - pictures.pairs
    if singles < 2 * BATCH:  # of few, none is drawn twice: it would have to be told from itself
        index = torch.randperm(singles, generator=rng)[:BATCH]
    else:
        index = torch.randint(singles, (BATCH,), generator=rng)
    if pairs and pictures.pairs:
        pair = torch.randperm(pictures.pairs, generator=rng)[:PAIRS]
        index[: 2 * PAIRS] = torch.cat([pair, pair + len(pictures) - pictures.pairs])

    seed = int(torch.randint(2**31, (), generator=rng))
    texts = pictures.captions(index, seed)
    if pairs and isinstance(pictures, Pictures):
        texts += [text for text in wrong_captions(pictures.scenes[index], seed) if text]
    return Batch(pictures.pixels(index), tokenize(tokenizer, texts), (len(index), len(texts)))


# How well the towers fit


class Retrieval(NamedTuple):
    """How often the nearest one is right, from 0 to 1: the picture to a caption, and the caption to a picture."""

    picture: float
    caption: float


@torch.no_grad()
def retrieval_among(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, texts: list[str]) -> Retrieval:
    """Retrieval among pictures [N, 3, S, S] in [-1, 1] and their captions, both ways."""
    likeness = embed_text(model.text_model, tokenize(tokenizer, texts)) @ embed_images(model, pixels).T
    right = torch.arange(len(texts))
    return Retrieval(*((likeness.argmax(axis) == right).float().mean().item() for axis in (1, 0)))


def distinct_scenes(count: int, seed: int) -> Scenes:
    """``count`` scenes no two of which have the same objects and table."""
    pool = sample_scenes(4 * count, seed, held_out="include")
    first: dict[object, int] = {}
    for i, key in enumerate(equivalent_key(pool)):
        first.setdefault(key, i)
    return pool[torch.tensor(list(first.values())[:count])]


def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, rounds: int = 8, count: int = 64, size: int = SIZE
) -> Retrieval:
    """The mean over rounds of `retrieval_among` ``count`` distinct scenes with full captions."""
    each: list[Retrieval] = []
    for k in range(rounds):
        scenes = distinct_scenes(count, TEST_SEED + k)
        pixels = render(scenes, size).images * 2 - 1
        each.append(retrieval_among(model, tokenizer, pixels, captions(scenes, TEST_SEED + k, full=True)))
    return Retrieval(*(sum(values) / rounds for values in zip(*each, strict=True)))


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, count: int = 256, size: int = SIZE) -> float:
    """How often a picture of one object is nearest to its own name, "a red sphere", among all colours and shapes."""
    names = [(color, shape) for color in COLORS for shape in SHAPES]
    scenes = sample_scenes(count, TEST_SEED, counts=(1.0, 0.0, 0.0), held_out="include")
    images = embed_images(model, render(scenes, size).images * 2 - 1)
    texts = embed_text(model.text_model, tokenize(tokenizer, [single_prompt(*name) for name in names]))
    right = scenes.color[:, 0] * len(SHAPES) + scenes.shape[:, 0]
    return ((images @ texts.T).argmax(1) == right).float().mean().item()


@torch.no_grad()
def binding(model: CLIPModel, tokenizer: CLIPTokenizer, count: int = 512, size: int = SIZE) -> dict[str, float]:
    """How often a picture of two objects is nearer to its caption than to the same with one kind of thing wrong (see
    `finetune.pretrain.world.captions.wrong_captions`; chance: 0.5)."""
    scenes = sample_scenes(count, TEST_SEED, counts=(0.0, 1.0, 0.0), held_out="include")
    pixels = render(scenes, size).images * 2 - 1
    image = torch.cat([embed_images(model, part) for part in pixels.split(64)])

    def likeness(texts: list[str]) -> Tensor:
        parts = [texts[start : start + 64] for start in range(0, count, 64)]
        return (image * torch.cat([embed_text(model.text_model, tokenize(tokenizer, part)) for part in parts])).sum(1)

    shares: dict[str, float] = {}
    right = likeness(captions(scenes, TEST_SEED))
    for kind in WRONG:
        wrong = wrong_captions(scenes, TEST_SEED, [kind])
        there = torch.tensor([bool(text) for text in wrong])
        shares[kind] = (right > likeness(wrong))[there].float().mean().item()
    return shares


def of_towers(model: CLIPModel, tokenizer: CLIPTokenizer, size: int = SIZE) -> dict[str, float]:
    """How well tabletop pictures and captions find each other, in per cent."""
    found = retrieval(model, tokenizer, size=size)
    figures = {
        "picture nearest to its caption among 64": found.picture,
        "caption nearest to its picture among 64": found.caption,
        f"one object named among {len(COLORS) * len(SHAPES)}": zero_shot(model, tokenizer, size=size),
    }
    figures |= {
        f"told from the caption with wrong {kind}": share
        for kind, share in binding(model, tokenizer, size=size).items()
    }
    return {name: 100 * value for name, value in figures.items()}


def of_own(model: CLIPModel, tokenizer: CLIPTokenizer, unseen: OwnPictures) -> dict[str, float]:
    """The same of the pictures of a folder that were held back."""
    found = retrieval_among(model, tokenizer, unseen.pixels(torch.arange(len(unseen))), unseen.texts)
    return {
        f"picture nearest to its caption among {len(unseen)}": 100 * found.picture,
        f"caption nearest to its picture among {len(unseen)}": 100 * found.caption,
    }


def write_towers(model: CLIPModel, folder: Path, text: Text = Text.v1) -> None:
    """Write the text encoder for `load_text_encoder`, without the layers that no picture sees, and ``image_encoder/``
    as transformers reads it."""
    from transformers import CLIPVisionModelWithProjection

    unused = tuple(f"text_model.encoder.layers.{layer}." for layer in range(SIZES[text].used, SIZES[text].layers))
    state = {name: value for name, value in text_state_dict(model.text_model).items() if not name.startswith(unused)}
    write_state(state, folder / "text_encoder.safetensors", torch.float16)
    write_json(folder / "text_encoder.json", text_config(model.text_model) | {"num_hidden_layers": SIZES[text].used})

    vision = CLIPVisionModelWithProjection(model.vision_model.config)
    vision.vision_model.load_state_dict(model.vision_model.state_dict())
    vision.visual_projection.load_state_dict(model.visual_projection.state_dict())
    vision.half().save_pretrained(folder / "image_encoder")


def main(
    work: Annotated[Path, typer.Option(help="Rendered pictures, checkpoints, results.")] = Path("build/tabletop"),
    data: Annotated[Path | None, typer.Option(help="A folder of pictures with captions, not tabletop renders.")] = None,
    scenes: Annotated[int, typer.Option(help=SCENES_HELP, min=64)] = SCENES,
    size: Annotated[int, typer.Option(help="Width and height of the pictures, a multiple of 8.", min=16)] = SIZE,
    text: Annotated[Text, typer.Option(help="The text encoder: small, or larger.")] = Text.v1,
    steps: Annotated[int, typer.Option(help="Training steps of at most 128 pictures.", min=1)] = 2_500,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate; 1e-3 collapses.")] = 3e-4,
) -> None:
    """Train tokenizer, text encoder and image encoder; a killed run goes on where it stopped."""
    if size % PATCHES:
        raise typer.BadParameter(f"--size: expected a multiple of {PATCHES}, the patches in a row, found {size}")
    if data is not None and scenes != SCENES:
        raise typer.BadParameter("--scenes: does nothing with --data")
    torch.manual_seed(0)
    unseen: OwnPictures | None = None
    folder = work / "clip"
    with main_process_first():
        if data is None:
            pictures = training_pictures(work, scenes, scenes // 2, size)
        else:
            pictures, unseen = image_folder(data, size)
        if not (folder / "tokenizer" / "special_tokens_map.json").exists():
            first = torch.arange(min(20_000, len(pictures) - pictures.pairs))
            train_tokenizer(pictures.captions(first, seed=4), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build(tokenizer, size, text)
    if isinstance(pictures, OwnPictures):
        cut = sum(len(ids) > LENGTH for ids in tokenizer(pictures.texts).input_ids)
        if cut:
            print(f"{cut} of {len(pictures)} captions have more than {LENGTH} tokens and are cut")

    recipe = Recipe(
        max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=20, adam_beta2=0.98, decay_from=0.5
    )

    def batches(step: int) -> Batch:
        return draw_batch(pictures, tokenizer, step >= EASY * steps, step)

    train_on_the_cpu(ContrastiveLoss(model), batches, recipe, folder, share)
    if not is_main_process():
        return
    model.eval()
    write_towers(model, folder, text)
    results = of_towers(model, tokenizer, size) if unseen is None else of_own(model, tokenizer, unseen)
    write_json(folder / RESULTS, results)
    for name, value in results.items():
        print(f"{name}: {value:.1f} %")


if __name__ == "__main__":
    typer.run(main)
