"""Lesson: inpainting, by a network that sees the mask and by one that does not."""

from docs.lessons.lesson import SEED, STEPS, Lesson, Subject, table
from finetune.pretrain import editing
from sdkit.images.pixels import to_pil
from sdkit.stable_diffusion import StableDiffusion

GUIDANCE = 7.5
SHOWN = 3


def lesson(subject: Subject) -> Lesson:
    which = editing.cases(subject.count)
    models = {
        "blended at every step, 4 channels": subject.sd,
        "sees the mask, 9 channels": StableDiffusion.from_pretrained("tabletop-inpaint", device="cpu"),
    }
    painted = {name: editing.inpaint(sd, which, SEED, STEPS, GUIDANCE) for name, sd in models.items()}

    rows: list[list[str]] = []
    for name, images in painted.items():
        right = editing.share(editing.shown(subject.probe, images), which.new)
        same = "yes" if editing.kept_are_identical(which, images) else "NO"
        rows.append([name, f"{right:.0f}", f"{editing.seams(which, images):.2f}", same])
    own = editing.seams(which, to_pil(which.pictures * 2 - 1))
    return Lesson(
        editing.sheet(which[:SHOWN], {name: images[:SHOWN] for name, images in painted.items()}),
        f"{len(which)} renders whose object is to become another. A seam is the mean difference of two neighbours of "
        f"which the mask keeps one, of 255; in the renders themselves it is {own:.2f}:\n\n"
        + table(["network", "new object right, %", "seam", "kept pixels the same"], rows),
    )
