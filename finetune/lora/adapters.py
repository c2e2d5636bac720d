"""The LoRA adapters that a model has: put into its layers, listed, switched, scaled, merged and taken out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import nn

from finetune.adapters import Adapter
from finetune.lora.in_place import forget, refresh, state_of, take_out
from finetune.lora.layers import Layer, LoraConv2d, LoraLinear
from finetune.lora.names import module_key, name_of_key
from finetune.lora.targets import Target, networks_of, targets_of

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel
    from sdkit.networks.unet import UNet2DConditionModel


def layers(sd: DiffusionModel) -> list[tuple[nn.Module, str, Layer]]:
    """Every layer that has adapters: its network, its path there, itself."""
    return [(network, *found) for network in networks_of(sd).values() for found in _layers_in(network, "")]


def layers_of(sd: DiffusionModel, key: str) -> dict[Target, Layer]:
    """The layers that have an adapter of this key (`finetune.lora.names.module_key`), by their places."""
    found: dict[Target, Layer] = {}
    for name, network in networks_of(sd).items():
        for target in targets_of(network, name):
            layer = network.get_submodule(target.path)
            if isinstance(layer, Layer) and key in layer.strength:
                found[target] = layer
    return found


def _layers_in(module: nn.Module, path: str) -> Iterator[tuple[str, Layer]]:
    for name, child in module.named_children():
        if isinstance(child, Layer):
            yield path + name, child
        else:
            yield from _layers_in(child, f"{path}{name}.")


def list_adapters(sd: DiffusionModel) -> dict[str, Adapter]:
    """The LoRAs of a model by name, in the order in which they came."""
    found: dict[str, Adapter] = {}
    places: dict[str, set[tuple[int, str]]] = {}

    def count(name: str, strength: float, enabled: bool, place: set[tuple[int, str]], size: int) -> None:
        places[name] = places.get(name, set()) | place
        size += found[name].parameters if name in found else 0
        found[name] = Adapter(strength, enabled, len(places[name]), size)

    for name, beside in state_of(sd).adapters.items():
        changed = {(id(networks_of(sd)[target.network]), target.path) for target in beside.changes}
        size = sum(part.numel() for change in beside.changes.values() for part in change.parts.values())
        count(name, beside.strength, beside.enabled, changed, size)
    for network, path, layer in layers(sd):
        for key, strength in layer.strength.items():
            parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
            size = sum(p.numel() for part in parts if key in part for p in part[key].parameters())
            count(name_of_key(key), strength, key in layer.active_adapters, {(id(network), path)}, size)
    return found


def inject(
    network: nn.Module, name: str, sizes: Mapping[str, tuple[int, float]], config: LoraConfig, trainable: bool
) -> None:
    """Give the layers at the paths in ``sizes`` an adapter of that (rank, alpha), beside those that they have.

    name: as a key of modules (`finetune.lora.names.module_key`). An adapter that trains is kept in float32 beside
    half-precision weights. ``config`` gives what is common to all.
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
    """Take merged adapters out of the weights for a change of what runs, and merge what then runs again.

    Also after an error.
    """
    merged = is_merged(sd)
    if merged:
        unmerge(sd)
    try:
        yield
    finally:
        refresh(sd)
        if merged:
            merge(sd)


def activate(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Let these adapters run, and no others."""
    with changing(sd):
        for _, _, layer in layers(sd):
            layer.activate([module_key(name) for name in names])
        for name, beside in state_of(sd).adapters.items():
            beside.enabled = name in names


@contextmanager
def without_adapters(sd: DiffusionModel) -> Generator[UNet2DConditionModel]:
    """Inside the block no adapter runs, none of which may be merged; gives the UNet. Which of them train stays."""
    running = [(layer, list(layer.active_adapters)) for _, _, layer in layers(sd)]
    enabled = [(beside, beside.enabled) for beside in state_of(sd).adapters.values()]
    try:
        for layer, _ in running:
            layer.activate([])
        for beside, _ in enabled:
            beside.enabled = False
        refresh(sd)
        yield sd.unet
    finally:
        for layer, keys in running:
            layer.activate(keys)
        for beside, on in enabled:
            beside.enabled = on
        refresh(sd)


def set_scale(sd: DiffusionModel, scale: float, names: Sequence[str]) -> None:
    """Let these adapters count ``scale`` times."""
    with changing(sd):
        for _, _, layer in layers(sd):
            for name in names:
                layer.set_scale(module_key(name), scale)
        for name, beside in state_of(sd).adapters.items():
            beside.strength = scale if name in names else beside.strength


def merge(sd: DiffusionModel) -> None:
    """Add the adapters that run to the weights, where they are not in them already."""
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
                layer.delete_adapter(module_key(name))
            if not layer.strength:
                network.set_submodule(path, layer.base)
        take_out(sd, names)


def bake(sd: DiffusionModel) -> None:
    """Make the adapters that run a part of the weights, for good, and take all out."""
    merge(sd)
    for network, path, layer in layers(sd):
        network.set_submodule(path, layer.base)
    forget(sd)
