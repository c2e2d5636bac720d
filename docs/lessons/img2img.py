"""Lesson: image-to-image, a picture that is noised in part."""

from docs.lessons.lesson import SEED, STEPS, Lesson, Subject, table
from finetune.pretrain import editing

GUIDANCE = 7.5
SHOWN = 3


def lesson(subject: Subject) -> Lesson:
    which = editing.cases(subject.count)
    moved = editing.along_strength(subject.sd, which, SEED, STEPS, GUIDANCE)
    rows: list[list[str]] = []
    for strength, images in moved.items():
        seen = editing.shown(subject.probe, images)
        shares = [f"{editing.share(seen, wanted):.0f}" for wanted in (which.old, which.new)]
        rows.append([f"{strength:g}", *shares, f"{editing.difference(which, images):.1f}"])

    return Lesson(
        editing.sheet(which[:SHOWN], {f"{strength:g}": images[:SHOWN] for strength, images in moved.items()}),
        f"{len(which)} renders, each with a prompt for another object:\n\n"
        + table(["strength", "input's object seen, %", "prompt's object seen, %", "RMS change, of 255"], rows),
    )
