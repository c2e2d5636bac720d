"""Schedulers of somebody else's told by a table: diffusers' own and odd ones, step by step beside themselves."""

import copy
import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.sampling import probed_step
from sdkit.sampling.probed_step import ProbedStep
from sdkit.sampling.probing import attributes
from tests.conftest import draw, relative_error
from tests.sdkit.tiny import SCHEDULE

SHAPE = (2, 4, 4, 6)
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "prediction_type": "v_prediction"}
TOLD: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="sample"),
    "ddim inverse": lambda: diffusers.DDIMInverseScheduler(**SCHEDULE, clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False),
    "pndm": lambda: diffusers.PNDMScheduler(**SCHEDULE),
    "plms": lambda: diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**SCHEDULE),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE),
    "euler zero snr": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE, **ZERO_SNR),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**SCHEDULE),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(**SCHEDULE),
    "kdpm2 ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**SCHEDULE),
    "dpm 1": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE, solver_order=1),
    "dpm 2": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE),
    "dpm 3": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE, solver_order=3),
    "dpm sde": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE, **SDE),
    "dpm singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**SCHEDULE, lower_order_final=True),
    "unipc 2": lambda: diffusers.UniPCMultistepScheduler(**SCHEDULE),
    "unipc 3": lambda: diffusers.UniPCMultistepScheduler(**SCHEDULE, solver_order=3),
    "deis": lambda: diffusers.DEISMultistepScheduler(**SCHEDULE),
    "sa solver": lambda: diffusers.SASolverScheduler(**SCHEDULE),
    "lcm": lambda: diffusers.LCMScheduler(**SCHEDULE, clip_sample=False),
    "tcd": lambda: diffusers.TCDScheduler(**SCHEDULE),
    "edm euler": lambda: diffusers.EDMEulerScheduler(),
}
UNTOLD: dict[str, Callable[[], Any]] = {
    "clipped ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=True, clip_sample_range=1000.0),
    "clipped lcm": lambda: diffusers.LCMScheduler(**SCHEDULE, clip_sample=True),
    "thresholding ddpm": lambda: diffusers.DDPMScheduler(**SCHEDULE, thresholding=True),
    "thresholding dpm": lambda: diffusers.DPMSolverMultistepScheduler(**SCHEDULE, thresholding=True),
}


def probed(scheduler: Any) -> Any:
    scheduler.step = ProbedStep(scheduler, randn_tensor)
    return scheduler


def pair(scheduler: Any) -> tuple[Any, Any]:
    """A scheduler as it is, and one that is told by a table."""
    return copy.deepcopy(scheduler), probed(scheduler)


def sample(
    scheduler: Any,
    steps: int = 6,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    device: str = "cpu",
    **more: Any,
) -> list[Tensor]:
    """The latents after each step, as a pipeline makes them; predictions are the same each time."""
    scheduler.set_timesteps(steps, **{} if device == "cpu" else {"device": device})
    times = scheduler.timesteps[first * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * scheduler.order)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(seed), "eta": 0.6} | more

    latents = [draw("start", SHAPE).to(device, dtype) * float(scheduler.init_noise_sigma)]
    for k, t in enumerate(times):
        scheduler.scale_model_input(latents[-1], t)
        given = {name: value for name, value in options.items() if name in accepted}
        result = scheduler.step(draw(f"{k}", SHAPE).to(device, dtype), t, latents[-1], **given, return_dict=False)
        latents.append(result[0])
    return latents


def told(scheduler: Any) -> int:
    """How many steps of the present run were rows of a table."""
    assert scheduler.step.why_not is None, scheduler.step.why_not
    return 0 if scheduler.step.run is None else len(scheduler.step.run.given)


def same_attributes(plain: Any, ours: Any, bound: float) -> None:
    expected, found = attributes(plain), attributes(ours)
    assert found.spec == expected.spec
    for a, b in zip(expected.leaves, found.leaves, strict=True):
        if isinstance(a, Tensor) and a.dim() > 1:
            assert relative_error(b.double(), a.double()) < bound
        else:
            assert repr(a) == repr(b)


