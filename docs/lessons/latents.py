"""Lesson: latents, a picture in a forty-eighth of its numbers."""

from torch import Tensor

from docs.lessons.lesson import SCENE_SEED, Lesson, Subject, table
from finetune.pretrain.autoencoder import mean_psnr
from finetune.pretrain.evaluate import is_well_formed
from finetune.pretrain.probe import look
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.figures import between, interpolation_sheet, reconstruction_sheet
from sdkit.images.sheet import stacked

SHOWN = 6


def lesson(subject: Subject) -> Lesson:
    sd = subject.sd
    scenes = sample_scenes(max(2 * subject.count, SHOWN), SCENE_SEED, counts=(1.0, 0.0, 0.0))
    images = subject.renders(scenes)
    first, second = images[: subject.count], images[subject.count : 2 * subject.count]

    (pixels,), (latents,) = between(sd, first, second, [0.5])
    shares = [
        [name, f"{one_object(subject, middle):.0f}"] for name, middle in (("pixels", pixels), ("latents", latents))
    ]
    side, factor, channels = sd.picture_size[0], sd.vae.config.factor, sd.vae.config.latent_channels
    return Lesson(
        stacked([reconstruction_sheet(sd.vae, images[:SHOWN]), interpolation_sheet(sd, first[:1], second[:1])]),
        f"{3 * side**2} numbers of a picture become {channels * (side // factor) ** 2}; decoded again, {len(images)} "
        f"unseen renders come back with {mean_psnr(sd.vae, images * 2 - 1):.2f} dB. Half way between two pictures of "
        f"one object each, {len(first)} times:\n\n"
        + table(["mean of", "one well-formed object, by the probe, %"], shares),
    )


def one_object(subject: Subject, images: Tensor) -> float:
    """How often the probe sees a single well-formed object, in per cent."""
    verdicts = look(subject.probe, images * 2 - 1)
    return 100 * sum(is_well_formed(verdict) and len(verdict.objects) == 1 for verdict in verdicts) / len(verdicts)
