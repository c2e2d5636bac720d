"""Changes of weights themselves (`WeightChange`) in a model, and the words that an adapter's file brought with it.

A changed parameter always has the value of what runs: the model's own, plus the difference of each adapter as often as
it counts, each computed from the model's own. So norms and biases are changed like any weight, a picture costs nothing
more, and there is nothing to merge. The model's own values are kept and come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.lora.targets import Target, networks_of
from finetune.lora.update import Changes
from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel

KIND = "lora"


@dataclass
class Beside:
    """What an adapter has beside its layers: its changes, and its words with their vectors."""

    changes: Changes = field(default_factory=Changes)
    words: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    strength: float = 1.0
    enabled: bool = True


@dataclass
class State:
    """What each adapter of a model has beside its layers, and the model's own values of the parameters changed.

    running: the adapters whose changes the parameters have now, and how often each counts.
    """

    adapters: dict[str, Beside] = field(default_factory=dict[str, Beside])
    own: dict[Target, Tensor] = field(default_factory=dict[Target, Tensor])
    running: dict[str, float] = field(default_factory=dict[str, float])


def state_of(sd: DiffusionModel) -> State:
    """What the adapters of a model have; only `put` keeps it in the model."""
    return sd.adapter_states.get(KIND) or State()


def parameter_of(sd: DiffusionModel, target: Target) -> nn.Parameter | None:
    """The weight or bias itself, without the layer that adapters put around it; None where there is no bias."""
    layer: Any = networks_of(sd)[target.network].get_submodule(target.path)
    layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return getattr(layer, target.parameter, None)


def own_value(sd: DiffusionModel, target: Target) -> Tensor:
    """The model's own value of a parameter, in which no adapter runs or is merged."""
    state, layer = state_of(sd), networks_of(sd)[target.network].get_submodule(target.path)
    if target in state.own:
        return state.own[target]
    if target.parameter == "weight" and isinstance(layer, LoraLayer):
        weight: Any = layer
        return weight.base_weight

    parameter = parameter_of(sd, target)
    assert parameter is not None, target
    return parameter.detach()


def put(sd: DiffusionModel, name: str, changes: Changes, words: Mapping[str, Tensor]) -> None:
    """Give an adapter its changes and its words; `refresh` lets them run. No adapter may be merged.

    Raises ConfigError for a word that stands for something else already.
    """
    state, known = state_of(sd), sd.textual_inversions
    for word, vectors in words.items():
        if word in known and not torch.equal(known[word].cpu(), vectors.cpu()):
            raise ConfigError(f"adapter {name!r}: its word {word!r} stands for another embedding of the model already")

    for target in changes:
        if target not in state.own:
            state.own[target] = own_value(sd, target).clone()
    state.adapters[name] = Beside(changes, words)
    for word, vectors in words.items():
        known.setdefault(word, vectors)
    _keep(sd, state)


def take_out(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Take the changes and words of adapters out of the model; what no other adapter changes is its own again."""
    state, known = state_of(sd), sd.textual_inversions
    gone = [state.adapters.pop(name) for name in names if name in state.adapters]

    left = {target for beside in state.adapters.values() for target in beside.changes}
    for target in [target for target in state.own if target not in left]:
        _set(sd, target, state.own.pop(target))

    words = {word: vectors for beside in state.adapters.values() for word, vectors in beside.words.items()}
    for word, vectors in (item for beside in gone for item in beside.words.items()):
        if known.get(word) is vectors:
            known.pop(word)
            known.update({word: words[word]} if word in words else {})
    _keep(sd, state)


def forget(sd: DiffusionModel) -> None:
    """Let changed parameters and words be the model's own from now on."""
    _keep(sd, State())


def _keep(sd: DiffusionModel, state: State) -> None:
    """Keep the state in the model, and say in its networks whether their weights are their own: files of models ask."""
    sd.adapter_states[KIND] = state
    if not state.adapters:
        del sd.adapter_states[KIND]
    for name, network in networks_of(sd).items():
        vars(network)["has_changed_weights"] = any(target.network == name for target in state.own)


def refresh(sd: DiffusionModel) -> None:
    """Give each changed parameter the value of what runs. No adapter may be merged."""
    state = state_of(sd)
    running = {n: b.strength for n, b in state.adapters.items() if b.enabled and b.strength and b.changes}
    if running == state.running:
        return

    for target, own in state.own.items():
        parameter = parameter_of(sd, target)
        value = own = own if parameter is None else own.to(parameter.device)
        for name, strength in running.items():
            if target in state.adapters[name].changes:
                value = value + strength * state.adapters[name].changes[target].delta(own)
        _set(sd, target, value)
    state.running = running


@torch.no_grad()
def _set(sd: DiffusionModel, target: Target, value: Tensor) -> None:
    parameter = parameter_of(sd, target)
    assert parameter is not None, target
    parameter.data.copy_(value)
