"""The hot operations of latent diffusion, each with a plain PyTorch definition in ``reference.py``."""

from . import reference
from .backend import BACKENDS, UnsupportedError, backend, current, reference_only

try:
    from .geglu import geglu
except ModuleNotFoundError as error:  # triton is published for Linux alone; elsewhere the definitions run
    if error.name != "triton":
        raise
    geglu = reference_only(reference.geglu)

group_norm = reference_only(reference.group_norm)
self_attention = reference_only(reference.self_attention)
cross_attention = reference_only(reference.cross_attention)
layer_norm = reference_only(reference.layer_norm)
lora_linear = reference_only(reference.lora_linear)
add_noise = reference_only(reference.add_noise)
sampler_step = reference_only(reference.sampler_step)

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
