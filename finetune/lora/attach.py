"""LoRA on a model (arXiv 2106.09685): made for training, loaded, and exchanged in place."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn

from finetune.adapters import forget_if_none, use
from finetune.lora.adapters import (
    activate,
    changing,
    inject,
    is_merged,
    layers,
    layers_of,
    list_adapters,
    remove,
    set_scale,
)
from finetune.lora.bundles import read_bundle
from finetune.lora.in_place import own_value, parameter_of, put
from finetune.lora.names import check_name, module_key, name_of_file
from finetune.lora.reading import UpdatesRead, read_lora, weight_files
from finetune.lora.targets import Target, match_targets, networks_of, places_in, reached, targets_of
from finetune.lora.update import Changes, LowRankUpdate, Updates, split_updates
from finetune.training.freezing import freeze
from sdkit.checks import Range, check_choice, check_positive, check_range, expect, is_number
from sdkit.errors import CheckpointError, ConfigError
from sdkit.model_lock import alone

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


MOST_RANK = 16_384
"""No layer of a network that is known here is wider."""


@alone
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
    unet: bool = True,
    clip_skip: int = 0,
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
    unet: whether the UNet is adapted.
    clip_skip: leave out the last layers of the text encoder, which prompts at this clip_skip never reach.

    Raises ConfigError for arguments without meaning, while adapters are merged, and names targets that match no module.
    """
    _check(rank, alpha, dropout, init)
    check_name(name, list_adapters(sd))
    _check_unmerged(sd, "add_lora")
    wanted = {"unet": unet, "text_encoder": text_encoder}
    networks = {n: network for n, network in networks_of(sd).items() if wanted[n]}

    # Find the modules that it adapts.
    places = [target for n, network in networks.items() for target in targets_of(network, n)]
    chosen = match_targets(reached(places, sd.text_encoder.config.num_hidden_layers, clip_skip), targets)
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
    key = module_key(name)
    with _whole_or_not_at_all(sd, name):
        freeze(sd)
        for n, network in networks.items():
            inject(network, key, {s.path: (rank, alpha) for s in chosen if s.network == n}, config, trainable=True)
        put(sd, name, {}, {})
        _register(sd, name)

    return [p for _, _, layer in layers(sd) for path, p in layer.named_parameters() if f".{key}." in path]


@alone
def load_lora(
    sd: DiffusionModel,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    trainable: bool = False,
    slot_rank: int | None = None,
    dropout: float = 0.0,
) -> str:
    """Read a LoRA of any format (`finetune.lora.reading`) into the model, beside those that it has. Returns its name.

    Textual inversions in the file become the model's, until the LoRA is removed.

    scale: how many times it counts.
    name: for `set_scale`, prompts and so on; the file's name by default.
    trainable: whether it goes on training; for LoRA, LoCon, LoHa, LoKr (as LoRA) and DoRA that norms rows.
    slot_rank: make room for this rank, so that `swap_lora` can put other files of up to this rank in its place without
        anything being compiled again; for LoRA and what is rewritten as such. Move the model to its device first.
    dropout: share of the updates' inputs that training drops.

    Raises CheckpointError for a file that is damaged, no LoRA, or for another model; ConfigError for a name that cannot
    be, or for training what does not train.
    """
    expect(is_number(scale), "scale", "a finite number", scale)
    name = name_of_file(path) if name is None else name
    check_name(name, list_adapters(sd))
    updates, changes, words = _read(sd, path)
    if trainable:
        _check_unmerged(sd, "load_lora")
        check_trains(path, updates, changes)
    if slot_rank is not None:
        _check_slot(path, changes, words)
        for target, update in updates.items():
            _check_fits(path, target, update, slot_rank)

    updates = {target: _fitted(sd, target, update) for target, update in updates.items()}
    with _whole_or_not_at_all(sd, name):
        with changing(sd):
            put(sd, name, changes, words)
            _put_layers(sd, module_key(name), updates, trainable, slot_rank, dropout)

        if trainable:
            freeze(sd)
        _register(sd, name)
        set_scale(sd, scale, [name])
    return name


@contextmanager
def _whole_or_not_at_all(sd: DiffusionModel, name: str) -> Generator[None]:
    """After an error, or Ctrl-C, inside the block the model has nothing of this adapter, and trains what it did."""
    trained = [(p, p.requires_grad) for network in networks_of(sd).values() for p in network.parameters()]
    try:
        yield
    except BaseException:
        remove(sd, [name])
        forget_if_none(sd, "lora")
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise


