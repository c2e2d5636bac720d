"""Hypernetworks and their files: A1111's formula and defaults, restated here; what A1111's loader lets through."""

import collections
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import ACTIVATIONS, INITIALIZATIONS, Hypernetwork
from finetune.hypernetwork.whitening import Whitening
from sdkit.errors import CheckpointError, ConfigError
from tests.conftest import draw, draw_weights, relative_error

WIDTH = 6
X = 2 * draw("context", (2, 5, WIDTH))


# A1111's side


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


# The formula


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_written_file_is_what_a1111_computes(activation: str, tmp_path: Path):
    """Every activation, and for some every option: in the file, and read again, in float64."""
    drops = [0, 0.3, 0.2, 0]
    some = itertools.product((False, True), (False, True), (None, drops)) if activation in ("linear", "swish") else ()
    for norm, output, dropout in (*some, (False, True, drops)):
        network = draw_weights(Hypernetwork([WIDTH, 4], (1, 1.5, 2, 1), activation, "Normal", norm, output, dropout))
        network.save(tmp_path / "net.pt")
        check_like_a1111(tmp_path / "net.pt")
        content = torch.load(tmp_path / "net.pt", weights_only=True)
        read = read_hypernetwork(tmp_path / "net.pt").double()
        read.multiplier = 0.7
        for x in (X, X[..., :4]):
            k, v = read(x, 3 * x)
            assert relative_error(k, a1111(content, 0, x, 0.7)) < 1e-12
            assert relative_error(v, a1111(content, 1, 3 * x, 0.7)) < 1e-12
            assert relative_error(k, x) > 0.01


def test_the_curves_are_all_that_a1111_offers_and_can_run():
    offered = {name.lower() for name in torch.nn.modules.activation.__all__} | {"linear", "swish"}
    refused = {"glu", "threshold", "multiheadattention", "softmax", "softmin", "logsoftmax", "softmax2d"}
    assert set(ACTIVATIONS) == offered - refused == {*CURVES, "linear", "prelu"}


def test_another_width_and_multiplier_0_are_exactly_the_context():
    network = draw_weights(Hypernetwork([WIDTH])).double()
    k, v = draw("k", (1, 2, 5)), draw("v", (1, 2, 5))
    assert network(k, v)[0] is k and network(k, v)[1] is v
    network.multiplier = 0.0
    assert network(X, X)[0] is X
    network.train()  # in training the multiplier counts for nothing
    assert relative_error(network(X, X)[0], X) > 0.01


def test_contexts_keep_their_dtype_and_weights_theirs():
    network = draw_weights(Hypernetwork([WIDTH]))
    k, v = network(X.bfloat16(), X.half())
    assert (k.dtype, v.dtype, network.dtype) == (torch.bfloat16, torch.float16, torch.float32)
    assert relative_error(k.float(), network(X.bfloat16().float(), X.float())[0]) < 0.01


def test_dropout_is_in_force_in_training_alone():
    network = draw_weights(Hypernetwork([WIDTH], (1, 4, 1), dropout_structure=(0, 0.5, 0)))
    x = X.float()
    assert torch.equal(network(x, x)[0], network(x, x)[0])
    torch.manual_seed(0)
    first = network.train()(x, x)[0]
    assert not torch.equal(first, network(x, x)[0])
    torch.manual_seed(0)
    assert torch.equal(first, network(x, x)[0])


# Training


def skewed(name: str, count: int, scale: float = 1.0) -> Tensor:
    """Contexts [count, WIDTH] like a text's: far from 0, and stronger in some directions than in others."""
    spread = torch.diag(torch.tensor([10.0, 3.0, 1.0, 1.0, 0.3, 0.3], dtype=torch.float64))
    return scale * (draw(name, (count, WIDTH)) @ spread @ draw("mixing", (WIDTH, WIDTH)) + 20)


def whitened(network: Hypernetwork, *contexts: Tensor) -> Hypernetwork:
    network.whiten(lambda: [network(x[None], x[None]) for x in contexts])
    return network


