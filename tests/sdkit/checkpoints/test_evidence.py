"""What tells a single file's prediction type and noise schedule, and which of several sources is heard."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.evidence import from_metadata
from sdkit.checkpoints.scheduler_config import read_scheduler_config
from sdkit.checkpoints.single_file import load_single_file, save_single_file
from sdkit.errors import CheckpointError, ConfigError
from sdkit.sampling.schedule import NoiseSchedule
from tests.sdkit.checkpoints.models import use_tiny_presets


@pytest.fixture
def plain(sd1: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The tensors of an SD1 file without any metadata; the presets are shrunk to its size."""
    use_tiny_presets(monkeypatch, sd1)
    save_single_file(sd1, tmp_path / "a.safetensors")
    return load_file(tmp_path / "a.safetensors")


def table(**settings: Any) -> Tensor:
    return NoiseSchedule(**settings).alphas_cumprod


def load(
    path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None, **arguments: Any
) -> NoiseSchedule:
    save_file(state, path, metadata)
    config = load_single_file(path, **arguments).scheduler_config
    return read_scheduler_config(config)[0]


def sidecar(path: Path, **parameters: Any) -> None:
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in parameters.items())
    text = (
        f"model:\n  base_learning_rate: 1.0e-4\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n{lines}"
    )
    path.with_suffix(".yaml").write_text(text)


def test_the_order_of_the_sources(plain: dict[str, Tensor], tmp_path: Path) -> None:
    """For every two: the earlier one's epsilon is taken over the later one's v, and the other way round."""
    for first, second in itertools.combinations(("argument", "sidecar", "metadata", "marker"), 2):
        for said, contrary in (("epsilon", "v_prediction"), ("v_prediction", "epsilon")):
            if second == "marker" and contrary == "epsilon":
                continue  # a marker key says v alone
            path = tmp_path / f"{first}-{second}-{said}.safetensors"
            state, metadata, arguments = dict(plain), {"format": "pt"}, dict[str, Any]()
            for source, value in ((first, said), (second, contrary)):
                if source == "argument":
                    arguments["prediction_type"] = value
                elif source == "sidecar":
                    sidecar(path, parameterization={"epsilon": "eps", "v_prediction": "v"}[value])
                elif source == "metadata":
                    metadata["modelspec.prediction_type"] = value
                else:
                    state["v_pred"] = torch.zeros(0)
            assert load(path, state, metadata, **arguments).prediction_type == said, path.stem


def test_the_log_names_every_source_and_warns_of_those_overruled(
    plain: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "b.safetensors"
    sidecar(path, parameterization="v")
    load(path, plain | {"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"})
    assert "b.yaml says prediction_type v_prediction" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{path}: prediction_type is v_prediction by b.yaml; metadata says epsilon, which is not used"]


@pytest.mark.parametrize("prefix", ["modelspec.", "modelspec_", "ss_", ""])
@pytest.mark.parametrize(
    ("said", "prediction"),
    [("v", "v_prediction"), ("V_Prediction", "v_prediction"), ("v-prediction", "v_prediction"), ("vpred", None),
     ("epsilon", "epsilon"), ("eps", "epsilon"), ("sample", "sample"), ("x0", "sample")],
)  # fmt: skip
def test_spellings_of_the_prediction_type(
    prefix: str, said: str, prediction: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = from_metadata({f"{prefix}prediction_type": said}, "a.safetensors").facts
    assert found == ({"prediction_type": prediction} if prediction else {})
    assert bool(caplog.text) == (prediction is None)


@pytest.mark.parametrize(
    ("metadata", "facts"),
    [
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {"prediction_type": "v_prediction"}),
        ({"modelspec.architecture": "Stable-Diffusion-V2-768-v/lora"}, {"prediction_type": "v_prediction"}),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, {"prediction_type": "epsilon"}),
        ({"modelspec.architecture": "stable-diffusion-v1"}, {}),
        ({"modelspec_architecture": "stable-diffusion-v1/inpainting"}, {}),
        ({"ss_base_model_version": "sd_v2_v"}, {"prediction_type": "v_prediction"}),
        ({"ss_base_model_version": "sd_v2"}, {}),
        ({"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ({"ss_zero_terminal_snr": "True"}, {"rescale_betas_zero_snr": True}),
        ({"ss_zero_terminal_snr": "False"}, {"rescale_betas_zero_snr": False}),
        ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"},
         {"prediction_type": "epsilon"}),
        ({"modelspec.title": "v2-768-v"}, {}),
    ],
)  # fmt: skip
def test_what_metadata_tells(metadata: dict[str, str], facts: dict[str, Any]) -> None:
    assert from_metadata(metadata, "a").facts == facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(beta_schedule="linear", beta_start=0.0015, beta_end=0.0195),
        NoiseSchedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        NoiseSchedule(beta_start=0.0015, beta_end=0.015),
        NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        NoiseSchedule(num_train_timesteps=500),
    ],
)
def test_the_files_own_schedule_is_used(
    plain: dict[str, Tensor], tmp_path: Path, schedule: NoiseSchedule, dtype: torch.dtype
) -> None:
    """Whatever the networks are cast to."""
    acp = schedule.alphas_cumprod.to(dtype)
    for cast in (None, torch.float16):
        found = load(tmp_path / "b.safetensors", plain | {"alphas_cumprod": acp}, dtype=cast)
        assert found.prediction_type == schedule.prediction_type
        precision = 3e-3 if dtype == torch.float16 else 1e-6
        assert torch.allclose(found.alphas_cumprod, schedule.alphas_cumprod, rtol=precision, atol=precision / 10)
        if dtype != torch.float16:
            assert found.trained_betas is None


