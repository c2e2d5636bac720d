"""Depth from a picture alone, by the network that a depth checkpoint brings with it (transformers' DPT)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sdkit.errors import CheckpointError, one_line
from sdkit.images.pixels import to_pil

# The first fusion layer has nothing to add a residual to, and published files leave these weights out.
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."


@contextmanager
def _without_bar() -> Generator[None]:
    """Without transformers' bar over the weights that it loads."""
    from transformers.utils import logging

    shown: bool = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class DepthEstimator:
    """A depth network of transformers (DPT) with its own preprocessing, from a diffusers folder.

    ``parts``: "depth_estimator" and "feature_extractor" of `sdkit.checkpoints.components.Components.extra`. It runs
    in float32, as DPT's batch norms overflow in float16. Raises CheckpointError when it cannot be loaded.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        import transformers

        missing = [name for name in ("depth_estimator", "feature_extractor") if name not in parts]
        if missing:
            raise CheckpointError(f"depth_map: this checkpoint has no {' and no '.join(missing)}, so give a depth map")
        folder, kind = (str(parts["depth_estimator"][key]) for key in ("path", "class"))
        if kind != "DPTForDepthEstimation":
            raise CheckpointError(f"{folder}: expected DPTForDepthEstimation, found {kind}")

        # transformers 5 has the Pillow form under a name of its own; the other one needs torchvision.
        processor: Any = getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor
        try:
            self.processor = processor.from_pretrained(parts["feature_extractor"]["path"], local_files_only=True)
            load: Any = transformers.DPTForDepthEstimation.from_pretrained
            with _without_bar():
                network, info = load(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # transformers raises errors of many classes for damaged folders
            raise CheckpointError(f"{Path(folder).parent}: not a depth estimator ({one_line(error)})") from None

        if absent := sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED)):
            raise CheckpointError(f"{folder}: {len(absent)} missing keys, the first {absent[0]}")
        self.network: Any = network.eval()

    @torch.no_grad()
    def estimate(self, pictures: Tensor, device: torch.device) -> Tensor:
        """Inverse depth [N, h, w], larger nearer, of pictures [N, 3, H, W] in [-1, 1]; h and w are the network's."""
        pixels = self.processor(images=to_pil(pictures, "depth estimator"), return_tensors="pt").pixel_values
        return cast("Tensor", self.network.to(device)(pixels.to(device)).predicted_depth)
