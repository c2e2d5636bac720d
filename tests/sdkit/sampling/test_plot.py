"""The noise levels of a plan as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdkit.sampling.plan import Plan
from sdkit.sampling.planning import make_plan
from sdkit.sampling.plot import draw_levels
from sdkit.sampling.schedule import NoiseSchedule


def drawn(plan: Plan) -> Any:
    """The axes that ``draw_levels`` drew into."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_levels(axes, plan.levels, plan.timesteps, plan.draws_noise, plan.title)
    return axes


def marks(axes: Any) -> dict[str, dict[float, float]]:
    """Height by call, of each kind of mark."""
    kinds = (line for line in axes.lines if not line.get_label().startswith("_"))
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in kinds}


def test_plan_is_drawn_as_the_schedule_has_it() -> None:
    """Heights against the noise schedule, through the timesteps: not through what the plan says of its levels."""
    schedule = NoiseSchedule()
    plan = make_plan("ddpm", schedule, 7, timestep_spacing="leading")  # at timestep 0 it draws nothing
    acp = schedule.alphas_cumprod[plan.timesteps.long()]
    axes = drawn(plan)
    found = marks(axes)
    assert set(found) == {"network call that draws noise", "network call", "end, no noise"}
    calls = found["network call that draws noise"] | found["network call"]
    assert sorted(calls) == list(range(7)) and list(found["end, no noise"]) == [7]
    assert np.allclose([calls[k] for k in range(7)], ((1 - acp) / acp).sqrt().numpy(), rtol=1e-9)
    assert list(found["network call"]) == [k for k in range(7) if not plan.draws_noise[k]]
    assert found["end, no noise"][7] == axes.get_ylim()[0] < min(calls.values()), "sigma 0 lies on the edge"
    assert axes.get_yscale() == "log" and axes.lines[6].get_linestyle() == ":" != axes.lines[5].get_linestyle()
    top = axes.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == [f"{t:.0f}" for t in plan.timesteps]


def test_plan_without_signal_and_plan_without_calls() -> None:
    dark = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    axes = drawn(make_plan("ddim", dark, 5))
    first, second, *_ = marks(axes)["network call"].values()
    assert first == axes.get_ylim()[1] and math.isfinite(first) and first > second
    assert axes.lines[0].get_linestyle() == ":"
    assert set(marks(drawn(make_plan("ddim", NoiseSchedule(), 5, strength=0.0)))) == {"end"}
    assert make_plan("heun", NoiseSchedule(), 60).plot().size == (880, 462)


def test_plot_is_written_too(tmp_path: Path) -> None:
    plan = make_plan("euler", NoiseSchedule(), 4)
    picture = plan.plot(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(picture))
    assert not np.array_equal(np.asarray(picture), np.asarray(make_plan("heun", NoiseSchedule(), 4).plot()))
