"""The errors that a user can cause. The command line prints them as one line and exits with status 1."""

import errno
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters, tab and line feed aside, and lone surrogates as they are written in Python: a
    name in a file cannot colour or clear the terminal that it is shown on."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class SDKitError(Exception):
    """Base of every error whose message is meant for the user: what was expected, what was found, where."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(SDKitError, ValueError):
    """A configuration or an argument that has no meaning."""


class CheckpointError(SDKitError, ValueError):
    """A file that is missing, damaged, of another format, or made for another network."""


class NumericalError(SDKitError, ArithmeticError):
    """Non-finite latents or pixels; the message names the stage."""


_FULL = "make room, or write elsewhere"
_PERMISSIONS = "change its permissions, or choose another place"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "write to a file system that takes larger files",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "a folder is in the way, choose another name",
    errno.ENOTDIR: "a file is where a folder should be, choose another place",
    errno.EEXIST: "something is in the way, choose another name",
    errno.ENOTEMPTY: "a folder is in the way, choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links that lead to each other, choose another place",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "the disk or its connection fails",
}
"""What a user can do about an error of the operating system, by its number."""

_TORCH_WRITER = re.compile(r"PytorchStreamWriter|file write failed|unexpected pos \d+")
_TORCH_READER = re.compile(r"PytorchStreamReader|failed finding central directory")
_TORCH_FOLDER = re.compile(r"Parent directory .* does not exist|File .* cannot be opened")
_RUST_NUMBER = re.compile(r"Os \{ code: (\d+)|os error (\d+)")  # as safetensors passes it on


def one_line(error: BaseException) -> str:
    """The error's message in one line of at most 200 characters; of a file's error what to do about it as well."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _with_remedy(error, " ".join(text.split())[:200] or type(error).__name__)


def file_problem(error: BaseException) -> str | None:
    """An error about a file as one line that names the file and the remedy; None for any other error.

    Errors about files are those of the operating system, and the RuntimeErrors of torch's readers and writers.
    """
    others = ConnectionError | ChildProcessError | ProcessLookupError | TimeoutError | InterruptedError
    if isinstance(error, OSError) and not isinstance(error, others):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {one_line(error)}" if names else one_line(error)
    if isinstance(error, RuntimeError) and any(
        p.search(str(error)) for p in (_TORCH_WRITER, _TORCH_READER, _TORCH_FOLDER)
    ):
        return one_line(error)
    return None


def _with_remedy(error: BaseException, text: str) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        remedy = REMEDIES.get(error.errno)
        return text if remedy is None else f"{text}: {remedy}"
    if (number := _RUST_NUMBER.search(text)) and (remedy := REMEDIES.get(int(number[1] or number[2]))):
        return f"{text}: {remedy}"
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
        return f"{text}: not all of it could be written: {_FULL}"
    return text
