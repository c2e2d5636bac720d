"""peft's LoRA layers with three things added.

A single plain adapter runs in one kernel with its layer; what was merged can be undone bit for bit; and an adapter's
weights can be exchanged in place, so that neither a compiled network nor a captured graph notices.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

import sdkernels
from finetune.lora.update import LowRankUpdate


class _LoraLayer(lora.LoraLayer):
    """The base of our two kinds of layers. ``strength``: by adapter, the user's factor on alpha / rank."""

    other_param_names = (*lora.LoraLayer.other_param_names, "strength")
    unread_by_forward = frozenset({"strength", "lora_alpha", "use_rslora"})  # a graph outlives their changes

    # peft's attributes, which it leaves untyped; by the adapter's name, but for the last.
    r: dict[str, int]
    lora_alpha: dict[str, float]
    use_rslora: dict[str, bool]
    scaling: dict[str, Any]
    lora_variant: dict[str, Any]
    lora_A: Any
    lora_B: Any
    lora_magnitude_vector: Any
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        self.strength: dict[str, float] = {}
        self._kept: Tensor | None = None
        super().__init__(base_layer, adapter_name, config=config, **options)  # pyright: ignore[reportArgumentType]  # that of Linear or Conv2d

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Add an adapter; those that are here keep their state, and ``activate`` decides which run."""
        module: Any = self  # peft's layers are modules only below this class
        trains = {id(p): p.requires_grad for p in module.parameters()}
        super().update_layer(adapter_name, *args, **options)
        self.strength[adapter_name] = 1.0
        for parameter in module.parameters():
            parameter.requires_grad_(trains.get(id(parameter), parameter.requires_grad))

    @property
    def base(self) -> Any:
        """The layer that has the adapters."""
        return self.get_base_layer()

    @property
    def base_weight(self) -> Tensor:
        """Its weight, without what is merged."""
        return self.base.weight.detach() if self._kept is None else self._kept

    def activate(self, names: list[str]) -> None:
        """Choose the adapters that run, without the change of what trains that comes with peft's ``set_adapter``."""
        self._active_adapter = names

    def set_scale(self, adapter: str, scale: float) -> None:
        """The adapter counts ``scale`` times what its file or its training says."""
        if adapter not in self.scaling:
            return

        self.strength[adapter] = scale
        value = scale * self.unit_scale(adapter)
        held = self.scaling[adapter]
        if isinstance(held, Tensor):  # a slot to swap adapters in: compiled code reads the number from this tensor
            held.fill_(value)
        else:
            self.scaling[adapter] = value

    def unit_scale(self, adapter: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.r[adapter]
        return float(self.lora_alpha[adapter]) / (rank**0.5 if self.use_rslora[adapter] else rank)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters, or those named, to the weight, but none twice."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.lora_A and name not in self.merged_adapters]
        if not names:
            return

        if not self.merged:
            self._kept = self.base_weight.clone()
        super().merge(safe_merge, names)

    def unmerge(self) -> None:
        """Put the weight back that was there before; peft subtracts what it added, which rounds."""
        if self._kept is not None:
            self.base.weight.data.copy_(self._kept)
        self._kept = None
        self.merged_adapters.clear()

    def update_of(self, adapter: str) -> LowRankUpdate:
        """The adapter's weights here, without the user's scale."""
        magnitude = self.lora_magnitude_vector[adapter].weight.detach() if adapter in self.lora_variant else None
        a, b = self.lora_A[adapter].weight.detach(), self.lora_B[adapter].weight.detach()
        return LowRankUpdate(a, b, self.unit_scale(adapter), None if magnitude is None else magnitude.flatten())

    @torch.no_grad()
    def load(self, adapter: str, update: LowRankUpdate | None) -> None:
        """Copy weights of at most the adapter's rank into it, in place; None makes it do nothing."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        a.zero_()
        b.zero_()
        if update is None:
            return

        a[: update.rank].copy_(update.down)
        b[:, : update.rank].copy_(update.up)
        if update.magnitude is not None:
            weight = self.lora_magnitude_vector[adapter].weight
            weight.copy_(update.magnitude.view_as(weight))

        self.lora_alpha[adapter], self.use_rslora[adapter] = update.scale * self.r[adapter], False
        self.set_scale(adapter, self.strength[adapter])


class LoraLinear(_LoraLayer, lora.Linear):
    """peft's linear layer; one plain adapter, without dropout, runs as ``sdkernels.lora_linear``."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        name = None if args or options else self._alone()
        if name is None:
            return super().forward(x, *args, **options)

        base, a, b = self.base, self.lora_A[name].weight, self.lora_B[name].weight
        kind = x.device.type
        casts = kind != "meta" and torch.is_autocast_enabled(kind)  # which knows no meta device
        dtype = torch.get_autocast_dtype(kind) if casts else base.weight.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        return sdkernels.lora_linear(x.to(dtype), base.weight.to(dtype), bias, a, b, self.scaling[name])

    def _alone(self) -> str | None:
        """The one adapter that runs here, if the kernel can take it."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.merged or self.disable_adapters or names[0] in self.lora_variant:
            return None
        drops = self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity)
        return None if drops else names[0]


class LoraConv2d(_LoraLayer, lora.Conv2d):
    """peft's convolution."""


Layer = LoraLinear | LoraConv2d
