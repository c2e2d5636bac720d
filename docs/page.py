"""Take the picture of the page in docs/README.md: ``python docs/page.py`` (Debian's Chromium and the extra test)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

PROMPT = "a green cone and a yellow torus on a white table"
FILE = Path(__file__).with_suffix(".png")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is missing: apt-get install chromium")

    command = [sys.executable, "-m", "sdkit", "ui", "--no-browser", "--device", "cpu"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([*command, "--output", folder], stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(address)
        page.fill("#prompt textarea", PROMPT)
        page.fill("#seed input", "1")
        page.click("#draw")
        page.wait_for_selector("#words img")
        page.locator("#words .sd-word", has_text="torus").focus()
        page.wait_for_timeout(500)
        page.screenshot(path=FILE, full_page=True)
        browser.close()
        server.terminate()
    print(FILE)


if __name__ == "__main__":
    main()
