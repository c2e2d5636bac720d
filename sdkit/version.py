"""The version, which pyproject.toml and every picture's metadata take from here."""

__version__ = "0.1.0"
