"""The CLIP and OpenCLIP text encoders: transformers' own class, built and filled without a network.

SD1 and SD2 differ only in the config (quick_gelu or gelu, width, depth), so one path serves both: the 23 layers that
diffusers stores for SD2 are OpenCLIP's penultimate layer already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.importing import quick_imports

if TYPE_CHECKING:
    from transformers import CLIPTextModel

_PREFIX = "text_model."
_UNUSED = "text_projection.weight"  # pools for CLIP's contrastive loss; no Stable Diffusion 1 or 2 network reads it


def build_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """The network of a ``text_encoder/config.json``, in eval mode, torch's default dtype, weights not yet loaded.

    Built under ``torch.device("meta")`` it costs no memory, and ``load_text_state`` gives it its weights.
    Raises ConfigError for another kind of model, or values that describe no network.
    """
    with quick_imports():
        from transformers import CLIPTextConfig, CLIPTextModel

    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise ConfigError(f"text encoder config: expected model_type clip_text_model, found {kind!r}")
    if config.get("use_attention_mask"):
        raise ConfigError("text encoder config: use_attention_mask=True is not supported; CLIP is run without a mask")

    try:
        return CLIPTextModel(CLIPTextConfig(**config)).eval()
    except Exception as error:  # transformers checks values in classes of errors that differ between versions
        raise ConfigError(f"text encoder config: {one_line(error)}") from None


def load_text_state(model: CLIPTextModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load weights whose names start with ``text_model.`` or not; every weight must be there, with its shape.

    Returns the tensors that the network has no place for: ``text_projection.weight``, if it is there, for a writer
    of single files. ``position_ids`` buffers of old files are passed over. Weights are cast to the model's dtype;
    a model on the meta device takes the tensors themselves instead, with their dtype and device.
    Raises CheckpointError that names what is missing, left over, or of another shape.
    """
    target = {name.removeprefix(_PREFIX): (name, value) for name, value in model.state_dict().items()}
    given: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(_PREFIX)
        if name in given:
            raise CheckpointError(f"text encoder: {name} is there twice, with and without the prefix {_PREFIX}")
        if name != "embeddings.position_ids":
            given[name] = tensor

    unused = {_UNUSED: given.pop(_UNUSED)} if _UNUSED in given else {}
    shapes = [
        f"{name} is {list(given[name].shape)} where {list(value.shape)} is expected"
        for name, (_, value) in target.items()
        if name in given and given[name].shape != value.shape
    ]

    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", sorted(target.keys() - given.keys())),
            ("not understood:", sorted(given.keys() - target.keys())),
            ("wrong shape:", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"text encoder: {'; '.join(problems)}")

    on_meta = model.device.type == "meta"
    model.load_state_dict({target[name][0]: tensor for name, tensor in given.items()}, assign=on_meta)
    if on_meta:  # position_ids is no weight, so it is made here
        embeddings = inner_model(model).embeddings
        length = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(length, device=model.device).expand(1, -1)
    return unused


def text_state_dict(model: CLIPTextModel) -> dict[str, Tensor]:
    """The weights under the names of the file formats, each with the prefix ``text_model.``."""
    return {_PREFIX + k.removeprefix(_PREFIX): v.detach().contiguous() for k, v in model.state_dict().items()}


def pooled(hidden_states: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The state [B, D] at each row's first end token, of ``hidden_states`` [B, N, D] for ``input_ids`` [B, N].

    Configs written before transformers 4.31 say ``eos_token_id`` 2, wrongly; they mean the highest id in the row.
    Raises ConfigError when a row has no end token.
    """
    is_end = input_ids == (input_ids.amax(-1, keepdim=True) if eos_token_id == 2 else eos_token_id)
    if not bool(is_end.any(-1).all()):
        raise ConfigError(f"pooled output: a row of input_ids has no end token {eos_token_id}")
    rows = torch.arange(len(input_ids), device=hidden_states.device)
    return hidden_states[rows, is_end.int().argmax(-1).to(hidden_states.device)]


def inner_model(model: CLIPTextModel) -> Any:
    """The module that holds embeddings, encoder and final_layer_norm: one level down before transformers 5.6."""
    return getattr(model, "text_model", model)
