"""StableDiffusion: a model's parts, and the four ways from a prompt to a picture.

Argument names are those of diffusers' pipelines. What differs on purpose: guidance scales below 1 interpolate, every
image of a batch has its own seed, strength runs from 0 (the picture as the VAE gives it back) to 1 (pure noise), pixels
that a mask keeps stay as they were, and nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

import sdkernels
from sdkit.checkpoint import Components, load_folder, save_folder
from sdkit.depth import DepthEstimator, DepthSource
from sdkit.devices import default_dtype, find_device
from sdkit.errors import CheckpointError, ConfigError
from sdkit.generation import Generation, Output
from sdkit.inputs import Pictures
from sdkit.options import Options, Settings
from sdkit.plan import Plan, make_plan
from sdkit.prompts import ExtraNetwork
from sdkit.scheduler_config import read_scheduler_config, write_scheduler_config
from sdkit.tasks import Hires, Task, depth_task, image_task, inpaint_task, text_task

MODELS = Path(__file__).parent / "models"
"""The models that ship with us, each a diffusers folder."""

Prompt = str | Sequence[str] | None
ApplyNetworks = Callable[[Sequence[ExtraNetwork]], AbstractContextManager[None]]


class StableDiffusion:
    """A latent diffusion model: unet, vae, text_encoder, tokenizer, schedule.

    ``plan_defaults`` are the arguments of ``make_plan`` that the model's scheduler configuration stands for.
    ``extra_networks`` says for each kind of tag ("lora", "hypernet") how the networks that a prompt's tags of this kind
    name, ``<lora:name:0.8>``, are in force while its pictures are made: a context manager that raises ConfigError for
    a name that it does not know. ``textual_inversions`` holds for each trigger its vectors [n, D].
    """

    def __init__(self, components: Components, backend: str | None = None) -> None:
        self.unet, self.vae = components.unet, components.vae
        self.text_encoder: Any = components.text_encoder
        self.tokenizer: Any = components.tokenizer
        self.scheduler_config, self.extra = components.scheduler_config, components.extra
        self.schedule, self.plan_defaults = read_scheduler_config(components.scheduler_config)
        if backend not in (None, *sdkernels.BACKENDS):
            raise ConfigError(f"backend: expected {', '.join(sdkernels.BACKENDS)} or None, found {backend!r}")
        self.backend = backend
        self.extra_networks: dict[str, ApplyNetworks] = {}
        self.textual_inversions: dict[str, Tensor] = {}
        try:
            sdkernels.current()
        except ValueError as error:  # what the environment names
            raise ConfigError(str(error)) from None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tabletop",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load a model that ships with us by its name, or a diffusers folder by its path.

        ``device`` is the GPU if there is one, else the CPU; ``dtype`` float16 on a GPU, else float32; ``backend``
        as in ``sdkernels.backend``, None for the one in force. Raises CheckpointError.
        """
        device = find_device(device)
        shipped = MODELS / str(model)
        names = sorted(p.parent.name for p in MODELS.glob("*/model_index.json"))
        folder = shipped if str(model) in names else Path(model)
        if not folder.exists():
            raise CheckpointError(f"{model}: no such folder; models that ship with sdkit: {', '.join(names)}")
        return cls(load_folder(folder, dtype=dtype or default_dtype(device), variant=variant), backend).to(device)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        preset: str | None = None,
        prediction_type: str | None = None,
        use_ema: bool = False,
    ) -> Self:
        """Load a ``.safetensors`` or ``.ckpt`` file in the layout of CompVis and Stability.

        ``preset``, ``prediction_type`` and ``use_ema`` as in ``sdkit.single_file.load_single_file``, the others as in
        ``from_pretrained``. Raises CheckpointError.
        """
        from sdkit.single_file import load_single_file

        device = find_device(device)
        components = load_single_file(
            path, preset=preset, prediction_type=prediction_type, use_ema=use_ema,
            dtype=dtype or default_dtype(device),
        )  # fmt: skip
        return cls(components, backend).to(device)

    @property
    def components(self) -> Components:
        """The parts, as the files have them."""
        config = self.scheduler_config
        if read_scheduler_config(config) != (self.schedule, self.plan_defaults):
            config = write_scheduler_config(self.schedule, self.plan_defaults)
        return Components(self.unet, self.vae, self.text_encoder, self.tokenizer, config, self.extra)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move every network to ``device`` and cast it to ``dtype``, either may be given first; returns self."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = None if device is None else find_device(device)
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device=device, dtype=dtype)
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder. Raises CheckpointError when that is not possible."""
        save_folder(self.components, folder, dtype)

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one ``.safetensors`` file in the layout of CompVis and Stability. Raises CheckpointError."""
        from sdkit.single_file import save_single_file

        save_single_file(self.components, path, dtype=dtype)

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

        prompt and negative_prompt: one or several, with A1111's weights and tags.
        hires_scale: enlarge the latents by this and work on them again as image_to_image does: large pictures with the
            composition of small ones. hires_strength, hires_steps, hires_upscaler as in `sdkit.tasks.Hires`.
        options: see `sdkit.options.Options`.

        Prompts of one batch are padded to the same number of 75-token chunks, which a picture feels: beside a longer
        prompt the same seed gives another picture.

        Raises ConfigError for an argument without meaning, NumericalError for latents or pixels that are not finite.
        """
        settings = Settings(**options)
        hires = None if hires_scale is None else Hires(hires_scale, hires_strength, hires_steps, hires_upscaler)
        return self._generate(text_task(self, settings, hires), prompt, negative_prompt, settings)

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
        options: see `sdkit.options.Options`; height and width resize the picture. Raises as text_to_image.
        """
        settings = Settings(**options)
        task = image_task(self, settings, image, strength)
        return self._generate(task, prompt, negative_prompt, settings)

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
        mask_image: one or as many as pictures, of any size: white (from one half on) is repainted. All other pixels of
            the result equal the picture's exactly (but for output_type "latent").
        mask_blur: the repainted region fades out over so many pixels around the mask, which then change too.

        A UNet of 9 input channels is made for this: it sees the mask and the masked picture. With one of 4, every step
        puts back the picture, at that step's noise, where the mask keeps it. Raises as text_to_image.
        """
        settings = Settings(**options)
        task = inpaint_task(self, settings, image, mask_image, strength, mask_blur)
        return self._generate(task, prompt, negative_prompt, settings)

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
        depth_map: larger is nearer, as in `sdkit.depth.read_depth`; None estimates it by the checkpoint's own network.
            Raises as text_to_image, and CheckpointError when there is no such network.
        """
        settings = Settings(**options)
        task = depth_task(self, settings, image, depth_map, strength)
        return self._generate(task, prompt, negative_prompt, settings)

    @torch.no_grad()
    def _generate(self, task: Task, prompt: Prompt, negative_prompt: Prompt, settings: Settings) -> Output:
        return Generation(self, task, prompt, negative_prompt, settings).run()

    @cached_property
    def depth_estimator(self) -> DepthEstimator:
        """The checkpoint's own, loaded when it is first needed. Raises CheckpointError when it has none."""
        return DepthEstimator(self.extra)

    def load_vae(self, path: str | Path) -> None:
        """Put the VAE of a single file or a diffusers folder in place of this model's.

        Raises CheckpointError for a file that holds none, or one with latents of another shape.
        """
        from sdkit.single_file import load_vae_file

        vae = load_vae_file(path, dtype=self.vae.dtype).to(self.vae.device)
        own, new = ((v.config.latent_channels, v.config.factor) for v in (self.vae, vae))
        if own != new:
            raise CheckpointError(
                f"{path}: expected a VAE of {own[0]} latent channels and factor {own[1]}, found {new[0]} and {new[1]}"
            )
        self.vae = vae

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Read learned vectors that stand for ``token`` (the file's own name for them when None) in prompts.

        Returns the token. Raises CheckpointError for a file of another format or made for another text encoder.
        """
        from sdkit.textual_inversion import load_textual_inversion

        found = load_textual_inversion(path, token, int(self.text_encoder.config.hidden_size))
        self.textual_inversions[found.token] = found.vectors
        return found.token

    def make_plan(
        self,
        num_inference_steps: int,
        sampler: str | None = None,
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        eta: float = 0.0,
        strength: float = 1.0,
    ) -> Plan:
        """``sdkit.make_plan`` with this model's schedule; None stands for the model's own setting.

        Another sampler than the model's takes its own solver, and the rest of the model's settings.
        """
        own = self.plan_defaults
        if sampler not in (None, own["sampler"]):
            solver = ("solver_order", "solver_type", "original_inference_steps")
            own = {name: value for name, value in own.items() if name not in solver}
        given = {"sampler": sampler, "sigmas": sigmas, "timestep_spacing": timestep_spacing}
        arguments: dict[str, Any] = own | {name: value for name, value in given.items() if value is not None}
        return make_plan(
            schedule=self.schedule, num_inference_steps=num_inference_steps, eta=eta, strength=strength, **arguments
        )

    @contextlib.contextmanager
    def running(self, networks: Sequence[ExtraNetwork] = ()) -> Generator[None]:
        """The kernels that this model was asked to use, and the extra networks that a prompt's tags name, in force.

        Raises ConfigError for a kind of tag that nobody registered in ``extra_networks``.
        """
        kinds = {network.kind for network in networks}
        if unknown := sorted(kinds - self.extra_networks.keys()):
            known = ", ".join(sorted(self.extra_networks)) or "none"
            raise ConfigError(f"prompt: <{unknown[0]}:...>: expected a kind in this model's extra_networks: {known}")
        try:
            with contextlib.ExitStack() as stack:
                if self.backend is not None:
                    stack.enter_context(sdkernels.backend(self.backend))
                for kind in sorted(kinds):
                    named = [network for network in networks if network.kind == kind]
                    stack.enter_context(self.extra_networks[kind](named))
                yield
        except sdkernels.UnsupportedError as error:
            raise ConfigError(str(error)) from None
