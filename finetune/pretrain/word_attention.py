"""Measure whether the words of a prompt look at their objects: ``python -m finetune.pretrain.word_attention``.

Renders of one or two objects, whose masks are known, are noised and shown to the noise predictor once with their plain
caption. The cross-attention of a word, averaged over heads and layers (arXiv 2210.04885), is compared inside its object
and outside of it, a pixel with a pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import sdkernels
from finetune.pretrain.world.captions import pair_prompt, single_prompt
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.prompts.encoding import encode_prompts
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.attention_maps import AttentionMaps, prompt_words, record_attention

SCENE_SEED = 9_000_001
TIMESTEPS = (300, 500, 700, 900)
TIMES = 2.0  # as much inside as outside


class Looked(NamedTuple):
    """Attention per pixel inside the object over that outside: of its colour word and its shape word, [N, 2]; NaN in
    the second object's place where there is one object."""

    color: Tensor
    shape: Tensor

    def good(self) -> dict[str, float]:
        """In how many scenes, in per cent, all colour words, all shape words, and both, look at their objects."""
        color, shape = (((ratio >= TIMES) | ratio.isnan()).all(1) for ratio in self)
        named = {"colour words": color, "shape words": shape, "all words": color & shape}
        return {name: 100 * found.float().mean().item() for name, found in named.items()}


def prompts_of(scenes: Scenes) -> list[str]:
    """The plain captions of scenes of one or two objects, in the order of their slots."""
    pairs = [
        [(COLORS[scenes.color[i, k]], SHAPES[scenes.shape[i, k]]) for k in range(int(scenes.count[i]))]
        for i in range(len(scenes))
    ]
    return [single_prompt(*own[0]) if len(own) == 1 else pair_prompt(own[0], own[1]) for own in pairs]


@torch.no_grad()
def look(sd: StableDiffusion, scenes: Scenes, seed: int) -> Looked:
    """Where the words of the scenes' captions look, on average over TIMESTEPS."""
    rendered = render(scenes, sd.picture_size[0])
    latents = sd.vae.encode(rendered.images * 2 - 1).mode() * sd.vae.config.scaling_factor
    prompts, rng = prompts_of(scenes), torch.Generator().manual_seed(seed)
    context = encode_prompts(sd.tokenizer, sd.text_encoder, prompts, None)[0]

    with record_attention(sd.unet, images=len(scenes)) as recorder:
        for timestep in TIMESTEPS:
            t = torch.full((len(scenes),), timestep)
            noise, alphas = torch.randn(latents.shape, generator=rng), sd.schedule.alphas_cumprod.float()
            x_t, _ = sdkernels.add_noise(latents, noise, t, alphas, "epsilon")
            sd.unet(x_t, t, context)
    maps = recorder.maps([prompt_words(sd.tokenizer, prompt) for prompt in prompts])
    return ratios(maps, scenes, rendered.masks)


def ratios(maps: AttentionMaps, scenes: Scenes, masks: Tensor) -> Looked:
    """The maps of the scenes' captions compared with the objects' masks [N, S, S]; pixels of the maps count for each
    object by the part that it covers."""
    found = torch.full((2, len(scenes), 2), torch.nan)
    for i in range(len(scenes)):
        for k in range(int(scenes.count[i])):
            covered = F.interpolate((masks[i] == k + 1).float()[None, None], maps.values.shape[2:], mode="area")[0, 0]
            for w, names in enumerate((COLORS, SHAPES)):
                kinds = (scenes.color, scenes.shape)[w][i, : int(scenes.count[i])].tolist()
                heat = maps.word(names[kinds[k]], i, occurrence=kinds[:k].count(kinds[k]))
                inside = (heat * covered).sum() / covered.sum()
                outside = (heat * (1 - covered)).sum() / (1 - covered).sum()
                found[w, i, k] = inside / outside
    return Looked(*found)


def measure(sd: StableDiffusion, count: int = 200) -> dict[str, float]:
    """`Looked.good` of ``count`` scenes, half of them of two objects."""
    scenes = sample_scenes(count, SCENE_SEED, counts=(0.5, 0.5, 0.0))
    parts = [look(sd, scenes[i : i + 50], SCENE_SEED + i) for i in range(0, count, 50)]
    return Looked(*(torch.cat(values) for values in zip(*parts, strict=True))).good()


def main(
    model: Annotated[Path, typer.Argument(help="The model's folder.")] = MODELS / "tabletop",
    count: Annotated[int, typer.Option(help="How many scenes.", min=1)] = 200,
) -> None:
    """Say in how many scenes the words look at their objects."""
    for name, share in measure(
        StableDiffusion.from_pretrained(model, device="cpu", dtype=torch.float32), count
    ).items():
        print(f"{name}: at least {TIMES:g} times as much inside their objects as outside in {share:.1f} % of {count}")


if __name__ == "__main__":
    typer.run(main)
