"""What the page's buttons do, without a page: a model that stays in memory, and makes one picture after the other."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from PIL import Image

from sdkit.adapter_kinds import AdapterKind, adapter_kinds
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checks import Range, check_range, nearest
from sdkit.errors import ConfigError, SDKitError
from sdkit.generation.axes import PROMPT, Axis, grid_sheet, read_axes
from sdkit.generation.option_text import argument_names, read_value
from sdkit.generation.options import TASKS
from sdkit.generation.output import Output
from sdkit.generation.png import read_foreign, read_parameters, write_png
from sdkit.generation.provenance import with_parts
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import enlarged
from sdkit.model_parts import ModelParts, file_and_weight
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.previews import Preview, PreviewMode, latent_to_rgb

LIMITS = {  # of what would keep the machine busy for hours, and others waiting
    "height": Range(1, 1024), "width": Range(1, 1024), "num_inference_steps": Range(1, 200),
    "num_images_per_prompt": Range(1, 9),
}  # fmt: skip
LARGEST_GRID = 64  # pictures
FRAMES = 12  # that a run keeps, about
DECODED = 256  # pixels: the estimate is decoded in pictures up to this side; in larger ones it is projected
SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Asked:
    """What is asked for: a task's method, its arguments, and the weights of networks by their names in `Studio`."""

    task: str = "text_to_image"
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    networks: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Frame:
    """After a step: the noisy latents in the colours that they stand for, and what the network takes the picture to be;
    both of the picture's size."""

    label: str
    noisy: Image.Image
    estimate: Image.Image


@dataclass(frozen=True)
class Drawn:
    """What came of it: the files of the pictures, with their metadata, the task's output, and what it warned of."""

    files: list[Path]
    output: Output
    seconds: float
    warnings: list[str]


@dataclass(frozen=True)
class Known:
    """What a picture's metadata says of how it was made, and what of that is not followed here."""

    asked: Asked
    notes: list[str]


class Stopped(Exception):
    """A run was stopped before its picture was there."""


@dataclass(frozen=True)
class Network:
    """A LoRA, a hypernetwork, or what other kinds of adapters there are, as a file."""

    file: Path
    kind: AdapterKind


