"""The hypernetworks of a model: put in, weighed, by prompts too, and taken out.

They lie beside the UNet, not in it: its modules, parameters and files stay what they are, and LoRA layers go in and out
of ``to_k`` and ``to_v`` as always. Cross-attention takes networks of the text's width, self-attention those of its own,
as in A1111. Keys and values of the text are computed once per prompt, so there they cost nothing per sampling step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from finetune.hypernetwork import Hypernetwork, read_hypernetwork
from sdkit.attention import Attention, KeyValue
from sdkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from sdkit import StableDiffusion
    from sdkit.prompts import ExtraNetwork
    from sdkit.unet import UNet2DConditionModel


class _Chain:
    """The hypernetworks of a model by name, each fed by the one before. Prompts' tags call it (`extra_networks`)."""

    def __init__(self) -> None:
        self.networks: dict[str, Hypernetwork] = {}

    def key_value(self, attention: Attention, context: Tensor) -> KeyValue:
        """Stands in for ``attention.key_value``."""
        k = v = context
        for network in self.networks.values():
            if network.device != context.device:  # where the model has gone since
                network.to(context.device)
            k, v = network(k, v)
        heads = (attention.heads, -1)
        return attention.to_k(k).unflatten(-1, heads), attention.to_v(v).unflatten(-1, heads)

    def named(self, name: str | None) -> list[Hypernetwork]:
        """The network of this name, or all."""
        if name is not None and name not in self.networks:
            known = ", ".join(self.networks) or "it has none"
            raise ConfigError(f"hypernetwork {name!r}: expected one of the model's: {known}")
        return list(self.networks.values()) if name is None else [self.networks[name]]

    @contextmanager
    def __call__(self, wanted: Sequence[ExtraNetwork]) -> Generator[None]:
        """While inside, the networks that a prompt names have the prompt's weights; the others those that they have."""
        weights: dict[str, float] = {}
        for tag in wanted:
            weights[tag.name] = weights.get(tag.name, 0.0) + tag.weight
        before = {network: network.multiplier for name in weights for network in self.named(name)}
        try:
            for network, weight in zip(before, weights.values(), strict=True):
                network.multiplier = weight
            yield
        finally:
            for network, multiplier in before.items():
                network.multiplier = multiplier


def load_hypernetwork(sd: StableDiffusion, path: str | Path, multiplier: float = 1.0, name: str | None = None) -> str:
    """Read a hypernetwork into the model, behind those that it has. Returns its name, the file's by default.

    Prompts weigh it by ``<hypernet:name:0.7>``; loaded with the multiplier 0 it is in force only where they do.
    Raises CheckpointError for a file that is damaged, no hypernetwork, or made for widths that the model lacks;
    ConfigError for a name that the model has.
    """
    network = read_hypernetwork(path)
    name = name or Path(path).stem
    if misfit := _misfit(sd, network):
        raise CheckpointError(f"{path}: {misfit}")
    add_hypernetwork(sd, network, multiplier, name)
    return name


def add_hypernetwork(
    sd: StableDiffusion, network: Hypernetwork, multiplier: float = 1.0, name: str = "default"
) -> None:
    """Put a hypernetwork into the model, behind those that it has; one that is to be trained, for instance.

    Its parameters are its own, not the UNet's. Raises ConfigError for widths that the model lacks, a name or a network
    that it has.
    """
    chain = _chain(sd)
    if misfit := _misfit(sd, network):
        raise ConfigError(f"hypernetwork {name!r}: {misfit}")
    if name in chain.networks or network in chain.networks.values():
        what = "one of this name" if name in chain.networks else "this one, under another name"
        raise ConfigError(f"hypernetwork {name!r}: the model has {what} already")
    network.multiplier = _finite(multiplier)
    chain.networks[name] = network.to(sd.device)
    _connect(sd, chain)


def list_hypernetworks(sd: StableDiffusion) -> dict[str, Hypernetwork]:
    """The hypernetworks of a model by name, in the order in which contexts go through them."""
    return dict(_chain(sd).networks)


def set_multiplier(sd: StableDiffusion, multiplier: float, name: str | None = None) -> None:
    """Weigh a hypernetwork, or all of them; with 0 they do nothing. Raises ConfigError for a name that there is not."""
    for network in _chain(sd).named(name):
        network.multiplier = _finite(multiplier)


def remove_hypernetworks(sd: StableDiffusion, name: str | None = None) -> None:
    """Take a hypernetwork, or all of them, out of the model. Raises ConfigError for a name that there is not."""
    chain = _chain(sd)
    gone = chain.named(name)
    chain.networks = {known: network for known, network in chain.networks.items() if network not in gone}
    _connect(sd, chain)


@contextmanager
def without_hypernetworks(sd: StableDiffusion) -> Generator[UNet2DConditionModel]:
    """Inside the block no hypernetwork runs, also none that trains; gives the UNet."""
    chain = _chain(sd)
    networks, chain.networks = chain.networks, {}
    try:
        yield sd.unet
    finally:
        chain.networks = networks


def _chain(sd: StableDiffusion) -> _Chain:
    found = sd.extra_networks.get("hypernet")
    return found if isinstance(found, _Chain) else _Chain()


def _misfit(sd: StableDiffusion, network: Hypernetwork) -> str | None:
    """What is wrong with the network's widths for this model."""
    known = sorted({_width(attention) for attention in _attentions(sd)})
    missing = sorted(set(network.widths) - set(known))
    if not missing:
        return None
    expected, found = (", ".join(map(str, widths)) for widths in (known, missing))
    return f"made for contexts of width {found}; expected those of the model: {expected}"


def _connect(sd: StableDiffusion, chain: _Chain) -> None:
    """Let the chain make the keys and values of the attentions that it has networks for, and of no others."""
    widths = {width for network in chain.networks.values() for width in network.widths}
    for attention in _attentions(sd):
        vars(attention).pop("key_value", None)  # its own again
        if _width(attention) in widths:
            attention.key_value = partial(chain.key_value, attention)
    sd.extra_networks.pop("hypernet", None)
    if chain.networks:
        sd.extra_networks["hypernet"] = chain


def _attentions(sd: StableDiffusion) -> list[Attention]:
    return [module for module in sd.unet.modules() if isinstance(module, Attention)]


def _width(attention: Attention) -> int:
    """Of its context; LoRA layers say it like the layers that they wrap."""
    return int(attention.to_k.in_features)


def _finite(multiplier: float) -> float:
    if not math.isfinite(multiplier):
        raise ConfigError(f"multiplier: expected a finite number, found {multiplier}")
    return multiplier
