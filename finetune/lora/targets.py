"""Where an adapter can sit in a model, and the names that files give to these places."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from sdkit.checkpoints.key_maps import unet_map
from sdkit.checkpoints.presets import read_preset
from sdkit.checks import check_kind
from sdkit.errors import ConfigError
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.networks.unet import UNet2DConditionModel

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel

_TEXT = "text_model."  # the level of CLIPTextModel that files have, and transformers had before 5.6


@dataclass(frozen=True)
class Target:
    """A layer's weight: its network ("unet" or "text_encoder"), the layer's path there, the weight's shape.

    ldm_path: the layer's path in CompVis' and Stability's single files, "" where it has none.
    parameter: "bias" for the layer's bias.
    """

    network: str
    path: str
    shape: torch.Size
    ldm_path: str = field(default="", compare=False)
    parameter: str = "weight"

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

    @property
    def bias(self) -> Target:
        """The bias beside this weight."""
        return replace(self, shape=self.shape[:1], parameter="bias")

    def spellings(self) -> Iterator[str]:
        """Every name under which a file may know this layer."""
        for path in {self.path, self.file_path, self.file_path.removeprefix(_TEXT)}:
            yield from (path, f"{self.network}.{path}", f"base_model.model.{path}")
        yield self.kohya

        if self.network == "text_encoder":
            yield self.kohya.replace("lora_te_", "lora_te1_", 1)  # SDXL's trainers number their text encoders
        else:
            yield self.kohya.replace("lora_", "oft_", 1)  # kohya's trainer of OFT
        if self.ldm_path:
            yield f"lora_unet_{self.ldm_path.replace('.', '_')}"
            yield from (f"{prefix}diffusion_model.{self.ldm_path}" for prefix in ("", "model."))


def networks_of(sd: DiffusionModel) -> dict[str, nn.Module]:
    """The networks that take adapters, by the names that files give them."""
    return {"unet": sd.unet, "text_encoder": sd.text_encoder}


def targets_of(network: nn.Module, name: str) -> list[Target]:
    """Every linear layer and convolution of the network called ``name``, in the order of its modules."""
    return _targets(network, name, lambda layer: isinstance(layer, nn.Linear | nn.Conv2d))


def places_of(network: nn.Module, name: str) -> list[Target]:
    """The layers that files may change: those of `targets_of`, and the norms."""
    return _targets(network, name, lambda layer: isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm))


def places_in(sd: DiffusionModel) -> list[Target]:
    """The layers of a whole model that files may change."""
    return [target for name, network in networks_of(sd).items() for target in places_of(network, name)]


def reached(places: Sequence[Target], text_layers: int, clip_skip: int) -> list[Target]:
    """The places without those in the last ``clip_skip`` of the text encoder's layers, whose results nothing reads."""

    def skipped(place: Target) -> bool:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", place.path) if place.network == "text_encoder" else None
        return layer is not None and int(layer[1]) >= text_layers - clip_skip

    return [place for place in places if not skipped(place)]


def _targets(network: nn.Module, name: str, wanted: Callable[[nn.Module], bool]) -> list[Target]:
    layers = {path: layer.weight.shape for path, layer in _layers(network, "") if wanted(layer)}
    keys = {path: f"{path}.weight" for path in layers}
    ldm = unet_map(keys.values(), network.config) if isinstance(network, UNet2DConditionModel) else {}
    return [
        Target(name, path, shape, ldm.get(keys[path], "").removesuffix(".weight")) for path, shape in layers.items()
    ]


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The modules with a weight and none inside, without the layers that adapters put around them."""
    for name, child in module.named_children():
        layer = child.get_base_layer() if isinstance(child, LoraLayer) else child
        if isinstance(getattr(layer, "weight", None), torch.Tensor):
            yield path + name, layer
        else:
            yield from _layers(child, f"{path}{name}.")


def published_places(context_width: int | None) -> list[Target]:
    """Those of `places_of` in Stable Diffusion 2 for a context of 1024, else in 1.5: for a file without its model."""
    preset = read_preset("sd2" if context_width == 1024 else "sd1")
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(preset["unet"]))
        text = build_text_encoder(preset["text_encoder"])
    return places_of(unet, "unet") + places_of(text, "text_encoder")


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
        check_kind("targets", targets, Collection, "a name, a regular expression, or ends of paths")
        for target in targets:
            check_kind("targets", target, str, "ends of paths")
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
