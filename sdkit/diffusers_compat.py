"""`accelerate`: a pipeline of diffusers that computes with our networks and stays what it was; `restore` undoes it.

Its UNet and VAE remain diffusers' modules, with their names, files, ``to`` and loaders; only what their ``forward``
computes is ours, on the very same parameters. A call that ours does not know (ControlNet, IP-Adapter, FreeU, a LoRA
that is not fused, …) is computed by diffusers, as before. Its scheduler remains diffusers' too; its ``step`` is one row
of a table that was read off it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sdkit.checkpoints.components import give_weights
from sdkit.devices import fast_layout
from sdkit.errors import ConfigError
from sdkit.graphs import Graphs, State, state_of
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.unet import ContextKeyValues, UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.probed_step import ProbedStep

Function = TypeVar("Function", bound=Callable[..., Any])

_SAME_ATTENTION = frozenset({"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"})
_FREEU = ("s1", "s2", "b1", "b2")


def accelerate(pipe: Any, graphs: bool | None = None) -> Any:
    """Let a diffusers pipeline's UNet and VAE compute with sdkit's networks; returns the same pipeline.

    pipe: any pipeline of SD1's or SD2's kind: text to image, image to image, inpainting, depth, ControlNet. The
    weights are shared, not copied: what changes them there, a fused LoRA or training, changes them here. When they are
    first used on a GPU, they are laid out as they compute fastest there (`sdkit.networks.memory_layout`).

    graphs: whether the launches of a call of the UNet are recorded once for each shape, and then replayed without
    Python (`sdkit.graphs`); None for on a GPU alone. Without them, keys and values are computed once for every tensor
    of hidden states, not in every step; only edits of weights through ``.data`` between two calls with the very same
    tensor go unseen.

    A step of the pipeline's scheduler becomes one launch if it can be told by a table
    (`sdkit.sampling.probed_step.ProbedStep`). A scheduler that is given to the pipeline later stays as it is until
    ``accelerate`` is called again; of what is accelerated already that changes ``graphs`` alone.

    Raises ConfigError for a pipeline without a UNet2DConditionModel, for one whose configuration ours lacks (SDXL's,
    for instance), with the keys' names, and for one that is being offloaded already: accelerate it before.
    """
    unet: Any = getattr(pipe, "unet", None)
    vae: Any = getattr(pipe, "vae", None)
    scheduler: Any = getattr(pipe, "scheduler", None)

    if type(unet).__name__ != "UNet2DConditionModel":
        raise ConfigError(f"accelerate: expected a pipeline with a UNet2DConditionModel, found {type(unet).__name__}")
    stand_ins: list[_Forward] = []
    if not isinstance(_stand_in(unet), _UNetForward):
        _check_in_place("accelerate", unet)
        stand_ins.append(_UNetForward(unet))
    if type(vae).__name__ == "AutoencoderKL" and _stand_in(vae.encoder) is None:
        _check_in_place("accelerate", vae)
        stand_ins += _vae_halves(vae)

    for stand_in in stand_ins:
        stand_in.take_over()
    if isinstance(stand_in := _stand_in(unet), _UNetForward):
        stand_in.graphs_wanted = graphs
    if hasattr(scheduler, "timesteps") and "step" not in vars(scheduler):
        scheduler.step = ProbedStep(scheduler, _draw_noise)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `accelerate`: all of the pipeline's parts are as they were, the layout of weights too; returns the pipeline.

    One that is not accelerated stays as it is. Raises ConfigError for one that is being offloaded: call its
    ``remove_all_hooks()`` before.
    """
    parts = [part for name in ("unet", "vae") if isinstance(part := getattr(pipe, name, None), nn.Module)]
    _check_in_place("restore", *parts)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(stand_in := vars(module).get("forward"), _Forward):
            stand_in.give_back()

    scheduler: Any = getattr(pipe, "scheduler", None)
    if isinstance(step := getattr(scheduler, "step", None), ProbedStep):
        step.end()
        del scheduler.step
    return pipe


def _check_in_place(name: str, *parts: Any) -> None:
    """Raises ConfigError for networks that are being offloaded."""
    if any(hasattr(module, "_hf_hook") for part in parts for module in part.modules()):
        remedy = "accelerate first, then offload" if name == "accelerate" else "call its remove_all_hooks() before"
        raise ConfigError(f"{name}: expected a pipeline that is not offloaded; {remedy}")


def _uncompiled(function: Function) -> Function:
    """A function of Python's objects, which torch.compile leaves alone."""
    return cast(Function, torch.compiler.disable(function))


