"""The model of a command, and the files that are put into it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from sdkit import adapter_kinds
from sdkit.adapter_kinds import AdapterKind
from sdkit.generation.png import read_parameters
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


def test_the_prediction_is_for_single_files_alone(run: Run, fake: type[FakeStableDiffusion]) -> None:
    assert run("txt2img", "x", "--model", "some/v1-5.safetensors", "--prediction", "epsilon")[0] == 0
    assert fake.loaded == [("some/v1-5.safetensors", {"prediction_type": "epsilon"})]
    status, _, err = run("txt2img", "x", "--model", "some/v1.5", "--prediction", "epsilon")
    assert status == 1 and "--prediction: only for single files; some/v1.5 says it itself" in err


@pytest.mark.parametrize("device", ["warp9", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there(run: Run, fake: type[FakeStableDiffusion], device: str) -> None:
    status, _, err = run("txt2img", "x", "--device", device)
    assert status == 1 and f"device {device!r} cannot be used" in err and err.count("\n") == 1 and not fake.loaded


def test_adapters_come_through_entry_points(
    run: Run, fake: type[FakeStableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the picture says what went in, so that it is put in again, and is refused when a file is another."""
    for name in ("a.safetensors", "b:c", "h.pt", "e.pt", "v.safetensors"):
        Path(name).write_text(name)
    options = (
        "--lora",
        "a.safetensors:0.8",
        "--lora",
        "b:c",
        "--hypernetwork",
        "h.pt:-1",
        "--vae",
        "v.safetensors",
        "--embedding",
        "e.pt",
    )
    monkeypatch.setattr(adapter_kinds, "_installed", lambda: ())
    status, _, err = run("txt2img", "x", *options)
    assert status == 2 and "No such option: --lora" in err and err.count("\n") == 1

    def loader(name: str) -> AdapterKind:
        module = types.ModuleType(f"tests.{name}_verbs")
        module.load = lambda sd, path, weight: sd.added.append((name, path, weight))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return AdapterKind(name, tag=name, verbs=module.__name__)

    kinds = (loader("lora"), loader("hypernetwork"))
    monkeypatch.setattr(adapter_kinds, "_installed", lambda: kinds)
    assert run("txt2img", "x", "--seed", "1", *options)[0] == 0
    added = [
        ("vae", "v.safetensors"),
        ("lora", "a.safetensors", 0.8),
        ("lora", "b:c", 1.0),
        ("hypernetwork", "h.pt", -1.0),
        ("embedding", "e.pt"),
    ]
    assert fake.added == added
    assert read_parameters("out.png")["lora"] == ["a.safetensors:0.8", "b:c"]
    assert run("reproduce", "out.png", "again.png")[0] == 0
    assert fake.added == 2 * added and read_parameters("again.png") == read_parameters("out.png")
    Path("h.pt").write_text("another")
    status, _, err = run("reproduce", "out.png", "again.png")
    assert status == 1 and "h.pt: not the file that made out.png: expected SHA-256" in err and len(fake.added) == 10
