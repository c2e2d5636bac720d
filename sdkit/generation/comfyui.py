"""ComfyUI's workflows in the form that its pictures hold: a JSON object of nodes, walked back from the sampler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, cast

from sdkit.errors import SDKitError
from sdkit.files import parse_json
from sdkit.generation.foreign import Foreign, sampler_named

SCHEDULERS: Mapping[str, dict[str, str]] = {
    "normal": {"timestep_spacing": "linspace"},
    "simple": {"timestep_spacing": "trailing"},
    "sgm_uniform": {"timestep_spacing": "trailing"},  # within one timestep
    "ddim_uniform": {"timestep_spacing": "leading"},
    "karras": {"sigmas": "karras", "timestep_spacing": "linspace"},
    "exponential": {"sigmas": "exponential", "timestep_spacing": "linspace"},
    "beta": {"sigmas": "beta", "timestep_spacing": "linspace"},
}
"""ComfyUI's schedulers that we have, by our arguments."""

_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_SILENT = ("VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "VAEEncode", "LoadImage")
"""Nodes that say nothing about how the picture was made beyond what is read elsewhere."""

_WHOLE_RUN = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
"""The inputs of an advanced sampler that runs all of its steps."""

Node = Mapping[str, Any]


def read_workflow(text: str, where: str) -> Foreign:
    """What a workflow says, in our arguments as far as they have a meaning here.

    Read are the sampler that starts from an empty latent or a picture, its texts, LoRAs, checkpoint and size. All
    other nodes are among the rest. ``where`` names the picture in errors. Raises SDKitError when this is no workflow.
    """
    nodes = parse_json(text, f"{where}: damaged ComfyUI metadata", SDKitError)
    if not isinstance(nodes, dict) or not all(map(_is_node, nodes.values())):  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]
        raise SDKitError(f"{where}: damaged ComfyUI metadata: expected an object of nodes")

    walk = _Walk(cast("Mapping[str, Node]", nodes))
    walk.sampler()
    return Foreign("ComfyUI", walk.facts, walk.model, walk.rest | walk.unread())


