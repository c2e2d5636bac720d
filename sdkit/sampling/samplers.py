"""All samplers by name. Each is one function and one row, in `single_step` or `multistep`."""

from __future__ import annotations

from collections.abc import Mapping

from sdkit.sampling.multistep import MULTISTEP
from sdkit.sampling.single_step import SINGLE_STEP
from sdkit.sampling.steps import Sampler

SAMPLERS: Mapping[str, Sampler] = {**SINGLE_STEP, **MULTISTEP}
