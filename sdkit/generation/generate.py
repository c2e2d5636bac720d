"""From a request to its pictures: `generate`, and below it its stages in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sdkit.generation.conditioning import Conditioning, encode
from sdkit.generation.engine import Watched, calls_by_graphs
from sdkit.generation.noise import given_latents
from sdkit.generation.output import Output
from sdkit.generation.prediction import Predictor
from sdkit.generation.provenance import facts_of
from sdkit.generation.request import Request
from sdkit.generation.splitting import BatchSplitter
from sdkit.generation.tasks import Hires
from sdkit.graphs import Graphs
from sdkit.images.depth import depth_channel
from sdkit.images.masks import feather, sampled, touched
from sdkit.images.pixels import to_pil
from sdkit.networks.convolution import packed
from sdkit.networks.vae import decode_latents, encode_pictures
from sdkit.sampling.plan import Calls, Plan, make_calls
from sdkit.viewing.attention_maps import AttentionRecorder, Word, prompt_words, record_attention
from sdkit.viewing.previews import Preview, Previewer

FEWEST_TO_PACK = 4
"""Network calls that packing the weights (`sdkit.networks.convolution.packed`) costs as much as it saves in."""


@torch.no_grad()
def generate(request: Request) -> Output:
    """Make the pictures of a request.

    Raises NumericalError for latents or pixels that are not finite, ConfigError for inputs that do not fit the batch.
    """
    model, settings = request.model, request.settings
    with model.running(request.prompts.networks), model.lend_graphs() as graphs:
        conditioning = encode(request.prompts, settings, model, request.stages, graphs)
        each = max(map(len, conditioning.texts))  # texts of an image, one where its prompt is the same in all steps
        recorder = record_attention(model.unet, request.batch * each) if settings.attention_maps else nullcontext()
        bar = tqdm(total=request.calls, disable=not settings.progress, leave=False)

        with recorder as record, bar:
            run = Run(request, conditioning, bar, record, graphs)
            latents = run.first_stage()
            if request.task.hires is not None and not run.stopped:
                latents = run.second_stage(request.task.hires, latents)

        images: Any = latents if settings.output_type == "latent" else run.pixels(latents)

    if settings.output_type == "pil":
        images = to_pil(images)
        for i, image in enumerate(images):
            image.info.update(facts_of(request, i, altered_by=run.altered_by))
    elif settings.output_type == "pt":
        images = (images / 2 + 0.5).clamp(0, 1)

    return Output(
        images,
        latents,
        seeds=request.noise.seeds if settings.latents is None else [],
        num_steps_run=sum(plan.num_steps for plan in request.plans) * run.calls // max(1, request.calls),
        previews=run.previews,
        attention_maps=None if record is None else record.maps(_words(request, conditioning, each)).joined(each),
    )


def _words(request: Request, conditioning: Conditioning, each: int) -> list[list[Word]]:
    """For each image the words of its prompt's texts, ``each`` lists for it."""
    model = request.model
    length = min(int(model.tokenizer.model_max_length), int(model.text_encoder.config.max_position_embeddings))
    words_of = partial(
        prompt_words,
        model.tokenizer,
        weighted=request.settings.prompt_weighting,
        embeddings=model.textual_inversions,
        max_length=length,
    )

    words = [[words_of(text) for text in texts] + [[]] * (each - len(texts)) for texts in conditioning.texts]
    return [own for row in request.rows(len(words), "prompt") for own in words[row]]


