"""One loop for the four tasks: from words, and a task's own inputs, to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sdkit.attention_maps import AttentionMaps, Word, prompt_words, record_attention
from sdkit.context import encode_wording, read_wording
from sdkit.denoise import Predict, denoise
from sdkit.depth import depth_channel
from sdkit.errors import ConfigError, NumericalError
from sdkit.image import to_pil
from sdkit.inputs import feather
from sdkit.noise import Noise, given_latents
from sdkit.options import Settings
from sdkit.parts import Parts
from sdkit.plan import Plan
from sdkit.preview import Preview, Previewer
from sdkit.provenance import facts_of
from sdkit.tasks import Hires, Task
from sdkit.tiling import choose_tile
from sdkit.vae import decode_latents

if TYPE_CHECKING:
    from sdkit.pipeline import StableDiffusion


@dataclass(frozen=True)
class Output:
    """What a task returns.

    images: a list of Pillow images ("pil"; ``sdkit.image.write_png(image, path, image.info)`` keeps in the PNG what
        made them), a tensor [B, 3, H, W] in [0, 1] ("pt"), or the latents ("latent").
    latents: the final ones [B, C, h, w], in the noise predictor's scale.
    seeds: one for each image; empty when generators or latents were given.
    num_steps_run: whole sampling steps.
    attention_maps: `sdkit.attention_maps.attention_sheet` shows them; None where none were asked for.
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    num_steps_run: int
    previews: list[Preview] = field(default_factory=list[Preview])
    attention_maps: AttentionMaps | None = None


class Contexts(NamedTuple):
    """What the UNet looks at [B, M, D], each None where the guidance needs none."""

    uncond: Tensor | None
    cond: Tensor | None


Blend = Callable[[Tensor, float, float], Tensor]
"""(latents, signal, noise) -> latents whose kept region is signal * picture + noise * initial noise."""


