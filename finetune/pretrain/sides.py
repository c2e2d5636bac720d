"""Teach a trained noise predictor left from right: ``python -m finetune.pretrain.sides``.

In front and behind a network learns by itself: a table has a near end and a far end. Left and right it does not: in
noise nothing tells them apart, and nothing does in the text encoder's vectors, so that neither has a use for the other.
After 11,000 steps of `noise_predictor` pictures had the sides asked for in half of the cases, which is chance. Here
each is taught what the other one waits for:

1. The text encoder, alone: the vectors of the object that a caption names second say on which side of the first it
   stands. Those of the first cannot, as a token knows only of those before it.
2. Both networks: every scene of two objects has beside it the same scene with their places exchanged, under the same
   noise, so that it is the relation's word alone that tells the two targets apart. At every level of noise the words of
   an object that is named second and stands left or right are to be looked at from that half of the picture, and the
   middle block is to say where in its row a cell is.
3. Both go on with many more ordinary pictures and few pairs. What is taught in a hurry is paid for elsewhere: after
   step 2 exactly one object was in 89 % of pictures, where it had been in 97.5, and the material right in 88, not 95.

What reads the side from the vectors and the place from the middle block are two linear maps, which are dropped. Scenes
in front and behind are among the pairs, too: without them 800 steps made left and right right in 98 % of pictures, and
in front and behind, which had been right in 96 %, in 65 %. And most of a batch are ordinary pictures: where they were 4
of 20, fewer prompts for two objects had both.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import sdkernels
from finetune.pretrain.clip import tokenize
from finetune.pretrain.exchanged_pairs import (
    SIDEWAYS,
    Pairs,
    find_halves,
    first_to_second,
    pair_captions,
    paired_scenes,
    plain_caption,
    render_pairs,
)
from finetune.pretrain.grounding import Places, find_places, grounding_loss, of_samples
from finetune.pretrain.noise_predictor import (
    COUNTS,
    PROMPTS,
    Batch,
    Draws,
    PredictorLoss,
    encoded,
    networks,
    rows_of,
    sample_sheet,
    share,
)
from finetune.pretrain.recipe import Recipe, is_main_process, main_process_first, train_on_the_cpu
from finetune.pretrain.world.captions import OPPOSITE, captions
from finetune.pretrain.world.pictures import SCENES, SCENES_HELP, SIZE, training_pictures
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from finetune.training.averaging import in_place_of
from sdkit.checkpoints import loading
from sdkit.checkpoints.components import Components
from sdkit.files import replacing
from sdkit.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdkit.networks.fusion import Sum

SCENE_SEED, TEXT_SEED, TEST_SEED = 7_000_001, 7_500_001, 7_900_001
TEXT_RUN, RUN = 11, 12  # numbers of the runs, for `step_generator`
TEXT_BATCH = 96
NOISY = 0.55  # part of the schedule from which on the scenes of pairs are noised
KEPT = 1.0  # weight of the text encoder's old vectors
UNSEEN = 200  # scenes of two objects to measure with
SHARPNESS = 2.0  # of the logits of a side


class Mixture(NamedTuple):
    """What a batch holds: ``ordinary`` pictures of the noise predictor's training, ``counts`` of them with one, two and
    three objects, and ``pairs`` of scenes. Then the weights, beside that training's loss, of where the words of the
    second object are looked at, of the side that its vectors say, and of where in its row a cell is."""

    ordinary: int
    pairs: int
    counts: tuple[float, float, float]
    halves: float
    sides: float
    rows: float


TAUGHT = Mixture(20, 5, COUNTS, halves=0.3, sides=0.1, rows=0.05)
KEPT_UP = Mixture(28, 2, (0.5, 0.38, 0.12), halves=0.03, sides=0.0, rows=0.02)


def side_loss(hidden: Tensor, direction: Tensor, halves: Places) -> Tensor:
    """How badly the vectors hidden [B, N, D] of the words of ``halves`` say, along ``direction`` [D], that their object
    stands on the left."""
    logits = SHARPNESS * (hidden[halves.sample, halves.token].float() @ (direction / direction.norm()))
    return F.binary_cross_entropy_with_logits(logits, halves.cover[:, 0, 0]) if len(logits) else logits.sum()


# The text encoder alone


class TextBatch(NamedTuple):
    """Token ids [B, N] of captions, and the words of `find_halves`."""

    ids: Tensor
    halves: Places


class TextLoss(nn.Module):
    """forward(batch) -> `side_loss` + how far the vectors are from what they were."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder
        self.before: Any = copy.deepcopy(text_encoder).requires_grad_(False)
        self.direction = nn.Parameter(torch.randn(text_encoder.config.hidden_size))

    def forward(self, batch: TextBatch) -> Tensor:
        hidden = self.text_encoder(input_ids=batch.ids).last_hidden_state
        with torch.no_grad():
            before = self.before(input_ids=batch.ids).last_hidden_state
        return side_loss(hidden, self.direction, batch.halves) + KEPT * F.mse_loss(hidden, before)


