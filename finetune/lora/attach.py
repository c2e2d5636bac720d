"""LoRA on a model (arXiv 2106.09685): made for training, loaded, saved, and exchanged in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from finetune.adapters import use
from finetune.lora.adapters import activate, changing, inject, is_merged, layers, list_adapters, networks_of, set_scale
from finetune.lora.layers import Layer
from finetune.lora.reading import read_lora
from finetune.lora.targets import Target, match_targets, targets_of
from finetune.lora.update import LowRankUpdate, Updates
from finetune.lora.writing import write_lora
from finetune.training.freezing import freeze
from sdkit.checks import check_choice, check_count, check_positive, expect, is_number
from sdkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def add_lora(
    sd: DiffusionModel,
    rank: int = 8,
    alpha: float = 8,
    targets: str | Sequence[str] = "cross_attention",
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    name: str = "default",
    text_encoder: bool = False,
) -> list[nn.Parameter]:
    """Put a new LoRA into the model, to be trained. Returns its parameters; the model's own are frozen.

    alpha: the update is multiplied by alpha / rank, or alpha / sqrt(rank) with ``use_rslora`` (arXiv 2312.03732).
    targets: "cross_attention" (attn2: to_q, to_k, to_v, to_out.0; 64 modules in SD1), "attention" (attn1 too),
        "transformer" (every layer of the transformers, kohya's scope; 192 in SD1), "all" (every linear layer and
        convolution); or a regular expression that is searched for in the modules' paths; or a list of ends of paths,
        such as ["to_k", "mid_block.attentions.0.proj_in"].
    dropout: share of the update's inputs that training drops.
    use_dora: train the norms of the weights' rows apart (arXiv 2402.09353).
    init: A is uniform as in LoRA's own code ("kaiming"), or normal of deviation 1 / rank; B is zero, so that the model
        is unchanged at first. Drawn from torch's global generator.
    text_encoder: adapt the text encoder too; its attention for the first two targets, its MLP as well for the others.

    Raises ConfigError for arguments without meaning, and names targets that match no module.
    """
    _check(rank, alpha, dropout, init)
    _check_name(sd, name)
    networks = networks_of(sd) if text_encoder else {"unet": sd.unet}

    # Find the modules that it adapts.
    places = [target for n, network in networks.items() for target in targets_of(network, n)]
    chosen = match_targets(places, targets)
    for n in networks:
        if not any(target.network == n for target in chosen):
            raise ConfigError(f"targets: {targets!r} matches nothing in the {n}")

    # Put the layers in; nothing else trains.
    config = LoraConfig(
        lora_dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init == "kaiming" else init,
    )
    freeze(sd)
    with changing(sd):
        for n, network in networks.items():
            inject(network, name, {s.path: (rank, alpha) for s in chosen if s.network == n}, config, trainable=True)
    _register(sd, name)

    return [p for _, _, layer in layers(sd) for key, p in layer.named_parameters() if f".{name}." in key]


def load_lora(
    sd: DiffusionModel,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    trainable: bool = False,
    slot_rank: int | None = None,
) -> str:
    """Read a LoRA of any format (`finetune.lora.reading`) into the model, beside those that it has. Returns its name.

    scale: how many times it counts.
    name: for `set_scale`, prompts and so on; the file's name by default.
    trainable: whether it goes on training.
    slot_rank: make room for this rank, so that `swap_lora` can put other files of up to this rank in its place without
        anything being compiled again; not for DoRA. Move the model to its device first.

    Raises CheckpointError for a file that is damaged, no LoRA, or for another model.
    """
    name = name or _module_name(Path(path).stem)
    _check_name(sd, name)
    updates = {target: _fitted(sd, target, update) for target, update in read_lora(path, _targets(sd)).items()}
    if slot_rank is not None:
        for target, update in updates.items():
            _check_fits(path, target, update, slot_rank)

    # Put the layers in; peft has different ones for plain updates and for DoRA.
    for dora in (False, True):
        config = LoraConfig(use_dora=dora, init_lora_weights=False)
        part = {target: update for target, update in updates.items() if (update.magnitude is not None) == dora}
        for n, network in networks_of(sd).items():
            sizes = {s.path: (slot_rank or b.rank, b.scale * b.rank) for s, b in part.items() if s.network == n}
            with changing(sd):
                inject(network, name, sizes, config, trainable)

    # Give them the file's weights.
    for target, layer in _layers_of(sd, name).items():
        if slot_rank is not None:
            layer.scaling[name] = torch.zeros((), device=layer.base_weight.device)
        layer.load(name, updates[target])

    if trainable:
        freeze(sd)
    _register(sd, name)
    set_scale(sd, scale, [name])
    return name


def swap_lora(sd: DiffusionModel, path: str | Path, name: str) -> None:
    """Put a file's LoRA in the place of one loaded with ``slot_rank``: no compiled code or captured graph notices.

    Modules of the slot that the file does not have do nothing. Raises CheckpointError when the file has modules that
    the slot lacks, a higher rank, or DoRA; ConfigError when ``name`` is no slot, or merged.
    """
    slots = _layers_of(sd, name)
    if not slots or not all(isinstance(layer.scaling[name], torch.Tensor) for layer in slots.values()):
        raise ConfigError(f"swap_lora: {name!r} is no adapter that was loaded with slot_rank")
    if is_merged(sd):
        raise ConfigError("swap_lora: the adapters are merged into the weights, unmerge them first")

    updates = read_lora(path, _targets(sd))
    for target, update in updates.items():
        _check_fits(path, target, update, slots[target].r[name] if target in slots else 0)
    for target, layer in slots.items():
        layer.load(name, updates.get(target))


def _check_fits(path: str | Path, target: Target, update: LowRankUpdate, rank: int) -> None:
    """Raise CheckpointError unless the update fits a slot of ``rank``; 0 where it has no such module."""
    if update.magnitude is not None or update.rank > rank:
        expected = f"plain LoRA of rank {rank} at most" if rank else "a module that the slot has"
        found = f"{'LoRA' if update.magnitude is None else 'DoRA'} of rank {update.rank}"
        raise CheckpointError(f"{path}: {target.diffusers}: expected {expected}, found {found}")


def save_lora(
    sd: DiffusionModel,
    path: str | Path,
    format: str = "diffusers",
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in the format "diffusers", "kohya" or "peft" (`finetune.lora.writing.write_lora`).

    ``name`` may be left out when there is only one. The scale of `set_scale` is no part of a file. ``metadata``, for
    the header: kohya's ``ss_…`` facts of the training, a trigger word.
    """
    known = list(list_adapters(sd))
    if name is None and len(known) != 1:
        raise ConfigError(f"save_lora: expected a name, for the model has {', '.join(known) or 'no adapters'}")
    name = name or known[0]
    if name not in known:
        raise ConfigError(f"save_lora: {name!r} is no adapter of the model, which has {', '.join(known) or 'none'}")

    facts = dict(metadata or {})
    if format == "kohya" and sd.schedule.prediction_type == "v_prediction":
        facts = {"ss_base_model_version": "sd_v2_v"} | facts
    write_lora(updates_of(sd, name), path, format, facts)


