"""The key names of single files beside diffusers', in both directions.

``unet_map`` and ``vae_map`` give, for each diffusers key, its name in a single file without the prefix; the text
encoder is either CLIP under Hugging Face's names (SD1) or OpenCLIP (SD2), which stacks q, k and v in one matrix.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor

from sdkit.errors import CheckpointError, ConfigError, printable
from sdkit.networks.config import UNetConfig
from sdkit.networks.vae import AutoencoderKL

logger = logging.getLogger(__name__)

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT = "cond_stage_model."
CLIP, OPEN_CLIP = TEXT + "transformer.", TEXT + "model."

NETWORKS = (UNET, VAE, TEXT, EMA)
"""Prefixes of the networks' keys: what a network does not know in here is an error."""

# What a single file may hold inside these namespaces beside the weights, and outside of them without a warning.
LEFT_OUT = {
    "noise schedule": r"betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
    r"|scale_factor",
    "marker keys": r"v_pred|ztsnr",
    "text positions": r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids",
    "contrastive head": r"cond_stage_model\.(model\.attn_mask|((model|transformer)\.)?logit_scale"
    r"|((model|transformer)\.)?text_projection(\.weight)?)",
    "averaging state": r"model_ema\.(decay|num_updates)",
    "depth estimator": r"depth_model\..*",
    "image encoder": r"cond_stage_model\.(transformer\.(vision_model\..*|visual_projection\.weight)|model\.visual\..*)",
    "VAE training (loss., model_ema.)": r"first_stage_model\.(loss|model_ema)\..*",
}
_QUIET = ("noise schedule", "marker keys", "text positions", "contrastive head", "averaging state", "last text block")

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_NAMES = {
    r"(down|up)_blocks\.(\d+)\.resnets": r"\1.\2.block", r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample", r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2", r"mid_block\.attentions\.0": "mid.attn_1", "group_norm": "norm",
    r"to_([qkv])\.": r"\1.", r"to_out\.0": "proj_out", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
}  # fmt: skip
_OPEN_CLIP_TOP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def unet_map(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """diffusers key -> CompVis key, for the state-dict keys ``names`` of a UNet built from ``config``."""
    layers = cast("tuple[int, ...]", config.per_block(config.layers_per_block))
    down = [1 + i + sum(layers[:i]) for i in range(len(layers))]
    up = [i + sum(layers[::-1][:i]) for i in range(len(layers))]
    return {name: _unet_key(name, layers, down, up, config.up_block_types) for name in names}


def _unet_key(name: str, layers: tuple[int, ...], down: list[int], up: list[int], up_types: tuple[str, ...]) -> str:
    """A key of `unet_map`; ``down`` and ``up`` hold each block's first entry in input_blocks and output_blocks."""
    for theirs, ours in _UNET_TOP.items():
        if name.startswith(theirs + "."):
            return ours + _resnet_tail(name[len(theirs) :])

    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\..+)", name)
    if match is None:
        raise ConfigError(f"UNet key {name} has no name in a single file")

    i, kind, j, tail = int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{down[i] + layers[i]}.0.op{tail.removeprefix('.conv')}"
    if kind == "upsamplers":
        last = up[i] + layers[::-1][i]
        return f"output_blocks.{last}.{2 if 'CrossAttn' in up_types[i] else 1}{tail}"

    blocks, first = ("input_blocks", down) if match[1] == "down" else ("output_blocks", up)
    return f"{blocks}.{first[i] + j}.{0 if kind == 'resnets' else 1}{_resnet_tail(tail) if kind == 'resnets' else tail}"


def _resnet_tail(tail: str) -> str:
    part, _, rest = tail[1:].partition(".")
    return f".{_UNET_RESNET[part]}.{rest}" if part in _UNET_RESNET and rest in ("weight", "bias") else tail


def vae_map(names: Iterable[str], blocks: int) -> dict[str, str]:
    """diffusers key -> CompVis key, for the state-dict keys ``names`` of a VAE of ``blocks`` resolutions."""

    def rename(name: str) -> str:
        for pattern, replacement in _VAE_NAMES.items():
            name = re.sub(pattern, replacement, name)
        return re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}", name)

    return {name: rename(name) for name in names}


