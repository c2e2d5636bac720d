"""A `Request`: all that a call of a task asks for, read and checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.conditioning import Prompt, Prompts, Stage, read_prompts
from sdkit.generation.noise import Noise
from sdkit.generation.options import Settings
from sdkit.generation.tasks import Task
from sdkit.sampling.plan import Plan


@dataclass(frozen=True)
class Request:
    """Everything that decides the pictures of one call.

    plans: the task's, and that of its second stage where there is one. noise: where the batch's normals come from.
    """

    model: DiffusionModel
    task: Task
    prompts: Prompts
    settings: Settings
    plans: list[Plan]
    noise: Noise

    @property
    def batch(self) -> int:
        """How many images are made."""
        return self.prompts.count * self.settings.num_images_per_prompt

    @property
    def stages(self) -> list[Stage]:
        """The steps of each plan, as prompt editing counts them."""
        steps = [steps for steps, _ in _stages(self.task, self.settings)]
        each = zip(steps, [None, *steps[:-1]], self.plans, strict=True)
        return [Stage(own, before, plan.num_steps) for own, before, plan in each]

    @property
    def calls(self) -> int:
        """How often the network is called, over all plans."""
        return sum(len(plan.timesteps) for plan in self.plans)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents between the steps: float32, or the model's if that is wider."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def rows(self, count: int, name: str) -> list[int]:
        """For each image of the batch, which of ``count`` things it takes: the only one, its prompt's, or its own."""
        if count not in (1, self.prompts.count, self.batch):
            raise ConfigError(f"{name}: expected 1, or {self.prompts.count}, one for each prompt; found {count}")
        each = self.batch // count
        return [i // each for i in range(self.batch)]

    def spread(self, tensor: Tensor, name: str) -> Tensor:
        """Repeat a tensor [count, ...] to one [B, ...] by `rows`, on the device."""
        return tensor.to(self.model.device)[self.rows(len(tensor), name)]


def make_request(
    model: DiffusionModel, task: Task, prompt: Prompt, negative_prompt: Prompt, settings: Settings
) -> Request:
    """Read the prompts, plan the sampling and set up the noise. Raises ConfigError for what does not fit together."""
    prompts = read_prompts(prompt, negative_prompt, settings, model.textual_inversions)
    batch = prompts.count * settings.num_images_per_prompt
    if settings.attention_maps and batch > (settings.max_batch_size or batch):
        raise ConfigError(f"attention_maps: expected a max_batch_size of at least {batch}, all the batch")

    plans = _plans(model, task, settings)
    config = model.vae.config
    shape = (batch, config.latent_channels, task.height // config.factor, task.width // config.factor)
    noise = Noise(shape, settings.seed, settings.generator, model.device, model.dtype, settings.variation)
    return Request(model, task, prompts, settings, plans, noise)


def _plans(model: DiffusionModel, task: Task, settings: Settings) -> list[Plan]:
    """The plan of each stage."""
    return [
        model.make_plan(steps, settings.sampler, settings.sigmas, settings.timestep_spacing, settings.eta, strength)
        for steps, strength in _stages(task, settings)
    ]


def _stages(task: Task, settings: Settings) -> list[tuple[int, float]]:
    """Each stage's steps, and the part of them that is run."""
    first = (settings.num_inference_steps, task.strength)
    if task.hires is None:
        return [first]
    return [first, (task.hires.steps or settings.num_inference_steps, task.hires.strength)]