def moments(*contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of contexts, each of which counts the same, whatever its length."""
    mean = torch.stack([x.mean(0) for x in contexts]).mean(0)
    return mean, torch.stack([(x - mean).T @ (x - mean) / len(x) for x in contexts]).mean(0)


def test_whitening_makes_mean_0_and_nearly_the_unit_as_covariance():
    contexts = skewed("long", 4000), skewed("short", 40, 0.5)
    covariance = moments(*contexts)[1]
    floor = 0.01 * covariance.diag().mean() * torch.eye(WIDTH)
    network = whitened(Hypernetwork([WIDTH, 4]), *contexts, *(x[:, :4] for x in contexts)).double()
    whitening, other = (module for module in network.modules() if isinstance(module, Whitening))
    mean, white = moments(*map(whitening, contexts))
    assert mean.abs().max() < 1e-3
    assert relative_error(white @ (covariance + floor), covariance) < 1e-4
    assert relative_error(whitening.matrix.T, whitening.matrix) < 1e-6  # it turns nothing that it need not
    assert other.mean.shape == (4,)


def test_what_was_trained_on_whitened_contexts_is_written_as_a_plain_file(tmp_path: Path):
    for options in ((1, 2, 1), "tanh", "Normal"), ((1, 1), "linear", "Normal", True, True):
        network = whitened(draw_weights(Hypernetwork([WIDTH], *options)), skewed("seen", 100))
        state = {key: value.clone() for key, value in network.state_dict().items()}
        network.save(tmp_path / "net.pt")
        check_like_a1111(tmp_path / "net.pt")
        content = torch.load(tmp_path / "net.pt", weights_only=True)
        x = skewed("unseen", 10)
        for index, changed in enumerate(network.double()(x, x)):
            assert relative_error(changed - x, a1111(content, index, x) - x) < 1e-5
        assert state.keys() == read_hypernetwork(tmp_path / "net.pt").state_dict().keys()
        assert all(torch.equal(state[key], value.float()) for key, value in network.state_dict().items())


def test_processes_share_one_whitening():
    contexts = [skewed("one", 100), skewed("other", 50, 2.0)]
    alone = whitened(Hypernetwork([WIDTH]), *contexts)
    sums: list[Tensor] = []
    for x in contexts:  # what each process has seen
        process = Hypernetwork([WIDTH])
        process.whiten(lambda n=process, x=x: n(x[None], x[None]), lambda seen: sums.append(seen.clone()) or seen)
    shared = Hypernetwork([WIDTH])
    shared.whiten(lambda: shared(contexts[0][None], contexts[0][None]), lambda seen: sums[0] + sums[1])
    for a, b in zip(alone.buffers(), shared.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_whitening_learns_what_tells_contexts_apart():
    """The same steps, at the best of several rates each: what hangs on the weak directions is learnt several times as
    far on whitened contexts."""
    seen = skewed("tokens", 512).float()
    weak = (draw("tokens", (512, WIDTH))[:, 4:] > 0).float().sum(1, keepdim=True)  # of which the spread is 0.3

    def error(white: bool, rate: float) -> float:
        torch.manual_seed(0)
        network = Hypernetwork([WIDTH], (1, 4, 1), "swish", "Zero")
        if white:
            whitened(network, seen)
        optimizer = torch.optim.Adam(network.parameters(), rate)

        def loss() -> Tensor:
            return (network(seen, seen)[0] - seen - weak).square().mean()

        for _ in range(100):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return loss().item()

    rates = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
    plain, white = (min(error(how, rate) for rate in rates) for how in (False, True))
    assert white < 0.5 * plain, (plain, white)


# First weights


def test_first_weights():
    """A1111's: deviation 0.01, or He's and Glorot's rule; norms' weights 0.01 always; biases 0."""
    width, wide = 200, 400
    expected = {
        "Zero": 0.01,
        "Normal": 0.01,
        "XavierUniform": (2 / (width + wide)) ** 0.5,
        "XavierNormal": (2 / (width + wide)) ** 0.5,
        "KaimingUniform": (2 / width) ** 0.5,
        "KaimingNormal": (2 / width) ** 0.5,
    }
    assert list(expected) == list(INITIALIZATIONS)
    for name, deviation in expected.items():
        torch.manual_seed(0)
        network = Hypernetwork([width], weight_initialization=name, is_layer_norm=True)
        linear, norm = network.layers[str(width)][1].linear[:2]
        assert abs(float(linear.weight.detach().std()) / deviation - 1) < 0.02
        peak = float(linear.weight.detach().abs().max()) / deviation
        assert 1.7 < peak < 1.74 if name.endswith("Uniform") else peak > 3.5
        assert 0.005 < float(norm.weight.detach().std()) < 0.015 and abs(float(norm.weight.detach().mean())) < 0.005
        assert not any(float(p.abs().max()) for n, p in network.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("options", [{}, {"is_layer_norm": True}, {"is_layer_norm": True, "activate_output": True}])
def test_zero_changes_nothing_at_first_but_trains(options: dict[str, Any]):
    torch.manual_seed(0)
    network = Hypernetwork([WIDTH], (1, 2, 1), "relu", "Zero", **options).double()
    assert torch.equal(network(X, X)[1], X)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        sum(y.square().sum() for y in network(X, X)).backward()
        optimizer.step()
    moved = [n for n, p in network.named_parameters() if float(p.grad.abs().max()) == 0]
    assert not moved and relative_error(network(X, X)[1], X) > 0.001
    with pytest.raises(ConfigError, match="Zero would not be zero"):
        Hypernetwork([WIDTH], (1, 2, 1), "relu", "Zero", activate_output=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "widths"),
        ({"widths": [8, 8]}, "each once"),
        ({"widths": [0]}, "widths"),
        ({"layer_structure": (1,)}, "layer_structure: expected numbers from 1"),
        ({"layer_structure": (2, 1)}, "layer_structure"),
        ({"layer_structure": (1, 0.1, 1)}, "a feature at least"),
        ({"layer_structure": (1, math.inf, 1)}, "layer_structure"),
        ({"activation_func": "glu"}, "found 'glu', expected one of linear, swish"),
        ({"weight_initialization": "normal"}, "found 'normal', expected one of Zero"),
        ({"dropout_structure": (0, 0)}, "3 shares"),
        ({"dropout_structure": (0, 1, 0)}, "below 1"),
    ],
)
def test_arguments_without_meaning(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Hypernetwork(**{"widths": [8]} | options)


# Files


def old_file() -> dict[Any, Any]:
    """Of the first days: two layers, no word of their structure."""
    shapes = {"linear1": (2 * WIDTH, WIDTH), "linear2": (WIDTH, 2 * WIDTH)}

    def state(part: str) -> dict[str, Tensor]:
        weights = {f"{name}.weight": draw(part + name, shape) for name, shape in shapes.items()}
        biases = {f"{name}.bias": draw(part + name, shape[:1]) for name, shape in shapes.items()}
        return {key: value.half() for key, value in (weights | biases).items()}

    return {WIDTH: (state("k"), state("v"))}


def placed(pair: tuple[dict[str, Tensor], ...], first: int, second: int) -> tuple[dict[str, Tensor], ...]:
    """The layers of an old file at these positions, as new files say it."""
    names = {"linear1": f"linear.{first}", "linear2": f"linear.{second}"}
    return tuple({names[key[:7]] + key[7:]: value for key, value in state.items()} for state in pair)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_a_file_leaves_out_has_a1111s_defaults(tmp_path: Path, zipped: bool):
    pair = old_file()[WIDTH]
    defaults = {
        "layer_structure": [1, 2, 1],
        "activation_func": None,
        "is_layer_norm": False,
        "activate_output": True,
        "dropout_structure": [0, 0, 0],
    }
    active = {"activation_func": "relu", "step": 7, "optimizer_name": "AdamW", WIDTH: placed(pair, 0, 2)}
    for content, meant in ((old_file(), {WIDTH: placed(pair, 0, 1)}), (active, active)):
        torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
        network = read_hypernetwork(tmp_path / "old.pt")
        assert network.widths == [WIDTH] and network.dtype == torch.float32 and not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert network.facts["step"] == content.get("step")
        for index, y in enumerate(network.double()(X, X)):
            assert relative_error(y, a1111(defaults | meant, index, X)) < 1e-12


@pytest.mark.parametrize(
    ("last", "structure", "expected"),
    [
        (True, (1, 2, 2, 1), [0, 0.3, 0.3, 0]),
        (False, (1, 2, 2, 1), [0, 0.3, 0, 0]),
        (None, (1, 2, 1), [0, 0, 0]),
        (True, (1, 1), [0, 0.3]),
    ],
)
def test_dropout_that_a_file_gives_in_words(
    last: bool | None, structure: tuple[float, ...], expected: list[float], tmp_path: Path
):
    """use_dropout is 0.3 after the layers inside; after the last of them if last_layer_dropout says so."""
    Hypernetwork([WIDTH], structure, dropout_structure=expected).save(tmp_path / "net.pt")
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    if len(structure) > 2:
        assert (content["use_dropout"], content["last_layer_dropout"]) == (any(expected), bool(last))
    content |= {"use_dropout": True, "last_layer_dropout": last}
    for key in ("dropout_structure", *(["last_layer_dropout"] if last is None else [])):
        del content[key]
    torch.save(content, tmp_path / "net.pt")
    assert read_hypernetwork(tmp_path / "net.pt").settings["dropout_structure"] == expected


def test_a_file_that_is_read_and_written_is_the_same(tmp_path: Path):
    network = draw_weights(Hypernetwork([4, WIDTH], (1, 2, 1), "mish", "XavierNormal", True, True, (0, 0.1, 0)))
    network.facts |= {"name": "fur", "step": 12, "sd_checkpoint_name": "v1-5", "optional_info": "a note"}
    network.save(tmp_path / "a.pt")
    read_hypernetwork(tmp_path / "a.pt").save(tmp_path / "b.pt")
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    tensors = {key for key in a if isinstance(key, int)}
    assert {k: a[k] for k in a.keys() - tensors} == {k: b[k] for k in b.keys() - tensors} and len(tensors) == 2
    for width, index in itertools.product(tensors, (0, 1)):
        assert a[width][index].keys() == b[width][index].keys()
        assert all(torch.equal(t, b[width][index][k]) and t.dtype == torch.float32 for k, t in a[width][index].items())
    assert a["weight_initialization"] == "XavierNormal" and a["step"] == 12 and isinstance(a[4], tuple)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_a_file_is_float32_and_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = draw_weights(Hypernetwork([WIDTH]))
    network.half().save(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")[WIDTH][0]["linear.0.bias"].dtype == torch.float32
    before = (tmp_path / "a.pt").read_bytes()

    def stop(content: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written \(no space left\)"):
        network.save(tmp_path / "a.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be written"):
        network.save(tmp_path / "none" / "a.pt")


def broken(change: Callable[[dict[Any, Any]], Any]) -> dict[Any, Any]:
    content = old_file()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(hash="x"), "not understood: hash"),
        (lambda c: c.pop(WIDTH), "no pair for any width"),
        (lambda c: c.update({WIDTH: c[WIDTH][:1]}), "two state dicts"),
        (lambda c: c.update({WIDTH: "x"}), "two state dicts"),
        (lambda c: c[WIDTH][1].pop("linear2.bias"), "1 missing keys, the first layers.6.1.linear.1.bias"),
        (lambda c: c[WIDTH][1].update({"linear3.bias": torch.ones(1)}), "1 unexpected keys"),
        (lambda c: c[WIDTH][1].update({"linear.1.bias": torch.ones(WIDTH)}), "expected one tensor"),
        (lambda c: c[WIDTH][0]["linear1.bias"].fill_(math.nan), "finite"),
        (lambda c: c.update(layer_structure=[1, 3, 1]), "expected the shape"),
        (lambda c: c.update(layer_structure="1, 2, 1"), "layer_structure"),
        (lambda c: c.update(layer_structure=7), "int"),
        (lambda c: c.update(activation_func="softmax"), "found 'softmax'"),
        (lambda c: c.update(dropout_structure=[0.0]), "dropout_structure"),
        (lambda c: c.update(name=Path("x")), "holds code or objects"),
    ],
)
def test_files_that_are_no_hypernetworks(change: Callable[[dict[Any, Any]], Any], message: str, tmp_path: Path):
    path = tmp_path / "bad.pt"
    torch.save(broken(change), path)
    with pytest.raises(CheckpointError, match=f"bad.pt: .*{message}"):
        read_hypernetwork(path)


def test_other_files(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is none"):
        read_hypernetwork(tmp_path / "none.pt")
    save_file({"x": torch.ones(1)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="found safetensors"):
        read_hypernetwork(tmp_path / "net.safetensors")
