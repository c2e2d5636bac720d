"""What a pickle's classes and functions become where they are not looked up."""

from __future__ import annotations

from typing import Any, Self, cast


class Stub:
    """Stands for an object, class or function of a pickle that is not looked up. It takes everything, does nothing."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


def stub_of(module_name: str, global_name: str) -> type[Stub]:
    """A class of its own for a global of a pickle, which says where it came from."""
    return cast("type[Stub]", type("Stub", (Stub,), {"origin": f"{module_name}.{global_name}"}))
