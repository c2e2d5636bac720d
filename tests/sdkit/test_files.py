"""Files that are written: their permissions, and sections of documents."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdkit.errors import ConfigError
from sdkit.files import new_folder, replace_section, replacing, section


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- one -->\n<!-- /one -->\nbetween\n<!-- two -->\nold\n\n<!-- /two -->\nend\n")
    assert (section(page, "one"), section(page, "two")) == ("", "old")
    for text in ("first", "| a |\n|---|"):
        replace_section(page, "one", text)
        assert section(page, "one") == text
    expected = "# Title\n<!-- one -->\n| a |\n|---|\n<!-- /one -->\nbetween\n<!-- two -->\nold\n\n<!-- /two -->\nend\n"
    assert page.read_text() == expected


@pytest.mark.parametrize("text", ["", "<!-- one -->", "<!-- one --><!-- /one --><!-- one --><!-- /one -->"])
def test_a_document_without_the_section_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    for call in (lambda: section(page, "one"), lambda: replace_section(page, "one", "new")):
        with pytest.raises(ConfigError, match=r"page\.md: expected a document with <!-- one --> and <!-- /one -->"):
            call()
    assert page.read_text() == text
    with pytest.raises(ConfigError, match="once each"):
        section(tmp_path / "none.md", "one")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_the_users_own(tmp_path: Path, mask: int, mode: int) -> None:
    """safetensors gives its files none for others."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "one.safetensors") as file:
            save_file({"a": torch.ones(1)}, file)
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.ones(1)}, folder / "inner" / "two.safetensors")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2 and {file.stat().st_mode & 0o777 for file in files} == {mode}
