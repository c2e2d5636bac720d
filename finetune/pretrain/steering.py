"""Measure how a tabletop model is steered: ``python -m finetune.pretrain.steering guidance``, or another way.

guidance: by its prompt, at growing scales. classifier: without a prompt, by the gradient of a classifier of noisy
latents. depth: by the depth of a picture, beside a prompt that asks for another colour. Guidance trades variety for
obedience, so both are measured: what the probe sees, and how far pictures of one prompt are from their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from finetune.pretrain.probe import Probe, load_probe, look
from finetune.pretrain.world.captions import single_prompt
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, HELD_OUT, SHAPES, sample_scenes
from sdkit.checkpoints.classifier_folder import load_classifier
from sdkit.images.depth import depth_channel
from sdkit.networks.latent_classifier import LatentClassifier
from sdkit.stable_diffusion import StableDiffusion

GUIDANCE = (0.0, 1.0, 2.0, 4.0, 7.5, 10.0)
CLASSIFIER = (0.0, 1.0, 3.0, 10.0, 30.0)
SCENE_SEED = 10_000_001
ONE = ("red", "sphere")  # whose pictures' variety is measured
Pair = tuple[str, str]

SEEN = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT]
"""The colours and shapes that training has shown together."""


class Way(StrEnum):
    """What steers."""

    guidance = "guidance"
    classifier = "classifier"
    depth = "depth"


def right(probe: Probe, images: Tensor, wanted: Sequence[Pair]) -> float:
    """How often the object that the probe is surest of has the wanted colour and shape, in per cent.

    images: [N, 3, H, W] in [0, 1].
    """
    verdicts = look(probe, images * 2 - 1)
    seen = [(v.objects[0]["color"], v.objects[0]["shape"]) if v.objects else None for v in verdicts]
    return 100 * sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(wanted)


def variety(images: Tensor) -> float:
    """How far pictures [N, 3, H, W] in [0, 1] are from their mean: root mean square, of 255."""
    return 255 * float((images - images.mean(0)).square().mean().sqrt())


def drawn(sd: StableDiffusion, prompts: Sequence[str] | None, seed: int, steps: int, **options: Any) -> Tensor:
    """A picture of each prompt, float32 [N, 3, H, W] in [0, 1]."""
    own: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt", "progress": False, "max_batch_size": 50}
    return (
        sd.text_to_image(None if prompts is None else list(prompts), seed=seed, **(own | options)).images.float().cpu()
    )


def along_guidance(
    sd: StableDiffusion, probe: Probe, count: int, seed: int, steps: int
) -> dict[float, tuple[float, float]]:
    """For each scale of GUIDANCE how many of ``count`` are right, in per cent, and the variety of as many of ONE."""
    wanted = [SEEN[i % len(SEEN)] for i in range(count)]
    found: dict[float, tuple[float, float]] = {}
    for scale in GUIDANCE:
        images = drawn(sd, [single_prompt(*pair) for pair in wanted], seed, steps, guidance_scale=scale)
        alike = drawn(sd, [single_prompt(*ONE)] * count, seed, steps, guidance_scale=scale)
        found[scale] = right(probe, images, wanted), variety(alike)
    return found


def along_classifier(
    sd: StableDiffusion, classifier: LatentClassifier, probe: Probe, count: int, seed: int, steps: int
) -> dict[float, tuple[float, float]]:
    """The same for each scale of CLASSIFIER, without a prompt, by the classifier's class."""
    wanted = [SEEN[i % len(SEEN)] for i in range(count)]
    found: dict[float, tuple[float, float]] = {}
    for scale in CLASSIFIER:
        each: list[Tensor] = []
        for pairs in (wanted, [ONE] * count):
            options: dict[str, Any] = {"guidance_scale": 0.0}
            if scale:
                labels = classifier.labels([" ".join(pair) for pair in pairs])
                options |= {"classifier": classifier, "class_labels": labels, "classifier_scale": scale}
            each.append(drawn(sd, [""] * count, seed, steps, **options))
        found[scale] = right(probe, each[0], wanted), variety(each[1])
    return found


def by_depth(
    sd: StableDiffusion, probe: Probe, count: int, seed: int, steps: int, guidance: float
) -> tuple[float, float]:
    """Renders redrawn at strength 1 by their estimated depth and a prompt for another colour: the mean correlation of
    the results' estimated depth with the given one, and how often the colour is right, in per cent."""
    scenes = sample_scenes(count, SCENE_SEED, counts=(1.0, 0.0, 0.0))
    size = sd.picture_size[0]
    pictures = render(scenes, size).images
    colors = [COLORS[(c + 1 + i) % len(COLORS)] for i, c in enumerate(scenes.color[:, 0].tolist())]
    prompts = [single_prompt(color, SHAPES[s]) for color, s in zip(colors, scenes.shape[:, 0].tolist(), strict=True)]

    given = sd.depth_estimator.estimate(pictures * 2 - 1, sd.device).cpu()
    out = sd.depth_to_image(
        prompts, pictures, given, strength=1.0, num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        output_type="pt", progress=False, max_batch_size=50,
    )  # fmt: skip
    images: Tensor = out.images.float().cpu()
    found = sd.depth_estimator.estimate(images * 2 - 1, sd.device).cpu()

    pair = torch.stack([depth_channel(values, (size, size)).flatten(1) for values in (given, found)])
    pair = pair - pair.mean(2, keepdim=True)
    kept = (pair[0] * pair[1]).sum(1) / (pair[0].norm(dim=1) * pair[1].norm(dim=1))
    seen = [v.objects[0]["color"] if v.objects else "" for v in look(probe, images * 2 - 1)]
    return kept.mean().item(), 100 * sum(a == b for a, b in zip(seen, colors, strict=True)) / count


def main(
    way: Annotated[Way, typer.Argument(help="What steers.")],
    model: Annotated[str, typer.Option(help="The model; of depth a companion.")] = "tabletop",
    classifier: Annotated[str, typer.Option(help="A classifier of its latents.")] = "tabletop-classifier",
    count: Annotated[int, typer.Option(help="Pictures for each figure.", min=2)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.", min=0)] = 1000,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale, of depth alone.")] = 7.5,
) -> None:
    """Say what each scale does, as a table."""
    sd, probe = StableDiffusion.load(model, device="cpu"), load_probe()
    if way is Way.depth:
        kept, colour = by_depth(sd, probe, count, seed, steps, guidance)
        print(f"depth of the result against the given one: {kept:.3f}; colour right {colour:.0f} % of {count}")
        return

    if way is Way.guidance:
        found = along_guidance(sd, probe, count, seed, steps)
    else:
        found = along_classifier(sd, load_classifier(classifier, "cpu"), probe, count, seed, steps)
    print(f"| {way} scale | colour and shape right, % of {count} | variety of one class, of 255 |\n|---|---|---|")
    for scale, (share, spread) in found.items():
        print(f"| {scale:g} | {share:.0f} | {spread:.1f} |")


if __name__ == "__main__":
    typer.run(main)
