"""The hot operations of latent diffusion, each with a plain PyTorch definition in ``reference.py``."""

from . import reference
from .backend import BACKENDS, UnsupportedError, backend, current, reference_only

try:
    from .add_noise import add_noise
    from .cross_attention import cross_attention
    from .cross_attention_block import cross_attention_block
    from .geglu import geglu
    from .group_norm import group_norm
    from .layer_norm import layer_norm
    from .lora_linear import lora_linear
    from .sampler_step import sampler_step
    from .self_attention import self_attention
except ModuleNotFoundError as error:  # triton is published for Linux alone; elsewhere the definitions run
    if error.name != "triton":
        raise
    add_noise = reference_only(reference.add_noise)
    cross_attention = reference_only(reference.cross_attention)
    cross_attention_block = reference_only(reference.cross_attention_block)
    geglu = reference_only(reference.geglu)
    group_norm = reference_only(reference.group_norm)
    layer_norm = reference_only(reference.layer_norm)
    lora_linear = reference_only(reference.lora_linear)
    sampler_step = reference_only(reference.sampler_step)
    self_attention = reference_only(reference.self_attention)

__all__ = [
    "BACKENDS",
    "UnsupportedError",
    "add_noise",
    "backend",
    "cross_attention",
    "cross_attention_block",
    "current",
    "geglu",
    "group_norm",
    "layer_norm",
    "lora_linear",
    "reference",
    "sampler_step",
    "self_attention",
]
