"""JSON values against types: what does not fit is named, and no configuration, however odd, is a raw traceback."""

import json
import random
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch

import sdkit
from sdkit.checkpoints.loading import MODELS
from sdkit.checks import POSITIVE, Range
from sdkit.errors import ConfigError, SDKitError
from sdkit.typed_json import checked

Few = Annotated[int, Range(1, 9)]


@dataclass
class Declared:
    few: Few = 1
    several: Few | tuple[Few, ...] | None = None
    two: tuple[Few, Few] = (1, 1)
    scale: Annotated[float, POSITIVE] = 1.0
    free: float = 0.0
    name: str | None = None
    switch: bool = False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("few", 9),
        ("several", [1, 2, 3]),
        ("several", None),
        ("two", [3, 4]),
        ("scale", 2),
        ("free", -3),
        ("name", "x" * 200),
        ("name", None),
        ("switch", True),
    ],
)
def test_what_fits_is_taken(key: str, value: Any) -> None:
    expected = tuple(value) if isinstance(value, list) else value
    assert checked(Declared, {key: value}, "it") == {key: expected}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("few", 10, "it: few: expected a whole number from 1 to 9, found 10"),
        ("few", True, "few: expected a whole number from 1 to 9, found True"),
        ("few", 2.0, "found 2.0"),
        ("several", [1, "x"], "several: expected a whole number from 1 to 9 or a list of at most 16, each a whole"),
        ("several", [1] * 17, r"or null, found \[1, 1"),
        ("two", [1], r"two: expected a list of 2, each a whole number from 1 to 9, found \[1\]"),
        ("scale", 0, "scale: expected a number above 0, found 0"),
        ("free", float("nan"), "free: expected a finite number, found nan"),
        ("name", 3, "name: expected a string of at most 200 letters or null, found 3"),
        ("switch", 1, "switch: expected true or false, found 1"),
        ("name", "x" * 201, "name: expected a string of at most 200 letters"),
        ("switch", "x" * 1000, r"found 'x{76}\.\.\.$"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(Declared, {key: value}, "it")


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 32, 1e9, 10**12, float("nan"), float("inf"), 0.5, -0.5, "x", "", "a" * 10_000,
    [], [1], [1, 2], [32, 64], [[1]], {}, {"a": 1}, ["CrossAttnDownBlock2D"] * 2000, [64] * 2000, [None], [True, False],
]  # fmt: skip


@pytest.mark.parametrize(
    ("network", "folder"), [(sdkit.UNet2DConditionModel, "unet"), (sdkit.AutoencoderKL, "vae")], ids=["unet", "vae"]
)
def test_no_network_configuration_is_a_raw_traceback(network: Any, folder: str) -> None:
    own = json.loads((MODELS / "tabletop" / folder / "config.json").read_text())
    rng = random.Random(1)
    cases = [own | {key: value} for key in own for value in ODD]
    cases += [own | {key: rng.choice(ODD) for key in rng.sample(list(own), 2)} for _ in range(100)]
    built = 0
    with torch.device("meta"):
        for case in cases:
            try:
                network.from_config(case)
                built += 1
            except SDKitError as error:
                assert len(str(error)) < 1000, case
    assert 20 < built < len(cases) / 2
