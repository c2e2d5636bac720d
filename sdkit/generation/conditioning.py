"""From prompts and negative prompts, one or several, to the hidden states that the UNet is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.options import Settings
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tags import ExtraNetwork, split_extra_networks

Prompt = str | Sequence[str] | None


@dataclass(frozen=True)
class Prompts:
    """P prompts: their texts without tags, the networks that the tags name, and the negative prompts.

    ``given`` (the prompts with their tags) and ``texts`` are None where embeddings were given.
    """

    given: list[str] | None
    texts: list[str] | None
    negatives: list[str]
    networks: list[ExtraNetwork]

    @property
    def count(self) -> int:
        return len(self.negatives)


class Conditioning(NamedTuple):
    """Hidden states [B, M, D] for the UNet, each None where the guidance needs none."""

    uncond: Tensor | None
    cond: Tensor | None


# Reading


def read_prompts(prompt: Prompt, negative_prompt: Prompt, settings: Settings) -> Prompts:
    """Check the prompts and take their tags out. Raises ConfigError."""
    embeds, negative_embeds = settings.prompt_embeds, settings.negative_prompt_embeds
    if (prompt is None) == (embeds is None):
        raise ConfigError("prompt, prompt_embeds: expected exactly one of them")
    if negative_prompt is not None and negative_embeds is not None:
        raise ConfigError("negative_prompt, negative_prompt_embeds: give one of them, not both")
    if prompt is None:
        count = len(embeds) if embeds is not None else 0
        return Prompts(None, None, _negatives(negative_prompt, count), [])

    if not isinstance(prompt, Sequence):
        raise ConfigError(f"prompt: expected words, or a list of prompts, found {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if odd := [p for p in prompts if not isinstance(p, str)]:
        raise ConfigError(f"prompt: expected a string, found {type(odd[0]).__name__} {odd[0]!r}")

    texts, networks = _without_tags(prompts) if settings.prompt_weighting else (prompts, [])
    empty = not texts or any(not text.strip() for text in texts)
    if empty and settings.guidance.needs_cond:
        raise ConfigError(
            "prompt: expected words, found an empty prompt (guidance_scale=0 makes a picture without one)"
        )

    negatives = _negatives(negative_prompt, len(prompts))
    if settings.prompt_weighting and (tags := _without_tags(negatives)[1]):
        raise ConfigError(
            f"negative_prompt: {tags[0].kind}:{tags[0].name} changes the network for both prompts: "
            "expected its tag in the prompt"
        )
    return Prompts(prompts, texts, negatives, networks)


def _without_tags(prompts: list[str]) -> tuple[list[str], list[ExtraNetwork]]:
    """The prompts without their tags, and the networks that each of them names."""
    pairs = [split_extra_networks(prompt) for prompt in prompts]
    sets = {frozenset(networks) for _, networks in pairs}
    if len(sets) > 1:
        raise ConfigError("prompt: the prompts of one batch name different extra networks; run them apart")
    return [text for text, _ in pairs], pairs[0][1] if pairs else []


def _negatives(negative_prompt: Prompt, count: int) -> list[str]:
    """A negative prompt for each of ``count`` prompts."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ConfigError(f"negative_prompt: expected one or {count}, found {len(negative_prompt)}")
    return list(negative_prompt)


# Encoding


def encode(prompts: Prompts, settings: Settings, model: DiffusionModel) -> Conditioning:
    """The hidden states [P, M, D] of P prompts and negative prompts, by the model's text encoder."""
    config = model.unet.config
    width = config.per_block(config.cross_attention_dim)[0]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given: Tensor | None = getattr(settings, name)
        if given is not None and (given.dim() != 3 or given.shape[-1] != width):
            raise ConfigError(f"{name}: expected [prompts, tokens, {width}], found {list(given.shape)}")

    guidance = settings.guidance
    cond = settings.prompt_embeds if guidance.needs_cond else None
    uncond = settings.negative_prompt_embeds if guidance.needs_uncond else None
    encoder = partial(
        encode_prompts,
        model.tokenizer,
        model.text_encoder,
        clip_skip=settings.clip_skip,
        weighted=settings.prompt_weighting,
        embeddings=model.textual_inversions,
    )

    # Prompts and negative prompts go through the encoder together, so that they get the same number of chunks.
    encode_uncond = guidance.needs_uncond and uncond is None
    if guidance.needs_cond and cond is None:
        cond, encoded = encoder(prompts.texts or [], prompts.negatives if encode_uncond else None)
        uncond = encoded if encode_uncond else uncond
    elif encode_uncond:
        uncond, _ = encoder(prompts.negatives, None)
        if cond is not None and cond.shape[1] % uncond.shape[1] == 0:  # as many chunks as the embeddings have
            uncond = uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1)

    if cond is not None and uncond is not None and cond.shape != uncond.shape:
        raise ConfigError(
            f"negative_prompt_embeds: expected the prompt's shape {list(cond.shape)}, found {list(uncond.shape)}"
        )
    return Conditioning(uncond, cond)
