"""Hypernetworks, A1111's kind: small networks between a context and the keys and values that are made of it.

``k = to_k(H_k(context))``, ``v = to_v(H_v(context))`` in every attention whose context has a width that the
hypernetwork has a pair (H_k, H_v) for. `finetune.hypernetwork.attach` puts them into a model,
`finetune.hypernetwork.files` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.hypernetwork.whitening import Whitening, measure_contexts
from sdkit.checkpoints.tensors import is_finite, write_pickle
from sdkit.checks import check_choice, check_kind, expect, is_count, is_number
from sdkit.errors import ConfigError, NumericalError

_BY_CLASS_NAME = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "linear": nn.Identity,
    "swish": nn.Hardswish,
    **{kind.__name__.lower(): kind for kind in _BY_CLASS_NAME},
}
"""A1111's names. It also lets one write glu, threshold, multiheadattention and softmax2d, which it cannot run, and
softmax, softmin and logsoftmax, which there go over the pictures of a batch."""

INITIALIZATIONS = ("Zero", "Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")

FACTS = ("name", "step", "sd_checkpoint", "sd_checkpoint_name", "optional_info")


class Residual(nn.Module):
    """x + multiplier * linear(x) for x [..., width], or linear(whitening(x)). Arguments as in `Hypernetwork`."""

    whitening: Whitening | None

    def __init__(
        self,
        width: int,
        layer_structure: Sequence[float],
        activation_func: str,
        is_layer_norm: bool,
        activate_output: bool,
        dropout_structure: Sequence[float],
    ) -> None:
        super().__init__()

        sizes = [int(width * factor) for factor in layer_structure]

        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(sizes), start=1):
            layers.append(nn.Linear(inner, outer))
            if activation_func != "linear" and (i < len(sizes) - 1 or activate_output):
                layers.append(ACTIVATIONS[activation_func]())
            if is_layer_norm:
                layers.append(nn.LayerNorm(outer))
            if dropout_structure[i] > 0:
                layers.append(nn.Dropout(dropout_structure[i]))

        self.linear = nn.Sequential(*layers)
        self.whitening = None

    def forward(self, x: Tensor, multiplier: float) -> Tensor:
        return x + multiplier * self.linear(x if self.whitening is None else self.whitening(x))

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict that A1111 knows, float32, on the CPU: ``linear``, whitening folded into its first layer."""
        state = {key: value.float().cpu() for key, value in self.state_dict().items()}
        if self.whitening is not None:
            first = ("linear.0.weight", "linear.0.bias")
            state |= zip(first, self.whitening.folded(*(state[key] for key in first)), strict=True)
        return {key: value.contiguous() for key, value in state.items()}