class Run:
    """The stages of one request, and what they share: batch splitting, the progress bar, previews and callback."""

    def __init__(
        self,
        request: Request,
        conditioning: Conditioning,
        bar: Any,
        recorder: AttentionRecorder | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.request, self.conditioning, self.bar, self.recorder = request, conditioning, bar, recorder
        self.graphs = graphs
        settings, vae = request.settings, request.model.vae
        self.unet_splitter = BatchSplitter(settings.max_batch_size, fixed=settings.attention_maps)
        self.vae_splitter = BatchSplitter(settings.max_batch_size)
        self.previewer = Previewer(vae, settings.preview_every, settings.preview_mode)
        self.previews: list[Preview] = []
        self.calls = 0  # of the network, so far
        self.stopped, self.altered_by = False, list[str]()  # by callbacks, whose names these are

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
        return self.denoise(0, plan.start(initial, clean), extra, kept)

    def second_stage(self, hires: Hires, latents: Tensor) -> Tensor:
        """Enlarge the latents and work on them again; the noise goes on where the first stage left off."""
        request, plan = self.request, self.request.plans[1]
        clean = hires.enlarge(latents)
        request.noise.shape = (request.batch, clean.shape[1], clean.shape[2], clean.shape[3])
        return self.denoise(1, plan.start(request.noise.draw().to(request.dtype), clean))

    def initial_noise(self) -> Tensor:
        """A standard normal [B, C, h, w]: drawn, or the user's own."""
        request, given = self.request, self.request.settings.latents
        if given is None:
            return request.noise.initial().to(request.dtype)
        return given_latents(given, request.noise.shape, request.model.device).to(request.dtype)

    def encode(self, pictures: Tensor, sample: bool = True) -> Tensor:
        """Encode pictures [N, 3, H, W] in [-1, 1] to latents [B, C, h, w]: a sample of the posterior, or its mean."""
        request, vae = self.request, self.request.model.vae
        tiling = request.settings.vae_tiling
        parts = self.vae_splitter.run(lambda part: encode_pictures(vae, pictures[part], tiling), len(pictures))

        mean, std = (torch.cat(values).to(request.dtype) for values in zip(*parts, strict=True))
        latents = request.spread(mean, "image")
        if sample:
            noise = request.noise.draw_for_pictures(len(pictures))
            latents = latents + request.spread(std, "image") * request.spread(noise, "image")
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

    def denoise(self, stage: int, first: Tensor, extra: Tensor | None = None, kept: KeptRegion | None = None) -> Tensor:
        """Run the plan of one stage from its first latents; returns the last."""
        plan = self.request.plans[stage]
        predict = Predictor(self.request, stage, self.conditioning, extra, self.unet_splitter, self.recorder)
        calls = Calls(plan, predict, first, self.request.noise.draw, self.request.settings.guidance)
        if self.graphs is not None:
            watched = Watched(self.previewer.every > 0, self.request.settings.callback_on_step_end is not None)
            calls = calls_by_graphs(calls, predict, self.graphs, watched)

        callback = self.request.settings.callback_on_step_end  # which may change weights
        pays = callback is None and len(plan.timesteps) > FEWEST_TO_PACK
        with packed(self.request.model.unet) if pays else nullcontext():
            return make_calls(calls, partial(self.on_step, _levels_after(plan), kept))

    def on_step(
        self,
        levels: list[list[float]],
        kept: KeptRegion | None,
        k: int,
        t: float,
        latents: Tensor,
        x0: Callable[[], Tensor],
    ) -> Tensor | Literal["stop"] | None:
        """After network call k: put the kept region back, show a preview, ask the callbacks."""
        self.bar.update()
        step, self.calls = self.calls, self.calls + 1
        new = None if kept is None else kept.put_back(latents, *levels[k])

        if self.previewer.wants(step):
            shown = x0() if kept is None else kept.put_back(x0(), 1.0, 0.0)
            show = self.previewer.frames
            frames = self.vae_splitter.run(lambda part: show(shown[part], self.graphs), self.request.batch)
            images = [frame for part in frames for frame in part]
            self.previews.append(Preview(step, t, images, (latents if new is None else new).clone()))
            watching = self.request.settings.callback_on_preview
            if watching is not None and watching(self.previews[-1]) == "stop":
                self.stopped = True
                self.altered_by.append("callback_on_preview")

        callback = self.request.settings.callback_on_step_end
        if callback is None or self.stopped:
            return "stop" if self.stopped else new
        seen = latents.clone() if new is None else new  # the callback may keep them, the next call overwrites its own
        answer = callback(self.request.model, step, t, {"latents": seen})
        if isinstance(answer, dict):
            if "latents" in answer:
                self.altered_by.append("callback_on_step_end")
            return answer.get("latents", new)
        if answer is None:
            return new
        self.stopped = answer == "stop"
        self.altered_by.append("callback_on_step_end")
        return answer

    # Pixels

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode to [B, 3, H, W] in [-1, 1], and lay the kept pixels of a masked picture over it as they were."""
        request, task, vae = self.request, self.request.task, self.request.model.vae
        tiling = request.settings.vae_tiling
        parts = self.vae_splitter.run(
            lambda part: decode_latents(vae, latents[part], tiling, self.graphs), request.batch
        )
        pixels = torch.cat(parts)
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
