"""Adapters as one family: every kind has the same verbs, and here they are for all kinds at once.

`KINDS` registers those that come with us. A new kind is a folder with a module of verbs (`Verbs`) and a row in that
table: prompt tags, the command line, the metadata of pictures and ``sdkit inspect`` follow from the row.

A network without adapters is exactly what it was: `remove` puts the very same layers back.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from sdkit.adapter_kinds import AdapterKind, adapter_kinds, register_adapter_kind
from sdkit.checks import as_path, check_kind, expect, is_number
from sdkit.errors import CheckpointError, ConfigError
from sdkit.model_lock import alone
from sdkit.prompts.tags import ExtraNetwork

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel

logger = logging.getLogger(__name__)

KINDS = (
    AdapterKind(
        "lora",
        tag="lora",
        verbs="finetune.lora.verbs",
        files={
            "LoRA (kohya)": r"(module\.)?(lora|oft)_(unet|te)\w*\..*|bundle_emb\..*",
            "LoRA (peft)": r"base_model\.model\..*(lora_[AB]|hada_|lokr_).*",
            "LoRA (diffusers)": r".*(lora_[AB]|lora\.(up|down)|_lora\.(up|down)|lora_linear_layer).*",
        },
        formats=("diffusers", "kohya", "peft"),
    ),
    AdapterKind(
        "hypernetwork",
        tag="hypernet",
        verbs="finetune.hypernetwork.verbs",
        files={"hypernetwork": r"\d+\.[01]\.linear.*"},
    ),
)
"""The kinds that come with us: one row each."""

for _kind in KINDS:  # for where nothing is installed, and no entry point names them
    register_adapter_kind(_kind)


@dataclass(frozen=True)
class Adapter:
    """An adapter that a model has: its scale, whether it runs, and its size."""

    scale: float
    enabled: bool
    modules: int
    parameters: int
    kind: str = "lora"


class Verbs(Protocol):
    """The functions of a kind's module; ``sd`` is the model."""

    MERGES: bool
    """Whether its adapters can become a part of the weights."""

    def add(self, sd: DiffusionModel, /, *args: Any, **options: Any) -> Any:
        """Put a new adapter into the model, to be trained."""
        ...

    def load(self, sd: DiffusionModel, path: str | Path, scale: float = 1.0, /, name: str | None = None) -> str:
        """Read an adapter into the model, beside those that it has; returns its name, the file's by default."""
        ...

    def save(self, sd: DiffusionModel, path: str | Path, /, *, name: str | None = None) -> None:
        """Write an adapter; the name may be left out when there is only one."""
        ...

    def list_adapters(self, sd: DiffusionModel, /) -> dict[str, Adapter]:
        """The adapters of this kind by name, in the order in which they came."""
        ...

    def set_scale(self, sd: DiffusionModel, scale: float, names: Sequence[str], /) -> None:
        """Let these adapters count ``scale`` times."""
        ...

    def activate(self, sd: DiffusionModel, names: Sequence[str], /) -> None:
        """Let these adapters run, and no others of this kind."""
        ...

    def merge(self, sd: DiffusionModel, /) -> None:
        """Add the adapters that run to the weights; only called where ``MERGES``."""
        ...

    def unmerge(self, sd: DiffusionModel, /) -> None:
        """Undo `merge`, bit for bit."""
        ...

    def remove(self, sd: DiffusionModel, names: Sequence[str], /) -> None:
        """Take these adapters out."""
        ...

    def bake(self, sd: DiffusionModel, /) -> None:
        """Make what runs a part of the weights for good and take all out; only called where ``MERGES``."""
        ...


def verbs_of(kind: AdapterKind) -> Verbs:
    """The verbs of a kind, imported when they are first needed."""
    return cast("Verbs", kind.module)


# What a model has


def list_adapters(sd: DiffusionModel) -> dict[str, Adapter]:
    """The adapters of a model by name, kind after kind, in the order in which they came.

    Where two kinds have an adapter of the same name, the later one's is "name (kind)" here and in all verbs.
    """
    return {label: adapter for label, (_, _, adapter) in _labelled(sd).items()}


