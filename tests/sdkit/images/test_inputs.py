"""Pictures and masks on their way in."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from sdkit.errors import ConfigError, SDKitError
from sdkit.files import file_hash
from sdkit.images.inputs import feather, paths_of, picture_tensors, read_masks
from sdkit.images.pixels import to_tensor
from tests.sdkit.tiny import mask, picture


def test_several_pictures_become_one_batch() -> None:
    expected = torch.cat([to_tensor(picture(seed=1)), to_tensor(picture(seed=2))])
    as_tensor = expected / 2 + 0.5
    for given in ([picture(seed=1), picture(seed=2)], as_tensor, list(as_tensor), [as_tensor[:1], picture(seed=2)]):
        assert torch.allclose(picture_tensors(given, None, None, 4), expected, atol=1e-6)
    half = as_tensor.half()
    assert torch.allclose(picture_tensors(half, None, None, 4), expected, atol=1e-3)


def test_resizing_is_pillows_bicubic() -> None:
    large = picture(64, 96)
    expected = to_tensor(large.resize((48, 32), Image.Resampling.BICUBIC))
    resized = picture_tensors(large, 32, 48, 4)
    assert resized.abs().max() <= 1 and torch.allclose(resized, expected, atol=0.02)  # its steps are of 2 / 255


def test_masks_are_zeros_and_ones_at_the_pictures_size() -> None:
    grey = mask().point(lambda v: 128 if v else 127)
    assert torch.equal(read_masks(grey, 32, 48), (to_tensor(mask())[:, :1] > 0).float())
    large = mask().resize((96, 64), Image.Resampling.NEAREST)
    both = read_masks([large, torch.ones(1, 5, 5)], 32, 48)
    assert torch.equal(both[:1], read_masks(mask(), 32, 48)) and both[1].min() == 1


@pytest.mark.parametrize("pixels", [0, 1, 4])
def test_a_feather_falls_evenly_with_the_distance(pixels: int) -> None:
    """Chessboard distance, by scipy."""
    white = torch.rand(1, 1, 30, 40, generator=torch.Generator().manual_seed(0)).gt(0.98).float()
    distance = torch.from_numpy(distance_transform_cdt(white[0, 0].numpy() == 0, "chessboard"))
    expected = (1 - distance / (pixels + 1)).clamp(0)
    weights = feather(white, pixels)[0, 0]
    assert torch.allclose(weights, expected.float(), atol=1e-6)
    assert torch.equal(weights == 0, expected == 0) and torch.equal(weights == 1, white[0, 0] == 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "image: expected a picture, found an empty list"),
        (None, "image: expected a picture, its file, an array or a tensor, found None"),
        (torch.zeros(2, 3, dtype=torch.int64), "image: expected a tensor of floats"),
        (torch.zeros(8), "image: expected a tensor of floats [C, H, W] or [N, C, H, W], found [8]"),
        (torch.full((3, 4, 4), -1.0), "expected floats in [0, 1]"),
        ([picture(), picture(32, 32)], "image: expected pictures of one size, found 32 x 32, 48 x 32"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        picture_tensors(given, None, None, 4)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"abc")
    assert file_hash(file) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(SDKitError, match=r"b\.png: no such file"):
        file_hash(tmp_path / "b.png")
    sources = [str(file), file, picture(), np.zeros((4, 4)), torch.zeros(2, 3, 4, 4)]
    assert paths_of(sources) == [str(file), str(file), None, None, None, None]
    assert paths_of(torch.zeros(3, 4, 4)) == [None]
