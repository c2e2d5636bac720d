"""Adapters as one family: a third kind comes to prompts, files, pictures and the command line by its registration."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import sdkit
from sdkit import adapter_kinds
from sdkit.checkpoints.inspection import inspect_file
from sdkit.cli.main import main
from sdkit.errors import CheckpointError, ConfigError
from sdkit.generation.png import read_parameters
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import read_image
from tests.finetune import layer_scale

PROMPT = "a red sphere"
QUICK = {"num_inference_steps": 2, "seed": 5, "progress": False}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapter_kinds, "_added", [])
    sdkit.register_adapter_kind(layer_scale.KIND)
    yield


@pytest.fixture
def sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tabletop", device="cpu", dtype=torch.float32)


@pytest.fixture
def file(sd: StableDiffusion, tmp_path: Path) -> Path:
    """Layer scales that change a picture."""
    factors = {name: torch.tensor(-1.0 if i % 2 else 3.0) for i, name in enumerate(layer_scale.layers_of(sd))}
    layer_scale.add(sd, "made", factors)
    finetune.save_adapter(sd, path := tmp_path / "flip.safetensors", "made")
    finetune.remove(sd, "made")
    return path


def drawn(sd: StableDiffusion, prompt: str = PROMPT) -> np.ndarray:
    return np.asarray(sd.text_to_image(prompt, **QUICK).images[0])


@pytest.mark.usefixtures("registered")
def test_a_third_kind_has_the_verbs(sd: StableDiffusion, file: Path, tmp_path: Path):
    plain = drawn(sd)
    assert inspect_file(file)["kind"] == "layer scale"
    assert finetune.load_adapter(sd, file, 0.5) == "flip"
    assert finetune.list_adapters(sd)["flip"].kind == "layer_scale"
    half = drawn(sd)
    assert (half != plain).any()

    finetune.disable(sd, "flip")
    assert (drawn(sd) == plain).all()
    finetune.enable(sd)
    finetune.set_scale(sd, 1.0, "flip")
    full = drawn(sd)
    assert (full != half).any()
    for verb in (finetune.merge, finetune.bake):
        with pytest.raises(ConfigError, match="flip cannot become a part of the weights"):
            verb(sd)

    finetune.save_adapter(sd, tmp_path / "again.safetensors")
    finetune.remove(sd, "flip")
    assert (drawn(sd) == plain).all() and finetune.list_adapters(sd) == {}
    finetune.load_adapter(sd, tmp_path / "again.safetensors")
    assert (drawn(sd) == full).all()


@pytest.mark.usefixtures("registered")
def test_a_third_kind_is_named_in_prompts(sd: StableDiffusion, file: Path):
    plain = drawn(sd)
    finetune.load_adapter(sd, file)
    finetune.set_scale(sd, 0.25)
    quarter = drawn(sd)
    finetune.disable(sd)
    assert (drawn(sd, f"{PROMPT}<scale:flip:0.25>") == quarter).all()
    assert (drawn(sd) == plain).all(), "the tag is in force for its picture alone"
    with pytest.raises(ConfigError, match="layer_scale 'other': expected one of the model's: flip"):
        drawn(sd, f"{PROMPT} <scale:other>")


@pytest.mark.usefixtures("registered")
def test_a_third_kind_comes_to_the_command_line(
    sd: StableDiffusion, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    steps = ["--steps", "2", "--seed", "5"]

    assert run("txt2img", PROMPT, *steps, "--layer-scale", f"{file}:0.5", "--device", "cpu", "--out", "a.png") == 0
    assert read_parameters("a.png")["layer_scale"] == [f"{file}:0.5"]
    finetune.load_adapter(sd, file, 0.5)
    assert (pixels("a.png") == drawn(sd)).all()

    assert run("reproduce", "a.png", "b.png", "--device", "cpu") == 0
    assert (pixels("b.png") == pixels("a.png")).all()
    capsys.readouterr()
    assert run("inspect", str(file)) == 0
    assert "layer scale" in capsys.readouterr().out


def test_without_its_registration_nothing_knows_it(sd: StableDiffusion, tmp_path: Path):
    path = tmp_path / "flip.safetensors"
    layer_scale.save_file({layer_scale.PREFIX + name: torch.ones(()) for name in layer_scale.layers_of(sd)}, path)
    assert inspect_file(path)["kind"] != "layer scale"
    with pytest.raises(CheckpointError, match="expected an adapter"):
        finetune.load_adapter(sd, path)
    assert run("txt2img", PROMPT, "--layer-scale", str(path)) == 2


@pytest.mark.usefixtures("registered")
def test_one_name_in_two_kinds(sd: StableDiffusion, file: Path, tmp_path: Path):
    """The later one's is "name (kind)", in every verb."""
    finetune.add_lora(sd, rank=1, name="flip")
    finetune.load_adapter(sd, file)
    assert list(finetune.list_adapters(sd)) == ["flip", "flip (layer_scale)"]
    finetune.disable(sd, "flip (layer_scale)")
    assert [adapter.enabled for adapter in finetune.list_adapters(sd).values()] == [True, False]
    finetune.save_adapter(sd, tmp_path / "again.safetensors", "flip (layer_scale)")
    assert inspect_file(tmp_path / "again.safetensors")["kind"] == "layer scale"
    with pytest.raises(ConfigError, match="scale: expected a finite number"):
        finetune.set_scale(sd, float("nan"))
    finetune.remove(sd, "flip")
    assert [adapter.kind for adapter in finetune.list_adapters(sd).values()] == ["layer_scale"]


