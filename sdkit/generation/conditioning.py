"""From prompts and negative prompts, one or several, to the hidden states that the UNet is conditioned on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdkit.checks import check_kind, most_like
from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.options import Settings
from sdkit.graphs import Graphs
from sdkit.networks.attention import KeyValue
from sdkit.networks.unet import ContextKeyValues, UNet2DConditionModel
from sdkit.prompts.composition import is_composed, split_composition
from sdkit.prompts.encoding import encode_groups
from sdkit.prompts.scheduling import prompt_schedule, text_at
from sdkit.prompts.tags import ExtraNetwork, split_extra_networks
from sdkit.prompts.tokens import prompt_tokens, used_triggers

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


class Stage(NamedTuple):
    """The steps of one stage of a run: those of its whole schedule, which prompt editing counts in, those of the stage
    before it, if there is one, and those that are run.

    As in A1111, the first step that is run is step 1 also where ``strength`` leaves some out.
    """

    steps: int
    before: int | None
    run: int


class Look(NamedTuple):
    """What a prompt is at one step: rows of the table of contexts, and their weights, for `compose`."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the weights sum to 1, so that the unconditional prediction cancels out."""
        return math.isclose(math.fsum(self.weights), 1, abs_tol=1e-9)


Looks = list[list[list[Look]]]
"""By stage, step and prompt."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The table of all contexts of a run, and the rows of it that each prompt looks at.

    contexts: hidden states [R, M, D] on the UNet's device and in its dtype, a row for each different text of a prompt.
    uncond, cond: None where the guidance needs none. texts: of each prompt, in the order of its rows; [""] for
    embeddings.
    """

    contexts: Tensor
    uncond: Looks | None
    cond: Looks | None
    texts: list[list[str]]
    _projected: dict[tuple[int, ...], ContextKeyValues] = field(default_factory=dict[tuple[int, ...], ContextKeyValues])

    @cached_property
    def is_partial(self) -> bool:
        """Whether a conditional prediction is made with the unconditional one: not all weights of AND sum to 1."""
        return any(not look.is_whole for stage in self.cond or [] for step in stage for look in step)

    @cached_property
    def is_constant(self) -> bool:
        """Whether each prompt looks at the same rows in all steps."""
        return all(step == looks[0][0] for looks in (self.uncond, self.cond) if looks for st in looks for step in st)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """For each conditional row its number among those of its prompt. They are the last ones of the table."""
        numbers = [number for texts in self.texts for number in range(len(texts))]
        return dict(enumerate(numbers, len(self.contexts) - len(numbers)))

    def key_values(self, unet: UNet2DConditionModel, rows: tuple[int, ...]) -> ContextKeyValues:
        """The keys and values of these rows, which are computed once for a run.

        Where nothing changes on the way they are those of all rows together; else each row's are computed by
        themselves, and put together for every call.
        """
        for own in [rows] if self.is_constant else [(row,) for row in rows]:
            if own not in self._projected:
                self._projected[own] = unet.context_kv(self.contexts[list(own)])
        if self.is_constant:
            return self._projected[rows]

        transformers = zip(*(self._projected[row,] for row in rows), strict=True)
        return [[_joined(pairs) for pairs in zip(*layers, strict=True)] for layers in transformers]


def _joined(pairs: Sequence[KeyValue]) -> KeyValue:
    return torch.cat([key for key, _ in pairs]), torch.cat([value for _, value in pairs])


# Reading