def text_batches(tokenizer: CLIPTokenizer, count: int = 20_000) -> Callable[[int], TextBatch]:
    """A function from a step to its batch: captions of all kinds of scenes, a third of them plain ones of sides."""
    scenes = sample_scenes(count, TEXT_SEED, counts=(0.2, 0.65, 0.15), repeats=0.2)
    sides = first_to_second(scenes)

    def batch(step: int) -> TextBatch:
        rng = step_generator(TEXT_RUN, step)
        index = torch.randint(count, (TEXT_BATCH,), generator=rng)
        drawn = scenes[index]
        texts = captions(drawn, seed=int(torch.randint(2**31, (), generator=rng)))
        for i in range(0, TEXT_BATCH, 3):
            if drawn.count[i] == 2 and sides[int(index[i])] in SIDEWAYS:
                texts[i] = plain_caption(drawn[i : i + 1], sides[int(index[i])])

        two = (drawn.count == 2).nonzero()[:, 0]
        halves = find_halves(tokenizer, [texts[i] for i in two.tolist()], drawn[two])
        return TextBatch(tokenize(tokenizer, texts, None), halves._replace(sample=two[halves.sample]))

    return batch


def share_of_text(batch: TextBatch, process: int, processes: int) -> TextBatch:
    """What one of several processes trains on."""
    own = torch.arange(process, len(batch.ids), processes)
    return TextBatch(batch.ids[own], of_samples(batch.halves, own))


# Both networks


class SidedBatch(NamedTuple):
    """A batch of the noise predictor, the words of `find_halves` in it, and what weighs how much."""

    batch: Batch
    halves: Places
    mixture: Mixture


class SidedLoss(nn.Module):
    """forward(batch) -> the noise predictor's loss + how much the second object's words are looked at from the other
    half + `side_loss` + how badly the middle block says where in its row a cell is."""

    def __init__(self, predictor: PredictorLoss, direction: Tensor) -> None:
        super().__init__()
        self.predictor = predictor
        self.direction = nn.Parameter(direction.clone())
        self.row = nn.Parameter(torch.zeros(predictor.unet.config.block_out_channels[-1]))

    def forward(self, sided: SidedBatch) -> Tensor:
        middle, block = list[Tensor](), self.predictor.unet.mid_block
        assert block is not None

        def keep(module: Any, inputs: Any, out: Sum) -> None:
            middle.append(out.total())

        hook = block.register_forward_hook(keep)
        try:
            found = self.predictor.predict(sided.batch)
        finally:
            hook.remove()

        place = torch.linspace(-1, 1, middle[0].shape[-1]).expand(middle[0].shape[-2:])
        read = torch.einsum("bchw,c->bhw", middle[0].float(), self.row)
        everywhere = torch.ones(len(sided.batch.t))  # at every level of noise
        weights = sided.mixture
        loss = found.loss + weights.halves * grounding_loss(found.probabilities, sided.halves, everywhere)
        loss = loss + weights.sides * side_loss(found.hidden, self.direction, sided.halves)
        return loss + weights.rows * (read - place).square().mean()


