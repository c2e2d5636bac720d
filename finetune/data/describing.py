"""What a run's pictures are, in words: buckets, folders, captions, what cropping takes, and what is not used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.data.batches import TrainingData
from finetune.data.buckets import cropped_share
from finetune.data.folders import GIVEN, Picture
from finetune.data.walking import LeftOut

FOLDERS, NAMES = 20, 10  # that are written out
UNUSED = "unused.txt"  # the file of a run that has `every_unused`


def describe(data: TrainingData) -> dict[str, str]:
    """Lines of a summary by their names; a line may be several."""
    sizes = Counter({bucket: len(set(pictures)) for bucket, pictures in data.buckets.items()})
    buckets = ", ".join(f"{count} of {width}×{height}" for (width, height), count in sizes.most_common())
    lines = {"pictures": f"{len(set(data.samples))}: {buckets}", "folders": "\n".join(_folders(data))}

    unused = [*_unused_prompts(data), *_unused_files(data.left_out)]
    if unused:
        lines["unused"] = "\n".join(unused)
    return {name: _printable(line) for name, line in lines.items()}


def every_unused(data: TrainingData) -> str:
    """Every file that is not used and why, one a line."""
    return _printable("".join(f"{path}: {why}\n" for path, why in data.left_out))


def _folders(data: TrainingData) -> list[str]:
    by_folder: dict[Path, list[Picture]] = defaultdict(list)
    for picture in data.pictures:
        by_folder[picture.path.parent].append(picture)
    cropped = {p: cropped_share(p.size, bucket) for bucket, pictures in data.buckets.items() for p in pictures}

    lines = [_folder(folder, pictures, cropped, data) for folder, pictures in list(by_folder.items())[:FOLDERS]]
    rest = list(by_folder.values())[FOLDERS:]
    if rest:
        lines.append(f"and {len(rest)} more folders with {sum(map(len, rest))} pictures")
    return lines


def _folder(folder: Path, pictures: Sequence[Picture], cropped: Mapping[Picture, float], data: TrainingData) -> str:
    """Pictures, repeats, captions with an example, and what cropping takes; of one folder without those below it."""
    count, repeats = len(pictures), pictures[0].repeats
    said = f"{folder}: {count} picture{'s' if count > 1 else ''}{f', {repeats} times an epoch' if repeats != 1 else ''}"
    if not repeats:
        return f"{said}: never shown"

    sources = Counter(p.source for p in pictures)
    names = [source if count == len(pictures) else f"{count} {source}" for source, count in sources.most_common()]
    said += f"; captions from {', '.join(names)}"
    empty, example = sum(not p.caption for p in pictures), max(pictures, key=lambda p: bool(p.caption))
    if empty:
        said += f", {empty} empty"
    if example.caption:
        said += f", such as {_short(data.orders(example.caption)[0])!r}"

    worst = max(pictures, key=lambda p: cropped[p])
    if cropped[worst] < 0.0005:
        return f"{said}; cropping takes nothing"
    mean = sum(cropped[p] for p in pictures) / count
    return f"{said}; cropping takes {mean:.1%} of the area, at most {cropped[worst]:.1%} ({worst.path.name})"


def _unused_prompts(data: TrainingData) -> list[str]:
    config, lines = data.config, list[str]()
    for name, prompt, prior in (
        ("instance_prompt", config.instance_prompt, False),
        ("class_prompt", None if config.num_class_images else config.class_prompt, True),
    ):
        its = [p for p in data.pictures if p.is_prior == prior]
        if prompt is not None and not any(p.source == GIVEN for p in its):
            lines.append(f"{name} {prompt!r}: every picture has a caption of its own")
    return lines


def _unused_files(left_out: Sequence[LeftOut]) -> list[str]:
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, why in left_out:
        by_reason[why].append(path)

    lines: list[str] = []
    for why, paths in sorted(by_reason.items()):
        names = ", ".join(map(str, paths[:NAMES]))
        more = f" and {len(paths) - NAMES} more, see {UNUSED}" if len(paths) > NAMES else ""
        lines.append(f"{len(paths)} {why}: {names}{more}")
    return lines


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _printable(text: str) -> str:
    """The text with what no encoding has, out of file names, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
