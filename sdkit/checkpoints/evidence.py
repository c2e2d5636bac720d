"""What a single file's noise predictor was trained for: its prediction type and noise schedule.

The weights do not tell. What may tell is weighed in one order, the first that says a fact decides it: the caller's
arguments, a ``.yaml`` file beside the checkpoint, our own metadata, ModelSpec's and kohya's metadata, marker keys, the
schedule's own tensors in the file, the preset for the network's shape.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sdkit.errors import CheckpointError, ConfigError, one_line, printable
from sdkit.files import parse_json
from sdkit.sampling.schedule import NoiseSchedule

logger = logging.getLogger(__name__)

MARKERS = ("v_pred", "ztsnr")
"""Keys without a meaning as weights, by which ComfyUI and A1111 know v prediction and zero terminal SNR."""

SCHEDULE = "alphas_cumprod"

PREDICTIONS = {
    "epsilon": ("epsilon", "eps", "noise"),
    "v_prediction": ("v", "v_prediction", "v_pred", "velocity"),
    "sample": ("sample", "x0", "x_start"),
}
"""Prediction types with the ways in which files spell them."""

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class Evidence:
    """One source, and what it says: any of "prediction_type", "rescale_betas_zero_snr" and "betas" (a dict of
    diffusers' keys)."""

    source: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_preset: bool = False


def first_to_say(name: str, sources: list[Evidence]) -> Evidence | None:
    """The first source that says this fact."""
    return next((found for found in sources if name in found.facts), None)


def decide(sources: list[Evidence], where: str) -> dict[str, Any]:
    """diffusers' scheduler keys, each from the first source that says it; all of them are logged.

    A source that is overruled by one above it is a warning, but for a preset, which is there to be overruled.
    """
    values: dict[str, Any] = {}
    for found in sources:
        if found.facts:
            logger.info("%s: %s says %s", where, found.source, printable(_in_words(found.facts)))
        for name, value in found.facts.items():
            first = first_to_say(name, sources) or found
            values[name] = first.facts[name]
            if _differ(value, values[name]) and not found.is_preset:
                heard = f"{name} is {_in_words(values[name])} by {first.source}"
                logger.warning(
                    "%s: %s; %s says %s, which is not used", where, heard, found.source, printable(_in_words(value))
                )

    return values.pop("betas", {}) | values


def _differ(value: Any, other: Any) -> bool:
    """Whether two sources contradict each other; a key of betas that is None says nothing."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        pair = (cast("Mapping[str, Any]", betas) for betas in (value, other))
        value, other = ({k: v for k, v in betas.items() if v is not None} for betas in pair)
    return value != other


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_in_words(v)}" for k, v in cast("Mapping[str, Any]", value).items() if v is not None)
    return f"[{len(cast('list[Any]', value))} values]" if isinstance(value, list | tuple) else str(value)


# The sources


def from_arguments(prediction_type: str | None, zero_snr: bool | None) -> Evidence:
    """Raises ConfigError for an unknown prediction type."""
    if prediction_type not in (None, *PREDICTIONS):
        raise ConfigError(f"prediction_type: expected {', '.join(PREDICTIONS)}, found {prediction_type!r}")
    facts = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    return Evidence("the argument", {name: value for name, value in facts.items() if value is not None})


def from_sidecar(path: Path) -> Evidence:
    """The ``.yaml`` (or ``.yml``) of the same name: original Stable Diffusion's training configuration.

    Another kind of YAML is a warning. Raises CheckpointError for a configuration that says what is not understood.
    """
    file = next((file for ending in (".yaml", ".yml") if (file := path.with_suffix(ending)).is_file()), None)
    if file is None:
        return Evidence("a sidecar")

    import yaml

    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["params"]
        given = cast("dict[str, Any]", dict(model))
    except (yaml.YAMLError, LookupError, TypeError, ValueError):  # UnicodeDecodeError is a ValueError
        logger.warning("%s: not used: expected model: params: …, as beside original checkpoints", file)
        return Evidence("a sidecar")

    # What it leaves out is the original's default: its training code says "eps".
    facts: dict[str, Any] = {"prediction_type": _prediction(given.get("parameterization", "eps"), str(file))}
    names = ("rescale_betas_zero_snr", "zero_terminal_snr", "zero_snr", "ztsnr", "use_zsnr")
    facts["rescale_betas_zero_snr"] = next((_is_true(given[name]) for name in names if name in given), None)
    if given.keys() & {"linear_start", "linear_end", "timesteps", "beta_schedule"}:
        facts["betas"] = _betas_of_yaml(given, str(file))
    return Evidence(file.name, {name: value for name, value in facts.items() if value is not None})


def _betas_of_yaml(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With original Stable Diffusion's defaults; its "linear" is linear in the root, "sqrt_linear" in beta itself."""
    kinds = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
    kind = given.get("beta_schedule", "linear")
    if kind not in kinds:
        raise CheckpointError(f"{where}: beta_schedule: expected {', '.join(kinds)}, found {kind!r}")
    try:
        betas: dict[str, Any] = {
            "num_train_timesteps": int(given.get("timesteps", 1000)),
            "beta_start": float(given.get("linear_start", 1e-4)),
            "beta_end": float(given.get("linear_end", 2e-2)),
            "beta_schedule": kinds[kind],
            "trained_betas": None,
        }
        NoiseSchedule(**betas)
    except (TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{where}: timesteps, linear_start, linear_end: {one_line(error)}") from None
    return betas


def from_own_metadata(scheduler: Mapping[str, Any] | None) -> Evidence:
    """The scheduler configuration that we wrote into the file."""
    if scheduler is None:
        return Evidence("sdkit_config")
    facts = {name: scheduler[name] for name in ("prediction_type", "rescale_betas_zero_snr") if name in scheduler}
    betas = {name: scheduler.get(name) for name in BETAS if name in scheduler}
    return Evidence("sdkit_config", facts | ({"betas": betas} if betas else {}))


def from_metadata(metadata: Mapping[str, str], where: str) -> Evidence:
    """ModelSpec's keys ("modelspec." or "modelspec_" before them) and kohya's ("ss_").

    A prediction type that is not understood is a warning. An architecture tells it for Stable Diffusion 2 alone.
    """
    own = {re.sub(r"^modelspec[._]|^ss_", "", key.lower()): str(value).strip() for key, value in metadata.items()}
    said = next((own[key] for key in ("prediction_type", "predict_type", "parameterization") if own.get(key)), None)

    prediction = None
    try:
        prediction = _prediction(said, where)
    except CheckpointError as error:
        logger.warning("%s", printable(str(error)))
    if prediction is None:
        architecture = own.get("architecture", "") + " " + own.get("base_model_version", "")
        is_v = re.search(r"v2[-_.\w]*768[-_]?v|v2[-_.\w]*[-_]v\b|v_?2_v\b", architecture.lower())
        is_epsilon = re.search(r"stable[-_ ]diffusion[-_ ]v2[-_.\w]*512", architecture.lower())
        prediction = "v_prediction" if is_v else "epsilon" if is_epsilon else None
    if prediction is None and _is_true(own.get("v_parameterization", "")):
        prediction = "v_prediction"

    zero = next((_is_true(own[key]) for key in ("zero_terminal_snr", "ztsnr", "zsnr") if own.get(key)), None)
    facts = {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    return Evidence("metadata", {name: value for name, value in facts.items() if value is not None})


def from_markers(state: Mapping[str, Tensor]) -> Evidence:
    facts: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in state else {}
    return Evidence("marker keys", facts | ({"rescale_betas_zero_snr": True} if "ztsnr" in state else {}))


def from_schedule(state: Mapping[str, Tensor], where: str) -> Evidence:
    """The file's own ``alphas_cumprod``, as one of the formulas, or as a table where none fits.

    A schedule that ends at zero SNR also tells that the network does not predict epsilon. One that is no schedule is a
    warning.
    """
    table = state.get(SCHEDULE)
    if table is None:
        return Evidence(SCHEDULE)

    acp = table.flatten().double()
    falls = bool((acp[1:] < acp[:-1] + 1e-9).all())
    if len(acp) < 2 or not falls or not 0 < float(acp[0]) <= 1 or float(acp[-1]) < -1e-9:
        logger.warning("%s: %s is no noise schedule, so it is not used", where, SCHEDULE)
        return Evidence(SCHEDULE)

    known = next(_fitting(acp, table.dtype), None)
    if known is None:
        betas = (1 - acp / torch.cat([acp.new_ones(1), acp[:-1]])).clamp(0, 1)
        known = {"num_train_timesteps": len(acp), "trained_betas": betas.tolist()}, False
        logger.warning("%s: %s follows no known formula, so it is used as a table", where, SCHEDULE)

    betas, zero = known
    facts: dict[str, Any] = {"betas": betas, "rescale_betas_zero_snr": zero}
    return Evidence(SCHEDULE, facts | ({"prediction_type": "v_prediction"} if float(acp[-1]) < 1e-6 else {}))


def _fitting(acp: Tensor, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], bool]]:
    """The schedules, and whether they are rescaled to zero SNR, whose table this is, rounded to ``dtype``."""
    precision = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 2e-5)
    own = (float(1 - acp[0]), float(1 - acp[-1] / acp[-2]))
    plain = (float(f"{own[0]:.3g}"), float(f"{own[1]:.3g}"))  # as someone would write them
    for start, end in ((0.00085, 0.012), (0.0001, 0.02), (0.0015, 0.0155), (0.0015, 0.0195), plain, own):
        for kind, zero in product(("scaled_linear", "linear"), (False, True)):
            if not 0 < start <= end < 1:
                continue
            values: dict[str, Any] = {"num_train_timesteps": len(acp), "beta_start": start, "beta_end": end}
            values |= {"beta_schedule": kind, "trained_betas": None}
            schedule = NoiseSchedule(**values, rescale_betas_zero_snr=zero)
            if torch.allclose(schedule.alphas_cumprod, acp, rtol=precision, atol=1e-6):
                yield values, zero


def _is_true(said: Any) -> bool:
    return str(said).strip().lower() in ("true", "1", "yes", "on")


def _prediction(said: Any, where: str) -> str | None:
    """The prediction type that is spelled so. Raises CheckpointError for a word that is none."""
    if said is None:
        return None
    word = str(said).strip().lower().replace("-", "_")
    known = next((name for name, spellings in PREDICTIONS.items() if word in spellings), None)
    if known is None:
        raise CheckpointError(f"{where}: prediction type: expected {', '.join(PREDICTIONS)}, found {said!r}")
    return known


def own_configs(metadata: Mapping[str, str], where: str, *parts: str) -> dict[str, Any] | None:
    """The configurations that we wrote into a file's metadata, of ``parts`` and others; None where we wrote none.

    Raises CheckpointError when they are damaged.
    """
    if "sdkit_config" not in metadata:
        return None
    configs = parse_json(metadata["sdkit_config"], f"{where}: the metadata sdkit_config is damaged", CheckpointError)
    if not isinstance(configs, dict) or not all(isinstance(configs.get(part), dict) for part in parts):  # pyright: ignore[reportUnknownMemberType]
        raise CheckpointError(f"{where}: the metadata sdkit_config is damaged")
    return cast("dict[str, Any]", configs)
