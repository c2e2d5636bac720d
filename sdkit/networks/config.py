"""Frozen configurations of the UNet and the VAE, read from and written to diffusers' JSON.

Every key of a file is accounted for: it is a field here, or it is one of diffusers' switches that must
stand at the value that makes it do nothing (``INERT``), or the file is refused and the key is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

from sdkit.checks import POSITIVE, Range
from sdkit.errors import ConfigError
from sdkit.files import read_json
from sdkit.typed_json import checked

# Written by diffusers for its own bookkeeping; they say nothing about the network.
BOOKKEEPING = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "_use_default_values",
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


Width = Annotated[int, Range(1, 65_536)]
"""A number of channels, features, heads, groups, or cells along a side."""

Depth = Annotated[int, Range(1, 64)]
"""A number of layers in a block."""


class _JsonConfig:
    """Reading and writing shared by the dataclasses below. ``INERT`` maps a key to its harmless values."""

    CLASS_NAME: str = ""
    INERT: Mapping[str, tuple[Any, ...]] = {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a diffusers config. Raises ConfigError that names each key that is not understood."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        unknown = [
            f"{key}={value!r}"
            for key, value in values.items()
            if key not in known and key not in BOOKKEEPING and not (key in cls.INERT and value in cls.INERT[key])
        ]
        if unknown:
            raise ConfigError(f"{cls.CLASS_NAME} config: unsupported {', '.join(sorted(unknown))}")
        own = {key: value for key, value in values.items() if key in known}
        return cls(**checked(cls, own, f"{cls.CLASS_NAME} config"))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a config.json; ``path`` is the file or the folder that holds it."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """The config as diffusers writes it, ``_class_name`` first."""
        return {"_class_name": self.CLASS_NAME} | {k: _thaw(v) for k, v in asdict(self).items()}  # type: ignore[call-overload]


def _thaw(value: Any) -> Any:
    return [_thaw(v) for v in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class UNetConfig(_JsonConfig):
    """The noise predictor. Names and defaults are diffusers'; ``attention_head_dim`` is the number of heads."""

    CLASS_NAME = "UNet2DConditionModel"
    INERT = {
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "projection_class_embeddings_input_dim": (None,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "addition_time_embed_dim": (None,),
        "addition_embed_type_num_heads": (64,),
        "reverse_transformer_layers_per_block": (None,),
        "dropout": (0, 0.0),
        "act_fn": ("silu",),
        "mid_block_scale_factor": (1, 1.0),
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
    }

    sample_size: Width | tuple[Width, Width] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    layers_per_block: Depth | tuple[Depth, ...] = 2
    downsample_padding: Annotated[int, Range(0, 1)] = 1
    norm_num_groups: Width = 32
    norm_eps: Annotated[float, Range(0, 1)] = 1e-5
    cross_attention_dim: Width | tuple[Width, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth, ...] = 1
    attention_head_dim: Width | tuple[Width, ...] = 8
    num_attention_heads: Width | tuple[Width, ...] | None = None
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    upcast_attention: bool = False

    def per_block(self, value: Any) -> tuple[Any, ...]:
        """``value`` for each down block, in order: a scalar stands for all of them."""
        blocks = len(self.block_out_channels)
        result = value if isinstance(value, tuple) else (value,) * blocks
        if len(result) != blocks:
            raise ConfigError(f"UNet config: {value!r} has {len(result)} entries for {blocks} blocks")
        return result

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each down block (diffusers misnamed the key; a correct one wins if given)."""
        return self.per_block(self.num_attention_heads or self.attention_head_dim)


@dataclass(frozen=True)
class VAEConfig(_JsonConfig):
    """The autoencoder. Names and defaults are diffusers'."""

    CLASS_NAME = "AutoencoderKL"
    INERT = {
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None, 0.0),
    }

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[Width, ...] = (64,)
    layers_per_block: Depth = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: Width | tuple[Width, Width] = 32
    scaling_factor: Annotated[float, POSITIVE] = 0.18215
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = False  # run in float32 where the model is in float16, as it overflows there

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.block_out_channels) - 1)
