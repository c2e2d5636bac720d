"""A latent diffusion model's parts: loaded, moved, saved; its sampling plans; the extra networks that prompts name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import sdkernels
from sdkit.checkpoints import loading
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.scheduler_config import read_scheduler_config, write_scheduler_config
from sdkit.checkpoints.textual_inversion import load_textual_inversion
from sdkit.devices import default_dtype, find_device
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.depth_estimator import DepthEstimator
from sdkit.prompts.tags import ExtraNetwork
from sdkit.sampling.plan import Plan
from sdkit.sampling.planning import make_plan

ApplyNetworks = Callable[[Sequence[ExtraNetwork]], AbstractContextManager[None]]


class DiffusionModel:
    """A latent diffusion model: unet, vae, text_encoder, tokenizer, schedule.

    ``plan_defaults`` are the arguments of ``make_plan`` that the model's scheduler configuration stands for.
    ``extra_networks`` holds for each kind of tag ("lora", "hypernet") a function that puts the networks named by a
    prompt's tags of this kind, ``<lora:name:0.8>``, in force while its pictures are made: a context manager that raises
    ConfigError for a name that it does not know. ``adapter_kinds`` names the kinds of adapters that the model has,
    ``adapter_states`` holds what such a kind keeps beside the networks. ``textual_inversions`` holds for each trigger
    its vectors [n, D].
    """

    def __init__(self, components: Components, backend: str | None = None) -> None:
        self.unet, self.vae = components.unet, components.vae
        self.text_encoder: Any = components.text_encoder
        self.tokenizer: Any = components.tokenizer
        self.scheduler_config, self.extra = components.scheduler_config, components.extra
        self.schedule, self.plan_defaults = read_scheduler_config(components.scheduler_config)
        self.extra_networks: dict[str, ApplyNetworks] = {}
        self.adapter_kinds: set[str] = set()
        self.adapter_states: dict[str, Any] = {}
        self.textual_inversions: dict[str, Tensor] = {}

        if backend not in (None, *sdkernels.BACKENDS):
            raise ConfigError(f"backend: expected {', '.join(sdkernels.BACKENDS)} or None, found {backend!r}")
        self.backend = backend
        try:
            sdkernels.current()
        except ValueError as error:  # the environment names an unknown one
            raise ConfigError(str(error)) from None

    # Loading and saving

    @classmethod
    def load(
        cls,
        model: str | Path = "tabletop",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a model that ships with us by its name, a diffusers folder or a single file, whichever it is.

        device: the GPU if there is one, else the CPU. dtype: float16 on a GPU, else float32. backend: as in
        ``sdkernels.backend``, None for the one in force. options: ``variant`` for a folder; ``preset``,
        ``prediction_type`` and ``use_ema`` for a single file. Raises CheckpointError, and ConfigError for an option
        that does not belong to what is there.
        """
        place = find_device(device)
        components = loading.load(model, dtype=dtype or default_dtype(place), **options)
        return cls(components, backend).to(place)

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

        Arguments and errors as in `load`.
        """
        place = find_device(device)
        components = loading.FOLDER.load(
            loading.find_model(model), dtype=dtype or default_dtype(place), variant=variant
        )
        return cls(components, backend).to(place)

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

        ``preset``, ``prediction_type`` and ``use_ema`` as in `sdkit.checkpoints.single_file.load_single_file`, the
        others as in `load`. Raises CheckpointError.
        """
        place = find_device(device)
        components = loading.SINGLE_FILE.load(
            path,
            preset=preset,
            prediction_type=prediction_type,
            use_ema=use_ema,
            dtype=dtype or default_dtype(place),
        )
        return cls(components, backend).to(place)

    @property
    def components(self) -> Components:
        """The parts, in the form in which files hold them."""
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
        loading.FOLDER.save(self.components, folder, dtype=dtype)

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one ``.safetensors`` file in the layout of CompVis and Stability. Raises CheckpointError."""
        loading.SINGLE_FILE.save(self.components, path, dtype=dtype)

    @cached_property
    def depth_estimator(self) -> DepthEstimator:
        """The checkpoint's depth network, loaded when it is first needed. Raises CheckpointError when it has none."""
        return DepthEstimator(self.extra)

    def load_vae(self, path: str | Path) -> None:
        """Put another VAE in place of this model's: a file or a folder of one alone, or of a whole model.

        Raises CheckpointError for a file that holds none, or one with latents of another shape.
        """
        vae = loading.load_vae(path, dtype=self.vae.dtype).to(self.vae.device)
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
        """Call ``sdkit.make_plan`` with this model's schedule; None stands for the model's own setting.

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
        """Put in force the kernels that this model was asked to use, and the extra networks that a prompt's tags name.

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
