"""Lesson: the noise predictor, with a text and without."""

from docs.lessons.lesson import Lesson, Subject, prompts_of, table
from sdkit.figures import prediction_errors, prediction_figure

TIMESTEPS = (100, 300, 500, 700, 900)


def lesson(subject: Subject) -> Lesson:
    scenes = subject.scenes()
    images, prompts = subject.renders(scenes), prompts_of(scenes)
    wrong = prompts[1:] + prompts[:1]

    texts = {"the right text": prompts, "no text": [""] * len(prompts), "another's text": wrong}
    errors = {name: prediction_errors(subject.sd, images, own, TIMESTEPS) for name, own in texts.items()}
    rows = [[name, *(f"{error:.4f}" for error in own)] for name, own in errors.items()]
    return Lesson(
        prediction_figure(subject.sd, images, prompts, wrong),
        f"Mean squared error of the prediction over {len(images)} unseen renders:\n\n"
        + table(["told", *(f"t = {t}" for t in TIMESTEPS)], rows),
    )