class Studio:
    """A model, networks by their names (`find_networks`), and the folder that pictures are written to.

    Methods may be called from several threads: one picture is made at a time, by a thread that loads the model too. Of
    all threads of a process OpenMP serves the first that asks best: a second one takes half as long again.
    """

    def __init__(
        self, load: Callable[[], StableDiffusion], parts: ModelParts, networks: Mapping[str, Network], output: Path
    ) -> None:
        self.parts, self.networks, self.output = parts, networks, output
        self._worker = ThreadPoolExecutor(1)
        self.sd = self._worker.submit(load).result()
        self._loaded: dict[str, tuple[AdapterKind, str]] = {}  # by its name here: its kind, its name in the model
        output.mkdir(parents=True, exist_ok=True)
        self._inputs = output / "inputs"

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model's UNet takes part in, by its number of input channels."""
        latent, channels = self.sd.vae.config.latent_channels, self.sd.unet.config.in_channels
        plain = ["text_to_image", "image_to_image", "inpaint"]
        return {latent: plain, 2 * latent + 1: ["inpaint"], latent + 1: ["depth_to_image"]}[channels]

    # Pictures

    def draw(self, asked: Asked, stop: threading.Event) -> Iterator[Frame | Drawn]:
        """Make pictures: a frame after every few steps, at the end what came of it.

        Raises Stopped soon after ``stop`` is set, SDKitError for what cannot be made.
        """
        for name, range in LIMITS.items():
            if asked.arguments.get(name) is not None:
                check_range(name, asked.arguments[name], range, whole=True)
        events: SimpleQueue[Frame | Drawn | Exception] = SimpleQueue()
        left = threading.Event()  # by the reader, who may have closed the page

        def ended() -> bool:
            return stop.is_set() or left.is_set()

        def work() -> None:
            try:
                events.put(self._make(asked, ended, lambda preview: events.put(self.frame(preview))))
            except Exception as error:
                events.put(error)

        work_in_hand = self._worker.submit(work)
        try:
            while True:
                try:
                    event = events.get(timeout=0.05)
                except Empty:
                    if ended() and work_in_hand.cancel():  # it waits for another
                        raise Stopped from None
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            left.set()
            work_in_hand.cancel()
            wait([work_in_hand])

    def _make(self, asked: Asked, ended: Callable[[], bool], show: Callable[[Preview], None]) -> Drawn:
        def watch(preview: Preview) -> Any:
            show(preview)
            return "stop" if ended() else None

        if ended():
            raise Stopped
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = self._run(asked, callback_on_preview=watch, **self._previews(asked))
        if ended():
            raise Stopped
        seconds = time.perf_counter() - started
        said = [str(warning.message) for warning in caught]
        return Drawn(self._write(asked, output), output, seconds, list(dict.fromkeys(said)))

    def _run(self, asked: Asked, **more: Any) -> Output:
        """The task, with the networks that are asked for and no others."""
        arguments = dict(asked.arguments)
        for name in ("image", "mask_image", "depth_map"):
            if isinstance(arguments.get(name), Image.Image):
                arguments[name] = str(self.keep(arguments[name]))
        self._put_in_force(asked.networks)
        return getattr(self.sd, asked.task)(**{"progress": False} | arguments | more)

    def _previews(self, asked: Asked) -> dict[str, Any]:
        """How often, and how, the picture is shown on its way."""
        steps = int(asked.arguments.get("num_inference_steps", 30))
        height, width = self.sd.picture_size
        small = max(asked.arguments.get("height") or height, asked.arguments.get("width") or width) <= DECODED
        mode: PreviewMode = "decode" if small or self.sd.device.type != "cpu" else "fast"
        return {"preview_every": max(1, steps // FRAMES) if small else 1, "preview_mode": mode}

    def frame(self, preview: Preview) -> Frame:
        """What is shown of a preview: the first picture of the batch."""
        cells = to_pil(latent_to_rgb(self.sd.vae, preview.latents[:1]).clamp(-1, 1))[0]
        factor = self.sd.vae.config.factor
        size = (cells.width * factor, cells.height * factor)
        noisy = cells.resize(size, Image.Resampling.NEAREST)
        estimate = preview.images[0].resize(size, Image.Resampling.BICUBIC)
        return Frame(f"after step {preview.step + 1}, {preview.label}", noisy, estimate)

    def _write(self, asked: Asked, output: Output) -> list[Path]:
        """The pictures as files whose metadata has what made them, networks too."""
        made_of = replace(self.parts, adapters=self._adapters(asked.networks)).facts()
        return [write_png(image, self._new_file(""), with_parts(image.info, made_of)) for image in output.images]

    def _new_file(self, prefix: str) -> Path:
        """The name that comes after those in the output folder: PREFIX0001.png and so on."""
        taken = [file.stem.removeprefix(prefix) for file in self.output.glob(f"{prefix}*.png")]
        return self.output / f"{prefix}{max((int(name) for name in taken if name.isdecimal()), default=0) + 1:04d}.png"

    def keep(self, image: Image.Image) -> Path:
        """Write a picture that goes in, once, so that metadata can name it."""
        self._inputs.mkdir(exist_ok=True)
        buffer = BytesIO()
        image.save(buffer, format="PNG")
        file = self._inputs / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
        if not file.exists():
            write_png(image, file)
        return file

    # Networks

    def _put_in_force(self, wanted: Mapping[str, float]) -> None:
        """Let these networks run with their weights, and no others; those that are new are read."""
        wanted = {name: weight for name, weight in wanted.items() if weight}
        for name, weight in wanted.items():
            if name not in self.networks:
                raise ConfigError(f"network {name!r}: not in the folder{nearest(name, self.networks)}")
            if name not in self._loaded:
                kind = self.networks[name].kind
                self._loaded[name] = (kind, kind.module.load(self.sd, self.networks[name].file, weight))

        for kind in {kind for kind, _ in self._loaded.values()}:
            own = {called: wanted[name] for name, (k, called) in self._loaded.items() if k is kind and name in wanted}
            kind.module.activate(self.sd, list(own))
            for called, weight in own.items():
                kind.module.set_scale(self.sd, weight, [called])

    def _adapters(self, networks: Mapping[str, float]) -> dict[str, list[str]]:
        """FILE:WEIGHT texts by kind, as the command line takes them."""
        found: dict[str, list[str]] = {}
        for name, weight in networks.items():
            if weight:
                network = self.networks[name]
                found.setdefault(network.kind.name, []).append(f"{network.file}:{weight:g}")
        return found

    # Grids

    def grid(self, asked: Asked, texts: Sequence[str], stop: threading.Event) -> Iterator[tuple[int, int, Path]]:
        """Draw what is asked for over axes as `sdkit.generation.axes.read_axis` reads them: how many pictures are there
        of how many, and the sheet so far. Raises as `draw`, before anything is drawn where an axis has no meaning."""
        axes = read_axes([text for text in texts if text.strip()], "axis")
        places = list(product(*(range(len(axis.values)) for axis in axes)))
        if not axes or len(places) > LARGEST_GRID:
            raise ConfigError(f"axes: expected 1 to {LARGEST_GRID} pictures, found {len(places) if axes else 0}")
        cells = {place: self._cell(asked, axes, place) for place in places}

        images: dict[tuple[int, ...], Image.Image] = {}
        file = self._new_file("grid-")
        for place, cell in cells.items():
            *_, last = self.draw(cell, stop)
            assert isinstance(last, Drawn)
            images[place] = enlarged(last.output.images[0], 128)
            said = {name: asked.arguments[name] for name in (PROMPT, "seed") if asked.arguments.get(name) is not None}
            yield len(images), len(cells), write_png(grid_sheet(images, axes), file, said | {"vary": list(texts)})

    def _cell(self, asked: Asked, axes: Sequence[Axis], place: Sequence[int]) -> Asked:
        for axis, k in zip(axes, place, strict=True):
            asked = self.with_option(asked, axis.option, axis.values[k], axis)
        return replace(asked, arguments={**asked.arguments, "num_images_per_prompt": 1})

    def with_option(self, asked: Asked, option: str, text: str, axis: Axis | None = None) -> Asked:
        """What is asked for with another value of one option, both written as on the command line, or of a network.

        Raises ConfigError for an option that the task does not have, or a value that it cannot be.
        """
        if option == PROMPT and axis is not None:
            prompt = axis.in_prompt(str(asked.arguments.get(PROMPT, "")), text)
            return replace(asked, arguments={**asked.arguments, PROMPT: prompt})
        if option in self.networks:
            return replace(asked, networks={**asked.networks, option: read_value(TASKS[asked.task], "eta", text)})

        names = argument_names(TASKS[asked.task])
        name = names.get(option.replace("-", "_"))
        if name is None or name in ("progress", "preview_every"):
            raise ConfigError(f"{option}: no option of {asked.task}{nearest(option, [*names, *self.networks])}")
        value = read_value(TASKS[asked.task], name, text)
        return replace(asked, arguments={**asked.arguments, name: value})

    # What a picture says

    def read(self, file: Path) -> Known:
        """How a picture was made, by its metadata: ours, A1111's or ComfyUI's. Raises SDKitError where it has none."""
        foreign = read_foreign(file)
        facts = dict(read_parameters(file) if foreign is None else foreign.facts)
        notes = [] if foreign is None else [f"{name}: {value}" for name, value in foreign.rest.items()]

        task = str(facts.pop("task", "text_to_image"))
        if task not in self.tasks:
            notes.append(f"task: {task}, which this model is not for")
            task = self.tasks[0]
        networks: dict[str, float] = {}
        for kind in adapter_kinds():
            for text in facts.pop(kind.name, []):
                path, weight = file_and_weight(text)
                if Path(path).stem in self.networks:
                    networks[Path(path).stem] = weight
                else:
                    notes.append(f"{kind.name}: {text}, which is not in the folder")

        model = facts.pop("model", None if foreign is None else foreign.model)
        if model not in (None, self.parts.model):
            notes.append(f"model: {model}; this is {self.parts.model}")
        known = set(argument_names(TASKS[task]).values())
        held = {"files", "dtype", "version", "adapters", "triggers", "prompt_weighting"}
        notes += [f"{name}: {value}" for name, value in facts.items() if name not in known | held]
        arguments = {name: value for name, value in facts.items() if name in known}
        if interval := arguments.get("guidance_interval"):
            arguments["guidance_interval"] = (interval[0], float("inf") if interval[1] is None else interval[1])
        return Known(Asked(task, arguments, networks), notes)


def find_networks(folder: Path | None) -> dict[str, Network]:
    """The adapters in a folder and the folders in it, by their names without the ending. Raises ConfigError where there
    is no such folder, or two have one name."""
    found: dict[str, Network] = {}
    if folder is None:
        return found
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder with LoRAs or hypernetworks")

    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        try:
            what = str(inspect_file(file)["kind"])
        except SDKitError:
            continue
        kind = next((kind for kind in adapter_kinds() if what in kind.files), None)
        if kind is None:
            continue
        if file.stem in found:
            raise ConfigError(f"{file}: has the name of {found[file.stem].file}; give one of them another")
        found[file.stem] = Network(file, kind)
    return found
