"""The network's calls in the steps of a stage: what each image of the batch looks at, and its predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdkit.generation.conditioning import Conditioning, Look, Looks
from sdkit.generation.request import Request
from sdkit.generation.splitting import BatchSplitter
from sdkit.sampling.guidance import compose
from sdkit.viewing.attention_maps import AttentionRecorder

Rows = tuple[int, ...]
"""Rows of the table of contexts, one for each row of the network's batch."""
Network = Callable[[Tensor, int, Rows], Tensor]
"""As `Predictor.call_unet`."""


class Predictor:
    """Makes the network calls of a stage; everything that does not depend on the latent is computed once.

    extra [B, C, h, w]: channels that the UNet sees beside the latents. recorder: of attention maps, if they are asked
    for; it is told which row of a batch is whose.
    """

    def __init__(
        self,
        request: Request,
        stage: int,
        conditioning: Conditioning,
        extra: Tensor | None,
        splitter: BatchSplitter,
        recorder: AttentionRecorder | None = None,
    ) -> None:
        model, plan = request.model, request.plans[stage]
        self.unet, self.dtype, self.plan, self.splitter = model.unet, model.dtype, plan, splitter
        self.conditioning, self.recorder = conditioning, recorder
        self.extra = None if extra is None else extra.to(self.dtype)
        self.guidance, self.steps = request.settings.guidance.at_levels(plan.levels), plan.steps
        self.times = self.unet.time_projections(plan.timesteps.to(model.device, torch.float32))
        self.uncond = _of_images(request, conditioning.uncond, stage, "negative_prompt_embeds")
        self.cond = _of_images(request, conditioning.cond, stage, "prompt_embeds")
        self._owners: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, k: int, network: Network | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Call k's (unconditional, conditional) predictions for its input x [B, C, h, w], None where not needed.

        network: what to call in place of `call_unet`.
        """
        uncond, cond = self.looks(k)
        call = partial(self._part, network or self.call_unet, x, k)
        parts = self.splitter.run(lambda part: call(uncond[part], cond[part], part), len(x))

        of_uncond, of_cond = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        prediction = compose(of_uncond if uncond else None, of_cond, [look.weights for look in cond]) if cond else None
        return (of_uncond if self.guidance[k].needs_uncond else None), prediction

    def looks(self, k: int) -> tuple[list[Look], list[Look]]:
        """What each image looks at in call k, unconditionally and conditionally; [] where that is not needed."""
        now, step = self.guidance[k], self.steps[k]
        cond = self.cond[step] if now.needs_cond else []
        uncond = self.uncond[step] if now.needs_uncond or (cond and self.conditioning.is_partial) else []
        return uncond, cond

    def _part(
        self, network: Network, x: Tensor, k: int, uncond: list[Look], cond: list[Look], part: slice
    ) -> tuple[Tensor, Tensor]:
        """The predictions of a part of the batch, in one call: one for each of its unconditional rows, and one for each
        of its conditional ones."""
        inputs = x[part].to(self.dtype)
        if self.extra is not None:
            inputs = torch.cat([inputs, self.extra[part]], dim=1)
        if self.recorder is not None:
            self.recorder.places = self._places(uncond, cond)

        owners = owners_of(uncond, cond)
        if owners != tuple(range(len(inputs))):
            inputs = inputs[self._on_device(owners)]
        both = network(inputs, k, rows_of(uncond, cond))
        return both[: len(uncond)], both[len(uncond) :]

    def call_unet(self, x: Tensor, k: int, rows: Rows) -> Tensor:
        """The UNet's prediction [N, C, h, w] at call k for its input x [N, C + E, h, w], each row of which looks at a
        row of the contexts."""
        time = [projection[k : k + 1] for projection in self.times]
        return self.unet(x, self.plan.timesteps[k], None, self.conditioning.key_values(self.unet, rows), time)

    def _on_device(self, owners: tuple[int, ...]) -> Tensor:
        if owners not in self._owners:  # moved there once: each time the host would wait for the GPU
            self._owners[owners] = torch.tensor(owners, device=self.unet.device)
        return self._owners[owners]

    def _places(self, uncond: list[Look], cond: list[Look]) -> list[int | None]:
        """For each row of a batch the attention map that it counts for: that of its text, among those of its image."""
        numbers, each = self.conditioning.numbers, max(map(len, self.conditioning.texts))
        of_texts = [i * each + numbers[row] for i, look in enumerate(cond) for row in look.rows]
        return [*[None] * len(uncond), *of_texts]


def owners_of(uncond: list[Look], cond: list[Look]) -> tuple[int, ...]:
    """For each row of the network's batch the image that it belongs to."""
    return tuple(i for half in (uncond, cond) for i, look in enumerate(half) for _ in look.rows)


def rows_of(uncond: list[Look], cond: list[Look]) -> Rows:
    """For each row of the network's batch the row of the contexts that it looks at."""
    return tuple(row for look in (*uncond, *cond) for row in look.rows)


def _of_images(request: Request, looks: Looks | None, stage: int, name: str) -> list[list[Look]]:
    """By step, what each image of the batch looks at."""
    if looks is None:
        return []
    return [[prompts[row] for row in request.rows(len(prompts), name)] for prompts in looks[stage]]
