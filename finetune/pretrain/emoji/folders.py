"""Write the folders of pictures that the run trains on: ``python -m finetune.pretrain.emoji.folders``.

base/ has every subject in both of the base's styles, several times each; style/ has 24 subjects in the third.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from finetune.pretrain.emoji.sets import BASE, LEARNT, Sets, caption, draw, read_sets
from sdkit.files import write_text

SIZE = 64
TIMES = 16  # that each of the base's emoji is drawn
LESSON = 24  # subjects in the third style
SEED = 5


def lesson_subjects(sets: Sets) -> list[str]:
    """The subjects that the third style is learnt from; it is judged on all others."""
    return random.Random(SEED).sample(sorted(sets[LEARNT]), LESSON)


def write_folder(folder: Path, sets: Sets, which: Sequence[tuple[str, str]], times: int) -> None:
    """Draw each (style, subject) so many times, with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(SEED), list[str]()
    for style, subject in tqdm(which, desc=folder.name, mininterval=5.0):
        for k in range(times):
            name = f"{style}-{subject.replace(' ', '_').replace(':', '')}-{k:02}.png"
            draw(sets[style][subject], SIZE, rng).save(folder / name)
            rows.append(json.dumps({"file_name": name, "text": caption(subject, style)}))
    write_text(folder / "metadata.jsonl", "\n".join(rows) + "\n")


def main(
    work: Annotated[Path, typer.Option(help="Has node_modules; base and style are written here.")] = Path(
        "build/emoji"
    ),
) -> None:
    """Write both folders."""
    sets = read_sets(work / "node_modules")
    subjects = sorted(sets[LEARNT])
    write_folder(work / "base", sets, [(style, subject) for style in BASE for subject in subjects], TIMES)
    write_folder(work / "style", sets, [(LEARNT, subject) for subject in lesson_subjects(sets)], 1)
    print(f"{len(subjects)} subjects; {len(BASE) * len(subjects) * TIMES} pictures in base, {LESSON} in style")


if __name__ == "__main__":
    typer.run(main)
