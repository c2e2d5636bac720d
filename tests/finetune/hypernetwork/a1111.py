"""A1111's side of hypernetworks, restated: its formula, its curves, and what its loader lets through."""

import collections
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import draw

WIDTH = 6
X = 2 * draw("context", (2, 5, WIDTH))


class Restricted(pickle.Unpickler):
    """Lets through what A1111 lets through, as far as hypernetworks and optimizers go, and no more."""

    ALLOWED = {
        ("collections", "OrderedDict"),
        *(("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
        *(("torch", f"{kind}Storage") for kind in ("Float", "Half", "Int", "Long", "Double", "Byte")),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in self.ALLOWED, f"{module}.{name} is forbidden"
        return collections.OrderedDict if name == "OrderedDict" else getattr(__import__(module, fromlist=[name]), name)

    def persistent_load(self, pid: Any) -> Any:
        assert pid[0] == "storage"
        return torch.storage.TypedStorage(_internal=True)


def check_like_a1111(path: Path) -> None:
    """A file that is no zip holds five pickles; each has to pass."""
    assert path.read_bytes()[:2] != b"PK"
    with path.open("rb") as file:
        unpickler = Restricted(file)
        for _ in range(5):
            unpickler.load()


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "celu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "hardshrink": lambda x: torch.where(x.abs() > 0.5, x, 0),
    "hardsigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardtanh": lambda x: x.clamp(-1, 1),
    "logsigmoid": lambda x: -(1 + (-x).exp()).log(),
    "mish": lambda x: x * torch.tanh((1 + x.exp()).log()),
    "relu6": lambda x: x.clamp(0, 6),
    "rrelu": lambda x: torch.where(x > 0, x, x * (1 / 8 + 1 / 3) / 2),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    "silu": lambda x: x / (1 + (-x).exp()),
    "softplus": lambda x: torch.where(x > 20, x, (1 + x.exp()).log()),  # torch's rule, 2e-9 off
    "softshrink": lambda x: x.sign() * (x.abs() - 0.5).clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "tanhshrink": lambda x: x - torch.tanh(x),
}


def a1111(content: Mapping[Any, Any], index: int, x: Tensor, multiplier: float = 1.0) -> Tensor:
    """What A1111 makes of a context [..., width] by a file's content; index 0 is for keys, 1 for values."""
    state = {key: value.double() for key, value in content[x.shape[-1]][index].items()}
    structure = content["layer_structure"]
    position, y = 0, x
    for i in range(len(structure) - 1):
        y = y @ state[f"linear.{position}.weight"].T + state[f"linear.{position}.bias"]
        assert y.shape[-1] == int(x.shape[-1] * structure[i + 1])
        position += 1
        name, last = content["activation_func"], i == len(structure) - 2
        if name not in (None, "linear") and (content["activate_output"] or not last):
            slope = state.get(f"linear.{position}.weight")
            y = torch.where(y > 0, y, slope * y) if name == "prelu" else CURVES[name](y)
            position += 1
        if content["is_layer_norm"]:
            centred = y - y.mean(-1, keepdim=True)
            y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            y = y * state[f"linear.{position}.weight"] + state[f"linear.{position}.bias"]
            position += 1
        position += content["dropout_structure"][i + 1] > 0
    return x + multiplier * y
