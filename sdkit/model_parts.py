"""A model and the files that are put into it: named, loaded, and remembered by pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.adapter_kinds import adapter_kinds
from sdkit.errors import ConfigError
from sdkit.files import file_hash
from sdkit.prompts.emphasis import escaped

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
    zero_snr: bool | None = None
    text_encoder: str | None = None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> ModelParts:
        """Read the parts from a picture's metadata."""
        adapters = {kind.name: facts[kind.name] for kind in adapter_kinds() if kind.name in facts}
        own = (facts.get("prediction"), facts.get("vae"), adapters, facts.get("embedding", []))
        return cls(facts["model"], *own, facts.get("zero_snr"), facts.get("text_encoder"))

    @staticmethod
    def names() -> set[str]:
        """The keys that `facts` may hold."""
        own = {"model", "prediction", "vae", "embedding", "zero_snr", "text_encoder", "files"}
        return own | {kind.name for kind in adapter_kinds()}

    def given(self) -> dict[str, Any]:
        """The parts that were given, as `facts` has them."""
        found = {"model": self.model, "prediction": self.prediction, "vae": self.vae, **self.adapters}
        found |= {"embedding": self.embedding or None, "zero_snr": self.zero_snr, "text_encoder": self.text_encoder}
        return {name: value for name, value in found.items() if value not in (None, [])}

    def facts(self) -> dict[str, Any]:
        """The parts that were given, and the SHA-256 of every file but the model's, which may be large."""
        files = [file_and_weight(text)[0] for texts in self.adapters.values() for text in texts] + self.embedding
        files += [file for file in (self.vae, self.text_encoder) if file is not None and Path(file).is_file()]
        return self.given() | ({"files": {file: file_hash(file) for file in files}} if files else {})


def load_model(
    parts: ModelParts,
    device: str | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    graphs: bool | None = None,
) -> StableDiffusion:
    """Load a shipped model, a diffusers folder or a single file, and everything that goes into it.

    ``dtype`` is the name of one of torch's. Raises CheckpointError and ConfigError as `DiffusionModel.load` does.
    """
    from sdkit.checkpoints.loading import is_single_file
    from sdkit.devices import find_device, find_dtype
    from sdkit.stable_diffusion import StableDiffusion

    for option, value in (("prediction", parts.prediction), ("zero-snr", parts.zero_snr)):
        if value is not None and not is_single_file(parts.model):
            raise ConfigError(f"--{option}: only for single files; {parts.model} says it itself")
    sd = StableDiffusion.load(
        parts.model,
        device=None if device is None else find_device(device),
        dtype=find_dtype(dtype),
        backend=backend,
        graphs=graphs,
        prediction_type=parts.prediction,
        zero_snr=parts.zero_snr,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
    )

    for kind in adapter_kinds():
        for file, weight in map(file_and_weight, parts.adapters.get(kind.name, [])):
            kind.module.load(sd, file, weight)
    for file in parts.embedding:
        token = sd.load_textual_inversion(file)
        print(f"{file}  in prompts: {', '.join(map(escaped, sd.triggers_of(token)))}")
    return sd


def file_and_weight(text: str) -> tuple[str, float]:
    """FILE:WEIGHT; the weight is 1 when it is left out."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0
