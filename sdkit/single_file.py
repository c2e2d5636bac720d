"""Single-file checkpoints in the layout of CompVis and Stability AI: their key names, reading and writing.

``unet_map`` and ``vae_map`` give, for each diffusers key, its name in a single file without the prefix; the text
encoder is either CLIP under Hugging Face's names (SD1) or OpenCLIP (SD2), which stacks q, k and v in one matrix.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sdkit.checkpoint import (
    Components,
    build_networks,
    give_text_weights,
    give_weights,
    inspect_file,
    load_weights,
    read_old_attention,
    read_state,
    text_config,
    write_state,
)
from sdkit.config import UNetConfig, VAEConfig, read_json
from sdkit.errors import CheckpointError, ConfigError
from sdkit.text import clip_tokenizer, load_tokenizer, save_tokenizer, text_state_dict
from sdkit.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CONTEXT_KEYS = [f"input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight" for i in (2, 1)]
PRESETS = {
    (768, 4): "sd1", (768, 9): "sd1_inpaint", (1024, 4): "sd2", (1024, 9): "sd2_inpaint", (1024, 5): "sd2_depth",
}  # fmt: skip
ALL_PRESETS = (*PRESETS.values(), "sd2_base")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")

# What a single file may hold beside the networks' weights. Everything else is an error.
LEFT_OUT = {
    "noise schedule": r"betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
    r"|scale_factor",
    "text positions": r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids",
    "contrastive head": r"cond_stage_model\.(model\.attn_mask|(model\.)?(logit_scale|text_projection))",
    "averaging state": r"model_ema\.(decay|num_updates)",
    "depth estimator": r"depth_model\..*",
    "VAE training (loss., model_ema.)": r"first_stage_model\.(loss|model_ema)\..*",
}


# ---- names -----------------------------------------------------------------------------------------------------------

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
    """``down`` and ``up`` hold the number of each block's first entry in input_blocks and output_blocks."""
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


# ---- conversion ------------------------------------------------------------------------------------------------------


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


