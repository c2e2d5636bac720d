"""The losses of a run: collected without making the GPU wait, checked, drawn, and shown in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdkit.errors import ConfigError, NumericalError
from sdkit.files import replacing, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator


class Row(NamedTuple):
    """One optimizer step: its number from 1, the mean loss, the gradient's norm before clipping, the learning rate."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


class History:
    """The rows of a run. What ``add`` gets stays on the device until ``collect``."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)
        self._waiting: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Take a step's figures; a GPU need not have computed them yet."""
        self._waiting.append((step, loss, norm, rate))

    def collect(self, accelerator: Accelerator) -> list[Row]:
        """The rows since the last call, losses averaged over all processes.

        Raises NumericalError for a loss that is not finite, and for such a gradient, unless a gradient scaler has seen
        to it.
        """
        if not self._waiting:
            return []

        both = torch.stack([torch.stack([loss, norm.to(loss)]) for _, loss, norm, _ in self._waiting])
        figures: Any = accelerator.reduce(both, reduction="mean")
        rows = [
            Row(step, loss, norm, rate)
            for (step, _, _, rate), (loss, norm) in zip(self._waiting, figures.tolist(), strict=True)
        ]

        for row in rows:
            if not np.isfinite(row.loss):
                raise NumericalError(f"training: the loss of step {row.step} is {row.loss}")
            if not np.isfinite(row.grad_norm) and accelerator.scaler is None:
                raise NumericalError(f"training: the norm of the gradient of step {row.step} is {row.grad_norm}")

        self.rows += rows
        self._waiting = []
        return rows

    def recent(self, count: int = 50) -> float:
        """The mean of the last losses."""
        return float(np.mean([row.loss for row in self.rows[-count:]]))

    def write_csv(self, path: Path) -> None:
        """A row a step, below the columns' names; every digit of the numbers."""
        lines = [",".join(Row._fields), *(",".join(map(repr, row)) for row in self.rows)]
        write_text(path, "\n".join(lines) + "\n")

    def draw(self, path: Path) -> None:
        """The loss curve as a PNG file: every step faintly, and its running mean."""
        from matplotlib.figure import Figure

        steps, losses = [row.step for row in self.rows], np.array([row.loss for row in self.rows])
        window = max(1, len(losses) // 20)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")

        axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
        axes.plot(steps, losses, color="#9db4c8", linewidth=0.8, label="each step")
        axes.plot(steps[window - 1 :], mean, color="#b8462f", linewidth=1.8, label=f"mean of {window}")
        axes.set(xlabel="step", ylabel="loss", title=f"{len(steps)} steps")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)

        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


class Board:
    """Sample sheets as files, and all of it in TensorBoard if ``report_to`` says so.

    sheets: the files' path below ``output``, made by ``str.format`` from ``step``.
    step: how many steps are done; what TensorBoard has of later ones, out of a session that was killed, goes.
    main: whether this is the process that writes.
    """

    def __init__(self, output: Path, sheets: str, report_to: str, step: int, main: bool) -> None:
        self.output, self.sheets, self.writer = output, sheets, None
        if report_to == "tensorboard" and main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("report_to: tensorboard is not installed (pip install tensorboard)") from None
            self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def losses(self, rows: Sequence[Row]) -> None:
        """Show these steps in TensorBoard."""
        if self.writer is not None:
            for row in rows:
                for name in ("loss", "grad_norm", "learning_rate"):
                    self.writer.add_scalar(f"train/{name}", getattr(row, name), row.step)

    def sheet(self, step: int, sheet: Image.Image | None) -> None:
        """Keep a sample sheet; None comes from processes that drew none."""
        if sheet is None:
            return

        file = self.output / self.sheets.format(step=step)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            sheet.save(temporary, format="PNG")
        if self.writer is not None:
            self.writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
