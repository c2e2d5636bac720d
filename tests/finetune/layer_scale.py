"""A third kind of adapter, for tests: a factor for the output of each cross-attention layer.

A file has one number for each layer, ``layer_scale.LAYER``. At scale s an output counts 1 + s (factor - 1) times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.adapters import Adapter, use
from sdkit.adapter_kinds import AdapterKind
from sdkit.errors import CheckpointError
from sdkit.stable_diffusion import StableDiffusion

KIND = AdapterKind(
    "layer_scale",
    tag="scale",
    verbs="tests.finetune.layer_scale",
    files={"layer scale": r"layer_scale\..*"},
)
PREFIX = "layer_scale."
MERGES = False


@dataclass
class LayerScale:
    """One adapter of the model, and the hooks that put it there."""

    factors: dict[str, Tensor]
    scale: float = 1.0
    enabled: bool = True
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)


def layers_of(sd: StableDiffusion) -> dict[str, nn.Module]:
    """The layers that can be scaled."""
    return {name: module for name, module in sd.unet.named_modules() if name.endswith("attn2")}


def _adapters(sd: StableDiffusion) -> dict[str, LayerScale]:
    return sd.adapter_states.setdefault(KIND.name, {})


# The verbs


def add(sd: StableDiffusion, name: str, factors: dict[str, Tensor], scale: float = 1.0) -> None:
    """Hang the factors on the layers."""
    adapter = _adapters(sd)[name] = LayerScale(factors, scale)
    layers = layers_of(sd)
    if unknown := factors.keys() - layers.keys():
        raise CheckpointError(f"layer scale: no layers {sorted(unknown)}")

    for layer, factor in factors.items():
        adapter.hooks.append(layers[layer].register_forward_hook(_scaled(adapter, factor)))
    use(sd, KIND.name)


def _scaled(adapter: LayerScale, factor: Tensor) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output * (1 + adapter.scale * (float(factor) - 1)) if adapter.enabled else None

    return hook


def load(sd: StableDiffusion, path: str | Path, scale: float = 1.0, /, name: str | None = None) -> str:
    """Read a file."""
    name = name or Path(path).stem
    add(sd, name, {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}, scale)
    return name


def save(sd: StableDiffusion, path: str | Path, /, *, name: str | None = None) -> None:
    """Write one adapter."""
    adapters = _adapters(sd)
    adapter = adapters[name or next(iter(adapters))]
    save_file({PREFIX + layer: factor for layer, factor in adapter.factors.items()}, path)


def list_adapters(sd: StableDiffusion, /) -> dict[str, Adapter]:
    """In the order in which they came."""
    return {
        name: Adapter(a.scale, a.enabled, len(a.factors), len(a.factors), KIND.name)
        for name, a in _adapters(sd).items()
    }


def set_scale(sd: StableDiffusion, scale: float, names: Sequence[str], /) -> None:
    """Let these count ``scale`` times."""
    for name in names:
        _adapters(sd)[name].scale = scale


def activate(sd: StableDiffusion, names: Sequence[str], /) -> None:
    """Let these run, and no others."""
    for name, adapter in _adapters(sd).items():
        adapter.enabled = name in names


def remove(sd: StableDiffusion, names: Sequence[str], /) -> None:
    """Take these out."""
    for name in names:
        for hook in _adapters(sd).pop(name).hooks:
            hook.remove()