def test_adapters_are_read_again_from_where_they_were_written(sd: StableDiffusion, tmp_path: Path):
    finetune.add_lora(sd, rank=1)
    finetune.save_adapter(sd, tmp_path / "folder")
    finetune.save_lora(sd, tmp_path / "peft", format="peft")
    finetune.remove(sd)
    for name in ("folder", "peft"):
        assert finetune.load_adapter(sd, tmp_path / name, name=name) == name
    finetune.remove(sd)
    finetune.add_hypernetwork(sd, finetune.Hypernetwork([sd.unet.config.cross_attention_dim]))
    with pytest.raises(ConfigError, match=r"a file that ends in \.pt"):
        finetune.save_adapter(sd, tmp_path / "wrong.safetensors")


def test_kinds_of_ours_are_known_where_nothing_is_installed():
    """As on a machine with PYTHONPATH alone, by `make gpu` for instance."""
    root = Path(__file__).parents[2]
    code = (
        "from sdkit import adapter_kinds; adapter_kinds.entry_points = lambda group: []\n"
        "import finetune, sdkit; sd = sdkit.StableDiffusion.from_pretrained('tabletop', device='cpu')\n"
        "finetune.add_lora(sd, rank=1); print(*finetune.list_adapters(sd))"
    )
    path = os.pathsep.join(map(str, (root, root / "kernels")))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.stdout.split() == ["default"], ran.stderr


def test_an_entry_point_that_is_no_table_is_named(monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("lora", "finetune:load_lora", "sdkit.adapters")
    monkeypatch.setattr(adapter_kinds, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match=r"entry point lora of sdkit\.adapters: expected a sequence of AdapterKind"):
        adapter_kinds._installed.__wrapped__()


def test_two_kinds_cannot_share_a_name(registered: None):
    sdkit.register_adapter_kind(layer_scale.KIND)  # the same once more is no second one
    with pytest.raises(ConfigError, match="adapter kind"):
        sdkit.register_adapter_kind(sdkit.AdapterKind("other", tag="lora", verbs="tests.finetune.layer_scale"))


def test_a_distribution_brings_its_kind(tmp_path: Path):
    """By an entry point of its own, as one that someone installs beside sdkit does."""
    info = tmp_path / "layer_scale-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: layer-scale\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sdkit.adapters]\nlayer_scale = brought:KINDS\n")
    (tmp_path / "brought.py").write_text(
        "from sdkit.adapter_kinds import AdapterKind\n"
        'KINDS = (AdapterKind("layer_scale", tag="scale", verbs="tests.finetune.layer_scale"),)\n'
    )

    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (tmp_path, root, root / "kernels")))
    code = "import sys, sdkit.cli.main; sys.argv = ['sdkit', 'txt2img', '--help']; sdkit.cli.main.main()"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "--layer-scale" in shown.stdout and "--lora" in shown.stdout, shown.stdout + shown.stderr


def run(*arguments: str) -> int:
    """The exit status of the command line."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def pixels(path: str) -> np.ndarray:
    return np.asarray(read_image(path))
