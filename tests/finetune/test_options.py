"""Options: every number of every option dataclass has a range, and what is outside of it is refused."""

import dataclasses
import importlib
import math
import pkgutil
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

import finetune
from finetune.options import Declared, check_options, declared, refuse_unread_options
from finetune.train_hypernetwork import HypernetworkTraining
from finetune.train_lora import app
from finetune.training.config import TrainConfig
from sdkit.checks import Range
from sdkit.errors import ConfigError
from tests.finetune.commands import call

NEEDED = {"data": Path("x"), "token": "zorb", "init": "torus"}
BESIDE = {  # what lets an option be read
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "prior_loss_weight": {"class_data": Path("y")},
    "keep_tags": {"shuffle_tags": 2},
    "text_encoder_lr": {"train_text_encoder": True},
    "num_class_images": {"class_data": Path("y"), "class_prompt": "a wall"},
    **{f"discriminator_{name}": {"discriminator_weight": 0.5} for name in ("start", "channels", "layers", "lr")},
}


def option_dataclasses() -> Iterator[type[Any]]:
    """Every dataclass of finetune that declares an option, with a text for its help or a range."""
    for module in pkgutil.walk_packages(finetune.__path__, "finetune."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.name:
                hints = get_type_hints(value, include_extras=True) if "Annotated" in str(value.__annotations__) else {}
                if any(get_origin(hint) is Annotated for hint in hints.values()):
                    yield value


KINDS = list(option_dataclasses())
NUMBERS = [(kind, name) for kind in KINDS for name, option in declared(kind).items() if option.number]


def made(kind: type[Any], **given: Any) -> Any:
    """An instance, with something in each field that has no default."""
    needed = {f.name: NEEDED[f.name] for f in fields(kind) if f.default is MISSING}
    beside = {k: v for name in given for k, v in BESIDE.get(name, {}).items() if k in {f.name for f in fields(kind)}}
    return kind(**needed | beside | given)


def outside(option: Declared) -> list[float]:
    """What is never inside, and what is just outside of the range."""
    assert option.range is not None
    low, high = option.range.low, option.range.high
    step = 1 if option.number is int else 1e-9
    found = [math.nan, math.inf, -math.inf, True]
    found += [low if option.range.above else low - step] if math.isfinite(low) else []
    return found + ([high if option.range.below else high + step] if math.isfinite(high) else [])


def test_all_option_dataclasses_are_found_and_every_number_has_a_range():
    names = {kind.__name__ for kind in KINDS}
    assert {"TrainConfig", "DataConfig", "LossConfig", "SampleConfig", "ModelConfig", "LoraOptions", "Recipe"} <= names
    assert {"HypernetworkOptions", "WordOptions", "UNetOptions", "DecoderLossConfig", "DecoderSamples"} <= names
    assert len(names) >= 20 and len(NUMBERS) >= 90
    for kind, name in NUMBERS:
        bounds = declared(kind)[name].range
        assert bounds is not None and math.isfinite(bounds.low), f"{kind.__name__}.{name}"  # no number may be anything


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_number_outside_of_its_range_is_refused_by_name(kind: type[Any], name: str):
    option, default = declared(kind)[name], next(f.default for f in fields(kind) if f.name == name)
    for number in outside(option):
        with pytest.raises(ConfigError, match=rf"^{name}: expected a (whole |finite )?number {option.range}, found"):
            made(kind, **{name: (number,) if isinstance(default, tuple) else number})
    made(kind, **{} if default is MISSING else {name: default})


def test_the_command_line_refuses_them_too(tmp_path: Path):
    for option, number in (("--learning-rate", -1e-4), ("--learning-rate", "nan"), ("--adam-epsilon", "inf")):
        assert f"{option[2:].replace('-', '_')}: expected a finite number" in call(
            ("--data", tmp_path, option, number), status=1
        )


def test_help_shows_the_ranges():
    shown = " ".join(
        CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output.replace("│", " ").split()
    )
    for kind in (TrainConfig, *(k for k in KINDS if k.__name__ in ("LoraOptions", "DataConfig", "LossConfig"))):
        for option in declared(kind).values():
            assert option.range is None or f"{option.help} A number {option.range}." in shown, option.help


def test_a_number_without_a_range_is_a_bug():
    @dataclass
    class Forgotten:
        size: Annotated[int | None, "How large."] = None

        def __post_init__(self) -> None:
            check_options(self)

    with pytest.raises(TypeError, match=r"Forgotten\.size: a number without a range"):
        Forgotten()


def test_words_are_those_listed():
    @dataclass
    class Words:
        kind: Annotated[Literal["a", "b"], "Which."] = "a"
        other: Annotated[Literal["c"] | None, "Or none."] = None
        size: Annotated[tuple[float, ...], "Some.", Range(0)] = ()

        def __post_init__(self) -> None:
            check_options(self)
            if self.kind == "a":
                refuse_unread_options(self, ("size",), "for kind a")

    assert Words("b", "c", (1.0, 2)).size == (1.0, 2)
    for given, message in (
        ({"kind": "x"}, "kind: expected one of a, b, found 'x'"),
        ({"other": "x"}, "other: expected one of c, found 'x'"),
        ({"kind": "b", "size": (1, -1)}, "size: expected a finite number of at least 0, found -1"),
        ({"size": (1.0,)}, "size: does nothing for kind a; leave it out, found"),
    ):
        with pytest.raises(ConfigError, match=message):
            Words(**given)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("lora", "--text-encoder-lr 1e-4", "text_encoder_lr: does nothing without train_text_encoder"),
        ("lora", "--learning-rate 0", "learning_rate: expected a number above 0, or a text_encoder_lr to train that a"),
        ("lora", "--learning-rate 0 --train-text-encoder", "learning_rate: expected a number above 0, or a text_encod"),
        ("lora", "--lr-num-cycles 2", "lr_num_cycles: does nothing without the lr_scheduler cosine_with_restarts"),
        ("unet", "--lr-power 2", "lr_power: does nothing without the lr_scheduler polynomial"),
        ("lora", "--prior-loss-weight 0.5", "prior_loss_weight: does nothing without class_data"),
        ("lora", "--prior-target base", "prior_target: expected a class_data"),
        ("lora", "--class-prompt x", "class_prompt, num_class_images: expected a class_data"),
        ("lora", "--no-aspect-buckets --shortest-side 32", "shortest_side: does nothing without aspect_buckets"),
        ("lora", "--no-aspect-buckets --longest-side 32", "longest_side: does nothing without aspect_buckets"),
        ("lora", "--keep-tags 1", "keep_tags: does nothing without shuffle_tags"),
        ("lora", "--num-validation-images 0 --guidance-scale 2", "guidance_scale: does nothing without sample sheets"),
        ("lora", "--num-validation-images 0 --num-inference-steps 5", "num_inference_steps: does nothing without samp"),
        ("lora", "--num-validation-images 0 --validation-steps 5", "validation_steps: does nothing without sample she"),
        ("lora", "--num-validation-images 2 --validation-prompt x", "num_validation_images: does nothing beside valid"),
        ("hypernetwork", "--activation-func linear --activate-output", "activate_output: does nothing with the activa"),
        ("hypernetwork", "--dropout-structure .1 --dropout-structure 0 --dropout-structure 0", "dropout_structure: do"),
        ("vae_decoder", "--discriminator-lr 1e-4", "discriminator_lr: does nothing without discriminator_weight"),
        ("vae_decoder", "--discriminator-start 5", "discriminator_start: does nothing without discriminator_weight"),
        ("vae_decoder", "--discriminator-channels 5", "discriminator_channels: does nothing without discriminator_wei"),
        ("vae_decoder", "--discriminator-layers 5", "discriminator_layers: does nothing without discriminator_weight"),
        ("vae_decoder", "--learning-rate 0", "learning_rate: expected a number above 0"),
        ("vae_decoder", "--num-validation-images 0 --validation-steps 5", "validation_steps: does nothing without sam"),
    ],
)  # fmt: skip
def test_an_option_that_nothing_reads_is_refused(script: str, options: str, message: str, tmp_path: Path):
    program = importlib.import_module(f"finetune.train_{script}").app
    arguments = ("--data", tmp_path, "--output", tmp_path / "run", *shlex.split(options))
    assert f"error: {message}" in call(arguments, program, status=1)
    assert not (tmp_path / "run").exists()


def test_so_are_templates_where_every_picture_has_a_caption(pictures: Path, tmp_path: Path):
    for file in pictures.glob("*.txt"):
        file.write_text(f"a {file.stem} <zorb>")
    options = ("--data", pictures, "--output", tmp_path / "run", "--token", "<zorb>", "--init", "torus")
    program = importlib.import_module("finetune.train_textual_inversion").app
    printed = call((*options, "--templates", "the {}"), program, status=1)
    assert "error: templates: does nothing as every picture has a caption" in printed


def test_a_training_scripts_own_defaults_have_ranges_too():
    assert declared(HypernetworkTraining)["lr_warmup_steps"].range == Range(0)