class Hypernetwork(nn.Module):
    """A pair of networks, for keys and for values, for each width of a context.

    widths: of contexts: the text's (768 in SD1, 1024 in SD2), and those of self-attention (320, 640, 1280).
    layer_structure: sizes of the networks' layers over the width, from 1 to 1.
    activation_func: after every layer but the last; a key of ``ACTIVATIONS``.
    weight_initialization: "Normal" is A1111's: weights of deviation 0.01. The others of its names draw those of the
        linear layers by He's or Glorot's rule. "Zero" is "Normal" with zeros in the last layer: the model is unchanged
        at first, as with a new LoRA. Biases are zero. Drawn from torch's global generator.
    is_layer_norm: norm after every layer; its weights too start near 0.
    activate_output: the activation after the last layer as well.
    dropout_structure: for each entry of ``layer_structure`` the share that training drops there; the first, the
        network's input, is never dropped. None: nothing is.

    ``multiplier`` weighs the networks; in training mode, which has to be switched on, they count once. ``facts`` holds
    the other entries of the file: name, step, sd_checkpoint, sd_checkpoint_name, optional_info. Weights are float32,
    whatever the model's dtype.

    Raises ConfigError for arguments without meaning.
    """

    def __init__(
        self,
        widths: Sequence[int],
        layer_structure: Sequence[float] = (1, 2, 1),
        activation_func: str = "linear",
        weight_initialization: str = "Normal",
        is_layer_norm: bool = False,
        activate_output: bool = False,
        dropout_structure: Sequence[float] | None = None,
    ) -> None:
        super().__init__()

        for name, values in (("widths", widths), ("layer_structure", layer_structure)):
            check_kind(name, values, Sequence, "a list of numbers")
        check_kind("dropout_structure", dropout_structure, (Sequence, type(None)), "a list of numbers, or None")
        dropout = [0.0] * len(layer_structure) if dropout_structure is None else list(dropout_structure)
        _check(widths, layer_structure, activation_func, weight_initialization, dropout)
        if weight_initialization == "Zero" and activate_output and not is_layer_norm:
            raise ConfigError("weight_initialization: Zero would not be zero, or never train, under activate_output")

        self.settings: dict[str, Any] = {
            "layer_structure": list(layer_structure),
            "activation_func": activation_func,
            "weight_initialization": weight_initialization,
            "is_layer_norm": is_layer_norm,
            "activate_output": activate_output,
            "use_dropout": any(dropout),
            "last_layer_dropout": dropout[-2] != 0,
            "dropout_structure": dropout,
        }
        self.facts: dict[str, Any] = dict.fromkeys(FACTS)
        self.multiplier = 1.0

        shape = (layer_structure, activation_func, is_layer_norm, activate_output, dropout)
        self.layers = nn.ModuleDict(
            {str(width): nn.ModuleList(Residual(width, *shape) for _ in range(2)) for width in widths}
        )

        for module in self.modules():
            if isinstance(module, Residual):
                _initialize(module.linear, weight_initialization)
        self.eval()

    @property
    def widths(self) -> list[int]:
        return [int(width) for width in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The contexts [B, M, width] of keys and of values, changed, in their dtype; of other widths, as they are."""
        width, multiplier = str(k.shape[-1]), 1.0 if self.training else self.multiplier
        if width not in self.layers or not multiplier:
            return k, v
        for_k, for_v = cast("nn.ModuleList", self.layers[width])
        changed = for_k(k.to(self.dtype), multiplier), for_v(v.to(self.dtype), multiplier)
        return changed[0].to(k.dtype), changed[1].to(v.dtype)

    def whiten(self, see: Callable[[], object], total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Let a new network train on whitened contexts (`whitening`), which changes its results.

        see() runs the model with the network in it, on some batches of its training; total(x) sums x over processes.
        """
        pairs = {int(width): cast("Sequence[Residual]", pair) for width, pair in self.layers.items()}
        for width, whitening in measure_contexts({w: pair[0] for w, pair in pairs.items()}, see, total).items():
            for residual in pairs[width]:
                residual.whitening = whitening.to(self.device)

    def save(self, path: str | Path) -> None:
        """Write A1111's ``.pt``, in float32, in torch's older form: A1111 refuses the members of newer zip files.

        Raises CheckpointError when the file cannot be written, NumericalError for weights that are not finite.
        """
        if bad := [name for name, value in self.state_dict().items() if not is_finite(value)]:
            raise NumericalError(f"{path}: {bad[0]} is not saved: it has NaN or infinity")
        content: dict[str | int, Any] = {**self.settings, **self.facts}
        for width, pair in self.layers.items():
            content[int(width)] = tuple(network.plain_state() for network in cast("Sequence[Residual]", pair))
        write_pickle(content, path)


def _initialize(linear: nn.Sequential, initialization: str) -> None:
    """Draw the first weights; those of norms as by "Normal", whatever the choice, as in A1111."""
    rules = {
        "XavierUniform": nn.init.xavier_uniform_,
        "XavierNormal": nn.init.xavier_normal_,
        "KaimingUniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
        "KaimingNormal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    }

    normal = partial(nn.init.normal_, std=0.01)
    weighted = [layer for layer in linear if isinstance(layer, nn.Linear | nn.LayerNorm)]
    for layer in weighted:
        rule = rules.get(initialization, normal) if isinstance(layer, nn.Linear) else normal
        rule(layer.weight)
        nn.init.zeros_(layer.bias)

    if initialization == "Zero":
        nn.init.zeros_(weighted[-1].weight)


def _check(
    widths: Sequence[int], structure: Sequence[float], activation: str, initialization: str, dropout: Sequence[float]
) -> None:
    whole = bool(widths) and all(is_count(width, 1) for width in widths)
    expect(whole, "widths", "whole numbers from 1", list(widths))
    expect(len(set(widths)) == len(widths), "widths", "each once", list(widths))

    closed = len(structure) >= 2 and structure[0] == structure[-1] == 1
    expect(closed, "layer_structure", "numbers from 1 to 1, such as 1, 2, 1", list(structure))
    filled = all(is_number(factor) and int(factor * min(widths)) >= 1 for factor in structure)
    expect(filled, "layer_structure", "a feature at least in every layer", list(structure))

    # What was found comes first here, as messages about files are cut after 200 characters.
    if not isinstance(activation, str) or activation not in ACTIVATIONS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"activation_func: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    check_choice("weight_initialization", initialization, INITIALIZATIONS)

    shares = len(dropout) == len(structure) and all(is_number(share, 0, 1) and share < 1 for share in dropout)
    expected = f"{len(structure)} shares from 0 to below 1, as many as layer_structure has entries"
    expect(shares, "dropout_structure", expected, list(dropout))
