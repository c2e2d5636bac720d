"""Batches larger than memory."""

import pytest
import torch

from sdkit.generation.splitting import BatchSplitter


def run(splitter: BatchSplitter, count: int, memory: int) -> list[list[int]]:
    """What a network sees that has memory for ``memory`` images."""
    images = list(range(count))

    def call(part: slice) -> list[int]:
        if part.stop - part.start > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images[part]

    return splitter.run(call, count)


def test_parts_have_the_size_asked_for() -> None:
    assert run(BatchSplitter(None), 5, memory=9) == [[0, 1, 2, 3, 4]]
    assert run(BatchSplitter(2), 5, memory=9) == [[0, 1], [2, 3], [4]]
    assert run(BatchSplitter(8), 3, memory=9) == [[0, 1, 2]]


def test_parts_are_halved_where_memory_runs_out_and_stay_so() -> None:
    splitter = BatchSplitter(None)
    with pytest.warns(UserWarning, match="out of memory with 5 images at once; going on with 2"):
        assert run(splitter, 5, memory=2) == [[0, 1], [2, 3], [4]]
    assert run(splitter, 5, memory=2) == [[0, 1], [2, 3], [4]]


def test_one_image_too_large_and_fixed_parts_are_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        run(BatchSplitter(None), 2, memory=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(BatchSplitter(None, fixed=True), 2, memory=1)
