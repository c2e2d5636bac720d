"""Lesson: schedules of noise, in training and in sampling."""

from typing import Any

from docs.lessons.lesson import PAIR, Lesson, Subject, pairs_of, prompts_of, table
from sdkit.figures import options_sheet, schedules_figure
from sdkit.images.sheet import stacked
from sdkit.sampling.schedule import NoiseSchedule

FEW = 6  # steps, where it matters which ones
LEVELS: tuple[str | None, ...] = (None, "karras", "exponential", "beta")


def lesson(subject: Subject) -> Lesson:
    schedules = {
        "linear": NoiseSchedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        "scaled linear": NoiseSchedule(beta_schedule="scaled_linear"),
        "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
        "zero terminal SNR": NoiseSchedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    }
    scenes = subject.scenes()
    rows: list[list[str]] = []
    for name, schedule in schedules.items():
        noisy = float((schedule.alphas_cumprod < 0.5).float().mean())
        last = float(schedule.alphas_cumprod[-1].sqrt())
        rows.append([name, f"{100 * noisy:.0f}", f"{last:.3f}"])

    options: dict[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": FEW}
    found: list[list[str]] = []
    for level in LEVELS:
        images = subject.draw(prompts_of(scenes), sigmas=level, **options)
        found.append([level or "even in time", f"{subject.right(images, pairs_of(scenes)):.0f}"])

    return Lesson(
        stacked(
            [
                schedules_figure(schedules, subject.renders(scenes[:1])),
                options_sheet(subject.sd.text_to_image, "sigmas", LEVELS, prompt=PAIR, **options),
            ]
        ),
        table(
            ["schedule of training", "timesteps with more noise than signal, %", "signal that is left at the last"],
            rows,
        )
        + f"\n\nSampling in {FEW} steps (DPM-Solver++), of {len(scenes)} pictures:\n\n"
        + table(["noise levels", "colour and shape right, %"], found),
    )
