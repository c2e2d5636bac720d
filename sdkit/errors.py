"""The errors that a user can cause. The command line prints them as one line and exits with status 1."""


class SDKitError(Exception):
    """Base of every error whose message is meant for the user: what was expected, what was found, where."""


class ConfigError(SDKitError, ValueError):
    """A configuration or an argument that has no meaning."""


class CheckpointError(SDKitError, ValueError):
    """A file that is missing, damaged, of another format, or made for another network."""


class NumericalError(SDKitError, ArithmeticError):
    """Non-finite latents or pixels; the message names the stage."""


def one_line(error: BaseException) -> str:
    """The error's message in one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