class Generation:
    """One call of a task. `run` does it all; the other methods are its stages, in order."""

    def __init__(
        self,
        sd: StableDiffusion,
        task: Task,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        settings: Settings,
    ) -> None:
        self.sd, self.task, self.settings = sd, task, settings
        self.guidance = settings.guidance
        self.wording = read_wording(prompt, negative_prompt, settings)
        self.batch = self.wording.count * settings.num_images_per_prompt
        self.plans = self._plans()
        factor, channels = sd.vae.config.factor, sd.vae.config.latent_channels
        shape = (self.batch, channels, task.height // factor, task.width // factor)
        self.noise = Noise(shape, settings.seed, settings.generator, sd.device, sd.dtype, settings.variation)
        if settings.attention_maps and self.batch > (settings.max_batch_size or self.batch):
            raise ConfigError(f"attention_maps: expected a max_batch_size of at least {self.batch}, all the batch")
        self.unet_parts = Parts(settings.max_batch_size, fixed=settings.attention_maps)
        self.vae_parts = Parts(settings.max_batch_size)
        self.previewer = Previewer(sd.vae, settings.preview_every, settings.preview_mode)
        self.previews: list[Preview] = []
        self.calls = 0
        self.stopped = False  # by the callback
        self.work = torch.promote_types(sd.dtype, torch.float32)  # what latents are kept in

    def run(self) -> Output:
        """Raises NumericalError for latents or pixels that are not finite, ConfigError for what does not fit."""
        sd, calls = self.sd, sum(len(plan.timesteps) for plan in self.plans)
        with sd.running(self.wording.networks):
            contexts = self._contexts()
            recorder = record_attention(sd.unet, self.batch) if self.settings.attention_maps else nullcontext()
            bar = tqdm(total=calls, disable=not self.settings.progress, leave=False)
            with recorder as record, bar as self.bar:
                latents = self._first_stage(contexts)
                if self.task.hires is not None and not self.stopped:
                    latents = self._second_stage(self.task.hires, latents, contexts)
            images: Any = latents if self.settings.output_type == "latent" else self._pixels(latents)
        if self.settings.output_type == "pil":
            images = to_pil(images)
            for i, image in enumerate(images):
                image.info.update(facts_of(self, i))
        elif self.settings.output_type == "pt":
            images = (images / 2 + 0.5).clamp(0, 1)
        seeds = self.noise.seeds if self.settings.latents is None else []
        steps = sum(plan.num_steps for plan in self.plans) * self.calls // max(1, calls)
        maps = None if record is None else record.maps(self._words())
        return Output(images, latents, seeds, steps, self.previews, maps)

    def _words(self) -> list[list[Word]]:
        """For each image the words of its prompt."""
        sd, texts = self.sd, self.wording.texts or [""] * self.wording.count
        length = min(int(sd.tokenizer.model_max_length), int(sd.text_encoder.config.max_position_embeddings))
        words = [
            prompt_words(sd.tokenizer, text, weighted=self.settings.prompt_weighting,
                         embeddings=sd.textual_inversions, max_length=length)
            for text in texts
        ]  # fmt: skip
        return [words[row] for row in self.rows(len(words), "prompt")]

    def rows(self, count: int, name: str) -> list[int]:
        """For each image of the batch which of ``count`` things it takes: the same, its prompt's, or its own."""
        if count not in (1, self.wording.count, self.batch):
            raise ConfigError(f"{name}: expected 1, or {self.wording.count}, one for each prompt; found {count}")
        each = self.batch // count
        return [i // each for i in range(self.batch)]

    def _spread(self, tensor: Tensor, name: str) -> Tensor:
        """A tensor [count, ...] as one [B, ...], on the device."""
        return tensor.to(self.sd.device)[self.rows(len(tensor), name)]

    def _plans(self) -> list[Plan]:
        """The plan of each stage."""
        s, hires = self.settings, self.task.hires
        stages = [(s.num_inference_steps, self.task.strength)]
        if hires is not None:
            stages.append((hires.steps or s.num_inference_steps, hires.strength))
        return [
            self.sd.make_plan(steps, s.sampler, s.sigmas, s.timestep_spacing, s.eta, strength)
            for steps, strength in stages
        ]

    def _contexts(self) -> Contexts:
        sd, config = self.sd, self.sd.unet.config
        width = config.per_block(config.cross_attention_dim)[0]
        cond, uncond = encode_wording(
            self.wording, self.settings, sd.tokenizer, sd.text_encoder, width, sd.textual_inversions
        )
        spread = [c if c is None else self._spread(c.to(sd.dtype), "prompt_embeds") for c in (uncond, cond)]
        return Contexts(*spread)

    def _first_stage(self, contexts: Contexts) -> Tensor:
        """The task itself; answers its latents after the last step."""
        task, plan = self.task, self.plans[0]
        repaints = task.mask is not None and self.sd.unet.config.in_channels == self.sd.vae.config.latent_channels
        clean = None
        if task.picture is not None and (task.strength < 1 or repaints):
            clean = self._encode(task.picture, sample=task.strength > 0)
        if self.settings.latents is None:
            initial = self.noise.initial()
        else:
            initial = given_latents(self.settings.latents, self.noise.shape, self.sd.device)
        initial = initial.to(self.work)
        extra = None if repaints else self._extra_channels()
        blend = self._blend(clean, initial) if repaints and clean is not None else None
        return self._denoise(plan, plan.start(initial, clean), contexts, extra, blend)

    def _second_stage(self, hires: Hires, latents: Tensor, contexts: Contexts) -> Tensor:
        """The latents enlarged and worked on again; the noise goes on where the first stage left off."""
        clean, plan = hires.enlarge(latents), self.plans[1]
        self.noise.shape = (self.batch, clean.shape[1], clean.shape[2], clean.shape[3])
        return self._denoise(plan, plan.start(self.noise.draw().to(self.work), clean), contexts)

    def _encode(self, pictures: Tensor, sample: bool = True) -> Tensor:
        """Pictures [N, 3, H, W] in [-1, 1] to latents [B, C, h, w]: a sample of the posterior, or its mean."""
        vae = self.sd.vae
        tile = choose_tile(vae, pictures.shape[2], pictures.shape[3], self.settings.vae_tiling)
        posteriors = self.vae_parts.run(
            lambda part: vae.encode(pictures[part].to(vae.device, vae.dtype), tile), len(pictures)
        )
        latents = self._spread(torch.cat([p.mean for p in posteriors]).to(self.work), "image")
        if sample:
            std = self._spread(torch.cat([p.std for p in posteriors]).to(self.work), "image")
            latents = latents + std * self._spread(self.noise.draw_for_pictures(len(pictures)), "image")
        if not bool(latents.isfinite().all()):
            raise NumericalError(f"VAE encoder: latents are not finite in {vae.dtype}".replace("torch.", ""))
        return latents * vae.config.scaling_factor

    def _extra_channels(self) -> Tensor | None:
        """What the UNet sees beside the latents, [B, C, h, w]: depth, or the mask and the masked picture's latents."""
        task = self.task
        if task.depth is not None:
            return self._spread(depth_channel(task.depth, self.noise.shape[2:]), "depth_map")
        if task.picture is None or task.mask is None:
            return None
        masked = task.picture * (1 - task.mask)  # 0 is mid grey
        return torch.cat([self._latent_mask(task.mask), self._encode(masked)], dim=1)

    def _latent_mask(self, mask: Tensor) -> Tensor:
        """[B, 1, h, w], zeros and ones: the nearest pixel's."""
        return self._spread(F.interpolate(mask, self.noise.shape[2:], mode="nearest").to(self.work), "mask_image")

    def _blend(self, clean: Tensor, initial: Tensor) -> Blend:
        """How a UNet that knows no masks is made to keep a region."""
        assert self.task.mask is not None
        mask = self._latent_mask(self.task.mask)
        return lambda latents, signal, noise: torch.lerp(signal * clean + noise * initial, latents, mask)

    def _denoise(
        self, plan: Plan, first: Tensor, contexts: Contexts, extra: Tensor | None = None, blend: Blend | None = None
    ) -> Tensor:
        """Run one plan."""
        levels: list[list[float]] = plan.levels.tolist()
        levels[-1] = [1.0, 0.0]  # where a sampler ends at some noise, the kept region is the clean picture's

        def on_step(k: int, t: float, now: Tensor, x0: Callable[[], Tensor]) -> Tensor | Literal["stop"] | None:
            self.bar.update()
            step, self.calls = self.calls, self.calls + 1
            new = None if blend is None else blend(now, *levels[k + 1])
            if self.previewer.wants(step):
                shown = x0() if blend is None else blend(x0(), 1.0, 0.0)
                frames = self.vae_parts.run(lambda part: self.previewer.frames(shown[part]), self.batch)
                self.previews.append(Preview(step, t, [frame for part in frames for frame in part]))
            if self.settings.callback_on_step_end is None:
                return new
            state = {"latents": now if new is None else new}
            answer = self.settings.callback_on_step_end(self.sd, step, t, state)
            if isinstance(answer, dict):
                return answer.get("latents", new)
            self.stopped = answer == "stop"
            return new if answer is None else answer

        predict = self._predictor(plan, contexts, extra)
        return denoise(plan, predict, first, self.noise.draw, self.guidance, on_step)

    def _predictor(self, plan: Plan, contexts: Contexts, extra: Tensor | None) -> Predict:
        """The network call of the loop, with all that does not depend on the latent computed here, once."""
        unet, dtype = self.sd.unet, self.sd.dtype
        times = unet.time_projections(plan.timesteps.to(self.sd.device, torch.float32))
        in_force = self.guidance.along(plan)
        extra = None if extra is None else extra.to(dtype)

        @cache
        def context_kv(needs: tuple[bool, bool], first: int, last: int) -> Any:
            rows = [c[first:last] for c, needed in zip(contexts, needs, strict=True) if needed and c is not None]
            return unet.context_kv(torch.cat(rows))

        def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
            needs = (in_force[k].needs_uncond, in_force[k].needs_cond)
            time = [projection[k : k + 1] for projection in times]

            def call(part: slice) -> Tensor:
                inputs = x[part].to(dtype)
                inputs = inputs if extra is None else torch.cat([inputs, extra[part]], dim=1)
                kv = context_kv(needs, part.start, part.stop)
                return unet(torch.cat([inputs] * sum(needs)), plan.timesteps[k], None, kv, time).unflatten(
                    0, (sum(needs), -1)
                )

            halves = iter(torch.cat(self.unet_parts.run(call, len(x)), dim=1))
            return (next(halves) if needs[0] else None), (next(halves) if needs[1] else None)

        return predict

    def _pixels(self, latents: Tensor) -> Tensor:
        """Decoded, and the kept pixels of a masked picture laid over it as they were: [B, 3, H, W]."""
        vae, tiling = self.sd.vae, self.settings.vae_tiling
        pixels = torch.cat(self.vae_parts.run(lambda part: decode_latents(vae, latents[part], tiling), self.batch))
        if not bool(pixels.isfinite().all()):
            raise NumericalError("VAE decoder: pixels are not finite")
        task = self.task
        if task.picture is None or task.mask is None:
            return pixels
        weight = self._spread(feather(task.mask, task.mask_blur).to(pixels.dtype), "mask_image")
        return torch.lerp(self._spread(task.picture.to(pixels.dtype), "image"), pixels.clamp(-1, 1), weight)
