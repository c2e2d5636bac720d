"""A classifier of noisy latents as a folder: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.loading import MODELS
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.devices import default_dtype, find_device
from sdkit.errors import CheckpointError, ConfigError
from sdkit.files import new_folder, read_config, write_json
from sdkit.networks.latent_classifier import ClassifierConfig, LatentClassifier

WEIGHTS = "model.safetensors"


def load_classifier(
    model: str | Path = "tabletop-classifier",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LatentClassifier:
    """Load one that ships with us by its name, or a folder; device and dtype as in `StableDiffusion.load`.

    Raises CheckpointError.
    """
    place = find_device(device)
    folder = MODELS / str(model) if (MODELS / str(model) / WEIGHTS).is_file() else Path(model)
    config = read_config(folder)
    try:
        with torch.device("meta"):
            classifier = LatentClassifier(ClassifierConfig.from_dict(config))
    except (ConfigError, ValueError, RuntimeError, LookupError) as error:
        raise CheckpointError(f"{folder}: {error}") from None

    state = read_state(folder / WEIGHTS, dtype or default_dtype(place))[0]
    return give_weights(classifier, state, str(folder / WEIGHTS)).requires_grad_(False).to(place)


def save_classifier(classifier: LatentClassifier, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write such a folder, weights cast to ``dtype``. Raises CheckpointError."""
    with new_folder(Path(path).absolute()) as folder:
        write_state(classifier.state_dict(), folder / WEIGHTS, dtype)
        write_json(folder / "config.json", classifier.config.to_dict())