class _Forward:
    """Stands in for ``forward`` of a network of theirs: one of ours on its parameters."""

    def __init__(self, ours: nn.Module, theirs: Any) -> None:
        self.ours, self.theirs, self.their_forward = ours, theirs, theirs.forward
        self.before = vars(theirs).get("forward")  # somebody else's stand-in
        self.strides: dict[Tensor, tuple[int, ...]] = {}  # of the weights that were laid out anew, before
        self._share()
        self.__signature__ = inspect.signature(self.their_forward)

    def take_over(self) -> None:
        self.theirs.forward = self

    def give_back(self) -> None:
        """All is as before, to the order of weights in memory."""
        if self.before is None:
            del self.theirs.forward
        else:
            self.theirs.forward = self.before
        for weight, stride in self.strides.items():
            own = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
            weight.data = own.copy_(weight.data)

    @_uncompiled
    def network(self) -> Any | None:
        """Ours, on the parameters that theirs has now; None where it would be another network: while parameters lie
        elsewhere, offloaded piece by piece, or parts of theirs have hooks or functions of their own."""
        if not all(owner.get(name) is parameter for owner, name, parameter in self.shared):
            self._share()
        if self.away or any(_is_altered(module, kind) for module, kind in self.parts):
            return None
        self._lay_out()
        return self.ours

    def _share(self) -> None:
        """Give ours their parameters themselves, those below LoRA layers too."""
        state: dict[str, Tensor] = {}
        self.shared: list[tuple[dict[str, Any], str, Any]] = []
        self.parts = [(module, type(module)) for module in self.theirs.modules() if module is not self.theirs]
        for path, module in self.theirs.named_modules():
            owner = module._parameters  # pyright: ignore[reportPrivateUsage]  # in which they would be replaced
            for name, parameter in owner.items():
                if parameter is not None and ".lora_" not in path:
                    self.shared.append((owner, name, parameter))
                    state[f"{path}.{name}".replace(".base_layer.", ".")] = parameter

        give_weights(self.ours, state, "accelerate")
        self.away = any(parameter.device.type == "meta" for parameter in state.values())
        self.laid_out: tuple[torch.device, torch.dtype, int] | None = None

    def _lay_out(self) -> None:
        """Order the weights in memory as they compute fastest where they are now."""
        first = self.shared[0][2]
        if self.laid_out == (first.device, first.dtype, first.data_ptr()):
            return

        before = {weight: (weight.data_ptr(), weight.stride()) for _, _, weight in self.shared}
        with torch.inference_mode(False), torch.no_grad():
            lay_out(self.ours, fast_layout(first.device, first.dtype))
        self.laid_out = first.device, first.dtype, first.data_ptr()
        for weight, (address, stride) in before.items():
            if (weight.data_ptr(), weight.stride()) != (address, stride):
                self.strides.setdefault(weight, stride)


class _UNetForward(_Forward):
    """Stands in for ``forward`` of a diffusers UNet."""

    def __init__(self, theirs: Any) -> None:
        with torch.device("meta"):
            ours = UNet2DConditionModel.from_config(dict(theirs.config))
        super().__init__(ours, theirs)
        self.attentions = [m for m in theirs.modules() if hasattr(m, "processor") and hasattr(m, "to_q")]
        self.projected: tuple[Tensor, list[Any], ContextKeyValues] | None = None
        self.graphs = Graphs()
        self.graphs_wanted: bool | None = None

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
        plain = (
            not any(_means_something(value) for value in (*more, *named.values())) and not self._computes_otherwise()
        )
        ours = self.network() if plain else None
        if ours is None:
            return self.their_forward(sample, timestep, encoder_hidden_states, *more, return_dict=return_dict, **named)

        prediction = self._predict(ours, sample, timestep, encoder_hidden_states)
        if not return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _predict(self, ours: UNet2DConditionModel, sample: Tensor, timestep: Any, context: Tensor) -> Tensor:
        """The UNet's prediction, by a graph if there are any."""
        wanted = sample.device.type == "cuda" if self.graphs_wanted is None else self.graphs_wanted
        if wanted and not torch.compiler.is_compiling():  # which records graphs of its own, if asked to
            with self.graphs.lent() as graphs:
                if graphs is not None:  # no other thread has them
                    t = torch.as_tensor(timestep, device=sample.device)
                    return graphs.call("unet", self._state(), ours, sample, t, context)
        return ours(sample, timestep, None, context_kv=self._context_kv(ours, context))

    def _state(self) -> State:
        """As `state_of` would say of ours, a hundred times faster: nobody puts anything else into its modules."""
        process = state_of(nn.Identity())
        return State((process.held, tuple(weight.data_ptr() for _, _, weight in self.shared)), process.why_not)

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

    def _computes_otherwise(self) -> bool:
        """Whether diffusers' UNet computes something else than its parameters and configuration say."""
        unet = self.theirs
        return (
            any(type(attention.processor).__name__ not in _SAME_ATTENTION for attention in self.attentions)
            or any(getattr(block, name, None) is not None for block in unet.up_blocks for name in _FREEU)
            or (_has_peft(unet) and _has_live_adapter(unet.modules()))
            or (torch.is_grad_enabled() and unet.is_gradient_checkpointing)
        )


class _HalfForward(_Forward):
    """Stands in for ``forward`` of a diffusers VAE's encoder or decoder."""

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        checkpointed = torch.is_grad_enabled() and self.theirs.gradient_checkpointing
        plain = not any(_means_something(value) for value in (*more, *named.values())) and not checkpointed
        ours = self.network() if plain else None
        return self.their_forward(x, *more, **named) if ours is None else ours(x)


def _vae_halves(theirs: Any) -> list[_HalfForward]:
    """For the encoder and the decoder; the rest, tiling and slicing too, stays diffusers'."""
    with torch.device("meta"):
        ours = AutoencoderKL.from_config(dict(theirs.config))
    return [_HalfForward(getattr(ours, name), getattr(theirs, name)) for name in ("encoder", "decoder")]


def _stand_in(module: Any) -> _Forward | None:
    """Ours that computes for a module, offloaded since or not."""
    found = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return next((forward for forward in found if isinstance(forward, _Forward)), None)


def _is_altered(module: Any, kind: type) -> bool:
    """Whether a module of theirs does something else than its class, once ``kind``, says."""
    own = vars(module)
    return type(module) is not kind or bool(own["_forward_hooks"] or own["_forward_pre_hooks"]) or "forward" in own


def _draw_noise(shape: Any, **named: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, **named)


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
