"""The hypernetworks that a model has: put in, listed, weighed, switched and taken out.

They lie beside the UNet, not in it: its modules, parameters and files stay what they are, and LoRA layers go in and out
of ``to_k`` and ``to_v`` as always. Cross-attention takes networks of the text's width, self-attention those of its own,
as in A1111. Keys and values of the text are computed once per prompt, so there they cost nothing per sampling step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from finetune.adapters import Adapter, forget_if_none, use
from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import Hypernetwork
from sdkit.checks import expect, is_number
from sdkit.errors import CheckpointError, ConfigError
from sdkit.model_lock import alone
from sdkit.networks.attention import Attention, KeyValue

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel
    from sdkit.networks.unet import UNet2DConditionModel

KIND = "hypernetwork"


class Chain:
    """The hypernetworks of a model by name, each fed by the one before; ``off`` names those that do nothing."""

    def __init__(self) -> None:
        self.networks: dict[str, Hypernetwork] = {}
        self.off: set[str] = set()

    def key_value(self, attention: Attention, context: Tensor) -> KeyValue:
        """Stands in for ``attention.key_value``."""
        k = v = context
        for name, network in self.networks.items():
            if name in self.off:
                continue
            if network.device != context.device:  # where the model has gone since
                network.to(context.device)
            k, v = network(k, v)

        heads = (attention.heads, -1)
        return attention.to_k(k).unflatten(-1, heads), attention.to_v(v).unflatten(-1, heads)


# Into the model


@alone
def load_hypernetwork(sd: DiffusionModel, path: str | Path, multiplier: float = 1.0, name: str | None = None) -> str:
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


@alone
def add_hypernetwork(sd: DiffusionModel, network: Hypernetwork, multiplier: float = 1.0, name: str = "default") -> None:
    """Put a hypernetwork into the model, behind those that it has; one that is to be trained, for instance.

    Its parameters are its own, not the UNet's. Raises ConfigError for widths that the model lacks, a name or a network
    that it has.
    """
    chain = _chain(sd)
    if misfit := _misfit(sd, network):
        raise ConfigError(f"hypernetwork {name!r}: {misfit}")
    if name in chain.networks or network in chain.networks.values():
        there = "one of this name" if name in chain.networks else "this one, under another name"
        raise ConfigError(f"hypernetwork {name!r}: the model has {there} already")

    network.multiplier = _finite(multiplier)
    chain.networks[name] = network.to(sd.device)
    sd.adapter_states[KIND] = chain
    _connect(sd, chain)
    use(sd, KIND)


def save_hypernetwork(sd: DiffusionModel, path: str | Path, name: str | None = None) -> None:
    """Write a hypernetwork of the model as A1111's ``.pt``; the name may be left out when there is only one.

    Raises ConfigError when it is not clear which one is meant or for the ending .safetensors, which this is not,
    CheckpointError when it cannot be written.
    """
    expect(Path(path).suffix.lower() != ".safetensors", "save_hypernetwork", "a file that ends in .pt", str(path))
    networks = _chain(sd).networks
    if name is None and len(networks) != 1:
        known = ", ".join(networks) or "none"
        raise ConfigError(f"save_hypernetwork: expected a name, for the model has {known}")
    _named(sd, name)[0].save(path)


@alone
def remove_hypernetworks(sd: DiffusionModel, name: str | None = None) -> None:
    """Take a hypernetwork, or all of them, out of the model. Raises ConfigError for a name that there is not."""
    gone = _named(sd, name)
    remove(sd, [known for known, network in _chain(sd).networks.items() if network in gone])
    forget_if_none(sd, KIND)


def list_hypernetworks(sd: DiffusionModel) -> dict[str, Hypernetwork]:
    """The hypernetworks of a model by name, in the order in which contexts go through them."""
    return dict(_chain(sd).networks)


@contextmanager
def without_hypernetworks(sd: DiffusionModel) -> Generator[UNet2DConditionModel]:
    """Inside the block no hypernetwork runs, also none that trains; gives the UNet."""
    chain = _chain(sd)
    off, chain.off = chain.off, set(chain.networks)
    try:
        yield sd.unet
    finally:
        chain.off = off


# The verbs, as `finetune.adapters.Verbs` describes them


def list_adapters(sd: DiffusionModel) -> dict[str, Adapter]:
    """The hypernetworks by name; a module is a pair of networks, for keys and for values."""
    chain = _chain(sd)
    return {
        name: Adapter(
            network.multiplier,
            name not in chain.off,
            modules=len(network.widths),
            parameters=sum(p.numel() for p in network.parameters()),
            kind=KIND,
        )
        for name, network in chain.networks.items()
    }


def set_scale(sd: DiffusionModel, scale: float, names: Sequence[str]) -> None:
    """Let these hypernetworks count ``scale`` times; with 0 they do nothing."""
    for name in names:
        _chain(sd).networks[name].multiplier = _finite(scale)


def activate(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Let these hypernetworks run, and no others."""
    chain = _chain(sd)
    chain.off = set(chain.networks) - set(names)


def remove(sd: DiffusionModel, names: Sequence[str]) -> None:
    """Take these hypernetworks out of the model."""
    chain = _chain(sd)
    chain.networks = {name: network for name, network in chain.networks.items() if name not in names}
    chain.off -= set(names)
    _connect(sd, chain)
    if not chain.networks:
        sd.adapter_states.pop(KIND, None)


# Helpers


def _chain(sd: DiffusionModel) -> Chain:
    found = sd.adapter_states.get(KIND)
    return found if isinstance(found, Chain) else Chain()


def _named(sd: DiffusionModel, name: str | None) -> list[Hypernetwork]:
    """The network of this name, or all."""
    networks = _chain(sd).networks
    if name is not None and name not in networks:
        known = ", ".join(networks) or "it has none"
        raise ConfigError(f"hypernetwork {name!r}: expected one of the model's: {known}")
    return list(networks.values()) if name is None else [networks[name]]


def _misfit(sd: DiffusionModel, network: Hypernetwork) -> str | None:
    """Why the network's widths do not fit this model; None if they do."""
    known = sorted({_width(attention) for attention in _attentions(sd)})
    missing = sorted(set(network.widths) - set(known))
    if not missing:
        return None
    expected, found = (", ".join(map(str, widths)) for widths in (known, missing))
    return f"made for contexts of width {found}; expected those of the model: {expected}"


def _connect(sd: DiffusionModel, chain: Chain) -> None:
    """Let the chain make the keys and values of the attentions that it has networks for, and of no others."""
    widths = {width for network in chain.networks.values() for width in network.widths}
    for attention in _attentions(sd):
        vars(attention).pop("key_value", None)  # its own again
        if _width(attention) in widths:
            attention.key_value = partial(chain.key_value, attention)


def _attentions(sd: DiffusionModel) -> list[Attention]:
    return [module for module in sd.unet.modules() if isinstance(module, Attention)]


def _width(attention: Attention) -> int:
    """The width of its context; LoRA layers report that of the layers that they wrap."""
    return int(attention.to_k.in_features)


def _finite(multiplier: float) -> float:
    expect(is_number(multiplier), "multiplier", "a finite number", multiplier)
    return multiplier
