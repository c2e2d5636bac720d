"""Caption files beside pictures: a.txt or a.caption for a.png."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from finetune.data.walking import CAPTIONS, LeftOut
from sdkit.errors import one_line


class CaptionFiles:
    """The caption files of a tree, found by picture.

    The names match without their endings, or with the picture's: a.png.txt. Endings count in any case, and composed
    and decomposed letters (a Mac's) as the same.
    """

    def __init__(self, files: Collection[Path]) -> None:
        self.files = files
        self._by_name: dict[tuple[Path, str], list[Path]] = defaultdict(list)
        for file in files:
            self._by_name[file.parent, _composed(file.stem)].append(file)

    def beside(self, picture: Path) -> list[Path]:
        """The caption files that match, the one to be read first."""

        def order(file: Path) -> tuple[bool, bool, int, Path]:
            whole, exact = _composed(file.stem) == _composed(picture.name), file.stem in (picture.stem, picture.name)
            return not whole, not exact, CAPTIONS.index(file.suffix.lower()), file

        names = {_composed(picture.name), _composed(picture.stem)}
        return sorted((f for name in names for f in self._by_name.get((picture.parent, name), ())), key=order)

    def left_out(self, pictures: Iterable[Path], captioned: Collection[Path]) -> list[LeftOut]:
        """The files that no picture reads; those in ``captioned`` have a caption from elsewhere."""
        matching = {picture: self.beside(picture) for picture in pictures}
        read = {found[0] for picture, found in matching.items() if found and picture not in captioned}
        second = {file for found in matching.values() for file in found} - read
        why = {True: "captions of pictures that have another one", False: "captions without a picture"}
        return [LeftOut(file, why[file in second]) for file in self.files if file not in read]


def read_caption(file: Path, problems: list[str]) -> str:
    """The text on one line; an empty file is the empty caption."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.append(f"{file}: cannot be read ({one_line(error)})")
    except UnicodeDecodeError:
        problems.append(f"{file}: expected a caption in UTF-8")
    else:
        if "\0" not in text:
            return " ".join(text.split())
        problems.append(f"{file}: expected a caption in UTF-8")
    return ""


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