def _row(state: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor, or one of the three stacked matrices that ``key[0..2]`` names."""
    if not key.endswith("]"):
        return state[key]
    stacked = state[key[:-3]]
    if stacked.ndim == 0 or len(stacked) % 3:
        raise CheckpointError(f"{key[:-3]}: expected q, k and v stacked, found the shape {list(stacked.shape)}")
    return stacked.chunk(3, dim=0)[int(key[-2])]


def give(state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """The inverse of ``take``: tensors under the file's keys."""
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
    """What an OpenCLIP text tower has beyond ``layers`` blocks: the last block and the contrastive head.

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


def leftovers(state: Iterable[str], where: str, layers: int | None = None) -> None:
    """Log by group the keys that no network uses; ``layers`` is the number of the text block that goes unused,
    None when the file is a VAE alone.

    Raises CheckpointError for a key of no known group.
    """
    patterns = LEFT_OUT | {"last text block": rf"cond_stage_model\.model\.transformer\.resblocks\.{layers}\..*"}
    if layers is None:
        patterns = {"VAE training (loss., model_ema.)": r"(first_stage_model\.)?(loss|model_ema)\..*"}
    counts: dict[str, int] = {}
    unknown: list[str] = []
    for key in state:
        group = next((name for name, pattern in patterns.items() if re.fullmatch(pattern, key)), None)
        if group is None:
            unknown.append(key)
        else:
            counts[group] = counts.get(group, 0) + 1
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(f"{where}: not understood: {', '.join(unknown[:3])}{more}")
    for group, count in counts.items():
        level = logging.WARNING if group.startswith(("depth", "VAE training")) else logging.INFO
        logger.log(level, "%s: left out %s (%d tensors)", where, group, count)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_single_file(
    path: str | Path,
    *,
    preset: str | None = None,
    prediction_type: str | None = None,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
) -> Components:
    """Load a ``.safetensors`` or ``.ckpt`` file of a whole model; ``dtype`` None keeps the file's own.

    The configuration comes from ``preset`` (one of ``ALL_PRESETS``), else from the file's metadata where we wrote it,
    else from the preset that fits the UNet's context width and input channels. Epsilon or v cannot be told from the
    weights: ``prediction_type``, else the metadata ("modelspec.prediction_type"), else "v_prediction" for SD2 with 4
    channels (768-v) and "epsilon" for all others. ``use_ema`` takes the averaged UNet weights; they are also taken
    when there are no others. Raises CheckpointError for what cannot be read, is missing, or is not understood.
    """
    if preset is not None and preset not in ALL_PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(ALL_PRESETS)}, found {preset!r}")
    if prediction_type not in (None, "epsilon", "v_prediction", "sample"):
        raise ConfigError(f"prediction_type: expected epsilon, v_prediction or sample, found {prediction_type!r}")
    state, metadata = read_state(path, dtype)
    where = str(path)
    configs = _choose_configs(state, metadata, preset, prediction_type, where)
    unet, vae, text = build_networks(configs["unet"], configs["vae"], configs["text_encoder"], where)
    unet_state = _take_unet(state, unet_map(unet.state_dict(), unet.config), use_ema, where)
    vae_state = take(state, vae_map(vae.state_dict(), len(vae.config.block_out_channels)), VAE, where)
    text_state = _take_text(state, text_state_dict(text), where)
    leftovers(state, where, text.config.num_hidden_layers)
    return Components(
        unet=give_weights(unet, unet_state, f"{where}: UNet"),
        vae=give_weights(vae, read_old_attention(vae_state), f"{where}: VAE"),
        text_encoder=give_text_weights(text, text_state, where),
        tokenizer=_tokenizer(configs.get("tokenizer"), unet.config, where),
        scheduler_config=configs["scheduler"],
    )


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """The configs "unet", "vae", "text_encoder" and "scheduler" of one of ``ALL_PRESETS``."""
    return read_json(Path(__file__).parent / "presets" / f"{name}.json")


def _ema_key(key: str) -> str:
    return EMA + ("diffusion_model." + key).replace(".", "")


def _choose_configs(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], preset: str | None, prediction: str | None, where: str
) -> dict[str, Any]:
    """The configs of the file, by the rules in ``load_single_file``."""
    if preset is None and "sdkit_config" in metadata:
        try:
            configs = cast("dict[str, Any]", json.loads(metadata["sdkit_config"]))
            if missing := {"unet", "vae", "text_encoder"} - configs.keys():
                raise KeyError(missing)
            configs["scheduler"] |= {"prediction_type": prediction} if prediction else {}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{where}: the metadata sdkit_config is damaged") from None
        return configs
    stated = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    name = preset or _detect_preset(state, where)
    if name == "sd2" and preset is None and (prediction or stated) == "epsilon":
        name = "sd2_base"
    if name == "sd2" and preset is None and not (prediction or stated):
        logger.warning("%s: its weights do not tell, so it is taken for v_prediction (a 768-v model)", where)
    configs = read_preset(name)
    chosen = prediction or (None if preset else stated)
    configs["scheduler"] |= {"prediction_type": chosen} if chosen else {}
    return configs


def _detect_preset(state: Mapping[str, Tensor], where: str) -> str:
    """The preset for the UNet's context width and input channels."""

    def find(key: str) -> Tensor | None:
        return state.get(UNET + key, state.get(_ema_key(key)))

    context = next((t for key in CONTEXT_KEYS if (t := find(key)) is not None), None)
    first = find("input_blocks.0.0.weight")
    if context is None or first is None or context.ndim < 2 or first.ndim != 4:
        raise CheckpointError(f"{where}: expected a Stable Diffusion 1 or 2 model, found {inspect_file(where)['kind']}")
    found = (context.shape[-1], first.shape[1])
    if found not in PRESETS:
        wanted = ", ".join(f"{width} and {channels}" for width, channels in PRESETS)
        raise CheckpointError(
            f"{where}: expected a UNet with context width and input channels {wanted}; found {found[0]} and {found[1]}"
        )
    return PRESETS[found]


def _take_unet(state: dict[str, Tensor], names: Mapping[str, str], use_ema: bool, where: str) -> dict[str, Tensor]:
    """The plain or the averaged weights; the others are moved out as well and named in the log."""
    averaged = {name: _ema_key(key).removeprefix(EMA) for name, key in names.items()}
    has_ema = any(EMA + key in state for key in averaged.values())
    if use_ema and not has_ema:
        raise CheckpointError(f"{where}: use_ema: the file has no averaged weights ({EMA}…)")
    has_plain = any(UNET + key in state for key in names.values())
    plain = take(state, names, UNET, where) if has_plain or not has_ema else None
    ema = take(state, averaged, EMA, where) if has_ema else None
    if plain is not None and ema is not None:
        logger.info("%s: left out the %s weights of the UNet", where, "plain" if use_ema else "averaged")
    chosen = ema if use_ema or plain is None else plain
    assert chosen is not None
    return chosen


def _take_text(state: dict[str, Tensor], expected: Iterable[str], where: str) -> dict[str, Tensor]:
    """The text encoder's weights, from OpenCLIP's or Hugging Face's names, the latter with or without text_model."""
    if any(key.startswith(OPEN_CLIP) for key in state):
        return take(state, open_clip_map(expected), OPEN_CLIP, where)
    short = f"{CLIP}embeddings.token_embedding.weight" in state
    return take(state, {name: name.removeprefix("text_model.") if short else name for name in expected}, CLIP, where)


def _tokenizer(files: Mapping[str, str] | None, config: UNetConfig, where: str) -> CLIPTokenizer:
    """The tokenizer in the metadata, or CLIP's, padded as SD1 or SD2 want it."""
    if files is None:
        return clip_tokenizer(_pad_token(config))
    if set(files) - set(TOKENIZER_FILES):
        raise CheckpointError(f"{where}: the metadata sdkit_config is damaged (tokenizer)")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="\n")
        return load_tokenizer(folder)


