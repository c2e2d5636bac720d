"""A latent diffusion model's parts: loaded, moved, saved; its sampling plans; the extra networks that prompts name."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

import sdkernels
from sdkit.adapter_kinds import adapter_kinds
from sdkit.checkpoints import loading
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.scheduler_config import (
    read_noise_schedule,
    read_scheduler_config,
    read_spacing,
    write_scheduler_config,
)
from sdkit.checkpoints.textual_inversion import TextualInversion, load_textual_inversion
from sdkit.checks import as_path, nearest
from sdkit.devices import LARGE, check_dtype, default_dtype, find_device
from sdkit.errors import CheckpointError, ConfigError, SDKitError
from sdkit.graphs import Graphs
from sdkit.model_lock import ModelLock, alone
from sdkit.networks.depth_estimator import DepthEstimator
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.vae import AutoencoderKL, run_dtype
from sdkit.prompts.tags import ExtraNetwork
from sdkit.sampling.plan import Plan
from sdkit.sampling.planning import make_plan, plan_arguments

if TYPE_CHECKING:
    from transformers import CLIPTextModel

ApplyNetworks = Callable[[Sequence[ExtraNetwork]], AbstractContextManager[None]]


class DiffusionModel:
    """A latent diffusion model: unet, vae, text_encoder, tokenizer, schedule.

    ``plan_defaults`` are the arguments of ``make_plan`` that the model's scheduler configuration stands for; where it
    stands for what there is not here, ``plan_problem`` says so, and a plan needs a sampler that is named.
    ``extra_networks`` holds for each kind of tag ("lora", "hypernet") a function that puts the networks named by a
    prompt's tags of this kind, ``<lora:name:0.8>``, in force while its pictures are made: a context manager that raises
    ConfigError for a name that it does not know. ``adapter_kinds`` names the kinds of adapters that the model has,
    ``adapter_states`` holds what such a kind keeps beside the networks. ``textual_inversions`` holds for each trigger
    its vectors [n, D]. ``graphs`` as in `load`. ``made_of`` holds what the model was loaded from, by the names that
    the metadata of pictures has: model, vae, text_encoder, prediction, zero_snr; None for what was no file. ``words``
    are those that a small model knows, None for one that does not say; a prompt with others is a warning. ``lock`` is
    shared by the threads that draw with the model; one that changes its adapters, words or VAE has it alone.
    """

    def __init__(self, components: Components, backend: str | None = None, graphs: bool | None = None) -> None:
        self.unet, self.vae = components.unet, components.vae
        self.text_encoder: Any = components.text_encoder
        self.tokenizer: Any = components.tokenizer
        self.scheduler_config, self.extra = components.scheduler_config, components.extra
        self.schedule = read_noise_schedule(components.scheduler_config)
        self.plan_defaults: dict[str, Any] = read_spacing(components.scheduler_config)
        self.plan_problem = ""
        try:
            self.plan_defaults = read_scheduler_config(components.scheduler_config)[1]
        except ConfigError as error:
            self.plan_problem = str(error)
        self.made_of: dict[str, Any] = {}
        self.extra_networks: dict[str, ApplyNetworks] = {}
        self.adapter_kinds: set[str] = set()
        self.adapter_states: dict[str, Any] = {}
        self.words: frozenset[str] | None = None
        self.strange_words: set[str] = set()  # that were warned of
        self.textual_inversions: dict[str, Tensor] = {}
        self.new_inversions: list[tuple[str, ...]] = []  # triggers of those that no prompt was read with yet
        self.known_adapters: set[tuple[str, str]] = set()  # kind and name of those that pictures were made with

        if backend not in (None, *sdkernels.BACKENDS):
            raise ConfigError(f"backend: expected {', '.join(sdkernels.BACKENDS)} or None, found {backend!r}")
        self.backend, self.graphs, self._recorded, self.lock = backend, graphs, Graphs(), ModelLock()
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
        graphs: bool | None = None,
        **options: Any,
    ) -> Self:
        """Load a model that ships with us by its name, a diffusers folder or a single file, whichever it is.

        device: the GPU if there is one, else the CPU. dtype: float16 on a GPU; on a CPU float32, and for a model as
        large as Stable Diffusion bfloat16 where the processor multiplies it, with a warning. backend: as in
        ``sdkernels.backend``, None for the one in force. graphs: whether a step's launches are recorded once and then
        replayed without Python (`sdkit.graphs`), None for on a GPU alone. options: ``vae`` and ``text_encoder``, as a
        network or its file, in place of the model's own, which may be missing; ``variant`` for a folder; ``preset``,
        ``prediction_type``, ``zero_snr`` and ``use_ema`` for a single file. Raises CheckpointError, and ConfigError for
        an option that does not belong to what is there.
        """
        place = find_device(device)
        dtype = _asked_dtype(dtype, options)
        components = loading.load(model, dtype=dtype or _own_dtype(model, place), **options)
        loaded = cls(components, backend, graphs).to(place)
        loaded.made_of = _origin(model, options)
        loaded.words = loading.known_words(model)
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tabletop",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        variant: str | None = None,
        vae: str | Path | AutoencoderKL | None = None,
        text_encoder: str | Path | CLIPTextModel | None = None,
        graphs: bool | None = None,
        **others: Any,
    ) -> Self:
        """Load a model that ships with us by its name, or a diffusers folder by its path.

        Arguments and errors as in `load`.
        """
        if loading.is_single_file(model):
            raise CheckpointError(f"{model}: expected a diffusers folder, found a file: call from_single_file")
        dtype = _asked_dtype(dtype, others)
        _refuse_unknown(others, ("variant", "vae", "text_encoder", *COMMON))
        return cls.load(model, device, dtype, backend, graphs, variant=variant, vae=vae, text_encoder=text_encoder)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        preset: str | None = None,
        prediction_type: str | None = None,
        zero_snr: bool | None = None,
        use_ema: bool = False,
        vae: str | Path | AutoencoderKL | None = None,
        text_encoder: str | Path | CLIPTextModel | None = None,
        graphs: bool | None = None,
        **others: Any,
    ) -> Self:
        """Load a ``.safetensors`` or ``.ckpt`` file in the layout of CompVis and Stability.

        ``preset``, ``prediction_type``, ``zero_snr`` and ``use_ema`` as in
        `sdkit.checkpoints.single_file.load_single_file`, the others as in `load`. Raises CheckpointError.
        """
        if as_path("path", path).is_dir() or str(path) in loading.shipped_models():
            raise CheckpointError(f"{path}: expected a file, found a folder or a shipped model: call from_pretrained")
        dtype = _asked_dtype(dtype, others)
        _refuse_unknown(others, (*loading.SINGLE_FILE.options, *COMMON))
        return cls.load(
            path,
            device,
            dtype,
            backend,
            graphs,
            preset=preset,
            prediction_type=prediction_type,
            zero_snr=zero_snr,
            use_ema=use_ema,
            vae=vae,
            text_encoder=text_encoder,
        )

    def __repr__(self) -> str:
        """What the model is, in a few lines."""
        unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
        height, width = self.picture_size
        networks = (("UNet", self.unet), ("VAE", self.vae), ("text encoder", self.text_encoder))
        sizes = ", ".join(f"{name} {sum(p.numel() for p in n.parameters()) / 1e6:.1f} M" for name, n in networks)
        lines = [
            f"{type(self).__name__}({self.made_of.get('model', 'from parts')}), {str(self.dtype)[6:]} on {self.device}",
            f"  parameters  {sizes}",
            f"  pictures    {width} x {height} pixels, latents {vae.latent_channels} x {height // vae.factor} x "
            f"{width // vae.factor}, UNet of {unet.in_channels} channels",
            f"  text        {text.hidden_size} wide, {text.max_position_embeddings} tokens",
            f"  predicts    {self.schedule.prediction_type}",
        ]
        if self.textual_inversions:
            lines.append(f"  words       {', '.join(self.textual_inversions)}")
        return "\n".join(lines)

    @property
    def components(self) -> Components:
        """The parts, in the form in which files hold them."""
        config = self.scheduler_config
        is_own = bool(self.plan_problem) and read_noise_schedule(config) == self.schedule
        if not is_own and read_scheduler_config(config) != (self.schedule, self.plan_defaults):
            config = write_scheduler_config(self.schedule, self.plan_defaults)
        return Components(self.unet, self.vae, self.text_encoder, self.tokenizer, config, self.extra)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was made for; 64 cells of latents where it does not say."""
        own = self.unet.config.sample_size or 64
        rows, columns = own if isinstance(own, tuple) else (own, own)
        return rows * self.vae.config.factor, columns * self.vae.config.factor

    @alone
    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move every network to ``device`` and cast it to ``dtype``, either may be given first; returns self.

        A VAE whose configuration says ``force_upcast`` is float32 where the others are float16. Parameters
        are laid out as they compute fastest there (`sdkit.networks.memory_layout`).
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = None if device is None else find_device(device)
        check_dtype(dtype)
        for module in (self.unet, self.text_encoder):
            module.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=run_dtype(self.vae.config, dtype or self.vae.dtype))
        self.free_graphs()

        for network in (self.unet, self.vae):
            lay_out(network)
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder. Raises CheckpointError when that is not possible."""
        loading.FOLDER.save(self.components, as_path("folder", folder), dtype=dtype)

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one ``.safetensors`` file in the layout of CompVis and Stability. Raises CheckpointError."""
        loading.SINGLE_FILE.save(self.components, as_path("path", path), dtype=dtype)

    @cached_property
    def depth_estimator(self) -> DepthEstimator:
        """The checkpoint's depth network, loaded when it is first needed. Raises CheckpointError when it has none."""
        return DepthEstimator(self.extra)

    @alone
    def load_vae(self, path: str | Path) -> None:
        """Put another VAE in place of this model's: a file or a folder of one alone, or of a whole model.

        Raises CheckpointError for a file that holds none, or one with latents of another shape.
        """
        own = self.unet.dtype if self.vae.config.force_upcast else self.vae.dtype
        vae = loading.load_vae(path, dtype=own)
        vae = vae.to(self.vae.device, run_dtype(vae.config, own))
        lay_out(vae)
        had, new = ((v.config.latent_channels, v.config.factor) for v in (self.vae, vae))
        if had != new:
            raise CheckpointError(
                f"{path}: expected a VAE of {had[0]} latent channels and factor {had[1]}, found {new[0]} and {new[1]}"
            )
        self.vae = vae
        self.made_of["vae"] = str(path)

    @alone
    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Read learned vectors that stand for ``token`` in prompts, or where that is None for the file's own name for
        them and for the name of the file.

        Returns the token. Raises CheckpointError for a file of another format or made for another text encoder.
        """
        found = load_textual_inversion(path, token, int(self.text_encoder.config.hidden_size))
        self.add_textual_inversion(found)
        return found.token

    @alone
    def add_textual_inversion(self, inversion: TextualInversion) -> None:
        """Let the words of a textual inversion stand for its vectors, with a warning where another had one of them.

        The first pictures after this warn if none of the words is in their prompts; after that nothing is said again.
        """
        for trigger in inversion.triggers:
            for known in [known for known in self.textual_inversions if _folded(known) == _folded(trigger)]:
                before = self.textual_inversions.pop(known)
                if before.shape != inversion.vectors.shape or not bool((before.cpu() == inversion.vectors.cpu()).all()):
                    warnings.warn(f"embedding {trigger!r}: stands for other vectors from now on", stacklevel=3)
            self.textual_inversions[trigger] = inversion.vectors
        self.new_inversions.append(inversion.triggers)

    def triggers_of(self, token: str) -> list[str]:
        """The words that stand for the same vectors as this one."""
        vectors = self.textual_inversions[token]
        return [trigger for trigger, other in self.textual_inversions.items() if other is vectors]

    def make_plan(
        self,
        num_inference_steps: int,
        sampler: str | None = None,
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        eta: float = 0.0,
        strength: float = 1.0,
    ) -> Plan:
        """Call ``sdkit.make_plan`` with this model's schedule; None stands for the model's own setting, as
        `sdkit.sampling.planning.plan_arguments` has it.

        Raises ConfigError when the model's own sampler is asked for and its scheduler configuration names one that
        there is not.
        """
        if self.plan_problem and sampler is None:
            raise ConfigError(f"{self.plan_problem}; choose a sampler (sampler=, --sampler)")
        arguments = plan_arguments(
            self.plan_defaults, sampler=sampler, sigmas=sigmas, timestep_spacing=timestep_spacing
        )
        return make_plan(
            schedule=self.schedule, num_inference_steps=num_inference_steps, eta=eta, strength=strength, **arguments
        )

    @contextlib.contextmanager
    def running(self, networks: Sequence[ExtraNetwork] = ()) -> Generator[None]:
        """Put in force the kernels that this model was asked to use, and the extra networks that a prompt's tags name.

        Raises ConfigError for a kind of tag that nobody registered in ``extra_networks``. Warns of adapters that are
        loaded and do nothing.
        """
        kinds = {network.kind for network in networks}
        if unknown := sorted(kinds - self.extra_networks.keys()):
            known = ", ".join(sorted(self.extra_networks)) or "none"
            raise ConfigError(f"prompt: <{unknown[0]}:...>: expected a kind in this model's extra_networks: {known}")

        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(sdkernels.backend(self.backend or sdkernels.current()))  # else every op looks it up
                for kind in sorted(kinds):
                    named = [network for network in networks if network.kind == kind]
                    stack.enter_context(self.extra_networks[kind](named))
                self._warn_of_idle_adapters()
                yield
        except sdkernels.UnsupportedError as error:
            raise ConfigError(str(error)) from None

    @contextlib.contextmanager
    def lend_graphs(self) -> Generator[Graphs | None]:
        """The model's graphs for a call that makes pictures; None where there are to be none, or another call has them.

        Beside another thread's call, or inside another, from its callback, a call makes its pictures without.
        """
        if not (self.device.type == "cuda" if self.graphs is None else self.graphs):
            yield None
            return
        with self._recorded.lent() as graphs:
            yield graphs

    def free_graphs(self) -> None:
        """Give the memory of the recorded graphs back; the next pictures record them anew."""
        self._recorded.free()

    def _warn_of_idle_adapters(self) -> None:
        """Warn of each adapter that is there for the first time and does nothing: its scale is 0, or it is disabled.

        One that has once run, or was warned of, is switched off on purpose.
        """
        kinds = [kind for kind in adapter_kinds() if kind.name in self.adapter_kinds]
        present = {
            (kind.name, name): state for kind in kinds for name, state in kind.module.list_adapters(self).items()
        }
        for (kind, name), state in present.items():
            if (kind, name) not in self.known_adapters and not (state.enabled and state.scale):
                reason = "its scale is 0" if state.enabled else "it is disabled"
                warnings.warn(f"{kind} {name!r}: loaded, but does nothing: {reason}", stacklevel=2)
        self.known_adapters = set(present)


def _folded(trigger: str) -> str:
    """A trigger as it is looked for: whatever its case and white space."""
    return " ".join(trigger.lower().split())


COMMON = ("device", "dtype", "backend", "graphs")


def _asked_dtype(dtype: torch.dtype | None, others: dict[str, Any]) -> torch.dtype | None:
    """The dtype, also by diffusers' name for it, which is taken out of ``others``. Raises ConfigError for no dtype."""
    check_dtype(dtype)
    if "torch_dtype" not in others:
        return dtype
    warnings.warn("torch_dtype: is called dtype here", stacklevel=3)
    other = others.pop("torch_dtype")
    if dtype is not None and other != dtype:
        raise ConfigError(f"dtype, torch_dtype: expected one of them, found {dtype} and {other}")
    check_dtype(other)
    return other


