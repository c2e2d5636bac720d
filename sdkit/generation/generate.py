"""From a request to its pictures: `generate`, and below it its stages in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sdkit.errors import NumericalError
from sdkit.generation.conditioning import Conditioning, encode
from sdkit.generation.noise import given_latents
from sdkit.generation.provenance import facts_of
from sdkit.generation.request import Request
from sdkit.generation.splitting import BatchSplitter
from sdkit.generation.tasks import Hires
from sdkit.images.depth import depth_channel
from sdkit.images.masks import feather, sampled, touched
from sdkit.images.pixels import to_pil
from sdkit.networks.unet import ContextKeyValues
from sdkit.networks.vae import choose_tile, decode_latents
from sdkit.sampling.plan import Plan, denoise
from sdkit.viewing.attention_maps import AttentionMaps, Word, prompt_words, record_attention
from sdkit.viewing.previews import Preview, Previewer


@dataclass(frozen=True)
class Output:
    """The result of a task.

    images: a list of Pillow images ("pil"; ``sdkit.write_png(image, path, image.info)`` keeps in the PNG how they were
        made), a tensor [B, 3, H, W] in [0, 1] ("pt"), or the latents ("latent").
    latents: the final ones [B, C, h, w], in the noise predictor's scale.
    seeds: one for each image; empty when generators or latents were given.
    num_steps_run: whole sampling steps.
    attention_maps: `sdkit.attention_sheet` shows them; None where none were asked for.
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    num_steps_run: int
    previews: list[Preview] = field(default_factory=list[Preview])
    attention_maps: AttentionMaps | None = None


@torch.no_grad()
def generate(request: Request) -> Output:
    """Make the pictures of a request.

    Raises NumericalError for latents or pixels that are not finite, ConfigError for inputs that do not fit the batch.
    """
    model, settings = request.model, request.settings
    with model.running(request.prompts.networks):
        conditioning = _condition(request)
        recorder = record_attention(model.unet, request.batch) if settings.attention_maps else nullcontext()
        bar = tqdm(total=request.calls, disable=not settings.progress, leave=False)

        with recorder as record, bar:
            run = Run(request, conditioning, bar)
            latents = run.first_stage()
            if request.task.hires is not None and not run.stopped:
                latents = run.second_stage(request.task.hires, latents)

        images: Any = latents if settings.output_type == "latent" else run.pixels(latents)

    if settings.output_type == "pil":
        images = to_pil(images)
        for i, image in enumerate(images):
            image.info.update(facts_of(request, i))
    elif settings.output_type == "pt":
        images = (images / 2 + 0.5).clamp(0, 1)

    return Output(
        images,
        latents,
        seeds=request.noise.seeds if settings.latents is None else [],
        num_steps_run=sum(plan.num_steps for plan in request.plans) * run.calls // max(1, request.calls),
        previews=run.previews,
        attention_maps=None if record is None else record.maps(_words(request)),
    )


def _condition(request: Request) -> Conditioning:
    """The prompts' hidden states, a row for each image, in the UNet's dtype."""
    found = encode(request.prompts, request.settings, request.model)
    dtype = request.model.dtype
    return Conditioning(*(None if c is None else request.spread(c.to(dtype), "prompt_embeds") for c in found))


def _words(request: Request) -> list[list[Word]]:
    """For each image the words of its prompt."""
    model, texts = request.model, request.prompts.texts or [""] * request.prompts.count
    length = min(int(model.tokenizer.model_max_length), int(model.text_encoder.config.max_position_embeddings))
    words_of = partial(
        prompt_words,
        model.tokenizer,
        weighted=request.settings.prompt_weighting,
        embeddings=model.textual_inversions,
        max_length=length,
    )

    words = [words_of(text) for text in texts]
    return [words[row] for row in request.rows(len(words), "prompt")]


