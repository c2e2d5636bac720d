"""The facts that a run on pictures depends on; see `finetune.training.facts`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields
from typing import Any

from finetune.data.batches import TrainingData
from finetune.training.facts import content, options_as_facts
from sdkit.sampling.schedule import NoiseSchedule

PLACES = ("data", "class_data", "class_prompt", "num_class_images", "cache_dir")
"""Options of the data that say where things are and how they came there, and nothing of what is shown."""


def data_facts(data: TrainingData) -> dict[str, Any]:
    """The options of the data, and each picture by its path below its folder: content, caption, repeats, bucket."""
    config = data.config
    pictures: dict[str, dict[str, Any]] = {}
    for bucket, shown in data.buckets.items():
        for picture in dict.fromkeys(shown):
            folder = config.class_data if picture.is_prior and config.class_data is not None else config.data
            name = ("class: " if picture.is_prior else "") + os.path.relpath(picture.path, folder)
            pictures[name] = {
                "content": content(picture.digest),
                "caption": picture.caption,
                "repeats": picture.repeats,
                "bucket": tuple(bucket),
            }
    return options_as_facts(config, without=PLACES) | {"pictures": pictures}


def schedule_facts(schedule: NoiseSchedule) -> dict[str, Any]:
    """What the noise schedule is made of, under its name; a table of betas by its content."""
    facts = {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.init}
    if schedule.trained_betas is not None:
        facts["trained_betas"] = content(hashlib.sha256(repr(schedule.trained_betas).encode()).hexdigest())
    return {"noise schedule": facts}