@pytest.mark.parametrize("name", TOLD)
def test_schedulers_of_diffusers_told_by_a_table(name: str):
    """Two pictures, whole and from a start on the way; all that a scheduler shows of itself is as in its own steps."""
    plain, ours = pair(TOLD[name]())
    before = torch.get_rng_state()
    for first in (0, 0, 2):
        expected, found = sample(plain, first=first), sample(ours, first=first)
        assert told(ours) == len(expected) - 1
        for a, b in zip(expected, found, strict=True):
            assert relative_error(b, a) < 5e-5
        same_attributes(plain, ours, 5e-5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["ddim", "euler", "plms", "dpm sde", "heun"])
def test_half_precision(name: str):
    plain, ours = pair(TOLD[name]())
    expected, found = sample(plain, dtype=torch.bfloat16), sample(ours, dtype=torch.bfloat16)
    assert told(ours) == len(expected) - 1
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.bfloat16 and relative_error(b.double(), a.double()) < 0.02
    ours.step.end()
    assert [getattr(a, "dtype", None) for a in attributes(plain).leaves] == [
        getattr(a, "dtype", None) for a in attributes(ours).leaves
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("seeded_on", ["cpu", "cuda"])
def test_on_a_gpu(name: str, seeded_on: str):
    plain, ours = pair(TOLD[name]())
    for _ in range(2):
        expected, found = (
            sample(each, dtype=torch.float16, device="cuda", generator=torch.Generator(seeded_on).manual_seed(3))
            for each in (plain, ours)
        )
        assert told(ours) == len(expected) - 1
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == torch.float16 and relative_error(b.double(), a.double()) < 0.02
    ours.step.end()
    for a, b in zip(attributes(plain).leaves, attributes(ours).leaves, strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)


@pytest.mark.parametrize("name", UNTOLD)
def test_schedulers_that_are_no_linear_map_stay_as_they_are(name: str):
    plain, ours = pair(UNTOLD[name]())
    for a, b in zip(sample(plain), sample(ours), strict=True):
        assert torch.equal(a, b)
    assert "linear" in ours.step.why_not and ours.step.run is None
    same_attributes(plain, ours, 1e-12)


class Custom:
    """A scheduler of nobody's: the weighted mean of the last two predictions moves the latents."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self) -> None:
        self.kept: dict[str, list[Any]] = {"earlier": [None]}
        self.weights = torch.linspace(1, 2, 50)

    def odd(self, x: Tensor, p: Tensor) -> Tensor:
        return x

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(10 * steps, 0, -10)
        self.kept, self.count = {"earlier": [None]}, 0

    def scale_model_input(self, x: Tensor, t: Any) -> Tensor:
        return x

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: Any = True):
        earlier = self.kept["earlier"][0]
        mean = model_output if earlier is None else 1.5 * model_output - 0.5 * earlier
        self.kept, self.count = {"earlier": [model_output]}, self.count + 1
        return (self.odd(sample, mean) - 0.1 * self.weights[self.count] * mean,)


def custom(odd: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
    return type("Odd", (Custom,), {"odd": odd})()


class Remembering(Custom):
    """One that goes on from what a run before has left, and from its own last result whatever it is given."""

    last: Tensor | None = None

    def set_timesteps(self, steps: int) -> None:
        self.timesteps, self.count = torch.arange(10 * steps, 0, -10), 0

    def odd(self, x: Tensor, p: Tensor) -> Tensor:
        return x if self.last is None else 0.7 * x + 0.3 * self.last

    def step(self, *args: Any, **options: Any) -> Any:
        result = super().step(*args, **options)
        self.last = result[0]
        return result


def noisy(_: Any, x: Tensor, p: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)


def in_place(_: Any, x: Tensor, p: Tensor) -> Tensor:
    return x.mul_(0.5)


def keeps(make: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def odd(scheduler: Any, x: Tensor, p: Tensor) -> Tensor:
        scheduler.more = make(scheduler, x)
        return x

    return odd


def fails(scheduler: Any, x: Tensor, p: Tensor) -> Tensor:
    if x.shape != SHAPE:
        raise IndexError("too small")
    return x


LINEAR = {
    "none": lambda _, x, p: x,
    "a factor": lambda _, x, p: 0.9 * x,
    "noise of no generator": noisy,
    "a number that counts": keeps(lambda s, x: s.count * 2),
    "0-d tensors": keeps(lambda s, x: s.weights[s.count]),
    "the latents themselves": keeps(lambda s, x: [x]),
}
ODD = {
    "a curve": (lambda _, x, p: x + 1e-3 * x.tanh(), "no linear map"),
    "a constant": (lambda _, x, p: x + 0.1, "no linear map"),
    "a blur": (lambda _, x, p: (x + x.roll(1, -1)) / 2, "no linear map"),
    "a channel's own factor": (lambda _, x, p: x * torch.ones(x.shape[1]).cumsum(0)[:, None, None], "no linear map"),
    "a norm": (lambda _, x, p: x / (1 + 1e-3 * x.norm()), "no linear map"),
    "randn_like": (lambda _, x, p: x + torch.randn_like(x), "draws by aten.randn_like"),
    "uniform": (lambda _, x, p: x + torch.rand(x.shape), "draws by aten.rand.default"),
    "two normals": (lambda s, x, p: noisy(s, noisy(s, x, p), p), "draws by aten.randn.default again"),
    "one normal for all": (lambda _, x, p: x + torch.randn(1, dtype=x.dtype), "draws by aten.randn.default"),
    "a changed input": (in_place, "changes what it is given"),
    "changed tables": (lambda s, x, p: x * s.weights.mul_(0.99)[0] / s.weights[0], "changes its tables"),
    "an object": (keeps(lambda s, x: object()), "makes a object"),
    "a mean": (keeps(lambda s, x: x.mean()), "depends on the latents"),
    "a number from the latents": (keeps(lambda s, x: float(x.mean())), "depends on the latents"),
    "a table": (keeps(lambda s, x: s.weights * 2), "makes a Tensor that is no latents"),
    "many latents": (keeps(lambda s, x: [x * i for i in range(16)]), "keeps more than 15 latents"),
    "a small tensor's failure": (fails, "IndexError: too small"),
    "a method": (keeps(lambda s, x: s.set_timesteps), "makes a method"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_custom_scheduler(name: str):
    plain, ours = pair(custom(LINEAR[name]))
    torch.manual_seed(0)
    expected = sample(plain)
    torch.manual_seed(0)
    for a, b in zip(expected, sample(ours), strict=True):
        assert relative_error(b, a) < 1e-5
    assert told(ours) == 6
    same_attributes(plain, ours, 1e-5)


def test_a_scheduler_that_remembers():
    plain, ours = pair(Remembering())
    for change in (lambda s, k, given: None, lambda s, k, given: given.update(sample=given["sample"].roll(k, -1))):
        for a, b in zip(walk(plain, change), walk(ours, change), strict=True):
            assert relative_error(b, a) < 1e-5
        assert told(ours) == 6
        same_attributes(plain, ours, 1e-5)


@pytest.mark.parametrize("name", ["heun", "sa solver"])
def test_a_broken_run_does_not_break_the_next(name: str):
    """Schedulers keep latents of the run before; 0 times one that is not finite would not be 0."""
    plain, ours = pair(TOLD[name]())
    for scheduler in (plain, ours):
        scheduler.set_timesteps(4)
        x = torch.full(SHAPE, torch.nan)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(x, t, x).prev_sample
    for a, b in zip(sample(plain), sample(ours), strict=True):
        assert relative_error(b, a) < 5e-5
    sample(plain)
    sample(ours)
    assert told(ours) > 1


@pytest.mark.parametrize("name", ODD)
def test_odd_schedulers_stay_as_they_are_and_say_why(name: str):
    odd, reason = ODD[name]
    plain, ours = pair(custom(odd))
    torch.manual_seed(0)
    expected = sample(plain)
    torch.manual_seed(0)
    for a, b in zip(expected, sample(ours), strict=True):
        assert torch.equal(a, b)
    assert reason in ours.step.why_not


@pytest.mark.parametrize("helper", [object(), print, Custom().step, keeps(lambda s, x: x)])
def test_what_a_scheduler_keeps_at_the_start(helper: Any):
    ours = probed(Custom())
    ours.helper = helper
    sample(ours)
    assert f"keeps a {type(helper).__name__}" in ours.step.why_not


def test_a_mistaken_timestep_is_the_schedulers_error():
    """Euler wants one of its timesteps, not its position."""
    for scheduler in pair(diffusers.EulerDiscreteScheduler(**SCHEDULE)):
        scheduler.set_timesteps(5)
        x = draw("start", SHAPE).float()
        with pytest.raises(ValueError, match="integer indices"):
            scheduler.step(x, 0, x)
        with pytest.raises(IndexError):
            scheduler.step(x, torch.tensor(1e6), x)


# Steps that are the scheduler's own


def walk(scheduler: Any, change: Callable[[Any, int, dict[str, Any]], None]) -> list[Tensor]:
    """Six steps, each of which ``change(scheduler, k, arguments)`` may alter."""
    scheduler.set_timesteps(6)
    latents = [draw("start", SHAPE).float()]
    for k, t in enumerate(scheduler.timesteps):
        arguments = {"model_output": draw(f"{k}", SHAPE).float(), "timestep": t, "sample": latents[-1]}
        arguments |= {"return_dict": False}
        change(scheduler, k, arguments)
        latents.append(scheduler.step(**arguments)[0])
    return latents


CHANGES: dict[str, Callable[[Any, int, dict[str, Any]], None]] = {
    "another option": lambda s, k, a: a.update({"generator": None, "return_dict": True} if k == 3 else {}),
    "a generator on the way": lambda s, k, a: a.update({"generator": torch.Generator()} if k == 3 else {}),
    "another timestep": lambda s, k, a: a.update({"timestep": s.timesteps[0]} if k == 3 else {}),
    "another dtype": lambda s, k, a: a.update({n: a[n].double() for n in ("model_output", "sample")} if k == 3 else {}),
    "one dtype and another": lambda s, k, a: a.update({"model_output": a["model_output"].double()} if k == 3 else {}),
    "one picture": lambda s, k, a: a.update({n: a[n][:1] for n in ("model_output", "sample")} if k == 3 else {}),
    "an attribute": lambda s, k, a: setattr(s, "lower_order_nums", 0) if k == 3 else None,
    "what it keeps": lambda s, k, a: vars(s).update(model_outputs=[None] * 2, lower_order_nums=0) if k == 3 else None,
    "other noise levels": lambda s, k, a: setattr(s, "sigmas", s.sigmas * 1.01) if k == 3 else None,
    "a gradient": lambda s, k, a: a.update({"sample": a["sample"].clone().requires_grad_()} if k == 3 else {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_that_is_not_the_runs_next_is_the_schedulers_own(name: str):
    plain, ours = pair(diffusers.DPMSolverMultistepScheduler(**SCHEDULE))
    expected, found = walk(plain, CHANGES[name]), walk(ours, CHANGES[name])
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        assert relative_error(b.detach(), a.detach()) < 1e-5
    assert ours.step.run is None
    same_attributes(plain, ours, 1e-5)


def test_latents_may_be_any():
    """Those that a callback returns, or changes in place."""
    plain, ours = pair(diffusers.UniPCMultistepScheduler(**SCHEDULE))

    def change(scheduler: Any, k: int, arguments: dict[str, Any]) -> None:
        if k == 2:
            arguments["sample"] = arguments["sample"].roll(1, -1)
        if k == 4:
            arguments["sample"].mul_(0.5)

    for a, b in zip(walk(plain, change), walk(ours, change), strict=True):
        assert relative_error(b, a) < 1e-5
    assert told(ours) == 6


def test_latents_that_were_returned_stay_what_they_are():
    ours = probed(diffusers.DPMSolverMultistepScheduler(**SCHEDULE))
    seen: list[Tensor] = []
    kept = walk(ours, lambda s, k, arguments: seen.append(arguments["sample"].clone()))
    assert told(ours) == 6 and all(torch.equal(a, b) for a, b in zip(seen, kept, strict=False))


def test_numbers_for_timesteps_and_results_by_name():
    plain, ours = pair(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False))
    for scheduler in (plain, ours):
        scheduler.set_timesteps(4)
    x = draw("start", SHAPE).float()
    for k, t in enumerate(plain.timesteps.tolist()):
        p = draw(f"{k}", SHAPE).float()
        expected, found = plain.step(p, t, x), ours.step(p, t, x)
        assert type(found) is type(expected)
        assert relative_error(found.prev_sample, expected.prev_sample) < 1e-5
        assert relative_error(found.pred_original_sample, expected.pred_original_sample) < 1e-5
        x = expected.prev_sample
    assert told(ours) == 4


def test_seeds_draw_what_they_drew():
    plain, ours = pair(diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE))
    for generator in (lambda: [torch.Generator().manual_seed(i) for i in (5, 6)], lambda: None):
        torch.manual_seed(1)
        expected = sample(plain, generator=generator())
        torch.manual_seed(1)
        for a, b in zip(expected, sample(ours, generator=generator()), strict=True):
            assert relative_error(b, a) < 1e-5
        assert told(ours) == 6
    assert relative_error(sample(ours, seed=4)[-1], sample(ours, seed=3)[-1]) > 0.1


# Tables are made once, and cost no look at the device


def test_tables_are_kept_for_the_same_settings():
    ours = probed(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False))
    with patch.object(probed_step, "tabulate", side_effect=probed_step.tabulate) as made:
        sample(ours)
        sample(ours, seed=9)
        assert made.call_count == 1
        for count, settings in enumerate(({"steps": 7}, {"first": 2}, {"eta": 0.1}, {"generator": None}), 2):
            sample(ours, **settings)
            assert made.call_count == count
        ours.register_to_config(prediction_type="v_prediction")
        sample(ours)
        assert made.call_count == 6
        for steps in range(10, 10 + probed_step.MOST_TABLES):
            sample(ours, steps=steps)
        assert len(ours.step.tables) == probed_step.MOST_TABLES


class NoReads(TorchDispatchMode):
    """No number is read off a tensor: on a GPU that would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **kwargs or {})


def test_steps_do_not_read_timesteps():
    plain, ours = pair(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False))
    with pytest.raises(AssertionError), NoReads():
        plain.set_timesteps(6)
        plain.step(draw("p", SHAPE), plain.timesteps[0], draw("x", SHAPE))

    ours.set_timesteps(6)
    x = draw("start", SHAPE).float()
    for k, t in enumerate(ours.timesteps):
        if k == 0:
            x = ours.step(x, t, x, return_dict=False)[0]
        else:
            with NoReads():
                x = ours.step(x, t, x, return_dict=False)[0]
    assert told(ours) == 6


def test_inference_mode_and_copies():
    plain, ours = pair(TOLD["dpm 2"]())
    expected = sample(plain)
    with torch.inference_mode():
        sample(ours)
    assert told(ours) == 6
    copied = copy.deepcopy(ours)
    assert copied.step.scheduler is copied
    for scheduler in (ours, copied):
        for a, b in zip(expected, sample(scheduler), strict=True):
            assert relative_error(b, a) < 1e-5
        assert told(scheduler) == 6
    assert inspect.signature(ours.step) == inspect.signature(plain.step)
