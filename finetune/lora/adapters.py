"""The LoRA adapters that a model has: put into its layers, listed, switched, scaled, merged and taken out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import nn

from finetune.adapters import Adapter
from finetune.lora.layers import Layer, LoraConv2d, LoraLinear

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel
    from sdkit.networks.unet import UNet2DConditionModel


def networks_of(sd: DiffusionModel) -> dict[str, nn.Module]:
    """The networks that take adapters, by the names that files give them."""
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


def layers(sd: DiffusionModel) -> list[tuple[nn.Module, str, Layer]]:
    """Every layer that has adapters: its network, its path there, itself."""
    return [(network, *found) for network in networks_of(sd).values() for found in _layers_in(network, "")]


def _layers_in(module: nn.Module, path: str) -> Iterator[tuple[str, Layer]]:
    for name, child in module.named_children():
        if isinstance(child, Layer):
            yield path + name, child
        else:
            yield from _layers_in(child, f"{path}{name}.")


def list_adapters(sd: DiffusionModel) -> dict[str, Adapter]:
    """The LoRAs of a model by name, in the order in which they came."""
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


# The verbs, as `finetune.adapters.Verbs` describes them


@contextmanager
def changing(sd: DiffusionModel) -> Generator[None]:
    """Take merged adapters out of the weights for a change of what runs, and merge what then runs again."""
    merged = is_merged(sd)
    if merged:
        unmerge(sd)
    yield
    if merged:
        merge(sd)


def activate(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Let these adapters run, and no others."""
    with changing(sd):
        for _, _, layer in layers(sd):
            layer.activate(list(names))


@contextmanager
def without_adapters(sd: DiffusionModel) -> Generator[UNet2DConditionModel]:
    """Inside the block no adapter runs, none of which may be merged; gives the UNet. Which of them train stays."""
    running = [(layer, list(layer.active_adapters)) for _, _, layer in layers(sd)]
    try:
        for layer, _ in running:
            layer.activate([])
        yield sd.unet
    finally:
        for layer, names in running:
            layer.activate(names)


def set_scale(sd: DiffusionModel, scale: float, names: Sequence[str]) -> None:
    """Let these adapters count ``scale`` times."""
    with changing(sd):
        for _, _, layer in layers(sd):
            for name in names:
                layer.set_scale(name, scale)


def merge(sd: DiffusionModel) -> None:
    """Add the adapters that run to the weights."""
    for _, _, layer in layers(sd):
        layer.merge()


def unmerge(sd: DiffusionModel) -> None:
    """Undo `merge`, bit for bit."""
    for _, _, layer in layers(sd):
        layer.unmerge()


def is_merged(sd: DiffusionModel) -> bool:
    return any(layer.merged for _, _, layer in layers(sd))


def remove(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Take these adapters out of the model; a layer that has none left is the model's own again."""
    with changing(sd):
        activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled and n not in names])
        for network, path, layer in layers(sd):
            for name in names:
                layer.delete_adapter(name)
            if not layer.strength:
                network.set_submodule(path, layer.base)


def bake(sd: DiffusionModel) -> None:
    """Make the adapters that run a part of the weights, for good, and take all out."""
    merge(sd)
    for network, path, layer in layers(sd):
        network.set_submodule(path, layer.base)