class _Walk:
    """The way through a workflow; ``seen`` are the nodes that were understood, ``rest`` inputs that were not."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.facts: dict[str, Any] = {}
        self.rest: dict[str, Any] = {}
        self.model: str | None = None
        self.tags = ""  # of LoRAs
        self.seen: set[str] = set()

    # Nodes

    def kind(self, number: str) -> str:
        return str(self.nodes[number]["class_type"])

    def inputs(self, number: str) -> Mapping[str, Any]:
        return self.nodes[number].get("inputs", {})

    def linked(self, number: str, name: str) -> str | None:
        """The node that an input comes from; None where it is a value, or there is none."""
        value = self.inputs(number).get(name)
        if isinstance(value, list) and value and str(cast("list[Any]", value)[0]) in self.nodes:
            return str(cast("list[Any]", value)[0])
        return None

    def value(self, number: str, name: str, *kinds: type) -> Any:
        """An input of one of these types, its own or that of a node which holds one such value; else None."""
        source, visited = self.linked(number, name), set[str]()
        found = self.inputs(number).get(name)
        while source is not None and source not in visited:
            visited.add(source)
            held = [(key, value) for key, value in self.inputs(source).items() if _is(value, *kinds)]
            links = [key for key in self.inputs(source) if self.linked(source, key)]
            if len(held) == 1 and not links:
                self.seen.add(source)
                return held[0][1]
            source = self.linked(source, links[0]) if len(links) == 1 and not held else None
        return found if _is(found, *kinds) else None

    def back(self, number: str | None, through: str, *ends: str) -> tuple[str | None, list[str]]:
        """Walk back along the inputs ``through`` to a node of the kinds ``ends``: (that node, those on the way)."""
        passed: list[str] = []
        while number is not None and number not in passed:
            if self.kind(number) in ends:
                self.seen.add(number)
                return number, passed
            passed.append(number)
            number = self.linked(number, through)
        return None, passed

    def unread(self) -> dict[str, Any]:
        """The nodes that were not understood, with their values."""
        found: dict[str, Any] = {}
        for number in self.nodes:
            if number not in self.seen and self.kind(number) not in _SILENT:
                values = {key: value for key, value in self.inputs(number).items() if not isinstance(value, list)}
                found[f"{self.kind(number)} (node {number})"] = ", ".join(f"{k} {v}" for k, v in values.items())
        return found

    # What they say

    def sampler(self) -> None:
        """The sampler's own values, then what is linked to it. Of several samplers the first."""
        found = [number for number in self.nodes if self.kind(number) in _SAMPLERS]
        first = [n for n in found if not any(self.kind(p) in _SAMPLERS for p in self._before(n))]
        if not first:
            return

        number = first[0]
        self.seen.add(number)
        self.take(number, "seed", "seed", int)
        self.take(number, "noise_seed", "seed", int)
        self.take(number, "steps", "num_inference_steps", int)
        self.take(number, "cfg", "guidance_scale", int, float)
        self._sampler_and_scheduler(number)
        for name, default in _WHOLE_RUN.items():
            value = self.inputs(number).get(name, default)
            steps = self.facts.get("num_inference_steps", 0)
            if value != default and not (name == "end_at_step" and _is(value, int) and value >= steps):
                self.rest[name] = value

        self._latent(number)
        self._model(number)
        for name, argument in (("positive", "prompt"), ("negative", "negative_prompt")):
            self._text(number, name, argument)

    def take(self, number: str, name: str, argument: str, *kinds: type) -> None:
        value = self.value(number, name, *kinds)
        if value is not None:
            self.facts[argument] = value
        elif name in self.inputs(number):
            self.rest[name] = self.inputs(number)[name]

    def _before(self, number: str) -> list[str]:
        return self.back(self.linked(number, "latent_image"), "samples")[1]

    def _sampler_and_scheduler(self, number: str) -> None:
        name, scheduler = self.value(number, "sampler_name", str), self.value(number, "scheduler", str)
        sampler = sampler_named(str(name).removesuffix("_gpu"), "comfyui")
        if sampler is None:
            self.rest["sampler_name"] = name
        else:
            self.facts["sampler"] = sampler
        if scheduler in SCHEDULERS:
            self.facts |= SCHEDULERS[scheduler]
        else:
            self.rest["scheduler"] = scheduler

    def _latent(self, number: str) -> None:
        """The size, or that the picture was made from another one."""
        source, denoise = self.linked(number, "latent_image"), self.value(number, "denoise", int, float)
        if source is not None and self.kind(source) == "EmptyLatentImage":
            self.seen.add(source)
            self.take(source, "width", "width", int)
            self.take(source, "height", "height", int)
            if (count := self.value(source, "batch_size", int)) not in (None, 1):
                self.rest["batch_size"] = f"{count}, whose pictures share one seed"
            if denoise not in (None, 1):
                self.rest["denoise"] = denoise
        elif source is not None:
            self.facts["task"] = "image_to_image"
            self.facts["strength"] = 1.0 if denoise is None else denoise

    def _model(self, number: str) -> None:
        """Checkpoint and LoRAs, whose tags go into the prompt."""
        end, passed = self.back(self.linked(number, "model"), "model", "CheckpointLoaderSimple", "CheckpointLoader")
        if end is not None:
            self.model = self.value(end, "ckpt_name", str)

        for node in passed[::-1]:
            name, weight = self.value(node, "lora_name", str), self.value(node, "strength_model", int, float)
            if self.kind(node) not in ("LoraLoader", "LoraLoaderModelOnly") or name is None or weight is None:
                continue
            self.seen.add(node)
            self.tags += f"<lora:{PurePosixPath(name.replace(chr(92), '/')).stem}:{weight:g}>"
            of_text = 0 if self.kind(node) == "LoraLoaderModelOnly" else self.value(node, "strength_clip", int, float)
            if of_text != weight:
                self.rest[f"strength_clip of {name}"] = of_text

    def _text(self, number: str, name: str, argument: str) -> None:
        """A prompt, and the layers of the text encoder that are left out."""
        source = self.linked(number, name)
        end = source if source is not None and self.kind(source) == "CLIPTextEncode" else None
        if source is not None and end is None:
            end, _ = self.back(source, "conditioning", "CLIPTextEncode")
        text = None if end is None else self.value(end, "text", str)
        if end is None or text is None:
            self.rest[name] = "a conditioning that is no plain text"
            return

        self.seen.add(end)
        self.facts[argument] = _our_words(text) + (self.tags if argument == "prompt" else "")
        if re.search(r"(?<!\\)\(", text):
            self.rest["weights in brackets"] = "ComfyUI scales them otherwise"

        last, _ = self.back(self.linked(end, "clip"), "clip", "CLIPSetLastLayer")
        layer = None if last is None else self.value(last, "stop_at_clip_layer", int)
        if layer is not None:
            self.facts["clip_skip"] = -1 - layer


def _our_words(text: str) -> str:
    """A prompt of ComfyUI's in our grammar: there [, ], AND and BREAK are text, and embedding:NAME is a word."""
    text = re.sub(r"(?<!\\)([\[\]])", r"\\\1", text)
    text = re.sub(r"\b(AND|BREAK)\b", lambda match: match[1].lower(), text)
    return re.sub(r"\bembedding:(?:[\w.-]+[\\/])*([\w.-]+?)(?:\.(?:pt|bin|safetensors))?(?![\w.\\/-])", r"\1", text)


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs", {}), dict)  # pyright: ignore[reportUnknownMemberType]


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
