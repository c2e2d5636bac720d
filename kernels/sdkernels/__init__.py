"""The hot operations of latent diffusion, each with a plain PyTorch definition in ``reference.py``."""

from . import reference
from .backend import BACKENDS, UnsupportedError, backend, current, reference_only

try:
    from .add_noise import add_noise
    from .geglu import geglu
    from .layer_norm import layer_norm
    from .lora_linear import lora_linear
    from .sampler_step import sampler_step
except ModuleNotFoundError as error:  # triton is published for Linux alone; elsewhere the definitions run
    if error.name != "triton":
        raise
    add_noise = reference_only(reference.add_noise)
    geglu = reference_only(reference.geglu)
    layer_norm = reference_only(reference.layer_norm)
    lora_linear = reference_only(reference.lora_linear)
    sampler_step = reference_only(reference.sampler_step)

group_norm = reference_only(reference.group_norm)
self_attention = reference_only(reference.self_attention)
cross_attention = reference_only(reference.cross_attention)

__all__ = [
    "BACKENDS",
    "UnsupportedError",
    "add_noise",
    "backend",
    "cross_attention",
    "current",
    "geglu",
    "group_norm",
    "layer_norm",
    "lora_linear",
    "reference",
    "sampler_step",
    "self_attention",
]