def open_clip_map(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face key -> OpenCLIP key. A q, k or v name maps to ``…attn.in_proj_weight[0]``, [1], [2] (or bias)."""

    def rename(name: str) -> str:
        if name in _OPEN_CLIP_TOP:
            return _OPEN_CLIP_TOP[name]
        name = name.replace("text_model.encoder.layers.", "transformer.resblocks.")
        for theirs, ours in _OPEN_CLIP_LAYER.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        row = r"self_attn\.([qkv])_proj\.(weight|bias)"
        return re.sub(row, lambda m: f"attn.in_proj_{m[2]}[{'qkv'.index(m[1])}]", name)

    return {name: rename(name) for name in names}


def take(state: dict[str, Tensor], names: Mapping[str, str], prefix: str, where: str) -> dict[str, Tensor]:
    """Move out of ``state`` the tensors of one network. ``names``: diffusers key -> file key without ``prefix``.

    Raises CheckpointError that names the first of the missing keys.
    """
    missing = [prefix + key for key in names.values() if prefix + re.sub(r"\[\d\]$", "", key) not in state]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} keys missing, the first {missing[0]}")

    result = {name: _row(state, prefix + key) for name, key in names.items()}
    for key in names.values():
        state.pop(prefix + re.sub(r"\[\d\]$", "", key), None)
    return result


def take_text(state: dict[str, Tensor], expected: Iterable[str], where: str) -> dict[str, Tensor]:
    """Move a text encoder's weights out of ``state``, for the diffusers keys ``expected``: from OpenCLIP's or Hugging
    Face's names, the latter with or without ``text_model.``. Raises as `take`."""
    if any(key.startswith(OPEN_CLIP) for key in state):
        return take(state, open_clip_map(expected), OPEN_CLIP, where)
    short = f"{CLIP}embeddings.token_embedding.weight" in state
    return take(state, {name: name.removeprefix("text_model.") if short else name for name in expected}, CLIP, where)


def _row(state: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor, or one of the three stacked matrices that ``key[0..2]`` names."""
    if not key.endswith("]"):
        return state[key]
    stacked = state[key[:-3]]
    if stacked.ndim == 0 or len(stacked) % 3:
        raise CheckpointError(f"{key[:-3]}: expected q, k and v stacked, found the shape {list(stacked.shape)}")
    return stacked.chunk(3, dim=0)[int(key[-2])]


def give(state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """The inverse of ``take``: a network's tensors under the file's keys."""
    stacked: dict[str, list[Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, key in sorted(names.items(), key=lambda item: item[1]):
        if key.endswith("]"):
            stacked.setdefault(prefix + key[:-3], []).append(state[name])
        else:
            result[prefix + key] = state[name]
    return result | {key: torch.cat(rows) for key, rows in stacked.items()}


def vae_to_single(vae: AutoencoderKL, prefix: str = VAE) -> dict[str, Tensor]:
    """The VAE's tensors under single-file names, attention weights as [C, C, 1, 1]."""
    state = vae.state_dict()
    single = give(state, vae_map(state, len(vae.config.block_out_channels)), prefix)
    matrices = r"attn_1\.(q|k|v|proj_out)\.weight"
    return {k: v[:, :, None, None] if re.search(matrices, k) else v for k, v in single.items()}


def open_clip_extras(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors of an OpenCLIP text tower beyond ``layers`` blocks: the last block and the contrastive head.

    Stable Diffusion 2 reads the output before the last block, so diffusers keeps neither, while A1111 expects both.
    The block is written as the identity (both residual branches zero, norms one), so that a program that runs it
    gets the same hidden states; the projection is the identity, and the scale ln 100, CLIP's ceiling.
    """
    layer, last = f"{OPEN_CLIP}transformer.resblocks.{layers - 1}.", f"{OPEN_CLIP}transformer.resblocks.{layers}."
    block = {last + k.removeprefix(layer): torch.zeros_like(v) for k, v in state.items() if k.startswith(layer)}
    block |= {k: torch.ones_like(v) for k, v in block.items() if re.search(r"ln_[12]\.weight", k)}
    width = state[OPEN_CLIP + "ln_final.weight"]
    head = {"text_projection": torch.diag(torch.ones_like(width)), "logit_scale": width.new_tensor(math.log(100))}
    return block | {OPEN_CLIP + k: v for k, v in head.items()}


def is_left_out(key: str) -> bool:
    """Whether a single file's key lies beside the weights of all networks: the file may hold it without them."""
    return any(re.fullmatch(pattern, key) for pattern in LEFT_OUT.values())


def leftovers(state: Iterable[str], where: str, layers: int | None = None) -> None:
    """Log by group the keys that no network uses; ``layers`` is the number of the text block that goes unused,
    None when the file is a VAE alone.

    Outside of the networks' namespaces a group is what begins alike, as ``control_model.*``, and a warning. Raises
    CheckpointError for a key of no known group inside.
    """
    patterns = LEFT_OUT | {"last text block": rf"cond_stage_model\.model\.transformer\.resblocks\.{layers}\..*"}
    if layers is None:
        patterns = {"VAE training (loss., model_ema.)": r"(first_stage_model\.)?(loss|model_ema)\..*"}

    counts: dict[str, int] = {}
    unknown: list[str] = []
    for key in state:
        group = next((name for name, pattern in patterns.items() if re.fullmatch(pattern, key)), None)
        if group is None and layers is not None and not key.startswith(NETWORKS):
            first, dot, _ = key.partition(".")
            group = f"{first}.*" if dot else key
        if group is None:
            unknown.append(key)
        else:
            counts[group] = counts.get(group, 0) + 1

    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(f"{where}: not understood: {', '.join(unknown[:3])}{more}")
    for group, count in counts.items():
        level = logging.INFO if group in _QUIET else logging.WARNING
        logger.log(level, "%s: left out %s (%d tensors)", where, printable(group), count)
