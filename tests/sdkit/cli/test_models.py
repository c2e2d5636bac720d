"""The model of a command, and the files that are put into it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdkit import adapter_kinds
from sdkit.adapter_kinds import AdapterKind
from sdkit.generation.png import read_parameters
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


def test_the_prediction_is_for_single_files_alone(run: Run, fake: type[FakeStableDiffusion]) -> None:
    assert run("txt2img", "x", "--model", "some/v1-5.safetensors", "--prediction", "epsilon")[0] == 0
    assert fake.loaded == [("some/v1-5.safetensors", {"prediction_type": "epsilon"})]
    status, _, err = run("txt2img", "x", "--model", "some/v1.5", "--prediction", "epsilon")
    assert status == 1 and "--prediction: only for single files; some/v1.5 says it itself" in err


def test_zero_snr_is_for_single_files_alone_and_goes_into_the_picture(
    run: Run, fake: type[FakeStableDiffusion]
) -> None:
    for flag, value in (("--zero-snr", True), ("--no-zero-snr", False)):
        assert run("txt2img", "x", "--model", "v.safetensors", flag, "--out", f"{value}.png")[0] == 0
        assert fake.loaded[-1] == ("v.safetensors", {"zero_snr": value})
        assert run("reproduce", f"{value}.png", "again.png")[0] == 0
        assert fake.loaded[-1] == ("v.safetensors", {"zero_snr": value})
    status, _, err = run("txt2img", "x", "--zero-snr")
    assert status == 1 and "--zero-snr: only for single files; tabletop says it itself" in err


def test_a_model_without_a_vae_is_drawn_and_converted_with_one(run: Run, tiny: Path) -> None:
    assert run("convert", tiny, "whole.safetensors")[0] == 0
    with safe_open("whole.safetensors", "pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({k: v for k, v in state.items() if not k.startswith("first_stage")}, "bare.safetensors", metadata)

    assert "lacks       VAE" in run("inspect", "bare.safetensors")[1]
    quick = ("--model", "bare.safetensors", "--device", "cpu", "--steps", "2", "--seed", "1")
    status, _, err = run("txt2img", "x", *quick)
    assert status == 1 and "has no VAE (first_stage_model.…): give one (vae=, --vae)" in err
    parts = ("--vae", "whole.safetensors", "--text-encoder", str(tiny))
    assert run("txt2img", "x", *quick, *parts)[0] == 0
    assert run("reproduce", "out.png", "again.png", "--device", "cpu")[0] == 0
    assert Path("out.png").read_bytes() == Path("again.png").read_bytes()
    assert run("convert", "bare.safetensors", "mended.safetensors", "--vae", "whole.safetensors")[0] == 0
    mended = load_file("mended.safetensors")
    assert mended.keys() == state.keys() and all(torch.equal(mended[key], state[key]) for key in state)


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


def test_a_trigger_is_printed_as_it_is_written_in_a_prompt(run: Run, tiny: Path) -> None:
    torch.save({"*": torch.ones(2, 16)}, "hands (v2).pt")
    quick = ("--model", str(tiny), "--device", "cpu", "--steps", "2", "--seed", "1", "--embedding", "hands (v2).pt")
    status, out, err = run("txt2img", r"a hands \(v2\)", *quick)
    assert status == 0 and "warning" not in err and r"in prompts: hands \(v2\)" in out
