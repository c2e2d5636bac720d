"""LoRA on a model (arXiv 2106.09685): made for training, loaded, saved, and exchanged in place."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from peft import LoraConfig
from torch import nn

from finetune.adapters import (
    activate,
    changing,
    disable,
    enable,
    freeze,
    inject,
    is_merged,
    layers,
    list_adapters,
    networks_of,
    set_scale,
)
from finetune.branch import Branch, Branches
from finetune.formats import read_lora, write_lora
from finetune.lora_layers import Layer
from finetune.sites import Site, sites_of
from sdkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from sdkit import StableDiffusion

TARGETS: Mapping[str, tuple[str, str]] = {
    "cross_attention": (r"\.attn2\.(to_[qkv]|to_out\.0)$", r"\.self_attn\."),
    "attention": (r"\.attn[12]\.(to_[qkv]|to_out\.0)$", r"\.self_attn\."),
    "transformer": (r"(^|\.)attentions\.", r"\.layers\."),
    "all": (r"", r""),
}
"""By name, what the path of a module has to contain: in the UNet, and in the text encoder."""


class Wanted(Protocol):
    """An adapter that a prompt asks for, by ``<lora:name:0.8>``."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...


def add_lora(
    sd: StableDiffusion,
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
    """Put a new LoRA into the model, to be trained. Returns its parameters; all others of the model are frozen.

    alpha: the branch is multiplied by alpha / rank, or alpha / sqrt(rank) with ``use_rslora`` (arXiv 2312.03732).
    targets: "cross_attention" (attn2: to_q, to_k, to_v, to_out.0; 64 modules in SD1), "attention" (attn1 too),
        "transformer" (every layer of the transformers, kohya's scope; 192 in SD1), "all" (every linear layer and
        convolution); or a regular expression that is searched for in the modules' paths; or a list of ends of paths,
        such as ["to_k", "mid_block.attentions.0.proj_in"].
    dropout: share of the branch's inputs that training drops.
    use_dora: train the norms of the weights' rows apart (arXiv 2402.09353).
    init: A is uniform as in LoRA's own code ("kaiming"), or normal of deviation 1 / rank; B is zero, so that the model
        is unchanged at first. Drawn from torch's global generator.
    text_encoder: adapt the text encoder too; its attention for the first two targets, its MLP as well for the others.

    Raises ConfigError for arguments without meaning, and names targets that match no module.
    """
    _check(rank, alpha, dropout, init)
    _check_name(sd, name)
    networks = networks_of(sd) if text_encoder else {"unet": sd.unet}
    sites = [site for n, network in networks.items() for site in sites_of(network, n)]
    chosen = match_targets(sites, targets)
    for n in networks:
        if not any(site.network == n for site in chosen):
            raise ConfigError(f"targets: {targets!r} matches nothing in the {n}")
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


def match_targets(sites: Sequence[Site], targets: str | Sequence[str]) -> list[Site]:
    """The sites that ``targets`` (see `add_lora`) name. Raises ConfigError that names what matches none."""
    if isinstance(targets, str):
        unet, text = TARGETS.get(targets, (targets, targets))
        try:
            chosen = [s for s in sites if re.search(unet if s.network == "unet" else text, s.path)]
        except re.error as error:
            raise ConfigError(f"targets: {targets!r} is no regular expression ({error})") from None
        missing = [] if chosen else [targets]
    else:
        ends = {target: [s for s in sites if s.path == target or s.path.endswith(f".{target}")] for target in targets}
        missing = [target for target, found in ends.items() if not found]
        wanted = {site for found in ends.values() for site in found}
        chosen = [site for site in sites if site in wanted]
    if missing or not chosen:
        presets = ", ".join(TARGETS)
        raise ConfigError(
            f"targets: nothing matches {', '.join(missing) or '[]'}; expected {presets}, or parts of paths"
        )
    return chosen


def load_lora(
    sd: StableDiffusion,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    trainable: bool = False,
    slot_rank: int | None = None,
) -> str:
    """Read a LoRA of any format (`finetune.formats`) into the model, beside those that it has. Returns its name.

    scale: it counts so many times.
    name: for `set_scale`, prompts and so on; the file's name by default.
    trainable: to go on training it.
    slot_rank: make room for this rank, so that `swap_lora` can put other files of up to this rank in its place without
        anything being compiled again; not for DoRA. Move the model to its device first.

    Raises CheckpointError for a file that is damaged, no LoRA, or for another model.
    """
    name = name or _module_name(Path(path).stem)
    _check_name(sd, name)
    branches = {site: _fitted(sd, site, branch) for site, branch in read_lora(path, _sites(sd)).items()}
    if slot_rank is not None:
        for site, branch in branches.items():
            _check_fits(path, site, branch, slot_rank)
    for dora in (False, True):
        config = LoraConfig(use_dora=dora, init_lora_weights=False)
        part = {site: branch for site, branch in branches.items() if (branch.magnitude is not None) == dora}
        for n, network in networks_of(sd).items():
            sizes = {s.path: (slot_rank or b.rank, b.scale * b.rank) for s, b in part.items() if s.network == n}
            with changing(sd):
                inject(network, name, sizes, config, trainable)
    for site, layer in _layers_of(sd, name).items():
        if slot_rank is not None:
            layer.scaling[name] = torch.zeros((), device=layer.base_weight.device)
        layer.load(name, branches[site])
    if trainable:
        freeze(sd)
    _register(sd, name)
    set_scale(sd, scale, name)
    return name


def swap_lora(sd: StableDiffusion, path: str | Path, name: str) -> None:
    """Put a file's LoRA in the place of one loaded with ``slot_rank``: no compiled code or captured graph notices.

    Modules of the slot that the file does not have do nothing. Raises CheckpointError when the file has modules that
    the slot lacks, a higher rank, or DoRA; ConfigError when ``name`` is no slot, or merged.
    """
    slots = _layers_of(sd, name)
    if not slots or not all(isinstance(layer.scaling[name], torch.Tensor) for layer in slots.values()):
        raise ConfigError(f"swap_lora: {name!r} is no adapter that was loaded with slot_rank")
    if is_merged(sd):
        raise ConfigError("swap_lora: the adapters are merged into the weights, unmerge them first")
    branches = read_lora(path, _sites(sd))
    for site, branch in branches.items():
        _check_fits(path, site, branch, slots[site].r[name] if site in slots else 0)
    for site, layer in slots.items():
        layer.load(name, branches.get(site))


def _check_fits(path: str | Path, site: Site, branch: Branch, rank: int) -> None:
    """``rank`` is the slot's; 0 where it has no such module."""
    if branch.magnitude is not None or branch.rank > rank:
        expected = f"plain LoRA of rank {rank} at most" if rank else "a module that the slot has"
        found = f"{'LoRA' if branch.magnitude is None else 'DoRA'} of rank {branch.rank}"
        raise CheckpointError(f"{path}: {site.diffusers}: expected {expected}, found {found}")


def save_lora(
    sd: StableDiffusion,
    path: str | Path,
    format: str = "diffusers",
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in the format "diffusers", "kohya" or "peft" (`finetune.formats.write_lora`).

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
    write_lora(branches_of(sd, name), path, format, facts)


def branches_of(sd: StableDiffusion, name: str) -> Branches:
    """The weights of an adapter by their places; they are its own, not copies."""
    return {site: layer.branch(name) for site, layer in _layers_of(sd, name).items()}


@contextmanager
def prompt_loras(sd: StableDiffusion, wanted: Sequence[Wanted]) -> Generator[None]:
    """While inside, the adapters that a prompt names run with the prompt's weights; the others run as they do.

    Raises ConfigError for a name that the model does not have.
    """
    before = list_adapters(sd)
    weights: dict[str, float] = {}
    for network in wanted:
        name = _module_name(network.name)
        weights[name] = weights.get(name, 0.0) + network.weight
    try:
        for name, weight in weights.items():
            enable(sd, name)
            set_scale(sd, weight, name)
        yield
    finally:
        for name in weights.keys() & before.keys():
            set_scale(sd, before[name].scale, name)
            if not before[name].enabled:
                disable(sd, name)


def _register(sd: StableDiffusion, name: str) -> None:
    """Let the new adapter run, and prompts name it."""
    activate(sd, [n for n, adapter in list_adapters(sd).items() if adapter.enabled or n == name])
    sd.extra_networks["lora"] = partial(prompt_loras, sd)


def _sites(sd: StableDiffusion) -> list[Site]:
    return [site for name, network in networks_of(sd).items() for site in sites_of(network, name)]


def _layers_of(sd: StableDiffusion, name: str) -> dict[Site, Layer]:
    """The layers that have an adapter of this name, by their places."""
    modules = {site: _module(sd, site) for site in _sites(sd)}
    return {site: m for site, m in modules.items() if isinstance(m, Layer) and name in m.strength}


def _module(sd: StableDiffusion, site: Site) -> nn.Module:
    return networks_of(sd)[site.network].get_submodule(site.path)


def _fitted(sd: StableDiffusion, site: Site, branch: Branch) -> Branch:
    """peft's DoRA norms rows; one that norms columns becomes a plain update of this model's weight."""
    if not branch.normalizes_columns:
        return branch
    module: Any = _module(sd, site)
    return branch.without_magnitude(module.base_weight if isinstance(module, Layer) else module.weight.detach())


def _check(rank: int, alpha: float, dropout: float, init: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank: expected a whole number from 1, found {rank!r}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha: expected a number above 0, found {alpha!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: expected a share from 0 to below 1, found {dropout!r}")
    if init not in ("kaiming", "gaussian"):
        raise ConfigError(f"init: expected kaiming or gaussian, found {init!r}")


def _check_name(sd: StableDiffusion, name: str) -> None:
    if name in list_adapters(sd):
        raise ConfigError(f"adapter {name!r}: the model has one of this name already; remove it or choose another name")
    if not re.fullmatch(r"[^.:<>]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"adapter {name!r}: torch cannot name a module so (. : < > or a word of its own), choose another"
        )


def _module_name(name: str) -> str:
    """A file's name without its ending, as torch can have it for a module; prompts may write it either way."""
    return name.replace(".", "_")
