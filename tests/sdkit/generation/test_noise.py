"""Seeds, generators and variations."""

from typing import Any

import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.generation.noise import Noise, Variation, slerp

SHAPE = (3, 4, 16, 16)


def noise(seed: Any, generator: Any = None, variation: Variation | None = None) -> Noise:
    return Noise(SHAPE, seed, generator, torch.device("cpu"), torch.float32, variation)


def test_slerp_turns_evenly_and_keeps_the_norm() -> None:
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]  # on one sphere
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(x.flatten(1), y.flatten(1)).acos()

    for t in (0.1, 0.5, 0.8):
        between = slerp(a, b, t)
        assert torch.allclose(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-12)
        assert torch.allclose(angle(a, between), t * angle(a, b), rtol=1e-9)
        assert torch.allclose(angle(between, b), (1 - t) * angle(a, b), rtol=1e-9)
    assert torch.allclose(slerp(a, a, 0.3), a)


def test_a_variation_runs_from_one_seeds_noise_to_the_others() -> None:
    own, other = noise(5), noise(9)
    first, second = own.initial(), other.initial()
    assert torch.equal(noise([5, 6, 7]).initial(), first)
    varied = noise([5, 6, 7], variation=Variation(0.4, 9))
    assert torch.allclose(varied.initial(), slerp(first, second, 0.4)) and varied.variation_seeds == [9, 10, 11]
    assert torch.equal(noise([5, 6, 7], variation=Variation(1, 9)).initial(), second)
    assert torch.equal(varied.draw(), own.draw())  # the steps' noise stays the seed's


def test_variations_of_one_seed_share_it() -> None:
    varied = noise(5, variation=Variation(0.2, 9))
    assert varied.seeds == [5, 5, 5] and varied.variation_seeds == [9, 10, 11]
    unseeded = noise(None, variation=Variation(0.2))
    assert len(set(unseeded.seeds)) == 1 and len(set(unseeded.variation_seeds)) == 3


def test_one_generator_draws_once_for_each_picture() -> None:
    one = noise(None, torch.Generator().manual_seed(1))
    expected = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.draw_for_pictures(2), expected)
    assert noise(5).draw_for_pictures(2).shape == SHAPE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.5}, "variation_strength: expected a number from 0 to 1, found 1.5"),
        ({"strength": float("nan")}, "variation_strength"),
        ({"seed": 3}, "variation_seed: expected a variation_strength above 0"),
        ({"strength": 0.5, "seed": [1, 2]}, "variation_seed: expected one or 3"),
        ({"strength": 0.5, "seed": 1.5}, "variation_seed: expected a whole number"),
    ],
)
def test_bad_variations_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Noise(SHAPE, 5, None, torch.device("cpu"), torch.float32, Variation(**arguments))
