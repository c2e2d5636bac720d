"""`accelerate`: a pipeline of diffusers that computes with our networks and stays what it was.

Its UNet and VAE remain diffusers' modules, with their names, files, ``to`` and loaders; only what their ``forward``
computes is ours, on the very same parameters. A call that ours does not know (ControlNet, IP-Adapter, FreeU, a LoRA
that is not fused, …) is computed by diffusers, as before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.checkpoints.components import give_weights
from sdkit.errors import ConfigError
from sdkit.networks.unet import ContextKeyValues, UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL

_SAME_ATTENTION = frozenset({"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"})
_FREEU = ("s1", "s2", "b1", "b2")
_MARK = "_sdkit_accelerated"  # on the UNet: offloading wraps its ``forward`` once more


def accelerate(pipe: Any) -> Any:
    """Let a diffusers pipeline's UNet and VAE compute with sdkit's networks; returns the same pipeline.

    pipe: any pipeline of SD1's or SD2's kind: text to image, image to image, inpainting, depth, ControlNet. The
    weights are shared, not copied: what changes them there, a fused LoRA or training, changes them here. Keys and
    values are computed once for every tensor of hidden states, not in every step; only edits of weights through
    ``.data`` between two calls with the very same tensor go unseen. Calling it twice changes nothing more.

    Raises ConfigError for a pipeline without a UNet2DConditionModel, for one whose configuration ours lacks (SDXL's,
    for instance), with the keys' names, and for one that is being offloaded already: accelerate it before.
    """
    unet: Any = getattr(pipe, "unet", None)
    vae: Any = getattr(pipe, "vae", None)

    if type(unet).__name__ != "UNet2DConditionModel":
        raise ConfigError(f"accelerate: expected a pipeline with a UNet2DConditionModel, found {type(unet).__name__}")
    if _MARK in vars(unet):
        return pipe
    if any(hasattr(module, "_hf_hook") for part in (unet, vae) if part is not None for module in part.modules()):
        raise ConfigError("accelerate: expected a pipeline that is not offloaded yet; accelerate first, then offload")

    stand_in = _UNetForward(unet)  # which may raise
    if type(vae).__name__ == "AutoencoderKL":
        _take_over_vae(vae)
    unet.forward = stand_in
    setattr(unet, _MARK, True)
    return pipe


class _Twin:
    """A network of ours on the parameters of one of theirs."""

    def __init__(self, ours: nn.Module, theirs: Any) -> None:
        self.ours, self.theirs = ours, theirs
        self.shared: list[tuple[dict[str, Any], str, Any]] = []
        self._share()

    def network(self) -> Any | None:
        """Ours, on the parameters that theirs has now; None while these lie elsewhere, offloaded piece by piece."""
        if not all(owner.get(name) is parameter for owner, name, parameter in self.shared):
            self._share()
        return None if self.away else self.ours

    def _share(self) -> None:
        """Give ours their parameters themselves, those below LoRA layers too."""
        state: dict[str, Tensor] = {}
        self.shared = []
        for path, module in self.theirs.named_modules():
            owner = module._parameters  # pyright: ignore[reportPrivateUsage]  # in which they would be replaced
            for name, parameter in owner.items():
                if parameter is not None and ".lora_" not in path:
                    self.shared.append((owner, name, parameter))
                    state[f"{path}.{name}".replace(".base_layer.", ".")] = parameter

        give_weights(self.ours, state, "accelerate")
        self.away = any(parameter.device.type == "meta" for parameter in state.values())


class _UNetForward:
    """Stands in for ``forward`` of a diffusers UNet."""

    def __init__(self, theirs: Any) -> None:
        self.theirs, self.their_forward = theirs, theirs.forward
        with torch.device("meta"):
            ours = UNet2DConditionModel.from_config(dict(theirs.config))
        self.twin = _Twin(ours, theirs)
        self.attentions = [m for m in theirs.modules() if hasattr(m, "processor") and hasattr(m, "to_q")]
        self.projected: tuple[Tensor, list[Any], ContextKeyValues] | None = None
        functools.update_wrapper(self, self.their_forward)

    def __call__(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *more: Any,
        return_dict: bool = True,
        **named: Any,
    ) -> Any:
        """Arguments and result as diffusers has them."""
        plain = not any(_means_something(value) for value in (*more, *named.values())) and not self._is_altered()
        ours = self.twin.network() if plain else None
        if ours is None:
            return self.their_forward(sample, timestep, encoder_hidden_states, *more, return_dict=return_dict, **named)

        prediction = ours(sample, timestep, None, context_kv=self._context_kv(ours, encoder_hidden_states))
        if not return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _context_kv(self, ours: UNet2DConditionModel, context: Tensor) -> ContextKeyValues:
        """A prompt's keys and values: the last call's, if that had the same tensor and neither it nor a weight changed.

        Tensors count their changes. peft's merging goes past the counter, so with peft they are computed each time.
        """
        if torch.is_grad_enabled() or context.is_inference() or _has_peft(self.theirs):
            return ours.context_kv(context)

        read = (context, *(layer.weight for a in self.attentions for layer in (a.to_k, a.to_v)))
        now = [(t.data_ptr(), t._version, t.dtype) for t in read]  # pyright: ignore[reportPrivateUsage]
        if self.projected is None or self.projected[0] is not context or self.projected[1] != now:
            self.projected = (context, now, ours.context_kv(context))
        return self.projected[2]

    def _is_altered(self) -> bool:
        """Whether diffusers' UNet computes something else than its parameters and configuration say."""
        unet = self.theirs
        return (
            any(type(attention.processor).__name__ not in _SAME_ATTENTION for attention in self.attentions)
            or any(getattr(block, name, None) is not None for block in unet.up_blocks for name in _FREEU)
            or (_has_peft(unet) and _has_live_adapter(unet.modules()))
            or (torch.is_grad_enabled() and unet.is_gradient_checkpointing)
        )


class _HalfForward:
    """Stands in for ``forward`` of a diffusers VAE's encoder or decoder."""

    def __init__(self, ours: nn.Module, theirs: Any) -> None:
        self.theirs, self.their_forward = theirs, theirs.forward
        self.twin = _Twin(ours, theirs)
        functools.update_wrapper(self, self.their_forward)

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        checkpointed = torch.is_grad_enabled() and self.theirs.gradient_checkpointing
        plain = not any(_means_something(value) for value in (*more, *named.values())) and not checkpointed
        ours = self.twin.network() if plain else None
        return self.their_forward(x, *more, **named) if ours is None else ours(x)


def _take_over_vae(theirs: Any) -> None:
    """Let the encoder and the decoder compute with ours; the rest, tiling and slicing too, stays diffusers'."""
    with torch.device("meta"):
        ours = AutoencoderKL.from_config(dict(theirs.config))
    halves = [_HalfForward(getattr(ours, name), getattr(theirs, name)) for name in ("encoder", "decoder")]
    for half in halves:
        half.theirs.forward = half


def _means_something(value: Any) -> bool:
    """Whether an optional argument was given: pipelines pass None and empty dicts where it was not."""
    return value is not None and not (isinstance(value, dict) and not value)


def _has_peft(unet: Any) -> bool:
    return bool(getattr(unet, "_hf_peft_config_loaded", False))


def _has_live_adapter(modules: Iterable[Any]) -> bool:
    """Whether a layer of peft's adds something to its base: one that is merged or switched off does not."""
    return any(
        module.active_adapters and not module.merged and not module.disable_adapters
        for module in modules
        if hasattr(module, "base_layer")
    )