def read_prompts(
    prompt: Prompt, negative_prompt: Prompt, settings: Settings, triggers: Collection[str] = ()
) -> Prompts:
    """Check the prompts and take their tags out; ``triggers`` are the words of textual inversions, which no tag is.

    Raises ConfigError. What is given and has no effect at this guidance scale is a warning.
    """
    embeds, negative_embeds = settings.prompt_embeds, settings.negative_prompt_embeds
    if (prompt is None) == (embeds is None):
        raise ConfigError("prompt, prompt_embeds: expected exactly one of them")
    if negative_prompt is not None and negative_embeds is not None:
        raise ConfigError("negative_prompt, negative_prompt_embeds: give one of them, not both")
    if prompt is None:
        count = len(embeds) if embeds is not None else 0
        found = Prompts(None, None, _negatives(negative_prompt, count), [])
        _warn_of_ignored(found, settings)
        return found

    if not isinstance(prompt, Sequence) or (not len(prompt) and not isinstance(prompt, str)):
        raise ConfigError(f"prompt: expected words, or a list of prompts, found {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _check_strings("prompt", prompts)
    texts, networks = _without_tags(prompts, triggers) if settings.prompt_weighting else (prompts, [])

    negatives = _negatives(negative_prompt, len(prompts))
    if settings.prompt_weighting and (tags := _without_tags(negatives, triggers)[1]):
        raise ConfigError(
            f"negative_prompt: {tags[0].kind}:{tags[0].name} changes the network for both prompts: "
            "expected its tag in the prompt"
        )

    found = Prompts(prompts, texts, negatives, networks)
    _warn_of_ignored(found, settings)
    return found


def _without_tags(prompts: list[str], triggers: Collection[str]) -> tuple[list[str], list[ExtraNetwork]]:
    """The prompts without their tags, and the networks that each of them names."""
    pairs = [split_extra_networks(prompt, triggers) for prompt in prompts]
    sets = {frozenset(networks) for _, networks in pairs}
    if len(sets) > 1:
        raise ConfigError("prompt: the prompts of one batch name different extra networks; run them apart")
    return [text for text, _ in pairs], pairs[0][1] if pairs else []


def _negatives(negative_prompt: Prompt, count: int) -> list[str]:
    """A negative prompt for each of ``count`` prompts."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    check_kind("negative_prompt", negative_prompt, Sequence, "words, or a list of negative prompts")
    if len(negative_prompt) != count:
        raise ConfigError(f"negative_prompt: expected one or {count}, found {len(negative_prompt)}")
    _check_strings("negative_prompt", negative_prompt)
    return list(negative_prompt)


def _check_strings(name: str, prompts: Sequence[str]) -> None:
    if odd := [p for p in prompts if not isinstance(p, str)]:  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"{name}: expected a string, found {type(odd[0]).__name__} {odd[0]!r}")


def _warn_of_ignored(prompts: Prompts, settings: Settings) -> None:
    """Warn of a prompt, or a negative prompt, that the guidance gives no weight, and of words that look like syntax."""
    reads_words, texts = settings.prompt_weighting, prompts.texts or []
    if settings.guidance_scale == 0 and (settings.prompt_embeds is not None or any(t.strip() for t in texts)):
        name = "prompt" if settings.prompt_embeds is None else "prompt_embeds"
        warnings.warn(f"{name}: ignored at guidance_scale 0, which is unconditional", stacklevel=2)

    partial = reads_words and not all(_weights(text).is_whole for text in texts)
    given = settings.negative_prompt_embeds is not None or any(t.strip() for t in prompts.negatives)
    if settings.guidance_scale == 1 and given and not partial:
        name = "negative_prompt" if settings.negative_prompt_embeds is None else "negative_prompt_embeds"
        warnings.warn(f"{name}: ignored at guidance_scale 1, which is the prompt alone", stacklevel=2)
    if reads_words and any(map(is_composed, prompts.negatives)):
        warnings.warn("negative_prompt: AND is a word here; it joins prompts alone", stacklevel=2)


def _weights(text: str) -> Look:
    return Look((), tuple(weight for _, weight in split_composition(text)))


# Encoding


Said = list[list[list[tuple[str, float]]]]
"""What one prompt says, by stage and step: the texts that it is composed of, and their weights."""


def encode(
    prompts: Prompts,
    settings: Settings,
    model: DiffusionModel,
    stages: Sequence[Stage],
    graphs: Graphs | None = None,
) -> Conditioning:
    """The contexts of P prompts and negative prompts in every step, by the model's text encoder, if there are any by
    ``graphs``.

    Warns of each textual inversion that was loaded since the last call and stands in none of these texts, and once of
    each word that a model which says what words it knows has never seen.
    """
    embeds, negative_embeds = settings.prompt_embeds, settings.negative_prompt_embeds
    weighted = settings.prompt_weighting
    _check_embeds(settings, model)

    # What is said in each step; embeddings are one nameless text each.
    texts = [""] * prompts.count if prompts.texts is None else prompts.texts
    said = [_said(text, stages, weighted, composed=True) for text in texts]
    negatives = prompts.negatives if negative_embeds is None else [""] * len(negative_embeds)
    unsaid = [_said(text, stages, weighted, composed=False) for text in negatives]
    if embeds is None:
        every = [text for one in (*said, *unsaid) for text in _different(one)]
        _warn_of_unused_triggers(every, weighted, model)
        _warn_of_strange_words(every, weighted, model)

    # What of it the guidance needs. Prompts and negative prompts go through the encoder together, so that they get the
    # same number of chunks.
    needs_cond = settings.guidance.needs_cond
    partial = any(not look.is_whole for stage in _looks(said) for step in stage for look in step)
    needs_uncond = settings.guidance.needs_uncond or (needs_cond and partial)
    groups: dict[str, list[str]] = {}
    if needs_cond and embeds is None:
        groups["prompt"] = [text for one in said for text in _different(one)]
    if needs_uncond and negative_embeds is None:
        groups["negative_prompt"] = [text for one in unsaid for text in _different(one)]
    encoded = _encoded(groups, settings, model, graphs) if groups else {}

    # The table.
    cond = encoded.get("prompt", embeds) if needs_cond else None
    uncond = encoded.get("negative_prompt", negative_embeds) if needs_uncond else None
    if cond is not None and uncond is not None:
        uncond = _fitting(uncond, cond, prompts.count if negative_embeds is not None else None)
    parts = [part.to(model.device, model.dtype) for part in (uncond, cond) if part is not None]
    return Conditioning(
        torch.cat(parts),
        None if uncond is None else _looks(unsaid),
        None if cond is None else _looks(said, first=0 if uncond is None else len(uncond)),
        [_different(one) for one in said],
    )


def _said(text: str, stages: Sequence[Stage], weighted: bool, composed: bool) -> Said:
    parts = split_composition(text) if weighted and composed else [(text, 1.0)]
    found: Said = []
    for stage in stages:
        schedules = [
            (prompt_schedule(part, stage.steps, stage.before) if weighted else [(stage.steps, part)], weight)
            for part, weight in parts
        ]
        steps = range(1, max(1, stage.run) + 1)
        found.append([[(text_at(schedule, step), weight) for schedule, weight in schedules] for step in steps])
    return found


def _different(said: Said) -> list[str]:
    """The different texts of a prompt, in order: its rows of the table."""
    return list(dict.fromkeys(text for stage in said for step in stage for text, _ in step))


def _looks(said: Sequence[Said], first: int = 0) -> Looks:
    """The rows that prompts look at, in a table that has theirs one after the other from row ``first`` on."""
    looks: Looks = [[[] for _ in stage] for stage in said[0]]
    for one in said:
        rows = {text: first + i for i, text in enumerate(_different(one))}
        first += len(rows)
        for stage, steps in zip(looks, one, strict=True):
            for step, parts in zip(stage, steps, strict=True):
                step.append(Look(tuple(rows[text] for text, _ in parts), tuple(weight for _, weight in parts)))
    return looks


def _encoded(
    groups: dict[str, list[str]], settings: Settings, model: DiffusionModel, graphs: Graphs | None
) -> dict[str, Tensor]:
    return encode_groups(
        model.tokenizer,
        model.text_encoder,
        groups,
        clip_skip=settings.clip_skip,
        weighted=settings.prompt_weighting,
        embeddings=model.textual_inversions,
        graphs=graphs,
    )


def _check_embeds(settings: Settings, model: DiffusionModel) -> None:
    config = model.unet.config
    width = config.per_block(config.cross_attention_dim)[0]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given: Tensor | None = getattr(settings, name)
        check_kind(name, given, (Tensor, type(None)), f"a tensor [prompts, tokens, {width}]")
        if given is not None and (given.dim() != 3 or given.shape[-1] != width):
            raise ConfigError(f"{name}: expected [prompts, tokens, {width}], found {list(given.shape)}")


def _fitting(uncond: Tensor, cond: Tensor, count: int | None) -> Tensor:
    """The unconditional contexts, with as many chunks as the conditional ones; ``count``: how many there have to be."""
    if count is None and cond.shape[1] % uncond.shape[1] == 0:
        uncond = uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1)
    if uncond.shape[1:] != cond.shape[1:] or len(uncond) != (count or len(uncond)):
        expected = [count or len(uncond), *cond.shape[1:]]
        raise ConfigError(f"negative_prompt_embeds: expected the prompt's shape {expected}, found {list(uncond.shape)}")
    return uncond


def _warn_of_unused_triggers(texts: Sequence[str], weighted: bool, model: DiffusionModel) -> None:
    known = list(model.textual_inversions)
    used = used_triggers(texts, known, weighted=weighted) if model.new_inversions else set[str]()
    for triggers in model.new_inversions:
        if used.isdisjoint(triggers) and not set(known).isdisjoint(triggers):
            words = " or ".join(map(repr, triggers))
            warnings.warn(f"embedding {words}: loaded, but in no prompt and no negative prompt", stacklevel=2)
    model.new_inversions.clear()


def _warn_of_strange_words(texts: Sequence[str], weighted: bool, model: DiffusionModel) -> None:
    if model.words is None or model.adapter_kinds:  # adapters may know more
        return
    chunks = (
        chunk
        for text in texts
        for chunk in prompt_tokens(model.tokenizer, text, weighted=weighted, embeddings=model.textual_inversions)
    )
    said = {token.word for chunk in chunks for token in chunk if token.vector is None and token.word.isalpha()}
    if strange := sorted(said - model.words - model.strange_words):
        model.strange_words.update(strange)
        hints = [repr(word) + (f" ({like}?)" if (like := most_like(word, model.words)) else "") for word in strange]
        name = model.made_of.get("model", "the model")
        warnings.warn(f"prompt: words that {name} has never seen: {', '.join(hints)}", stacklevel=2)
