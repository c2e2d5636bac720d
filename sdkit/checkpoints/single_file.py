"""Single files in the layout of CompVis and Stability AI that hold a whole model, read and written."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.checkpoints.components import (
    Components,
    build_text,
    build_unet,
    build_vae,
    check_bare,
    check_fit,
    give_text_weights,
    give_weights,
    read_old_attention,
    text_config,
)
from sdkit.checkpoints.evidence import (
    SCHEDULE,
    Evidence,
    decide,
    first_to_say,
    from_arguments,
    from_markers,
    from_metadata,
    from_own_metadata,
    from_schedule,
    from_sidecar,
    own_configs,
)
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import (
    CLIP,
    EMA,
    OPEN_CLIP,
    TEXT,
    UNET,
    VAE,
    give,
    is_left_out,
    leftovers,
    open_clip_extras,
    open_clip_map,
    take,
    take_text,
    unet_map,
    vae_map,
    vae_to_single,
)
from sdkit.checkpoints.presets import ALL_PRESETS, PRESETS, read_preset
from sdkit.checkpoints.scheduler_config import with_facts
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import text_state_dict
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

CONTEXT_KEYS = [f"input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight" for i in (2, 1)]
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")

# Reading


def load_single_file(
    path: str | Path,
    *,
    preset: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool | None = None,
    use_ema: bool = False,
    vae: AutoencoderKL | None = None,
    text_encoder: CLIPTextModel | None = None,
    dtype: torch.dtype | None = None,
) -> Components:
    """Load a ``.safetensors`` or ``.ckpt`` file of a whole model; ``dtype`` None keeps the file's own.

    The networks' configurations come from ``preset`` (one of ``ALL_PRESETS``), else from the file's metadata where we
    wrote it, else from the preset that fits the UNet's context width and input channels. Prediction type (epsilon, v,
    sample), noise schedule and zero terminal SNR cannot be told from the weights: see `sdkit.checkpoints.evidence` for
    what tells them, in order; ``prediction_type`` and ``zero_snr`` come first. When nothing does, a UNet of SD2 with 4
    channels is taken for v_prediction (768-v), all others for epsilon.

    use_ema: take the averaged UNet weights; they are also taken when there are no others. vae, text_encoder: used in
    place of the file's own, which may be missing. Raises CheckpointError for what cannot be read, is missing, or is
    not understood.
    """
    if preset is not None and preset not in ALL_PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(ALL_PRESETS)}, found {preset!r}")
    arguments = from_arguments(prediction_type, zero_snr)

    state, metadata = read_state(path, dtype, exact=(SCHEDULE,))
    where = str(path)
    own = own_configs(metadata, where, "unet", "vae", "text_encoder", "scheduler") if preset is None else None
    sources = [
        arguments,
        from_sidecar(Path(path)),
        from_own_metadata(own and own["scheduler"]),
        from_metadata(metadata, where),
        from_markers(state),
        from_schedule(state, where),
    ]
    configs = _choose_configs(state, own, preset, sources, where)

    unet = build_unet(configs["unet"], where)
    unet_state = _take_unet(state, unet_map(unet.state_dict(), unet.config), use_ema, where)
    if vae is None:
        _expect_some(state, VAE, "VAE", "vae", where)
        vae = build_vae(configs["vae"], where)
        vae_state = take(state, vae_map(vae.state_dict(), len(vae.config.block_out_channels)), VAE, where)
        vae = give_weights(vae, read_old_attention(vae_state), f"{where}: VAE")
    else:
        _drop(state, VAE, "the file's own VAE", where)

    text = build_text(configs["text_encoder"], where)
    if text_encoder is None:
        _expect_some(state, TEXT, "text encoder", "text_encoder", where)
        text_encoder = give_text_weights(text, take_text(state, text_state_dict(text), where), where)
    else:
        _drop(state, TEXT, "the file's own text encoder", where)
    leftovers(state, where, text.config.num_hidden_layers)
    check_fit(unet, vae, text_encoder, build_vae(configs["vae"], where).config, where)

    return Components(
        unet=give_weights(unet, unet_state, f"{where}: UNet"),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(configs.get("tokenizer"), unet.config, where),
        scheduler_config=configs["scheduler"],
    )


def _choose_configs(
    state: Mapping[str, Tensor], own: dict[str, Any] | None, preset: str | None, sources: list[Evidence], where: str
) -> dict[str, Any]:
    """The configs of the file, by the rules in ``load_single_file``."""
    if own is not None:
        return own | {"scheduler": with_facts(own["scheduler"], decide(sources, where))}

    name = preset or _detect_preset(state, where)
    said = first_to_say("prediction_type", sources)
    if name == "sd2" and preset is None and said is not None and said.facts["prediction_type"] == "epsilon":
        name = "sd2_base"
    if name == "sd2" and preset is None and said is None:
        logger.warning("%s: nothing tells, so it is taken for v_prediction (a 768-v model)", where)

    configs = read_preset(name)
    scheduler = configs["scheduler"]
    facts = {"prediction_type": scheduler["prediction_type"]}
    if preset is None:
        ordered = [*sources, Evidence(f"the preset {name}", facts, is_preset=True)]
    else:
        ordered = [sources[0], Evidence("preset", facts), *sources[1:]]
    return configs | {"scheduler": with_facts(scheduler, decide(ordered, where))}


def _expect_some(state: Mapping[str, Tensor], prefix: str, what: str, argument: str, where: str) -> None:
    if not any(key.startswith(prefix) and not is_left_out(key) for key in state):
        flag = argument.replace("_", "-")
        raise CheckpointError(f"{where}: has no {what} ({prefix}…): give one ({argument}=, --{flag})")


def _drop(state: dict[str, Tensor], prefix: str, what: str, where: str) -> None:
    """Take the keys of a network that is not used out of ``state``, and log it."""
    keys = [key for key in state if key.startswith(prefix)]
    for key in keys:
        del state[key]
    if keys:
        logger.info("%s: left out %s (%d tensors): another one is used", where, what, len(keys))


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
    """Move the plain or the averaged weights out of ``state``; the others too, and the log names them."""
    averaged = {name: _ema_key(key).removeprefix(EMA) for name, key in names.items()}
    has_ema = any(EMA + key in state for key in averaged.values())
    has_plain = any(UNET + key in state for key in names.values())
    if use_ema and not has_ema:
        raise CheckpointError(f"{where}: use_ema: the file has no averaged weights ({EMA}…)")

    use_ema = use_ema or (has_ema and not has_plain)
    chosen = take(state, averaged, EMA, where) if use_ema else take(state, names, UNET, where)

    # The other set need not be whole.
    other = [UNET + key for key in names.values()] if use_ema else [EMA + key for key in averaged.values()]
    if any([state.pop(key, None) is not None for key in other]):
        logger.info("%s: left out the %s weights of the UNet", where, "plain" if use_ema else "averaged")
    return chosen


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
