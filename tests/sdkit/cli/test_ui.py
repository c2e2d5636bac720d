"""The command of the page: what it needs, and what is refused before a model is loaded. The page: tests/sdkit/ui."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


def test_without_gradio_it_says_how_to_get_it(
    run: Run, fake: type[FakeStableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = run("ui")
    assert status == 1 and "pip install 'sdkit-triton[ui]'" in err and not fake.loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "a.txt"), "a.txt: cannot be written"),
        (("--networks", "nowhere"), "nowhere: expected a folder with LoRAs or hypernetworks"),
        (("--port", "70000"), "port"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    run: Run, fake: type[FakeStableDiffusion], arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a file")
    status, _, err = run("ui", "--no-browser", *arguments)
    assert status != 0 and message in err and not fake.loaded
