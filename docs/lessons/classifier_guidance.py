"""Lesson: classifier guidance, a picture pushed towards a class by another network's gradient."""

from docs.lessons.lesson import SEED, STEPS, Lesson, Subject, table
from finetune.pretrain import steering
from sdkit.checkpoints.classifier_folder import load_classifier
from sdkit.figures import options_sheet

LABEL = "red sphere"


def lesson(subject: Subject) -> Lesson:
    classifier = load_classifier("tabletop-classifier", "cpu")
    found = steering.along_classifier(subject.sd, classifier, subject.probe, subject.count, SEED, STEPS)
    sheet = options_sheet(
        subject.sd.text_to_image,
        "classifier_scale",
        steering.CLASSIFIER[1:],
        seeds=(1, 2),
        prompt="",
        guidance_scale=0.0,
        classifier=classifier,
        class_labels=classifier.labels([LABEL]),
        num_inference_steps=STEPS,
    )
    return Lesson(
        sheet,
        f"Without a prompt, {subject.count} pictures of all classes, and as many of one:\n\n"
        + table(
            ["scale", "class right, %", "variety of one class, of 255"],
            [[f"{scale:g}", f"{share:.0f}", f"{spread:.1f}"] for scale, (share, spread) in found.items()],
        ),
    )
