"""The command line as a whole: mistakes, usage, help, and the shipped model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command

from sdkit.cli import main as cli
from sdkit.errors import SDKitError
from tests.conftest import read_image
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SDKitError("width 13\nis wrong"), 1, "sdkit: error: width 13 is wrong\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "error: x: No such file or directory: check the path",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "error: x: Permission denied: change its permissions, or ch",
        ),
        (IsADirectoryError(21, "Is a directory", "x"), 1, "x: Is a directory: a folder is in the way, choose another"),
        (OSError(28, "No space left on device"), 1, "No space left on device: make room, or write elsewhere"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            1,
            "make room, or write else",
        ),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line(
    run: Run, fake: type[FakeStableDiffusion], error: BaseException, status: int, message: str
) -> None:
    fake.error = error
    got, out, err = run("txt2img", "x")
    assert (got, out) == (status, "") and message in err and err.count("\n") == (1 if message else 0)
    assert os.listdir() == []


def test_bugs_keep_their_traceback(fake: type[FakeStableDiffusion], tmp_path: Path) -> None:
    fake.error = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["txt2img", "x", "--out", str(tmp_path / "a.png")])


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("txt2img",),
        ("txt2img", "x", "--steps", "many"),
        ("txt2img", "x", "--num", "0"),
        ("txt2img", "x", "--steps", "0"),
        ("txt2img", "x", "--height", "-8"),
        ("txt2img", "x", "--clip-skip", "-1"),
        ("txt2img", "x", "--dtype", "int8"),
        ("txt2img", "x", "--colour"),
        ("convert", "only-one"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and err.startswith("sdkit: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--interval", "high"), "--interval: expected LOW:HIGH"),
        (("--hires", "0"), "hires_scale"),
        (("--vae", "cut.safetensors"), "cut.safetensors"),
        (("--embedding", "nowhere.pt"), "nowhere.pt"),
        (("--sampler", "dream"), "dream"),
        (("--width", "13"), "width 13 is not a positive multiple of 4: use 12 or 16"),
        (("--steps", "1001"), "num_inference_steps: expected an integer from 1 to 1000"),
        (("--guidance", "nan"), "nan"),
        (("--guidance", "-2"), "-2"),
        (("--rescale", "1.5"), "1.5"),
        (("--sigmas", "round"), "round"),
        (("--spacing", "wide"), "wide"),
        (("--clip-skip", "99"), "99"),
        (("--seed", "-1"), "-1"),
        (("--backend", "cuda"), "cuda"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "empty"), "empty"),
        (("--model", "cut"), "cut/unet/diffusion_pytorch_model.safetensors: "),
        (("--model", "cut.safetensors"), "cut.safetensors: "),
        (("--model", "code.ckpt"), "code.ckpt: expected a dict of tensors, but 'a' is a commands.run"),
    ],
)
def test_bad_input_ends_in_one_line_and_no_file(
    run: Run, tiny: Path, options: tuple[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes())
    torch.save({"state_dict": {"a": subprocess.run}}, tmp_path / "code.ckpt")
    there = sorted(os.listdir())
    status, out, err = run("txt2img", "x", "--model", tiny, "--device", "cpu", "--strip", *options)
    assert (status, out) == (1, ""), err
    assert err.startswith("sdkit: error: ") and err.count("\n") == 1 and message in err
    assert sorted(os.listdir()) == there


def test_the_shipped_model_needs_nothing_but_a_prompt(run: Run) -> None:
    status, out, err = run("txt2img", "a large red sphere on a white table", "--seed", "1", "--steps", "8")
    assert (status, err) == (0, "") and out.startswith("out.png  seed 1"), err
    picture = np.asarray(read_image("out.png")).astype(int)
    redness = picture[..., 0] - picture[..., 1:].max(-1)
    assert (redness > 60).mean() > 0.02, "no red sphere in the picture"


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_help_fits_80_columns_and_ends_with_examples(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(command, "--help")
    group: Any = get_command(cli.make_app())
    options = {option for own in group.commands[command].params for option in (*own.opts, *own.secondary_opts)}
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    assert all(re.search(rf"{option}\s", out) for option in options if option.startswith("--"))  # none is clipped

    shown = " ".join(out.split())
    for example in cli.EXAMPLES[command]:
        assert f"sdkit {command} {example}".strip() in shown
        assert set(re.findall(r"--[\w-]+", example)) <= options


def test_the_usual_options_stand_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = run("txt2img", "--help")[1].split("─ Options ─")[1].split("╭─")[0]
    usual = ("negative", "height", "width", "num", "steps", "sampler", "guidance", "seed", "lora", "hypernetwork")
    assert re.findall(r"^│ --(\w+)", first, re.MULTILINE) == [*usual, "model", "out", "help"]


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sdkit.cli.main import main\n"
        "try: main([])\nexcept SystemExit as e: assert not e.code, e\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    root = Path(cli.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.stdout.endswith("[]\n"), done.stdout[-200:]
    for command in ("txt2img", "img2img", "inpaint", "depth2img", "reproduce", "inspect", "convert"):
        assert command in done.stdout
    module = subprocess.run([sys.executable, "-m", "sdkit", "--version"], **options)
    from sdkit import __version__

    assert module.stdout == f"sdkit {__version__}\n" and module.stderr == ""
