"""Adapters in a model: put in, switched, scaled, merged and taken out.

A network without adapters is exactly what it was: `remove` puts the very same layers back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import nn

from finetune.lora_layers import Layer, LoraConv2d, LoraLinear
from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from sdkit import StableDiffusion
    from sdkit.unet import UNet2DConditionModel


@dataclass(frozen=True)
class Adapter:
    """An adapter that a model has: its scale, whether it runs, and its size."""

    scale: float
    enabled: bool
    modules: int
    parameters: int


def networks_of(sd: StableDiffusion) -> dict[str, nn.Module]:
    """The networks that take adapters, by the names that files give them."""
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


def layers(sd: StableDiffusion) -> list[tuple[nn.Module, str, Layer]]:
    """Every layer that has adapters: its network, its path there, itself."""
    return [(network, *found) for network in networks_of(sd).values() for found in _layers_in(network, "")]


def _layers_in(module: nn.Module, path: str) -> Iterator[tuple[str, Layer]]:
    for name, child in module.named_children():
        if isinstance(child, Layer):
            yield path + name, child
        else:
            yield from _layers_in(child, f"{path}{name}.")


def list_adapters(sd: StableDiffusion) -> dict[str, Adapter]:
    """The adapters of a model by name, in the order in which they came."""
    found: dict[str, Adapter] = {}
    for _, _, layer in layers(sd):
        for name, strength in layer.strength.items():
            modules, parameters = (found[name].modules, found[name].parameters) if name in found else (0, 0)
            parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
            size = sum(p.numel() for part in parts if name in part for p in part[name].parameters())
            found[name] = Adapter(strength, name in layer.active_adapters, modules + 1, parameters + size)
    return found


def inject(
    network: nn.Module, name: str, sizes: Mapping[str, tuple[int, float]], config: LoraConfig, trainable: bool
) -> None:
    """Give the layers at the paths in ``sizes`` an adapter of that (rank, alpha), beside those that they have.

    One that trains is kept in float32 beside half-precision weights. ``config`` gives what is common to all.
    """
    for path, (rank, alpha) in sizes.items():
        layer = network.get_submodule(path)
        training = layer.training
        if isinstance(layer, Layer):
            layer.update_layer(name, rank, lora_alpha=alpha, config=config)
        else:
            kind = LoraLinear if isinstance(layer, nn.Linear) else LoraConv2d
            layer = kind(layer, name, config, r=rank, lora_alpha=alpha)
            network.set_submodule(path, layer)
        layer.train(training)
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if name in part:
                part[name].requires_grad_(trainable)
                if trainable and layer.base.weight.dtype in (torch.float16, torch.bfloat16):
                    part[name].float()


def freeze(sd: StableDiffusion) -> None:
    """Let nothing train but adapters."""
    for network in (sd.unet, sd.vae, sd.text_encoder):
        for key, parameter in network.named_parameters():
            if ".lora_" not in key:
                parameter.requires_grad_(False)


# Switching


@contextmanager
def changing(sd: StableDiffusion) -> Generator[None]:
    """Take merged adapters out of the weights for a change of what runs, and merge what then runs again."""
    merged = is_merged(sd)
    if merged:
        unmerge(sd)
    yield
    if merged:
        merge(sd)


def enable(sd: StableDiffusion, name: str | None = None) -> None:
    """Let an adapter run, or all of them. Raises ConfigError when there is none of that name."""
    names = _named(sd, name)
    activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled or n in names])


def disable(sd: StableDiffusion, name: str | None = None) -> None:
    """Let an adapter, or all of them, do nothing until `enable`. Raises ConfigError when there is none of that name."""
    names = _named(sd, name)
    activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled and n not in names])


@contextmanager
def without_adapters(sd: StableDiffusion) -> Generator[UNet2DConditionModel]:
    """Inside the block no adapter runs, none of which may be merged; gives the UNet. Which of them train stays."""
    running = [(layer, list(layer.active_adapters)) for _, _, layer in layers(sd)]
    try:
        for layer, _ in running:
            layer.activate([])
        yield sd.unet
    finally:
        for layer, names in running:
            layer.activate(names)


def set_scale(sd: StableDiffusion, scale: float, name: str | None = None) -> None:
    """Let an adapter, or each of them, count ``scale`` times; 1 is as it was trained, negative turns it round.

    For DoRA the scale multiplies the low-rank part alone, as in peft. Raises ConfigError when there is none of that
    name.
    """
    names = _named(sd, name)
    with changing(sd):
        for _, _, layer in layers(sd):
            for n in names:
                layer.set_scale(n, scale)


def merge(sd: StableDiffusion) -> None:
    """Add the adapters that run to the weights: same pictures, at the speed of the model alone. They stay here."""
    for _, _, layer in layers(sd):
        layer.merge()


def unmerge(sd: StableDiffusion) -> None:
    """Undo `merge`: the weights are those before it, bit for bit."""
    for _, _, layer in layers(sd):
        layer.unmerge()


def is_merged(sd: StableDiffusion) -> bool:
    return any(layer.merged for _, _, layer in layers(sd))


def remove(sd: StableDiffusion, name: str | None = None) -> None:
    """Take an adapter, or all of them, out of the model. Raises ConfigError when there is none of that name.

    A layer without adapters is the model's own again, bit for bit. Weights that were frozen for the adapters' training
    stay frozen.
    """
    names = _named(sd, name)
    with changing(sd):
        activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled and n not in names])
        for network, path, layer in layers(sd):
            for n in names:
                layer.delete_adapter(n)
            if not layer.strength:
                network.set_submodule(path, layer.base)


def bake(sd: StableDiffusion) -> None:
    """Make the adapters that run a part of the weights, for good, and take all adapters out.

    The model is then a plain one, which can be saved.
    """
    merge(sd)
    for network, path, layer in layers(sd):
        network.set_submodule(path, layer.base)


def _named(sd: StableDiffusion, name: str | None) -> list[str]:
    known = list(list_adapters(sd))
    if name is not None and name not in known:
        raise ConfigError(f"adapter {name!r}: expected one of the model's: {', '.join(known) or 'it has none'}")
    return known if name is None else [name]


def activate(sd: StableDiffusion, names: list[str]) -> None:
    """Let these adapters run, and no others."""
    with changing(sd):
        for _, _, layer in layers(sd):
            layer.activate(list(names))