def _labelled(sd: DiffusionModel) -> dict[str, tuple[AdapterKind, str, Adapter]]:
    """Each adapter by the name that the verbs of this module know it by: (its kind, its name there, itself)."""
    found: dict[str, tuple[AdapterKind, str, Adapter]] = {}
    for kind, own in _of_every_kind(sd).items():
        for name, adapter in own.items():
            found[name if name not in found else f"{name} ({kind.name})"] = (kind, name, adapter)
    return found


def _of_every_kind(sd: DiffusionModel) -> dict[AdapterKind, dict[str, Adapter]]:
    """The adapters by kind; kinds that the model has none of are left alone, so that they are not imported."""
    kinds = [kind for kind in adapter_kinds() if kind.name in sd.adapter_kinds]
    return {kind: own for kind in kinds if (own := verbs_of(kind).list_adapters(sd))}


def _named(sd: DiffusionModel, name: str | None) -> dict[AdapterKind, list[str]]:
    """The adapters of this name, or all. Raises ConfigError when there is none of that name."""
    check_kind("name", name, (str, type(None)), "the name of an adapter, or None for all")
    known = _labelled(sd)
    if name is not None and name not in known:
        raise ConfigError(f"adapter {name!r}: expected one of the model's: {', '.join(known) or 'it has none'}")

    chosen: dict[AdapterKind, list[str]] = {}
    for label, (kind, own_name, _) in known.items():
        if name in (None, label):
            chosen.setdefault(kind, []).append(own_name)
    return chosen


# The verbs