@dataclass(frozen=True)
class SidedDraws:
    """The batches of a run: of TAUGHT for its first ``teaching`` steps, then of KEPT_UP. Ordinary pictures come first,
    then scenes of ``pairs``, each beside its exchanged one."""

    ordinary: Draws
    pairs: Pairs
    teaching: int

    def __call__(self, step: int) -> SidedBatch:
        """Step ``step``'s batch."""
        rng, mixture = step_generator(RUN, step), TAUGHT if step < self.teaching else KEPT_UP
        drawn = replace(self.ordinary, counts=mixture.counts)(step)
        ordinary, number = rows_of(drawn, torch.arange(mixture.ordinary)), mixture.pairs

        which = torch.randint(self.pairs.number, (number,), generator=rng)
        index = torch.stack([which, which + self.pairs.number], 1).flatten()
        x0 = self.pairs.latents[index].float()
        noise = torch.randn(number, *x0.shape[1:], generator=rng).repeat_interleave(2, 0)
        even = (torch.randperm(number, generator=rng) + torch.rand(number, generator=rng)) / number
        t = (1000 * (NOISY + (1 - NOISY) * even)).long().clamp(max=999).repeat_interleave(2)

        scenes, tokenizer = self.pairs.scenes[index], self.ordinary.tokenizer
        texts = pair_captions(scenes, seed=int(torch.randint(2**31, (), generator=rng)))
        ids = tokenize(tokenizer, texts, None)
        seen = torch.ones(ids.shape, dtype=torch.bool)
        places = find_places(tokenizer, texts, scenes, self.pairs.cover[index], seen)
        halves = find_halves(tokenizer, texts, scenes)
        batch = joined(ordinary, Batch(x0, noise, t, ids, seen, places))
        return SidedBatch(batch, halves._replace(sample=halves.sample + mixture.ordinary), mixture)


def joined(first: Batch, second: Batch) -> Batch:
    """Both batches as one, with the token ids of the shorter captions padded by their last."""
    length = max(first.ids.shape[1], second.ids.shape[1])

    def longer(batch: Batch) -> Batch:
        more = length - batch.ids.shape[1]
        ids = torch.cat([batch.ids, batch.ids[:, -1:].expand(-1, more)], 1)
        return batch._replace(ids=ids, seen=F.pad(batch.seen, (0, more), value=True))

    first, second = longer(first), longer(second)
    assert first.places is not None and second.places is not None
    moved = second.places._replace(sample=second.places.sample + len(first.t))
    places = Places(*(torch.cat(parts) for parts in zip(first.places, moved, strict=True)))
    x0, noise, t, ids, seen = (torch.cat(parts) for parts in zip(first[:5], second[:5], strict=True))
    return Batch(x0, noise, t, ids, seen, places)


def share_of_sided(sided: SidedBatch, process: int, processes: int) -> SidedBatch:
    """What one of several processes trains on."""
    own = torch.arange(process, len(sided.batch.t), processes)
    return sided._replace(batch=share(sided.batch, process, processes), halves=of_samples(sided.halves, own))


@torch.no_grad()
def told_apart(loss: PredictorLoss, tokenizer: CLIPTokenizer, pairs: Pairs, t: int) -> float:
    """Of how many noised renders the prediction is better with the true relation than with the opposite, in per cent
    (chance: 50)."""
    right = 0
    for index in torch.arange(len(pairs.scenes)).split(50):
        scenes, x0 = pairs.scenes[index], pairs.latents[index].float()
        noise = torch.randn(x0.shape, generator=step_generator(RUN, 0))
        times = torch.full((len(index),), t)
        x_t, target = sdkernels.add_noise(x0, noise, times, loss.alphas, loss.schedule.prediction_type)

        errors: list[Tensor] = []
        for other in (False, True):
            texts = [
                plain_caption(scenes[i : i + 1], OPPOSITE[relation] if other else relation)
                for i, relation in enumerate(first_to_second(scenes))
            ]
            ids = tokenize(tokenizer, texts, loss.text_encoder.config.max_position_embeddings)
            prediction = loss.unet(x_t, times, loss.text_encoder(input_ids=ids).last_hidden_state)
            errors.append((prediction.float() - target).square().mean((1, 2, 3)))
        right += int((errors[0] < errors[1]).sum())
    return 100 * right / len(pairs.scenes)