def _own_dtype(model: str | Path, place: torch.device) -> torch.dtype:
    """The precision that a model gets where none is asked for; of a large one on a CPU it is said what it takes."""
    if place.type == "cuda":
        return default_dtype(place)
    try:
        count = loading.parameter_count(model)
    except SDKitError:
        return default_dtype(place)  # loading says what is wrong
    dtype = default_dtype(place, count)
    if count >= LARGE:
        name = str(dtype).removeprefix("torch.")
        other = "; float32 takes twice as much and is exact" if dtype == torch.bfloat16 else ""
        warnings.warn(
            f"{model}: {count / 1e9:.2f} billion parameters take {count * dtype.itemsize / 1e9:.1f} GB on the CPU in "
            f"{name}{other}",
            stacklevel=3,
        )
    return dtype


def _refuse_unknown(others: dict[str, Any], known: Sequence[str]) -> None:
    for name in others:
        raise TypeError(f"unexpected keyword argument {name!r}{nearest(name, known)}")


def _origin(model: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a model was loaded from, as `DiffusionModel.made_of` has it."""
    names = {"prediction_type": "prediction"}
    given = {names.get(name, name): value for name, value in options.items() if value is not None}
    files = {
        name: str(v) if isinstance(v, str | Path) else None for name, v in given.items() if name in loading.REPLACEABLE
    }
    return {"model": str(model)} | given | files
