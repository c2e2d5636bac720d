"""A probe that says what is in a tabletop picture, trained on renders: ``python -m finetune.pretrain.probe``.

A small convolutional network reads the picture into 256 cells; three learned queries look at the cells and each names
one object or none: shape, colour, size, material and place. Objects have no order, so the loss is taken under the best
of the six matchings, as in DETR (arXiv 2005.12872). It judges generated pictures, so it never sees one in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from finetune.pretrain.recipe import Recipe, autocast, every_nth, is_main_process, main_process_first, train_on_the_cpu
from finetune.pretrain.world.pictures import REPEATS, SCENES, SCENES_HELP, SIZE, Pictures, training_pictures
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, MATERIALS, SHAPES, SIZES, TABLES, Scenes, sample_scenes
from finetune.seeds import step_generator
from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.tensors import read_state, write_state

WEIGHTS = Path(__file__).parent / "probe.safetensors"
SLOTS, WIDTH = 3, 128
CELLS = 16  # in a row
NONE = len(SHAPES)  # the shape of a slot with no object
HEADS = {"shape": len(SHAPES) + 1, "color": len(COLORS), "size": len(SIZES), "material": len(MATERIALS), "place": 2}
PLACE_SCALE = 0.1  # metres
BATCH = 32
HELD_OUT_SCENES = 4096
RUN = 7  # number of the run, for `step_generator`
TEST_SEED = 3_000_001


def _stage(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1),
        nn.GroupNorm(8, out_channels),
        nn.SiLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.GroupNorm(8, out_channels),
        nn.SiLU(),
    )


class Probe(nn.Module):
    """Pictures [B, 3, size, size] in [-1, 1] to logits for three unordered objects and the table."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        self.stem = nn.Conv2d(3, 32, 3, stride=size // (4 * CELLS), padding=1)
        self.stages = nn.Sequential(_stage(32, 32, 2), _stage(32, 64, 2), _stage(64, WIDTH, 1))
        self.position = nn.Parameter(0.1 * torch.randn(CELLS**2, WIDTH))
        self.queries = nn.Parameter(torch.randn(SLOTS, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in HEADS.items()})
        self.table = nn.Linear(WIDTH, len(TABLES))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits: shape [B, 3, 6], color [B, 3, 8], size and material [B, 3, 2], table [B, 4]; place [B, 3, 2]."""
        cells = self.stages(self.stem(x)).flatten(2).transpose(1, 2) + self.position
        slots = self.decoder(self.queries.expand(len(x), -1, -1), cells)
        return {name: head(slots) for name, head in self.heads.items()} | {"table": self.table(cells.mean(1))}


def matched_loss(out: dict[str, Tensor], scenes: Scenes) -> Tensor:
    """Mean over the batch of the loss under the best matching of slots to objects."""
    present = scenes.shape >= 0
    shape = torch.where(present, scenes.shape, NONE)

    costs: list[Tensor] = []
    for order in permutations(range(SLOTS)):
        slot = torch.tensor(order)

        def entropy(name: str, target: Tensor, slot: Tensor = slot) -> Tensor:
            logits = out[name][:, slot].float().transpose(1, 2)
            return F.cross_entropy(logits, target.clamp_min(0), reduction="none")

        attributes = (
            entropy("color", scenes.color) + entropy("size", scenes.size) + entropy("material", scenes.material)
        )
        place = (out["place"][:, slot].float() - scenes.position / PLACE_SCALE).square().sum(-1)
        costs.append((entropy("shape", shape) + present * (attributes + place)).sum(1))

    objects = torch.stack(costs).amin(0).mean()
    return objects + F.cross_entropy(out["table"].float(), scenes.table)


class ProbeLoss(nn.Module):
    """forward((pictures, scenes)) -> the loss of the probe; what the pictures show is in ``scenes``."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, batch: tuple[Tensor, Scenes]) -> Tensor:
        pixels, scenes = batch
        with autocast():
            out = self.probe(pixels)
        return matched_loss(out, scenes)


@dataclass(frozen=True)
class Verdict:
    """One picture as the probe sees it: each object's attributes by argmax, their probabilities, its place."""

    objects: list[dict[str, str]]
    probabilities: list[dict[str, float]]
    places: list[tuple[float, float]]  # metres to the right and away from the camera
    table: str


@torch.no_grad()
def look(probe: Probe, pixels: Tensor) -> list[Verdict]:
    """Judge pictures [B, 3, S, S] in [-1, 1]; objects are listed by how sure the probe is of them."""
    out = {name: value.float() for name, value in probe(pixels).items()}
    names = {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}
    chances = {name: out[name].softmax(-1) for name in names}
    metres = [[(x * PLACE_SCALE, z * PLACE_SCALE) for x, z in row] for row in out["place"].tolist()]

    verdicts: list[Verdict] = []
    for b in range(len(pixels)):
        slots = [s for s in range(SLOTS) if int(out["shape"][b, s].argmax()) != NONE]
        slots.sort(key=lambda s: float(chances["shape"][b, s, NONE]))
        best = {name: chances[name][b, :, : len(words)].max(-1) for name, words in names.items()}

        objects = [{name: words[int(best[name].indices[s])] for name, words in names.items()} for s in slots]
        probabilities = [{name: float(best[name].values[s]) for name in names} for s in slots]
        table = TABLES[int(out["table"][b].argmax())]
        verdicts.append(Verdict(objects, probabilities, [metres[b][s] for s in slots], table))
    return verdicts


