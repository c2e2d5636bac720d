"""Sections of documents: what stands between their marks, and what is put there."""

from pathlib import Path

import pytest

from sdkit.errors import ConfigError
from sdkit.files import replace_section, section


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