def main(
    work: Annotated[Path, typer.Option(help="As of the other trainings; with their VAE and CLIP.")] = Path(
        "build/tabletop"
    ),
    init: Annotated[Path | None, typer.Option(help="The model that learns; default: WORK/model.")] = None,
    scenes: Annotated[int, typer.Option(help=SCENES_HELP, min=64)] = SCENES,
    pairs: Annotated[int, typer.Option(help="Scenes of two objects; not all may change places.", min=64)] = 3_000,
    size: Annotated[int, typer.Option(help="Width and height of the pictures.", min=16)] = SIZE,
    text_steps: Annotated[int, typer.Option(help="Steps of the text encoder alone.", min=1)] = 600,
    steps: Annotated[int, typer.Option(help="Then steps of both networks, of 30 pictures.", min=1)] = 800,
    more_steps: Annotated[int, typer.Option(help="And of both, of 32 pictures with few pairs.", min=0)] = 2_400,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of the UNet.")] = 5e-4,
) -> None:
    """Teach it and write the model to WORK/sides/model; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    folder, init = work / "sides", init or work / "model"
    folder.mkdir(parents=True, exist_ok=True)
    model = StableDiffusion.from_pretrained(init, device="cpu", dtype=torch.float32)
    vae, tokenizer = model.vae, model.tokenizer

    # Pictures as latents.
    kept = folder / f"pairs-{pairs}-{size}.pt"
    with main_process_first():
        pictures = training_pictures(work, scenes, scenes // 2, size)
        latents = encoded(vae, pictures, folder)
        if not kept.exists():
            with replacing(kept) as temporary:
                torch.save(render_pairs(vae, pairs, SCENE_SEED, size)[1:], temporary)
    exchanges = Pairs(paired_scenes(pairs, SCENE_SEED), *torch.load(kept, weights_only=True))
    predictor = networks(work, init, model.schedule, latents.shape[-1])

    # The text encoder alone.
    text_loss = TextLoss(predictor.text_encoder)
    recipe = Recipe(max_train_steps=text_steps, learning_rate=1e-3, lr_warmup_steps=50, decay_from=0.5)
    train_on_the_cpu(
        text_loss,
        text_batches(tokenizer),
        recipe,
        folder / "text",
        share=share_of_text,
        highest_rate=lambda name: 3e-3 if name == "direction" else 1e-3,
    )

    # Both networks.
    loss = SidedLoss(predictor, text_loss.direction.detach())
    recipe = Recipe(
        max_train_steps=steps + more_steps,
        learning_rate=learning_rate,
        lr_warmup_steps=50,
        decay_from=0.3,
        ema_decay=0.995,
        optimizer="muon",
    )
    length = predictor.anchor.config.max_position_embeddings
    trained = train_on_the_cpu(
        loss,
        SidedDraws(Draws(pictures, latents, tokenizer, length), exchanges, teaching=steps),
        recipe,
        folder / "both",
        share=share_of_sided,
        highest_rate=lambda name: learning_rate * (0.5 if "text_encoder" in name else 1.0),
        validate=lambda: sample_sheet(predictor, vae, tokenizer, PROMPTS, latents.shape[-1]),
    )

    # The model.
    if not is_main_process():
        return
    unseen = render_pairs(vae, UNSEEN, TEST_SEED, size)
    with in_place_of(loss, trained.average.values) if trained.average else nullcontext():
        for t in (700, 850):
            share_right = told_apart(predictor, tokenizer, unseen, t)
            print(f"the relation makes the prediction better in {share_right:.1f} % of unseen renders at t = {t}")
        parts = model.components
        taught = Components(predictor.unet, vae, predictor.text_encoder, tokenizer, parts.scheduler_config)
        loading.save(taught, folder / "model", dtype=torch.float16)
    shutil.copytree(init / "image_encoder", folder / "model" / "image_encoder", dirs_exist_ok=True)
    if (words := init / loading.WORDS).exists():
        shutil.copy(words, folder / "model")


if __name__ == "__main__":
    typer.run(main)