def updates_of(sd: DiffusionModel, name: str) -> Updates:
    """The weights of an adapter by their places; they are its own, not copies."""
    return {target: layer.update_of(name) for target, layer in _layers_of(sd, name).items()}


def _register(sd: DiffusionModel, name: str) -> None:
    """Let the new adapter run, and prompts name it."""
    activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled or n == name])
    use(sd, "lora")


def _targets(sd: DiffusionModel) -> list[Target]:
    return [target for name, network in networks_of(sd).items() for target in targets_of(network, name)]


def _layers_of(sd: DiffusionModel, name: str) -> dict[Target, Layer]:
    """The layers that have an adapter of this name, by their places."""
    modules = {target: _module(sd, target) for target in _targets(sd)}
    return {target: m for target, m in modules.items() if isinstance(m, Layer) and name in m.strength}


def _module(sd: DiffusionModel, target: Target) -> nn.Module:
    return networks_of(sd)[target.network].get_submodule(target.path)


def _fitted(sd: DiffusionModel, target: Target, update: LowRankUpdate) -> LowRankUpdate:
    """The update as peft can run it: its DoRA norms rows, so one that norms columns becomes a plain update."""
    if not update.normalizes_columns:
        return update
    module: Any = _module(sd, target)
    return update.without_magnitude(module.base_weight if isinstance(module, Layer) else module.weight.detach())


def _check(rank: int, alpha: float, dropout: float, init: str) -> None:
    check_count("rank", rank)
    check_positive("alpha", alpha)
    expect(is_number(dropout, 0, 1) and dropout < 1, "dropout", "a share from 0 to below 1", dropout)
    check_choice("init", init, ("kaiming", "gaussian"))


def _check_name(sd: DiffusionModel, name: str) -> None:
    if name in list_adapters(sd):
        raise ConfigError(f"adapter {name!r}: the model has one of this name already; remove it or choose another name")
    if not re.fullmatch(r"[^.:<>]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"adapter {name!r}: torch cannot name a module so (. : < > or a word of its own), choose another"
        )


def _module_name(name: str) -> str:
    """A file's name without its ending, as torch can have it for a module; prompts may write it either way."""
    return name.replace(".", "_")
