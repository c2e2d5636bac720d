"""StableDiffusion, the file to open first: the four ways from a prompt to a picture.

Each task reads its own inputs into a `Task`, `make_request` checks all that was asked for, `generate` makes the
pictures. The model's parts, loading and saving are in `diffusion_model`.

Argument names are those of diffusers' pipelines. These differences are meant: guidance scales below 1 interpolate,
every image of a batch has its own seed, strength runs from 0 (the picture as the VAE gives it back) to 1 (pure noise),
pixels that a mask keeps stay as they were, and nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from sdkit.diffusion_model import DiffusionModel
from sdkit.generation.conditioning import Prompt
from sdkit.generation.generate import generate
from sdkit.generation.options import Options, Settings, read_settings
from sdkit.generation.output import Output
from sdkit.generation.request import make_request
from sdkit.generation.tasks import Task, depth_task, image_task, inpaint_task, read_hires, text_task
from sdkit.images.depth import DepthSource
from sdkit.images.inputs import Pictures


class StableDiffusion(DiffusionModel):
    """A latent diffusion model with its tasks: pictures from a prompt, a picture, a mask, a depth map."""

    def __call__(self, prompt: Prompt = None, negative_prompt: Prompt = None, **options: Unpack[Options]) -> Output:
        """`text_to_image`; the other tasks have names of their own."""
        return self.text_to_image(prompt, negative_prompt, **options)

    def text_to_image(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        *,
        hires_scale: float | None = None,
        hires_strength: float = 0.7,
        hires_steps: int | None = None,
        hires_upscaler: str = "bilinear",
        **options: Unpack[Options],
    ) -> Output:
        """Make pictures of prompts.

        prompt and negative_prompt: one or several, with A1111's weights, tags and prompt editing (`sdkit.prompts`); the
            prompt may join several by AND. An empty prompt is the unconditional one.
        hires_scale: enlarge the latents by this and work on them again as image_to_image does: large pictures with the
            composition of small ones. hires_strength, hires_steps, hires_upscaler as in `sdkit.Hires`.
        options: see `sdkit.generation.options.Settings`.

        Prompts of one batch are padded to the same number of 75-token chunks, which a picture feels: beside a longer
        prompt the same seed gives another picture.

        Raises ConfigError for an argument without meaning, NumericalError for latents or pixels that are not finite.
        """
        settings = read_settings(options)
        hires = read_hires(hires_scale, hires_strength, hires_steps, hires_upscaler)
        return self._run(text_task(self, settings, hires), prompt, negative_prompt, settings)

    def image_to_image(
        self,
        prompt: Prompt,
        image: Pictures,
        strength: float = 0.75,
        negative_prompt: Prompt = None,
        **options: Unpack[Options],
    ) -> Output:
        """Make pictures of prompts out of pictures.

        image: one for all prompts, or one for each: Pillow images, files, arrays, or tensors [N, 3, H, W] in [0, 1].
        strength: the part of the schedule that is run. 0 gives back the picture as the VAE reconstructs it, without
            a call of the UNet; 1 starts from pure noise, as text_to_image does; the steps run are
            floor(num_inference_steps * strength), and at least 1 in between.
        options: see `sdkit.generation.options.Settings`; height and width resize the picture. Raises as text_to_image.
        """
        settings = read_settings(options)
        task = image_task(self, settings, image, strength)
        return self._run(task, prompt, negative_prompt, settings)

    def inpaint(
        self,
        prompt: Prompt,
        image: Pictures,
        mask_image: Pictures,
        strength: float = 1.0,
        negative_prompt: Prompt = None,
        *,
        mask_blur: int = 0,
        **options: Unpack[Options],
    ) -> Output:
        """Repaint a part of pictures.

        image, strength, options: as in image_to_image.
        mask_image: one or as many as pictures, of any size: white (from one half on) is repainted, or what is opaque
            where the mask was drawn in alpha; see `sdkit.images.masks.mask_to_tensor`. All other pixels of the result
            equal the picture's exactly (but for output_type "latent").
        mask_blur: the repainted region fades out over so many pixels around the mask, which then change too.

        A UNet of 9 input channels is made for this: it sees the mask and the masked picture. With one of 4, every step
        puts back the picture, at that step's noise, in the cells of the latents that the mask does not touch.
        Raises as text_to_image, and ConfigError for a mask that selects nothing or can be read in two ways.
        """
        settings = read_settings(options)
        task = inpaint_task(self, settings, image, mask_image, strength, mask_blur)
        return self._run(task, prompt, negative_prompt, settings)

    def depth_to_image(
        self,
        prompt: Prompt,
        image: Pictures,
        depth_map: DepthSource | Sequence[DepthSource] | None = None,
        strength: float = 0.75,
        negative_prompt: Prompt = None,
        **options: Unpack[Options],
    ) -> Output:
        """Make pictures of prompts that keep the depth of pictures, with a UNet of 5 input channels.

        image, strength, options: as in image_to_image.
        depth_map: larger is nearer, as in `sdkit.images.depth.read_depth`; None: the checkpoint's own network
            estimates it. Raises as text_to_image, and CheckpointError when there is no such network.
        """
        settings = read_settings(options)
        task = depth_task(self, settings, image, depth_map, strength)
        return self._run(task, prompt, negative_prompt, settings)

    def _run(self, task: Task, prompt: Prompt, negative_prompt: Prompt, settings: Settings) -> Output:
        request = make_request(self, task, prompt, negative_prompt, settings)
        changed = request.prompts.networks or self.textual_inversions or settings.attention_maps  # for this picture
        with self.lock.alone() if changed else self.lock.shared():
            return generate(request)
