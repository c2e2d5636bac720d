"""Lesson: classifier-free guidance over its scale."""

from docs.lessons.lesson import PROMPT, SEED, STEPS, Lesson, Subject, table
from finetune.pretrain import steering
from sdkit.figures import options_sheet


def lesson(subject: Subject) -> Lesson:
    found = steering.along_guidance(subject.sd, subject.probe, subject.count, SEED, STEPS)
    sheet = options_sheet(
        subject.sd.text_to_image,
        "guidance_scale",
        steering.GUIDANCE,
        seeds=(1, 2),
        prompt=PROMPT,
        num_inference_steps=STEPS,
    )
    return Lesson(
        sheet,
        f"{subject.count} pictures of all kinds, and as many of one prompt:\n\n"
        + table(
            ["scale", "colour and shape right, %", "variety of one prompt, of 255"],
            [[f"{scale:g}", f"{share:.0f}", f"{spread:.1f}"] for scale, (share, spread) in found.items()],
        ),
    )
