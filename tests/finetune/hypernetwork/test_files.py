"""A1111's files of hypernetworks: its defaults, read and written again, and what is refused."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import Hypernetwork
from sdkit.errors import CheckpointError
from tests.conftest import draw, draw_weights, relative_error
from tests.finetune.hypernetwork.a1111 import WIDTH, X, a1111


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
