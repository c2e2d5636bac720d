"""The page: what is on it, and which of its controls calls what of `Studio`."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdkit.errors import SDKitError, file_problem
from sdkit.sampling.samplers import SAMPLERS
from sdkit.ui.fields import NETWORK, NOT_REMEMBERED, STRENGTH, TASK_NAMES, defaults, fill_fields, read_fields
from sdkit.ui.inline import img
from sdkit.ui.studio import LIMITS, Asked, Drawn, Frame, Stopped, Studio
from sdkit.ui.words import CSS, words_html

LONGEST = 2000  # characters of a text
WAITING = 16  # runs that may wait for each other
LARGEST_FILE = "20mb"
OWN = "the model's own"
LONG: dict[str, Any] = {"concurrency_limit": WAITING, "show_progress": "minimal"}  # the studio makes one at a time
KEEP = gr.skip()
ENLARGED = """
#picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.sd-frame img { width: 100%; max-height: 240px; object-fit: contain; image-rendering: pixelated; }
#sheet img { max-width: 100%; }
"""


class Page:
    """The page of a studio; gradio serves ``blocks``. Each field of `sdkit.ui.fields` has its control in ``fields``."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.fields: dict[str, gr.components.Component] = {}
        self._stops: dict[str, threading.Event] = {}  # of the run of each tab, by its session

        with gr.Blocks(title="sdkit", analytics_enabled=False, fill_width=True) as self.blocks:
            self.frames, self.files = gr.State([]), gr.State([])  # of the last run; of all pictures of this tab
            height, width = studio.sd.picture_size
            gr.Markdown(f"## sdkit\n`{studio.parts.model}`, {width} x {height} pixels, on {studio.sd.device}")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_words_and_numbers()
                    self._lay_out_start()
                    self._lay_out_networks_and_more()
                with gr.Column(scale=3, min_width=320):
                    self._lay_out_result()
                    self._lay_out_grid()
            self._connect()

    # What is asked

    def _lay_out_words_and_numbers(self) -> None:
        at, fields = defaults(self.studio), self.fields
        most = {name: limit.high for name, limit in LIMITS.items()}
        cells = self.studio.sd.vae.config.factor

        fields["prompt"] = gr.Textbox(
            at["prompt"], label="Prompt", lines=2, max_lines=6, max_length=LONGEST, autofocus=True, elem_id="prompt"
        )
        fields["negative_prompt"] = gr.Textbox(
            at["negative_prompt"], label="Negative prompt", max_length=LONGEST, elem_id="negative"
        )
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop")

        def slider(name: str, low: float, high: float, step: float, label: str) -> None:
            fields[name] = gr.Slider(low, high, at[name], step=step, label=label, elem_id=name.replace("_", "-"))

        with gr.Row():
            fields["seed"] = gr.Number(
                at["seed"], label="Seed, -1 for any", precision=0, minimum=at["seed"], elem_id="seed"
            )
            slider("num_images_per_prompt", 1, most["num_images_per_prompt"], 1, "Pictures")
        with gr.Row():
            samplers = [(OWN, ""), *((name, name) for name in SAMPLERS)]
            fields["sampler"] = gr.Dropdown(samplers, value="", label="Sampler", elem_id="sampler")
            slider("num_inference_steps", 1, most["num_inference_steps"], 1, "Steps")
        slider("guidance_scale", 0, 30, 0.1, "Guidance scale")
        with gr.Row():
            slider("width", cells, most["width"], cells, "Width")
            slider("height", cells, most["height"], cells, "Height")

    def _lay_out_start(self) -> None:
        at, tasks = defaults(self.studio), self.studio.tasks
        height, width = self.studio.sd.picture_size

        with gr.Accordion("Start from", open=at["task"] != "text_to_image", elem_id="start"):
            choices = [(TASK_NAMES[task], task) for task in tasks]
            self.fields["task"] = gr.Radio(choices, value=at["task"], label="Task", elem_id="task")
            self.fields["image"] = gr.ImageEditor(
                label="Picture; paint over what is to be repainted",
                type="pil",
                sources=("upload", "clipboard"),
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=max(8, width // 8)),
                transforms=(),
                layers=False,
                canvas_size=(width, height),
                elem_id="image",
            )
            self.take = gr.Button("Take the picture that was drawn last", size="sm", elem_id="take")
            self.fields["strength"] = gr.Slider(
                0, 1, at["strength"], step=0.01, label="Strength, 0 keeps the picture", elem_id="strength"
            )
            self.fields["depth_map"] = gr.Image(
                label="Depth map, near is white; none: estimated",
                type="pil",
                image_mode="L",
                sources=["upload"],
                visible="depth_to_image" in tasks,
                elem_id="depth",
            )

    def _lay_out_networks_and_more(self) -> None:
        if self.studio.networks:
            with gr.Accordion("LoRAs and hypernetworks, 0 is off", open=True):
                for number, (name, network) in enumerate(self.studio.networks.items()):
                    self.fields[NETWORK + name] = gr.Slider(
                        -1, 2, 0, step=0.05, label=f"{name} ({network.kind.name})", elem_id=f"network-{number}"
                    )
        with gr.Accordion("More options", open=False, elem_id="more-options"):
            self.fields["more"] = gr.Textbox(
                "",
                label="One a line, named as by sdkit txt2img: clip-skip=1, sigmas=karras, eta=0.5",
                lines=3,
                max_length=LONGEST,
                elem_id="more",
            )
        self.drop = gr.File(
            label="Drop a PNG here to take its settings", file_types=["image"], height=110, elem_id="drop"
        )

    # What came of it

    def _lay_out_result(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            format="png",
            height=420,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="picture",
        )
        self.said = gr.Markdown("", elem_id="said")
        with gr.Accordion("The way there", open=True):
            self.step = gr.Slider(1, 2, 1, step=1, label="Step", elem_id="step", interactive=True)
            with gr.Row():
                view: dict[str, Any] = {"show_label": True, "container": True, "elem_classes": ["sd-frame"]}
                self.noisy = gr.HTML("", label="Noisy latents", min_width=120, elem_id="noisy", **view)
                self.estimate = gr.HTML("", label="The estimate in them", min_width=120, elem_id="estimate", **view)
        with gr.Accordion("Which word looks where", open=True):
            self.attention = gr.Checkbox(True, label="Record attention", elem_id="attention")
            self.words = gr.HTML("", elem_id="words")
        self.gallery = gr.Gallery(
            label="This session",
            columns=6,
            height=240,
            object_fit="contain",
            fit_columns=False,
            preview=False,
            format="png",
            interactive=False,
            buttons=[],
            elem_id="gallery",
        )

    def _lay_out_grid(self) -> None:
        with gr.Accordion("Grid", open=False, elem_id="grid"):
            gr.Markdown("The prompt over one option or two: `guidance=1,4,7.5`, `seed=1..4`, `prompt=red,blue`.")
            with gr.Row():
                self.columns = gr.Textbox("", label="Columns", max_length=LONGEST, elem_id="columns")
                self.rows = gr.Textbox("", label="Rows", max_length=LONGEST, elem_id="rows")
            self.draw_grid = gr.Button("Draw the grid", elem_id="draw-grid")
            self.sheet = gr.Image(label="Grid", format="png", interactive=False, elem_id="sheet")

    # What calls what

    def _connect(self) -> None:
        fields = list(self.fields.values())
        views = [self.noisy, self.estimate]
        gr.on(
            [self.draw.click, self.fields["prompt"].submit],  # type: ignore[attr-defined]  # a Textbox
            self.on_draw,
            [self.attention, self.files, *fields],
            [self.picture, self.said, *views, self.frames, self.step, self.words, self.files, self.gallery],
            **LONG,
        )
        self.draw_grid.click(self.on_grid, [self.columns, self.rows, *fields], [self.sheet, self.said], **LONG)
        self.stop.click(self.on_stop, queue=False)

        self.step.input(self.on_step, [self.frames, self.step], [*views, self.step], show_progress="hidden")
        task, strength = self.fields["task"], self.fields["strength"]
        task.input(lambda chosen: STRENGTH.get(chosen, 0.75), [task], [strength])  # type: ignore[attr-defined]  # a Radio
        self.take.click(self.on_take, [self.files], [self.fields["image"]])
        remembered = [control for name, control in self.fields.items() if name not in NOT_REMEMBERED]
        self.drop.upload(self.on_drop, [self.drop], [self.said, *remembered])

    def on_draw(
        self, request: gr.Request, attention: bool, files: list[str], *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw: the picture emerging, then the picture with all that is known of it."""
        stop = self._new_stop(request)
        frames: list[Frame] = []
        try:
            asked = self._asked(values)
            if attention and asked.arguments["guidance_scale"]:
                asked = Asked(asked.task, {**asked.arguments, "attention_maps": True}, asked.networks)
            for event in self.studio.draw(asked, stop):
                if isinstance(event, Drawn):
                    yield self._result(event, frames, files)
                    return
                frames.append(event)
                yield event.estimate, event.label, *_views(event), *[KEEP] * 5
        except Stopped:
            yield KEEP, "Stopped.", KEEP, KEEP, frames, _last_step(frames), *[KEEP] * 3
        except Exception as error:
            raise gr.Error(_explained(error), duration=None) from None

    def _result(self, drawn: Drawn, frames: list[Frame], files: list[str]) -> tuple[Any, ...]:
        """The outputs of `on_draw` at its end."""
        output, maps = drawn.output, drawn.output.attention_maps
        said = [f"{output!r}, {drawn.seconds:.1f} s", *(f"**{text}**" for text in drawn.warnings)]
        words = "" if maps is None else words_html(output.images[0], maps)
        views = _views(frames[-1]) if frames else ("", "")
        own = [str(file) for file in drawn.files]
        return own[0], "  \n".join(said), *views, frames, _last_step(frames), words, own + files, own + files

    def on_grid(self, request: gr.Request, columns: str, rows: str, *values: Any) -> Iterator[tuple[Any, str]]:
        """Draw a grid; the sheet is shown anew with every picture."""
        stop = self._new_stop(request)
        try:
            asked = self._asked(values)
            if asked.arguments["seed"] is None:  # one for all of its pictures
                asked = Asked(asked.task, {**asked.arguments, "seed": random.randrange(2**31)}, asked.networks)
            for done, of, file in self.studio.grid(asked, [columns, rows], stop):
                yield str(file), f"{done} of {of} pictures"
        except Stopped:
            yield KEEP, "Stopped."
        except Exception as error:
            raise gr.Error(_explained(error), duration=None) from None

    def on_stop(self, request: gr.Request) -> None:
        """Stop this tab's run, which then says so; one that waits does not begin."""
        stop = self._stops.pop(str(request.session_hash), None)
        if stop is not None:
            stop.set()

    def on_step(self, frames: list[Frame], step: float) -> tuple[Any, ...]:
        """Both views of a step, and its name."""
        if not frames:
            return KEEP, KEEP, KEEP
        frame = frames[min(int(step), len(frames)) - 1]
        return *_views(frame), gr.update(label=f"Step: {frame.label}")

    def on_take(self, files: list[str]) -> dict[str, Any]:
        """The last picture, in the editor."""
        if not files:
            raise gr.Error("There is no picture yet.")
        with Image.open(files[0]) as image:
            return {"background": image.convert("RGB"), "layers": [], "composite": None}

    def on_drop(self, file: str) -> list[Any]:
        """The fields as a picture's metadata has them, and what of it is not followed."""
        try:
            known = self.studio.read(Path(file))
            values = fill_fields(self.studio, known.asked)
        except Exception as error:
            raise gr.Error(_explained(error), duration=None) from None
        notes = [*known.notes, *(f"{name}: give it again" for name in NOT_REMEMBERED if name in known.asked.arguments)]
        said = "Settings taken." + "".join(f"  \nNot followed: {note}" for note in notes)
        return [said, *(values[name] for name in self.fields if name not in NOT_REMEMBERED)]

    def _asked(self, values: tuple[Any, ...]) -> Asked:
        return read_fields(self.studio, dict(zip(self.fields, values, strict=True)))

    def _new_stop(self, request: gr.Request) -> threading.Event:
        self._stops[str(request.session_hash)] = stop = threading.Event()
        return stop


def _views(frame: Frame) -> tuple[str, str]:
    """Noisy latents and estimate, as HTML."""
    return img(frame.noisy, f"noisy latents {frame.label}"), img(frame.estimate, f"the estimate {frame.label}")


def _last_step(frames: list[Frame]) -> Any:
    """The slider over the steps, at its end."""
    label = f"Step: {frames[-1].label}" if frames else "Step"
    return gr.update(maximum=max(2, len(frames)), value=max(1, len(frames)), label=label)


def _explained(error: Exception) -> str:
    """What is wrong, for the user's eyes; a bug of ours goes on as it is."""
    message = str(error) if isinstance(error, SDKitError) else file_problem(error)
    if message is None:
        raise error
    return message


def serve(studio: Studio, port: int | None = None, open_browser: bool = False) -> gr.Blocks:
    """Serve the page on this machine alone and return at once; ``local_url`` of the result is its address.

    port: None for the first free one from 7860 on. Nothing is sent to any other machine.
    """
    theme = gr.themes.Base(font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = Page(studio).blocks
    blocks.queue(max_size=WAITING, api_open=False)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=open_browser,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        allowed_paths=[str(studio.output.resolve())],
        max_file_size=LARGEST_FILE,
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=CSS + ENLARGED,
    )
    return blocks