def _pad_token(config: UNetConfig) -> int:
    return 0 if is_sd2(config) else 49407


def is_sd2(config: UNetConfig) -> bool:
    """Whether the text encoder goes under OpenCLIP's names: the field tells by the context width of 1024."""
    return config.per_block(config.cross_attention_dim)[0] == 1024


def load_vae_file(
    path: str | Path, config: VAEConfig | None = None, *, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Load a VAE: a file under single-file names (with or without ``first_stage_model.``) or diffusers', or a folder.

    Without ``config``: the folder's, the file's metadata where we wrote it, else Stable Diffusion's.
    Raises CheckpointError.
    """
    path, where = Path(path), str(path)
    if path.is_dir():
        state, config = load_weights(path, "diffusion_pytorch_model", dtype=dtype), config or VAEConfig.load(path)
    else:
        state, metadata = read_state(path, dtype)
        config = config or _vae_config(metadata, where)
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(config)
    except (ConfigError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{where}: vae: {error}") from None
    prefix = next((p for p in (VAE, "") if f"{p}decoder.conv_in.weight" in state), None)
    if prefix is None:
        raise CheckpointError(f"{where}: expected a VAE, found {inspect_file(path)['kind']}")
    if "decoder.up_blocks.0.resnets.0.conv1.weight" not in state:
        weights = take(state, vae_map(vae.state_dict(), len(config.block_out_channels)), prefix, where)
        leftovers(state, where)
        state = weights
    return give_weights(vae, read_old_attention(state), where)


def _vae_config(metadata: Mapping[str, str], where: str) -> VAEConfig:
    if "sdkit_config" not in metadata:
        return VAEConfig.from_dict(read_preset("sd1")["vae"])
    try:
        return VAEConfig.from_dict(json.loads(metadata["sdkit_config"])["vae"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: the metadata sdkit_config is damaged ({error})") from None


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_single_file(components: Components, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save the whole model as one safetensors file that A1111, ComfyUI and diffusers read.

    Our configs go into the metadata ("sdkit_config"), with the tokenizer's files unless it is CLIP's, so that a model
    of any size loads back. ``extra`` has no place in the format: what is there is named in the log.
    Raises CheckpointError when the file cannot be written.
    """
    if components.extra:
        logger.warning("%s: a single file has no place for %s", path, ", ".join(components.extra))
    state, config = components.unet.state_dict(), components.unet.config
    tensors = give(state, unet_map(state, config), UNET) | vae_to_single(components.vae)
    text = text_state_dict(components.text_encoder)
    if is_sd2(config):
        tensors |= give(text, open_clip_map(text), OPEN_CLIP)
        tensors |= open_clip_extras(tensors, components.text_encoder.config.num_hidden_layers)
    else:
        tensors |= {CLIP + name: tensor for name, tensor in text.items()}
    write_state(tensors, path, dtype, _metadata(components, Path(path).stem))


def _metadata(components: Components, title: str) -> dict[str, str]:
    """Our configs, and Stability's ModelSpec (github.com/Stability-AI/ModelSpec) as far as it is known."""
    unet, vae = components.unet.config, components.vae.config
    prediction = str(components.scheduler_config.get("prediction_type", "epsilon"))
    configs: dict[str, Any] = {
        "unet": unet.to_dict(),
        "vae": vae.to_dict(),
        "text_encoder": text_config(components.text_encoder),
        "scheduler": components.scheduler_config,
    }
    own = components.tokenizer
    if own.get_vocab() != clip_tokenizer(_pad_token(unet)).get_vocab() or own.pad_token_id != _pad_token(unet):
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(own, folder)
            files = {name: Path(folder) / name for name in TOKENIZER_FILES}
            configs["tokenizer"] = {n: file.read_text(encoding="utf-8") for n, file in files.items() if file.is_file()}
    second = "2-768-v" if prediction == "v_prediction" else "2-512"
    return {
        "sdkit_config": json.dumps(configs),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{second if is_sd2(unet) else 1}",
        "modelspec.title": title,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
    }


def save_vae_file(vae: AutoencoderKL, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save a VAE alone as A1111 reads it: 248 keys at full size, without a prefix. Raises CheckpointError."""
    write_state(vae_to_single(vae, prefix=""), path, dtype, {"sdkit_config": json.dumps({"vae": vae.config.to_dict()})})
