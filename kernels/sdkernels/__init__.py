"""The hot operations of latent diffusion, each with a plain PyTorch definition in ``reference.py``.

Every op of ``reference.__all__`` is a name here: the public function of the file of that name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import reference
from .backend import BACKENDS, UnsupportedError, backend, current, fuses, reference_only

if TYPE_CHECKING:
    from .reference import *  # noqa: F403  # the ops have their definitions' signatures


def _op(name: str) -> Any:
    try:
        return getattr(import_module(f".{name}", __name__), name)
    except ModuleNotFoundError as error:  # triton is published for Linux alone; elsewhere the definitions run
        if error.name != "triton":
            raise
        return reference_only(getattr(reference, name))


globals().update({name: _op(name) for name in reference.__all__})

__all__ = ["BACKENDS", "UnsupportedError", "backend", "current", "fuses", "reference"]
__all__ += reference.__all__