def _put_layers(
    sd: DiffusionModel, key: str, updates: Updates, trainable: bool, slot_rank: int | None, dropout: float
) -> None:
    """Give the model layers with these updates; peft has different ones for plain updates and for DoRA."""
    for dora in (False, True):
        config = LoraConfig(use_dora=dora, init_lora_weights=False, lora_dropout=dropout)
        part = {target: update for target, update in updates.items() if (update.magnitude is not None) == dora}
        for n, network in networks_of(sd).items():
            sizes = {s.path: (slot_rank or b.rank, b.scale * b.rank) for s, b in part.items() if s.network == n}
            inject(network, key, sizes, config, trainable)

    for target, layer in layers_of(sd, key).items():
        if slot_rank is not None:
            layer.scaling[key] = torch.zeros((), device=layer.base_weight.device)
        layer.load(key, updates[target])


@alone
def swap_lora(sd: DiffusionModel, path: str | Path, name: str) -> None:
    """Put a file's LoRA in the place of one loaded with ``slot_rank``: no compiled code or captured graph notices.

    Modules of the slot that the file does not have do nothing. Raises CheckpointError when the file has modules that
    the slot lacks, a higher rank, or DoRA; ConfigError when ``name`` is no slot, or merged.
    """
    key = module_key(name)
    slots = layers_of(sd, key)
    if not slots or not all(isinstance(layer.scaling[key], torch.Tensor) for layer in slots.values()):
        raise ConfigError(f"swap_lora: {name!r} is no adapter that was loaded with slot_rank")
    _check_unmerged(sd, "swap_lora")

    updates, changes, words = _read(sd, path)
    _check_slot(path, changes, words)
    for target, update in updates.items():
        _check_fits(path, target, update, slots[target].r[key] if target in slots else 0)
    held = {target: layer.update_of(key) for target, layer in slots.items()}
    before = {
        target: replace(update, down=update.down.clone(), up=update.up.clone()) for target, update in held.items()
    }
    try:
        for target, layer in slots.items():
            layer.load(key, updates.get(target))
    except BaseException:  # Ctrl-C, too
        for target, layer in slots.items():
            layer.load(key, before[target])
        raise


def _check_fits(path: str | Path, target: Target, update: LowRankUpdate, rank: int) -> None:
    """Raise CheckpointError unless the update fits a slot of ``rank``; 0 where it has no such module."""
    if update.magnitude is not None or update.rank > rank:
        expected = f"plain LoRA of rank {rank} at most" if rank else "a module that the slot has"
        found = f"{'LoRA' if update.magnitude is None else 'DoRA'} of rank {update.rank}"
        raise CheckpointError(f"{path}: {target.diffusers}: expected {expected}, found {found}")


def _read(sd: DiffusionModel, path: str | Path) -> tuple[Updates, Changes, dict[str, Tensor]]:
    """A file's low-rank updates, changes of weights, and words. Raises CheckpointError for what does not fit."""
    found: UpdatesRead = read_lora(path, places_in(sd))
    for target in found:
        if parameter_of(sd, target) is None:
            raise CheckpointError(f"{path}: {target.diffusers}: the model's layer has no bias to change")

    words: dict[str, Tensor] = {}
    for file, _ in weight_files(Path(path)):
        words |= read_bundle(file, int(sd.text_encoder.config.hidden_size))
    return *split_updates(found), words


def _register(sd: DiffusionModel, name: str) -> None:
    """Let the new adapter run, and prompts name it."""
    activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled or n == name])
    use(sd, "lora")


def _fitted(sd: DiffusionModel, target: Target, update: LowRankUpdate) -> LowRankUpdate:
    """The update as peft can run it: its DoRA norms rows, so one that norms columns becomes a plain update."""
    return update.without_magnitude(own_value(sd, target)) if update.normalizes_columns else update


def _check(rank: int, alpha: float, dropout: float, init: str) -> None:
    check_range("rank", rank, Range(1, MOST_RANK), whole=True)
    check_positive("alpha", alpha)
    expect(is_number(dropout, 0, 1) and dropout < 1, "dropout", "a share from 0 to below 1", dropout)
    check_choice("init", init, ("kaiming", "gaussian"))


def _check_unmerged(sd: DiffusionModel, verb: str) -> None:
    if is_merged(sd):
        raise ConfigError(f"{verb}: expected adapters beside the weights, found them merged; unmerge them first")


def check_trains(path: str | Path, updates: Updates, changes: Changes) -> None:
    """Raise ConfigError for a file of another family than those whose layers train."""
    other = {change.family.name for change in changes.values()}
    other |= {"DoRA that norms columns" for update in updates.values() if update.normalizes_columns}
    if other:
        raise ConfigError(f"{path}: expected LoRA to go on training, found {', '.join(sorted(other))}")


def _check_slot(path: str | Path, changes: Changes, words: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for what cannot be exchanged in place."""
    for target, change in changes.items():
        raise CheckpointError(f"{path}: {target.diffusers}: expected plain LoRA in a slot, found {change.family.name}")
    if words:
        raise CheckpointError(f"{path}: expected plain LoRA in a slot, found the embeddings {', '.join(words)}")
