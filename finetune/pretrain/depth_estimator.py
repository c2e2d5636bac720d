"""Train the network that estimates depth for depth-to-image: ``python -m finetune.pretrain.depth_estimator``.

A small DPT (arXiv 2103.13413, transformers' ``DPTForDepthEstimation``) learns inverse depth, larger nearer, from the
renders of the tabletop world, whose depth is exact. Loss: absolute error + that of the differences between neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from finetune.pretrain.recipe import Recipe, autocast, every_nth, is_main_process, train_on_the_cpu
from finetune.pretrain.world.pictures import COUNTS, REPEATS, SIZE, from_bytes, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from sdkit.files import write_json
from sdkit.networks.depth_estimator import UNUSED

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation

WIDTH, HEADS, LAYERS = 96, 3, 4
PATCH = 16  # pixels; so the estimate is as large as the picture
BATCH, RUN = 16, 11
SCENE_SEED, TEST_SEED = 7_000_001, 7_500_001
UNSEEN = 256  # renders
EDGES = 1.0  # weight of the differences between neighbours


def build(size: int = SIZE) -> DPTForDepthEstimation:
    """The untrained network for pictures of ``size`` pixels."""
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=size,
        patch_size=PATCH,
        backbone_out_indices=list(range(LAYERS)),
        neck_hidden_sizes=[WIDTH // 4, WIDTH // 2, WIDTH, WIDTH],
        fusion_hidden_size=WIDTH // 2,
        reassemble_factors=[4, 2, 1, 0.5],
        hidden_dropout_prob=0.0,
        is_hybrid=False,
        backbone_config=None,
        qkv_bias=True,
    )
    network = DPTForDepthEstimation(config)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith((UNUSED, "dpt.layernorm.")))  # it has layers that nothing reads
    return network


def rendered(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 [count, 3, size, size], and their inverse depth, float16 [count, size, size] in 1/metres."""
    rng = torch.Generator().manual_seed(seed)
    pictures: list[Tensor] = []
    inverse: list[Tensor] = []
    for _ in tqdm(range(0, count, 64), desc="render", mininterval=5.0):
        found = render(sample_scenes(64, rng, COUNTS, held_out="include", repeats=REPEATS), size)
        pictures.append(to_bytes(found.images))
        inverse.append((1 / found.depth).half())
    return torch.cat(pictures)[:count], torch.cat(inverse)[:count]


class DepthLoss(nn.Module):
    """forward((pictures [B, 3, S, S] in [-1, 1], inverse depth [B, S, S])) -> the loss."""

    def __init__(self, network: DPTForDepthEstimation) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, wanted = batch
        with autocast():
            found = self.network(pixels).predicted_depth.float()
        error = found - wanted
        edges = error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean()
        return error.abs().mean() + EDGES * edges


@torch.no_grad()
def correlation(network: DPTForDepthEstimation, pictures: Tensor, inverse: Tensor) -> float:
    """The mean over pictures of Pearson's correlation between estimated and true inverse depth."""
    each: list[Tensor] = []
    for pixels, wanted in zip(pictures.split(32), inverse.split(32), strict=True):
        estimate: Any = network(from_bytes(pixels))
        pair = torch.stack([estimate.predicted_depth.flatten(1), wanted.float().flatten(1)])
        pair = pair - pair.mean(2, keepdim=True)
        each.append((pair[0] * pair[1]).sum(1) / (pair[0].norm(dim=1) * pair[1].norm(dim=1)))
    return torch.cat(each).mean().item()


def preprocessing(size: int) -> dict[str, Any]:
    """What transformers' image processor has to do: pictures of ``size`` pixels in [-1, 1]."""
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "keep_aspect_ratio": False,
        "ensure_multiple_of": 1,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def main(
    work: Annotated[Path, typer.Option(help="Checkpoints and results.")] = Path("build/tabletop"),
    size: Annotated[int, typer.Option(help="Width and height of the pictures, a multiple of 32.", min=32)] = SIZE,
    examples: Annotated[int, typer.Option(help="Renders to learn from.", min=64)] = 8_000,
    steps: Annotated[int, typer.Option(help="Training steps of 16 renders.", min=1)] = 3_000,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
) -> None:
    """Train the estimator; a killed run goes on where it stopped."""
    if size % (2 * PATCH):
        raise typer.BadParameter(f"--size: expected a multiple of {2 * PATCH}, found {size}")
    torch.manual_seed(0)
    network = build(size)
    pictures, inverse = rendered(examples, size, SCENE_SEED)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pictures), (BATCH,), generator=step_generator(RUN, step))
        return from_bytes(pictures[index]), inverse[index].float()

    recipe = Recipe(max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=100, decay_from=0.3)
    train_on_the_cpu(DepthLoss(network), batches, recipe, work / "depth", every_nth)
    if not is_main_process():
        return

    network.eval()
    print(f"correlation with true inverse depth: {correlation(network, *rendered(UNSEEN, size, TEST_SEED)):.4f}")
    folder = work / "depth_estimator"
    network.half().save_pretrained(folder / "depth_estimator")
    (folder / "feature_extractor").mkdir(exist_ok=True)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessing(size))


if __name__ == "__main__":
    typer.run(main)
