"""Pictures on their way in."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import ConfigError, SDKitError
from sdkit.files import file_hash
from sdkit.images.inputs import paths_of, picture_tensors
from sdkit.images.pixels import to_tensor
from tests.sdkit.tiny import picture


def test_several_pictures_become_one_batch() -> None:
    expected = torch.cat([to_tensor(picture(seed=1)), to_tensor(picture(seed=2))])
    as_tensor = expected / 2 + 0.5
    for given in ([picture(seed=1), picture(seed=2)], as_tensor, list(as_tensor), [as_tensor[:1], picture(seed=2)]):
        assert torch.allclose(picture_tensors(given, None, None, 4), expected, atol=1e-6)
    bytes_ = (as_tensor * 255).round().to(torch.uint8)
    assert torch.allclose(picture_tensors(bytes_, None, None, 4), expected, atol=1e-6)
    half = as_tensor.half()
    assert torch.allclose(picture_tensors(half, None, None, 4), expected, atol=1e-3)


def test_resizing_is_pillows_bicubic() -> None:
    large = picture(64, 96)
    expected = to_tensor(large.resize((48, 32), Image.Resampling.BICUBIC))
    resized = picture_tensors(large, 32, 48, 4)
    assert resized.abs().max() <= 1 and torch.allclose(resized, expected, atol=0.02)  # its steps are of 2 / 255


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "image: expected a picture, found an empty list"),
        (None, "image: expected a picture, its file, an array or a tensor, found None"),
        (torch.zeros(2, 3, dtype=torch.int64), "picture: expected bool, uint8, uint16 or float values, found int64"),
        (torch.zeros(8), "image: expected a tensor [C, H, W] or [N, C, H, W], found [8] of torch.float32"),
        (torch.zeros(3, 4, 4) + 0j, "found [3, 4, 4] of torch.complex64"),
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

    (tmp_path / "deep").mkdir()
    whole = file_hash(tmp_path)
    (tmp_path / "deep" / "c.png").write_bytes(b"")
    assert file_hash(tmp_path) != whole and file_hash(tmp_path / "deep") != hashlib.sha256(b"").hexdigest()
    (tmp_path / "deep" / "c.png").rename(tmp_path / "deep" / "d.png")
    named = file_hash(tmp_path)
    (tmp_path / "deep" / "d.png").unlink()
    assert named != whole == file_hash(tmp_path)
    sources = [str(file), file, picture(), np.zeros((4, 4)), torch.zeros(2, 3, 4, 4)]
    assert paths_of(sources) == [str(file), str(file), None, None, None, None]
    assert paths_of(torch.zeros(3, 4, 4)) == [None]