class Run:
    """The stages of one request, and what they share: batch splitting, the progress bar, previews and callback."""

    def __init__(self, request: Request, conditioning: Conditioning, bar: Any) -> None:
        self.request, self.conditioning, self.bar = request, conditioning, bar
        settings, vae = request.settings, request.model.vae
        self.unet_splitter = BatchSplitter(settings.max_batch_size, fixed=settings.attention_maps)
        self.vae_splitter = BatchSplitter(settings.max_batch_size)
        self.previewer = Previewer(vae, settings.preview_every, settings.preview_mode)
        self.previews: list[Preview] = []
        self.calls = 0  # of the network, so far
        self.stopped = False  # by the callback

    # Latents

    def first_stage(self) -> Tensor:
        """Run the task itself; returns its latents after the last step."""
        request, task, plan = self.request, self.request.task, self.request.plans[0]
        config = request.model.unet.config
        blends = task.mask is not None and config.in_channels == request.model.vae.config.latent_channels

        # The order of these draws is fixed: the posterior, the initial noise, the masked picture's posterior.
        clean = None
        if task.picture is not None and (task.strength < 1 or blends):
            clean = self.encode(task.picture, sample=task.strength > 0)
        initial = self.initial_noise()
        extra = None if blends else self.extra_channels()

        kept = None
        if blends and clean is not None and task.mask is not None:
            cells = touched(task.mask, (initial.shape[2], initial.shape[3]))
            kept = KeptRegion(clean, initial, request.spread(cells.to(request.dtype), "mask_image"))
        return self.denoise(plan, plan.start(initial, clean), extra, kept)

    def second_stage(self, hires: Hires, latents: Tensor) -> Tensor:
        """Enlarge the latents and work on them again; the noise goes on where the first stage left off."""
        request, plan = self.request, self.request.plans[1]
        clean = hires.enlarge(latents)
        request.noise.shape = (request.batch, clean.shape[1], clean.shape[2], clean.shape[3])
        return self.denoise(plan, plan.start(request.noise.draw().to(request.dtype), clean))

    def initial_noise(self) -> Tensor:
        """A standard normal [B, C, h, w]: drawn, or the user's own."""
        request, given = self.request, self.request.settings.latents
        if given is None:
            return request.noise.initial().to(request.dtype)
        return given_latents(given, request.noise.shape, request.model.device).to(request.dtype)

    def encode(self, pictures: Tensor, sample: bool = True) -> Tensor:
        """Encode pictures [N, 3, H, W] in [-1, 1] to latents [B, C, h, w]: a sample of the posterior, or its mean."""
        request, vae = self.request, self.request.model.vae
        tile = choose_tile(vae, pictures.shape[2], pictures.shape[3], request.settings.vae_tiling)
        posteriors = self.vae_splitter.run(
            lambda part: vae.encode(pictures[part].to(vae.device, vae.dtype), tile), len(pictures)
        )

        latents = request.spread(torch.cat([p.mean for p in posteriors]).to(request.dtype), "image")
        if sample:
            std = request.spread(torch.cat([p.std for p in posteriors]).to(request.dtype), "image")
            latents = latents + std * request.spread(request.noise.draw_for_pictures(len(pictures)), "image")

        if not bool(latents.isfinite().all()):
            raise NumericalError(f"VAE encoder: latents are not finite in {vae.dtype}".replace("torch.", ""))
        return latents * vae.config.scaling_factor

    def extra_channels(self) -> Tensor | None:
        """Channels [B, C, h, w] beside the latents: depth, or the mask and the masked picture's latents."""
        request, task = self.request, self.request.task
        size = request.noise.shape[2:]
        if task.depth is not None:
            return request.spread(depth_channel(task.depth, size), "depth_map")
        if task.picture is None or task.mask is None:
            return None

        mask = request.spread(sampled(task.mask, size).to(request.dtype), "mask_image")
        masked = task.picture * (1 - task.mask)  # 0 is mid grey
        return torch.cat([mask, self.encode(masked)], dim=1)

    # The loop

    def denoise(self, plan: Plan, first: Tensor, extra: Tensor | None = None, kept: KeptRegion | None = None) -> Tensor:
        """Run one plan from its first latents; returns the last."""
        predict = Predictor(self.request, plan, self.conditioning, extra, self.unet_splitter)
        on_step = partial(self.on_step, _levels_after(plan), kept)
        return denoise(plan, predict, first, self.request.noise.draw, self.request.settings.guidance, on_step)

    def on_step(
        self,
        levels: list[list[float]],
        kept: KeptRegion | None,
        k: int,
        t: float,
        latents: Tensor,
        x0: Callable[[], Tensor],
    ) -> Tensor | Literal["stop"] | None:
        """After network call k: put the kept region back, show a preview, ask the callback."""
        self.bar.update()
        step, self.calls = self.calls, self.calls + 1
        new = None if kept is None else kept.put_back(latents, *levels[k])

        if self.previewer.wants(step):
            shown = x0() if kept is None else kept.put_back(x0(), 1.0, 0.0)
            frames = self.vae_splitter.run(lambda part: self.previewer.frames(shown[part]), self.request.batch)
            self.previews.append(Preview(step, t, [frame for part in frames for frame in part]))

        callback = self.request.settings.callback_on_step_end
        if callback is None:
            return new
        answer = callback(self.request.model, step, t, {"latents": latents if new is None else new})
        if isinstance(answer, dict):
            return answer.get("latents", new)
        self.stopped = answer == "stop"
        return new if answer is None else answer

    # Pixels

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode to [B, 3, H, W] in [-1, 1], and lay the kept pixels of a masked picture over it as they were."""
        request, task, vae = self.request, self.request.task, self.request.model.vae
        tiling = request.settings.vae_tiling
        parts = self.vae_splitter.run(lambda part: decode_latents(vae, latents[part], tiling), request.batch)
        pixels = torch.cat(parts)
        if not bool(pixels.isfinite().all()):
            raise NumericalError("VAE decoder: pixels are not finite")
        if task.picture is None or task.mask is None:
            return pixels

        weight = request.spread(feather(task.mask, task.mask_blur).to(pixels.dtype), "mask_image")
        return torch.lerp(request.spread(task.picture.to(pixels.dtype), "image"), pixels.clamp(-1, 1), weight)


@dataclass(frozen=True)
class KeptRegion:
    """Makes a UNet that knows no masks keep a part of a picture: after each step it is put back.

    clean, initial [B, C, h, w]: the picture's latents, and the initial noise; mask [B, 1, h, w], 1 where the picture is
    repainted.
    """

    clean: Tensor
    initial: Tensor
    mask: Tensor

    def put_back(self, latents: Tensor, signal: float, noise: float) -> Tensor:
        """``latents`` with the kept part of the picture at that level of noise."""
        return torch.lerp(signal * self.clean + noise * self.initial, latents, self.mask)


def _levels_after(plan: Plan) -> list[list[float]]:
    """(signal, noise) after each call. Even where a sampler ends at some noise, the kept region ends clean."""
    levels: list[list[float]] = plan.levels[1:].tolist()
    return [*levels[:-1], [1.0, 0.0]]


class Predictor:
    """Makes the network calls of the loop; everything that does not depend on the latent is computed once, here.

    extra [B, C, h, w]: channels that the UNet sees beside the latents.
    """

    def __init__(
        self,
        request: Request,
        plan: Plan,
        conditioning: Conditioning,
        extra: Tensor | None,
        splitter: BatchSplitter,
    ) -> None:
        model = request.model
        self.unet, self.dtype, self.plan, self.splitter = model.unet, model.dtype, plan, splitter
        self.conditioning = conditioning
        self.extra = None if extra is None else extra.to(self.dtype)
        self.guidance = request.settings.guidance.at_levels(plan.levels)
        self.times = self.unet.time_projections(plan.timesteps.to(model.device, torch.float32))
        self._projected: dict[tuple[bool, bool, int, int], ContextKeyValues] = {}

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        """Call k's (unconditional, conditional) predictions for its input x [B, C, h, w], None where not needed."""
        needs = (self.guidance[k].needs_uncond, self.guidance[k].needs_cond)
        parts = self.splitter.run(lambda part: self._part(x, k, needs, part), len(x))
        halves = iter(torch.cat(parts, dim=1))
        return (next(halves) if needs[0] else None), (next(halves) if needs[1] else None)

    def _part(self, x: Tensor, k: int, needs: tuple[bool, bool], part: slice) -> Tensor:
        """Both predictions of a part of the batch in one call: [1 or 2, images, C, h, w]."""
        inputs = x[part].to(self.dtype)
        if self.extra is not None:
            inputs = torch.cat([inputs, self.extra[part]], dim=1)
        time = [projection[k : k + 1] for projection in self.times]
        context = self._context_kv(needs, part.start, part.stop)
        both = self.unet(torch.cat([inputs] * sum(needs)), self.plan.timesteps[k], None, context, time)
        return both.unflatten(0, (sum(needs), -1))

    def _context_kv(self, needs: tuple[bool, bool], first: int, last: int) -> ContextKeyValues:
        """The keys and values of the prompts of images ``first`` to ``last``, computed when they are first needed."""
        key = (*needs, first, last)
        if key not in self._projected:
            rows = [
                c[first:last] for c, needed in zip(self.conditioning, needs, strict=True) if needed and c is not None
            ]
            self._projected[key] = self.unet.context_kv(torch.cat(rows))
        return self._projected[key]
