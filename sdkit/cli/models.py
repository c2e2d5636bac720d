"""The model of a command: loaded with everything that goes into it, and remembered by pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.adapter_kinds import adapter_kinds
from sdkit.cli.options import Precision, file_and_weight, find_dtype
from sdkit.errors import ConfigError
from sdkit.files import file_hash

if TYPE_CHECKING:
    from sdkit.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class ModelParts:
    """A model and the files that are put into it. A picture's metadata holds this.

    adapters: for each kind by its name FILE:WEIGHT texts, as given.
    """

    model: str
    prediction: str | None = None
    vae: str | None = None
    adapters: Mapping[str, list[str]] = field(default_factory=dict[str, list[str]])
    embedding: list[str] = field(default_factory=list[str])

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> ModelParts:
        """Read the parts from a picture's metadata."""
        adapters = {kind.name: facts[kind.name] for kind in adapter_kinds() if kind.name in facts}
        return cls(facts["model"], facts.get("prediction"), facts.get("vae"), adapters, facts.get("embedding", []))

    @staticmethod
    def names() -> set[str]:
        """The keys that `facts` may hold."""
        return {"model", "prediction", "vae", "embedding", "files", *(kind.name for kind in adapter_kinds())}

    def facts(self) -> dict[str, Any]:
        """The parts that were given, and the SHA-256 of every file but the model's, which may be large."""
        found = {"model": self.model, "prediction": self.prediction, "vae": self.vae, **self.adapters}
        facts = {name: value for name, value in (found | {"embedding": self.embedding}).items() if value}

        files = [file_and_weight(text)[0] for texts in self.adapters.values() for text in texts] + self.embedding
        if self.vae is not None and Path(self.vae).is_file():
            files.append(self.vae)
        return facts | ({"files": {file: file_hash(file) for file in files}} if files else {})


def load_model(parts: ModelParts, device: str | None, dtype: Precision | None, backend: str | None) -> StableDiffusion:
    """Load a shipped model, a diffusers folder or a single file, and everything that goes into it."""
    from sdkit.checkpoints.loading import is_single_file
    from sdkit.devices import find_device
    from sdkit.stable_diffusion import StableDiffusion

    if parts.prediction is not None and not is_single_file(parts.model):
        raise ConfigError(f"--prediction: only for single files; {parts.model} says it itself")
    sd = StableDiffusion.load(
        parts.model,
        device=None if device is None else find_device(device),
        dtype=find_dtype(dtype),
        backend=backend,
        prediction_type=parts.prediction,
    )

    if parts.vae is not None:
        sd.load_vae(parts.vae)
    for kind in adapter_kinds():
        for file, weight in map(file_and_weight, parts.adapters.get(kind.name, [])):
            kind.module.load(sd, file, weight)
    for file in parts.embedding:
        sd.load_textual_inversion(file)
    return sd
