"""Where an adapter can sit in a model, and the names that files give to these places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from sdkit.checkpoints.presets import read_preset
from sdkit.errors import ConfigError
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.networks.unet import UNet2DConditionModel

_TEXT = "text_model."  # the level of CLIPTextModel that files have, and transformers had before 5.6


@dataclass(frozen=True)
class Target:
    """A linear layer or convolution: its network ("unet" or "text_encoder"), its path there, its weight's shape."""

    network: str
    path: str
    shape: torch.Size

    @property
    def file_path(self) -> str:
        """The path as diffusers' files have it, whatever the version of transformers here."""
        return self.path if self.network == "unet" else _TEXT + self.path.removeprefix(_TEXT)

    @property
    def diffusers(self) -> str:
        return f"{self.network}.{self.file_path}"

    @property
    def peft(self) -> str:
        return f"base_model.model.{self.path}"

    @property
    def kohya(self) -> str:
        return f"lora_{'unet' if self.network == 'unet' else 'te'}_{self.file_path.replace('.', '_')}"

    def spellings(self) -> Iterator[str]:
        """Every name under which a file may know this place."""
        for path in {self.path, self.file_path, self.file_path.removeprefix(_TEXT)}:
            yield from (path, f"{self.network}.{path}", f"base_model.model.{path}")
        yield self.kohya
        if self.network == "text_encoder":
            yield self.kohya.replace("lora_te_", "lora_te1_", 1)  # SDXL's trainers number their text encoders


def targets_of(network: nn.Module, name: str) -> list[Target]:
    """Every linear layer and convolution of the network called ``name``, in the order of its modules."""
    return [Target(name, path, layer.weight.shape) for path, layer in _adaptable(network, "")]


def _adaptable(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for name, child in module.named_children():
        layer = child.get_base_layer() if isinstance(child, LoraLayer) else child
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield path + name, layer
        else:
            yield from _adaptable(child, f"{path}{name}.")


def published_targets(context_width: int | None) -> list[Target]:
    """Those of Stable Diffusion 2 for a context of 1024, else of 1.5: for a file that comes without its model."""
    preset = read_preset("sd2" if context_width == 1024 else "sd1")
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(preset["unet"]))
        text = build_text_encoder(preset["text_encoder"])
    return targets_of(unet, "unet") + targets_of(text, "text_encoder")


TARGETS: Mapping[str, tuple[str, str]] = {
    "cross_attention": (r"\.attn2\.(to_[qkv]|to_out\.0)$", r"\.self_attn\."),
    "attention": (r"\.attn[12]\.(to_[qkv]|to_out\.0)$", r"\.self_attn\."),
    "transformer": (r"(^|\.)attentions\.", r"\.layers\."),
    "all": (r"", r""),
}
"""By name, what the path of a module has to contain: in the UNet, and in the text encoder."""


def match_targets(places: Sequence[Target], targets: str | Sequence[str]) -> list[Target]:
    """The places that ``targets`` (see `add_lora`) name. Raises ConfigError that names what matches none."""
    if isinstance(targets, str):
        unet, text = TARGETS.get(targets, (targets, targets))
        try:
            chosen = [s for s in places if re.search(unet if s.network == "unet" else text, s.path)]
        except re.error as error:
            raise ConfigError(f"targets: {targets!r} is no regular expression ({error})") from None
        missing = [] if chosen else [targets]
    else:
        ends = {target: [s for s in places if s.path == target or s.path.endswith(f".{target}")] for target in targets}
        missing = [target for target, found in ends.items() if not found]
        wanted = {target for found in ends.values() for target in found}
        chosen = [target for target in places if target in wanted]

    if missing or not chosen:
        presets = ", ".join(TARGETS)
        raise ConfigError(
            f"targets: nothing matches {', '.join(missing) or '[]'}; expected {presets}, or parts of paths"
        )
    return chosen
