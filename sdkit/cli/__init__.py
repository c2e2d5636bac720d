"""The ``sdkit`` command."""
