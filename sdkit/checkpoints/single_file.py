"""Single files in the layout of CompVis and Stability AI that hold a whole model, read and written."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sdkit.checkpoints.components import (
    Components,
    build_networks,
    check_bare,
    give_text_weights,
    give_weights,
    read_old_attention,
    text_config,
)
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import (
    CLIP,
    EMA,
    OPEN_CLIP,
    UNET,
    VAE,
    give,
    leftovers,
    open_clip_extras,
    open_clip_map,
    take,
    unet_map,
    vae_map,
    vae_to_single,
)
from sdkit.checkpoints.presets import ALL_PRESETS, PRESETS, read_preset
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import text_state_dict
from sdkit.prompts.tokenizer import clip_tokenizer, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

CONTEXT_KEYS = [f"input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight" for i in (2, 1)]
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")

# Reading


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


def _ema_key(key: str) -> str:
    return EMA + ("diffusion_model." + key).replace(".", "")


def _take_unet(state: dict[str, Tensor], names: Mapping[str, str], use_ema: bool, where: str) -> dict[str, Tensor]:
    """Move the plain or the averaged weights out of ``state``; the others too, and these are named in the log."""
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


# Writing


def save_single_file(components: Components, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save the whole model as one safetensors file that A1111, ComfyUI and diffusers read.

    Our configs go into the metadata ("sdkit_config"), with the tokenizer's files unless it is CLIP's, so that a model
    of any size loads back. ``extra`` has no place in the format: what is there is named in the log.
    Raises CheckpointError when the file cannot be written.
    """
    check_bare(components, path)
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