def objects_of(scenes: Scenes, i: int) -> list[dict[str, str]]:
    """The attributes of the objects of scene ``i``, in words."""
    return [
        {
            "shape": SHAPES[scenes.shape[i, k]],
            "color": COLORS[scenes.color[i, k]],
            "size": SIZES[scenes.size[i, k]],
            "material": MATERIALS[scenes.material[i, k]],
        }
        for k in range(int(scenes.count[i]))
    ]


def accuracy(probe: Probe, count: int = 2048) -> dict[str, float]:
    """How often each attribute is right on unseen renders, held-out pairs included, in per cent.

    Seen objects are matched to real ones as well as can be; a real object that is not seen counts as wrong in all.
    "count" is the number of objects of a picture.
    """
    right: dict[str, list[bool]] = {name: [] for name in ("count", "shape", "color", "size", "material", "table")}
    for part in range(0, count, 64):
        scenes = sample_scenes(64, TEST_SEED + part, held_out="include", repeats=REPEATS)
        for i, verdict in enumerate(look(probe, render(scenes, probe.size).images * 2 - 1)):
            truth = objects_of(scenes, i)
            right["count"].append(len(verdict.objects) == len(truth))
            right["table"].append(verdict.table == TABLES[scenes.table[i]])

            seen = verdict.objects + [{}] * (SLOTS - len(verdict.objects))
            best = max(
                permutations(seen, len(truth)),
                key=lambda order: sum(a.get(name) == b[name] for a, b in zip(order, truth, strict=True) for name in b),
            )
            for found, real in zip(best, truth, strict=True):
                for name in real:
                    right[name].append(found.get(name) == real[name])
    return {name: 100 * sum(values) / len(values) for name, values in right.items()}


def load_probe(file: Path = WEIGHTS, size: int = SIZE) -> Probe:
    """The trained probe for pictures of ``size``. Raises CheckpointError where ``file`` is missing or does not fit."""
    with torch.device("meta"):
        probe = Probe(size)
    return give_weights(probe, read_state(file, torch.float32)[0], str(file))


def draw_batch(pictures: Pictures, extra: Tensor, held_out: Scenes, step: int) -> tuple[Tensor, Scenes]:
    """Noisy training pictures and their scenes; one in eight is of ``extra``, the pictures of ``held_out``."""
    rng = step_generator(RUN, step)
    index = torch.randint(len(pictures), (BATCH - BATCH // 8,), generator=rng)
    other = torch.randint(len(extra), (BATCH // 8,), generator=rng)
    x = torch.cat([pictures.pixels(index), extra[other]])
    x = x + 0.03 * torch.rand(BATCH, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
    return x, Scenes.cat([pictures.scenes[index], held_out[other]])


def main(
    work: Annotated[Path, typer.Option(help="Rendered pictures and checkpoints.")] = Path("build/tabletop"),
    output: Annotated[Path, typer.Option(help="Where the trained probe is written.")] = WEIGHTS,
    init: Annotated[Path | None, typer.Option(help="A probe's weights to go on from; else from nothing.")] = None,
    scenes: Annotated[int, typer.Option(help=SCENES_HELP, min=64)] = SCENES,
    size: Annotated[int, typer.Option(help="Width and height of the pictures, a multiple of 64.", min=64)] = SIZE,
    steps: Annotated[int, typer.Option(help="Training steps of 32 pictures.", min=1)] = 5_600,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
) -> None:
    """Train the probe; a killed run goes on where it stopped."""
    if size % (4 * CELLS):
        raise typer.BadParameter(f"--size: expected a multiple of {4 * CELLS}, found {size}")
    torch.manual_seed(0)
    with main_process_first():
        pictures = training_pictures(work, scenes, scenes // 2, size)
    held_out = sample_scenes(HELD_OUT_SCENES, TEST_SEED - 1, held_out="only")  # so that no pair is strange to it
    extra = render(held_out, size).images * 2 - 1
    probe = Probe(size) if init is None else load_probe(init, size)

    def batches(step: int) -> tuple[Tensor, Scenes]:
        return draw_batch(pictures, extra, held_out, step)

    recipe = Recipe(max_train_steps=steps, learning_rate=learning_rate, decay_from=0.3, optimizer="muon")
    train_on_the_cpu(ProbeLoss(probe), batches, recipe, work / "probe", every_nth)
    if not is_main_process():
        return

    probe.eval()
    write_state(probe.state_dict(), output, torch.float16)
    for name, value in accuracy(load_probe(output, size)).items():
        print(f"{name:10} {value:.2f} % right on unseen renders")


if __name__ == "__main__":
    typer.run(main)
