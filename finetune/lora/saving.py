"""A model's LoRA as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.lora.adapters import layers_of, list_adapters
from finetune.lora.in_place import own_value, state_of
from finetune.lora.names import module_key
from finetune.lora.reading import BASE
from finetune.lora.update import AnyUpdates
from finetune.lora.writing import check_format, plain_updates, write_lora
from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def save_lora(
    sd: DiffusionModel,
    path: str | Path,
    format: str = "diffusers",
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in the format "diffusers", "kohya" or "peft" (`finetune.lora.writing.write_lora`).

    ``name`` may be left out when there is only one. The scale of `set_scale` is no part of a file. ``metadata``, for
    the header: kohya's ``ss_…`` facts of the training, a trigger word; the model's name is among them by itself.
    Changes of weights (OFT, IA3, GLoRA, whole differences) are written as LoRA of full rank but for kohya's format,
    which has them as they are.

    Raises ConfigError for a name that is not the model's, and for what the format cannot hold.
    """
    known = list(list_adapters(sd))
    if name is None and len(known) != 1:
        raise ConfigError(f"save_lora: expected a name, for the model has {', '.join(known) or 'no adapters'}")
    name = name or known[0]
    if name not in known:
        raise ConfigError(f"save_lora: {name!r} is no adapter of the model, which has {', '.join(known) or 'none'}")

    base = sd.made_of.get("model")
    facts = ({BASE: Path(str(base)).name} if base else {}) | dict(metadata or {})
    if format == "kohya" and sd.schedule.prediction_type == "v_prediction":
        facts = {"ss_base_model_version": "sd_v2_v"} | facts
    updates = updates_of(sd, name)
    if format in ("diffusers", "peft"):
        updates = plain_updates(updates, lambda target: own_value(sd, target), format)
    beside = state_of(sd).adapters.get(name)
    write_lora(updates, path, format, facts, words=beside.words if beside else {})


def check_can_save(sd: DiffusionModel, name: str, format: str) -> None:
    """Raise ConfigError where `save_lora` will, for what the format cannot hold; of an adapter that trains, which has
    no changes of weights."""
    beside = state_of(sd).adapters.get(name)
    check_format(updates_of(sd, name), format, beside.words if beside else {})


def updates_of(sd: DiffusionModel, name: str) -> AnyUpdates:
    """What an adapter does by its places; the tensors are its own, not copies."""
    beside, key = state_of(sd).adapters.get(name), module_key(name)
    low_rank = {target: layer.update_of(key) for target, layer in layers_of(sd, key).items()}
    return low_rank | (beside.changes if beside else {})