def test_a_schedule_of_no_formula_is_a_table_with_a_warning(
    plain: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acp = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64) ** 1.7
    found = load(tmp_path / "b.safetensors", plain | {"alphas_cumprod": acp})
    assert torch.allclose(found.alphas_cumprod, acp, rtol=1e-9)
    assert "follows no known formula" in caplog.text


@pytest.mark.parametrize("acp", [torch.zeros(3), torch.linspace(0.1, 0.9, 10), torch.full((5,), torch.nan)])
def test_what_is_no_schedule_is_warned_about(
    plain: dict[str, Tensor], tmp_path: Path, acp: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tmp_path / "b.safetensors", plain | {"alphas_cumprod": acp}) == NoiseSchedule()
    assert "alphas_cumprod is no noise schedule" in caplog.text


def test_zero_snr_by_argument_marker_sidecar_and_schedule(plain: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    dark = {"alphas_cumprod": table(rescale_betas_zero_snr=True)}
    for state, arguments, expected in (
        ({}, {}, False),
        ({}, {"zero_snr": True, "prediction_type": "v_prediction"}, True),
        ({"ztsnr": torch.zeros(0), "v_pred": torch.zeros(0)}, {}, True),
        ({"ztsnr": torch.zeros(0)}, {"zero_snr": False}, False),
        (dark, {}, True),
        (dark, {"zero_snr": False}, False),
    ):
        found = load(path, plain | state, **arguments)
        assert found.rescale_betas_zero_snr == expected and (found.alphas_cumprod[-1] == 0) == expected

    sidecar(path, parameterization="v", zero_snr=True)
    assert load(path, plain).rescale_betas_zero_snr
    sidecar(path, parameterization="v", zero_snr="False")
    assert not load(path, plain).rescale_betas_zero_snr


def test_the_sidecars_betas_are_the_originals(plain: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    sidecar(path, linear_start=0.001, linear_end=0.013, timesteps=900)
    assert load(path, plain) == NoiseSchedule(900, 0.001, 0.013)
    sidecar(path, linear_start=0.001, linear_end=0.013, beta_schedule="sqrt_linear")
    assert load(path, plain) == NoiseSchedule(1000, 0.001, 0.013, "linear")
    assert load(path, plain | {"alphas_cumprod": table()}).beta_schedule == "linear"  # it comes before the table
    sidecar(path, beta_schedule="odd")
    with pytest.raises(CheckpointError, match=r"b\.yaml: beta_schedule: expected"):
        load(path, plain)
    for values in ({"timesteps": 0}, {"linear_start": "x"}, {"linear_start": float("nan")}):
        sidecar(path, **values)
        with pytest.raises(CheckpointError, match=r"b\.yaml: timesteps, linear_start, linear_end: "):
            load(path, plain)


@pytest.mark.parametrize("text", ["[1, 2", "name: a model", "- a", "\x80"])
def test_a_yaml_that_is_no_configuration_is_not_used(
    plain: dict[str, Tensor], tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b.yaml").write_bytes(text.encode("latin1"))
    assert load(tmp_path / "b.safetensors", plain) == NoiseSchedule()
    assert "b.yaml: not used: expected model: params" in caplog.text


def test_our_own_metadata_yields_to_arguments_and_sidecar(sd1: Components, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_single_file(sd1, path)
    assert load_single_file(path).scheduler_config == sd1.scheduler_config
    assert load_single_file(path, prediction_type="sample").scheduler_config["prediction_type"] == "sample"
    changed = load_single_file(path, prediction_type="v_prediction", zero_snr=True).scheduler_config
    assert read_scheduler_config(changed)[0] == NoiseSchedule(
        prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    sidecar(path, parameterization="v")
    assert load_single_file(path).scheduler_config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(("kind", "is_warned"), [("scaled_linear", False), ("linear", True)])
def test_a_schedule_that_our_own_metadata_overrules_is_warned_about(
    kind: str, is_warned: bool, sd1: Components, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_single_file(sd1, path := tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    own = table(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule=kind)

    found = load(path, load_file(path) | {"alphas_cumprod": own.float()}, metadata)
    assert found.beta_schedule == "scaled_linear"
    assert ("alphas_cumprod says num_train_timesteps 1000" in caplog.text) == is_warned


def test_a_preset_that_is_named_comes_before_the_file(plain: dict[str, Tensor], tmp_path: Path) -> None:
    state = plain | {"v_pred": torch.zeros(0)}
    assert load(tmp_path / "b.safetensors", state, preset="sd1").prediction_type == "epsilon"
    assert load(tmp_path / "b.safetensors", state).prediction_type == "v_prediction"


def test_unknown_words_are_refused(plain: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with pytest.raises(ConfigError, match="prediction_type: expected epsilon, v_prediction, sample, found 'v'"):
        load(path, plain, prediction_type="v")
    sidecar(path, parameterization="odd")
    with pytest.raises(CheckpointError, match=r"b\.yaml: prediction type: expected .*found 'odd'"):
        load(path, plain)
