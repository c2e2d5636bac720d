"""Garbage collection rests during imports, and goes on afterwards."""

import gc

import pytest

from sdkit.importing import quick_imports


@pytest.mark.parametrize("on", [True, False])
def test_garbage_collection_rests_and_is_as_it_was(on: bool) -> None:
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == on
    finally:
        gc.enable()
