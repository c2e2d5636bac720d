"""``python -m sdkit`` is the ``sdkit`` command."""

from sdkit.cli.main import main

if __name__ == "__main__":
    main()
