"""The page in Debian's Chromium as a user has it: drawing, the slider, the brush, networks, a PNG, stopping, a grid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
from sdkit.generation.png import read_parameters
from sdkit.stable_diffusion import StableDiffusion

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_CHROMIUM = "needs Chromium: apt-get install chromium"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")


LOOK = """
from sdkit.model_parts import ModelParts
from sdkit.ui.fields import defaults
from sdkit.ui.page import Page
from sdkit.ui.studio import Studio, find_networks
from tests.sdkit.tiny import model
import json, sys
from pathlib import Path

studio = Studio(model, ModelParts("tiny"), find_networks(Path(sys.argv[1])), Path(sys.argv[2]))
fields = Page(studio).fields
json.dump([{n: (c.label, c.value) for n, c in fields.items()}, defaults(studio)], sys.stdout)
"""  # in a process of its own: gradio leaves an event loop open, which our tests take for an error


def test_every_field_has_a_control(networks: Path, tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-c", LOOK, networks, tmp_path], capture_output=True, text=True, check=True)
    controls, defaults = json.loads(told.stdout)
    assert controls.keys() == defaults.keys() | {"image", "depth_map"}
    assert {name: controls[name][1] for name in defaults} == defaults
    labels = [label for label, _ in controls.values()]
    assert all(labels) and "stars (lora)" in labels and "blur (hypernetwork)" in labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """networks/ with a LoRA that changes the shipped model much; pictures go to out/."""
    root = tmp_path_factory.mktemp("page")
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    finetune.add_lora(sd, rank=2, name="stars", init="gaussian")
    for name, parameter in sd.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    (root / "networks").mkdir()
    finetune.save_adapter(sd, root / "networks" / "stars.safetensors", "stars")
    return root


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where ``sdkit ui`` serves the page."""
    command = [sys.executable, "-m", "sdkit", "ui", "--no-browser", "--networks", "networks", "--device", "cpu"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = ADDRESS.search(server.stdout.readline())
        assert found is not None
        yield found.group()
        server.terminate()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A tab with the page; every request has to go to the server, and nothing may be an error."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 1400, "height": 1400}).new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
        tab.goto(address)
        tab.wait_for_selector("#draw")
        yield tab
        browser.close()
    assert wrong == []


def put(page: Any, control: str, value: str) -> None:
    page.fill(f"#{control} :is(textarea, input:not([type=range]))", value)
    page.keyboard.press("Tab")


def draw(page: Any, folder: Path, prompt: str, **numbers: int) -> Path:
    """Fill the fields, press the button, and wait for the picture; returns its file."""
    before = set((folder / "out").glob("0*.png"))
    put(page, "prompt", prompt)
    for control, value in numbers.items():
        put(page, control.replace("_", "-"), str(value))
    page.click("#draw")
    for _ in range(300):
        if new := set((folder / "out").glob("0*.png")) - before:
            page.wait_for_function("() => document.querySelector('#said').innerText.includes('Output(1 picture')")
            (file,) = new
            return file
        page.wait_for_timeout(100)
    raise AssertionError(f"no picture after 30 s; the page says {page.inner_text('#said')!r}")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_session(page: Any, folder: Path) -> None:
    # A picture, its way, its words.
    first = draw(page, folder, "a red sphere", seed=3, num_inference_steps=12)
    assert "seed 3, 12 steps" in page.inner_text("#said")
    page.wait_for_selector("#words img")
    last = page.get_attribute("#noisy img", "src")
    put(page, "step", "2")
    page.wait_for_function("last => document.querySelector('#noisy img').src != last", arg=last)
    assert "after step 2" in page.inner_text("#step")
    word = page.locator("#words .sd-word", has_text="red")
    assert word.locator("img").evaluate("image => getComputedStyle(image).visibility") == "hidden"
    word.hover()
    assert word.locator("img").evaluate("image => getComputedStyle(image).visibility") == "visible"

    # A network.
    put(page, "network-0", "1")
    second = draw(page, folder, "a red sphere")
    assert read_parameters(second)["lora"] == ["networks/stars.safetensors:1"]
    put(page, "network-0", "0")

    # A mask, painted on the picture.
    page.click("#start button >> nth=0")
    page.click("#take")
    page.get_by_label("repaint a part").check()
    canvas = page.locator("#image canvas").first
    page.wait_for_timeout(1500)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"], steps=8)
    page.mouse.up()
    third = draw(page, folder, "a blue cube")
    facts = read_parameters(third)
    assert facts["task"] == "inpaint" and facts["strength"] == 1.0 and facts["mask_image"].startswith("out/inputs/")

    # Settings out of a picture.
    page.set_input_files("#drop input[type=file]", str(first))
    page.wait_for_function("() => document.querySelector('#said').innerText.includes('Settings taken')")
    assert page.input_value("#prompt textarea") == "a red sphere" and page.input_value("#seed input") == "3"
    assert page.get_by_label("from text").is_checked()

    # Stopped, and drawn again.
    put(page, "num-inference-steps", "200")
    page.click("#draw")
    page.wait_for_function("() => document.querySelector('#said').innerText.includes('after step')")
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('#said').innerText.includes('Stopped')")
    again = draw(page, folder, "a red sphere", num_inference_steps=12)
    assert read_parameters(again)["seed"] == 3 and again.read_bytes() != second.read_bytes()

    # A grid.
    page.click("#grid button >> nth=0")
    put(page, "columns", "guidance=1,7")
    page.click("#draw-grid")
    page.wait_for_function("() => document.querySelector('#said').innerText.includes('2 of 2 pictures')")
    assert page.locator("#sheet img").count() == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_two_tabs_the_keyboard_alone_and_a_narrow_window(page: Any, folder: Path, address: str) -> None:
    other = page.context.new_page()
    other.goto(address)
    other.wait_for_selector("#draw")
    for tab, prompt in ((page, "a red sphere"), (other, "a blue cube")):
        put(tab, "prompt", prompt)
        put(tab, "num-inference-steps", "12")
    before = set((folder / "out").glob("0*.png"))
    page.focus("#draw")
    page.keyboard.press("Enter")
    other.focus("#draw")
    other.keyboard.press("Enter")
    for tab in (page, other):
        tab.wait_for_selector("#words img")
    new = set((folder / "out").glob("0*.png")) - before
    assert sorted(read_parameters(file)["prompt"] for file in new) == ["a blue cube", "a red sphere"]
    assert "sphere" in page.inner_text("#words") and "cube" in other.inner_text("#words")

    page.focus("#words .sd-word >> nth=0")
    image = page.locator("#words .sd-word img").first
    assert image.evaluate("image => getComputedStyle(image).visibility") == "visible"
    for width in (390, 1400):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_what_is_refused_is_said(page: Any) -> None:
    page.click("#more-options button >> nth=0")
    put(page, "more", "strenght=1")
    page.click("#draw")
    page.wait_for_selector(".toast-body")
    assert "strenght: no option of text_to_image" in page.inner_text(".toast-body")
