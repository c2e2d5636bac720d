"""Lesson: cross-attention, which word looks where."""

from docs.lessons.lesson import PAIR, Lesson, Subject, table
from finetune.pretrain import word_attention
from sdkit.viewing.attention_sheet import attention_sheet


def lesson(subject: Subject) -> Lesson:
    out = subject.sd.text_to_image(PAIR, seed=1, attention_maps=True, progress=False)
    assert out.attention_maps is not None
    found = word_attention.measure(subject.sd, subject.count)
    return Lesson(
        attention_sheet(out.images[0], out.attention_maps),
        f"On {subject.count} noised renders of one or two objects, attention per pixel is at least "
        f"{word_attention.TIMES:g} times as high inside the word's object as outside, for all words of a kind:\n\n"
        + table(["words", "scenes, %"], [[name, f"{share:.0f}"] for name, share in found.items()]),
    )
