"""Lesson: depth-to-image, another picture with the same layout."""

from docs.lessons.lesson import SEED, STEPS, Lesson, Subject
from finetune.pretrain import steering
from sdkit.figures import depth_sheet
from sdkit.stable_diffusion import StableDiffusion

GUIDANCE = 7.5
PROMPT = "a yellow cone"


def lesson(subject: Subject) -> Lesson:
    sd = StableDiffusion.from_pretrained("tabletop-depth", device="cpu")
    kept, colour = steering.by_depth(sd, subject.probe, subject.count, SEED, STEPS, GUIDANCE)
    picture = subject.renders(subject.scenes()[:1])
    return Lesson(
        depth_sheet(sd, PROMPT, picture, num_images_per_prompt=4, num_inference_steps=STEPS, seed=1),
        f"{subject.count} renders redrawn from noise alone, by their estimated depth and a prompt for another colour: "
        f"it is right in {colour:.0f} %; the result's depth correlates with the given one by {kept:.3f}.",
    )