@alone
def load_adapter(sd: DiffusionModel, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
    """Read an adapter of any kind into the model, beside those that it has. Returns its name, the file's by default.

    Raises CheckpointError for a file that is no adapter, or made for another model.
    """
    from sdkit.checkpoints.inspection import inspect_file

    expect(is_number(scale), "scale", "a finite number", scale)
    found = str(inspect_file(path)["kind"])
    for kind in adapter_kinds():
        if found in kind.files:
            return verbs_of(kind).load(sd, path, scale, name=name)
    raise CheckpointError(f"{path}: expected an adapter, found {found}")


@alone
def save_adapter(sd: DiffusionModel, path: str | Path, name: str | None = None) -> None:
    """Write an adapter in its kind's own format; the name may be left out when there is only one.

    Raises ConfigError when it is not clear which one is meant, CheckpointError when it cannot be written.
    """
    as_path("path", path)
    chosen = _named(sd, name)
    if sum(map(len, chosen.values())) != 1:
        raise ConfigError(f"save: expected a name, for the model has {', '.join(list_adapters(sd)) or 'no adapters'}")

    ((kind, names),) = chosen.items()
    verbs_of(kind).save(sd, path, name=names[0])


@alone
def enable(sd: DiffusionModel, name: str | None = None) -> None:
    """Let an adapter run, or all of them. Raises ConfigError when there is none of that name."""
    for kind, names in _named(sd, name).items():
        _switch(sd, kind, names, on=True)


@alone
def disable(sd: DiffusionModel, name: str | None = None) -> None:
    """Let an adapter, or all of them, do nothing until `enable`. Raises ConfigError when there is none of that name."""
    for kind, names in _named(sd, name).items():
        _switch(sd, kind, names, on=False)


def _switch(sd: DiffusionModel, kind: AdapterKind, names: Sequence[str], on: bool) -> None:
    """Switch these adapters of a kind; the others stay as they are."""
    own = verbs_of(kind).list_adapters(sd)
    running = [n for n, adapter in own.items() if (on if n in names else adapter.enabled)]
    verbs_of(kind).activate(sd, running)


@alone
def set_scale(sd: DiffusionModel, scale: float, name: str | None = None) -> None:
    """Let an adapter, or each of them, count ``scale`` times; 1 is as it was trained, negative turns it round.

    For DoRA the scale multiplies the low-rank part alone, as in peft. Raises ConfigError when there is none of that
    name, and for a scale that is not finite.
    """
    expect(is_number(scale), "scale", "a finite number", scale)
    for kind, names in _named(sd, name).items():
        verbs_of(kind).set_scale(sd, scale, names)


@alone
def merge(sd: DiffusionModel) -> None:
    """Add the adapters that run to the weights: same pictures, at the speed of the model alone. They stay here.

    Adapters of a kind that cannot be merged go on running beside the weights, with a warning. Raises ConfigError when
    the model has none but those.
    """
    known = _of_every_kind(sd)
    mergeable = [kind for kind in known if verbs_of(kind).MERGES]
    others = [name for kind, own in known.items() if kind not in mergeable for name, a in own.items() if a.enabled]
    if others and not mergeable:
        raise ConfigError(f"merge: {', '.join(others)} cannot become a part of the weights; they run beside them")

    for kind in mergeable:
        verbs_of(kind).merge(sd)
    if others:
        logger.warning("merge: %s cannot become a part of the weights and go on running beside them", ", ".join(others))


@alone
def unmerge(sd: DiffusionModel) -> None:
    """Undo `merge`: the weights are those before it, bit for bit."""
    for kind in _of_every_kind(sd):
        if verbs_of(kind).MERGES:
            verbs_of(kind).unmerge(sd)


@alone
def remove(sd: DiffusionModel, name: str | None = None) -> None:
    """Take an adapter, or all of them, out of the model. Raises ConfigError when there is none of that name.

    A layer without adapters is the model's own again, bit for bit. Weights that were frozen for the adapters' training
    stay frozen.
    """
    for kind, names in _named(sd, name).items():
        verbs_of(kind).remove(sd, names)
        forget_if_none(sd, kind.name)


@alone
def bake(sd: DiffusionModel) -> None:
    """Make the adapters that run a part of the weights, for good, and take all adapters out.

    The model is then a plain one, which can be saved. Raises ConfigError, before anything is changed, for adapters that
    run and are of a kind that cannot be merged.
    """
    known = _of_every_kind(sd)
    stuck = [n for kind, own in known.items() if not verbs_of(kind).MERGES for n, a in own.items() if a.enabled]
    if stuck:
        raise ConfigError(f"bake: {', '.join(stuck)} cannot become a part of the weights; disable or remove them first")

    for kind, own in known.items():
        if verbs_of(kind).MERGES:
            verbs_of(kind).bake(sd)
        else:
            verbs_of(kind).remove(sd, list(own))
        forget_if_none(sd, kind.name)


# Prompts


def use(sd: DiffusionModel, kind_name: str) -> None:
    """Note that the model has adapters of this kind, and let prompts name them by its tag. Kinds call this."""
    kind = next(kind for kind in adapter_kinds() if kind.name == kind_name)
    sd.adapter_kinds.add(kind.name)
    sd.extra_networks[kind.tag] = partial(in_force, sd, kind)


def forget_if_none(sd: DiffusionModel, kind_name: str) -> None:
    """Undo `use` where the model has no adapter of this kind any more."""
    kind = next(kind for kind in adapter_kinds() if kind.name == kind_name)
    if not verbs_of(kind).list_adapters(sd):
        sd.adapter_kinds.discard(kind.name)
        sd.extra_networks.pop(kind.tag, None)


@contextmanager
def in_force(sd: DiffusionModel, kind: AdapterKind, wanted: Sequence[ExtraNetwork]) -> Generator[None]:
    """While inside, the adapters of a kind that a prompt names run with the prompt's weights; the others as they do.

    Raises ConfigError for a name that the model does not have.
    """
    before = verbs_of(kind).list_adapters(sd)
    weights = _weights(kind, wanted, before)

    try:
        for name, weight in weights.items():
            _switch(sd, kind, [name], on=True)
            verbs_of(kind).set_scale(sd, weight, [name])
        yield
    finally:
        for name in weights:
            verbs_of(kind).set_scale(sd, before[name].scale, [name])
            if not before[name].enabled:
                _switch(sd, kind, [name], on=False)


def _weights(kind: AdapterKind, wanted: Sequence[ExtraNetwork], known: Mapping[str, Adapter]) -> dict[str, float]:
    """The weight of each adapter that a prompt names, added up."""
    weights: dict[str, float] = {}
    for network in wanted:
        if network.name not in known:
            there = ", ".join(known) or "it has none"
            raise ConfigError(f"{kind.name} {network.name!r}: expected one of the model's: {there}")
        weights[network.name] = weights.get(network.name, 0.0) + network.weight
    return weights
