"""The samplers that look back: their registers hold the results of earlier calls.

They are written as those of `single_step`, whose docstring says how; the table of their rows stands at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise

import numpy as np

from sdkit.sampling.levels import Array, Level, basis
from sdkit.sampling.steps import Call, Sampler, Steps


def pndm(steps: Steps) -> Iterator[Call]:
    """Pseudo linear multistep, arXiv 2202.09778, equations 11 and 12, as Stable Diffusion runs it (skip_prk_steps).

    The first step takes two calls: down by one slope, then again by the mean of the slopes at both ends.
    """
    x, start, e1, e2, e3, prediction, _ = basis(5)
    for i in range(steps.num_steps):
        now, after = steps.levels[i], steps.levels[i + 1]
        x0, eps = steps.estimates(i, x, prediction)

        slope = eps
        if i == 1:
            slope = (3 * eps - e1) / 2
        elif i == 2:
            slope = (23 * eps - 16 * e1 + 5 * e2) / 12
        elif i > 2:
            slope = (55 * eps - 59 * e1 + 37 * e2 - 9 * e3) / 24
        latent = after.signal * x0 + after.noise * eps if i == 0 else _along(x, slope, now, after)
        yield steps.call(i, [latent, x, eps, e1, e2], x0)

        if i == 0 and steps.num_steps > 1 and now.signal > 0:  # without signal there is no x0 to hold on to
            x0, eps = steps.estimates(1, x, prediction)
            yield steps.call(1, [_along(start, (e1 + eps) / 2, now, after), start, e1, e2, e3], x0)


def _along(x: Array, eps: Array, now: Level, after: Level) -> Array:
    """The latent at the next level, of the same x0, where epsilon is ``eps`` (DDIM's step)."""
    return after.signal / now.signal * (x - now.noise * eps) + after.noise * eps


def lms(steps: Steps) -> Iterator[Call]:
    """Linear multistep (Adams-Bashforth on uneven steps), as in k-diffusion: the polynomial through the last slopes,
    integrated over sigma."""
    x, *old, prediction, _ = basis(steps.order)
    sigmas = [level.noise for level in steps.levels]
    for i in range(steps.num_steps):
        x0, eps = steps.estimates(i, x, prediction)
        order = min(i + 1, steps.order)
        known = [sigmas[i - j] for j in range(order)]
        nodes, weights = np.polynomial.legendre.leggauss(2)  # exact to degree 3
        middle, half = (sigmas[i + 1] + sigmas[i]) / 2, (sigmas[i + 1] - sigmas[i]) / 2

        step = np.zeros_like(x)
        for j, slope in enumerate([eps, *old][:order]):
            lagrange = np.prod([(middle + half * nodes - s) / (known[j] - s) for s in known if s != known[j]], axis=0)
            step = step + half * np.sum(weights * lagrange) * slope

        yield steps.call(i, [x + step, *[eps, *old][: len(old)]], x0)


def dpmpp(steps: Steps, sde: bool = False) -> Iterator[Call]:
    """Multistep DPM-Solver++, arXiv 2211.01095, algorithm 2 and its SDE form (section 5), of order 1 to 3.

    The first steps are of lower order, and so is the last where it ends at sigma 0; of fewer than 15 steps the last
    is of order 1 and the one before of order 2, as in diffusers. ``sde`` draws at every step, the last too.
    """
    x, *old, prediction, noise = basis(steps.order)
    for i in range(steps.num_steps):
        now, after, left = steps.levels[i], steps.levels[i + 1], steps.num_steps - i
        x0, _ = steps.estimates(i, x, prediction)
        short = steps.num_inference_steps < 15
        order = min(steps.order, i + 1, left if short else 3, 1 if left == 1 and after.noise == 0 else 3)

        h = after.log_snr - now.log_snr
        g = 2 * h if sde else h
        target = -math.expm1(-g) * x0 + _curvature(steps, i, order, g, [x0, *old])
        shrink = after.noise / now.noise * (math.exp(-h) if sde else 1)
        random = after.noise * math.sqrt(-math.expm1(-g)) * noise if sde else 0 * noise
        yield steps.call(i, [shrink * x + after.signal * target + random, *[x0, *old][: len(old)]], x0, draws=sde)


def _curvature(steps: Steps, i: int, order: int, g: float, known: list[Array]) -> Array:
    """The term of DPM-Solver++'s target from the differences between the estimates of x0 at points i, i - 1, ...;
    ``g`` is the step in log SNR, twice that for the SDE."""
    if order == 1:
        return np.zeros_like(known[0])

    lambdas = [steps.levels[i + 1 - j].log_snr for j in range(order + 1)]
    ratios = [(a - b) / (lambdas[0] - lambdas[1]) for a, b in pairwise(lambdas[1:])]
    slope = (known[0] - known[1]) / ratios[0]

    phi1 = -math.expm1(-g)
    phi2 = 1 - phi1 / g
    if order == 2:
        return (phi1 / 2 if steps.solver_type == "midpoint" else phi2) * slope
    bend = (slope - (known[1] - known[2]) / ratios[1]) / (ratios[0] + ratios[1])
    return phi2 * (slope + ratios[0] * bend) + (0.5 - phi2 / g) * bend


def dpmpp_singlestep(steps: Steps) -> Iterator[Call]:
    """Singlestep DPM-Solver++, arXiv 2211.01095, algorithm 1, of order 1 to 3, one call a step.

    The steps come in groups of ``order``: each goes from the group's first point to its own next one, by the estimates
    of x0 at the group's points so far. The last steps are of lower order, as in diffusers.
    """
    x, start, *old, prediction, _ = basis(4)
    orders = _singlestep_orders(steps.num_inference_steps, steps.order, ends_clean=steps.levels[-1].noise == 0)
    for i, wanted in enumerate(orders[steps.num_inference_steps - steps.num_steps :]):
        x0, _ = steps.estimates(i, x, prediction)
        order = min(wanted, i + 1)
        begin = x if order == 1 else start

        first, after = steps.levels[i - order + 1], steps.levels[i + 1]
        lambdas = [steps.levels[i - order + 1 + j].log_snr - first.log_snr for j in range(order)]
        h = after.log_snr - first.log_snr
        known = [*reversed(old[: order - 1]), x0]

        target = -math.expm1(-h) * known[0] + _slopes(lambdas, h, known, steps.solver_type)
        yield steps.call(i, [after.noise / first.noise * begin + after.signal * target, begin, x0, old[0]], x0)


def _singlestep_orders(count: int, order: int, ends_clean: bool) -> list[int]:
    """The order of each of ``count`` steps: whole groups 1, 2, ..., then what is left, and 1 where sigma ends at 0."""
    groups = (count - 1) // order if count % order == 0 else count // order
    rest = [*range(1, order), 1] if count % order == 0 else [*range(1, count % order + 1)]
    orders = [*range(1, order + 1)] * groups + rest
    return [*orders[:-1], 1] if ends_clean else orders


def _slopes(lambdas: list[float], h: float, known: list[Array], solver_type: str) -> Array:
    """The terms of the target beyond the first: of the estimates ``known`` at log SNRs ``lambdas`` from the first."""
    if len(known) == 1:
        return np.zeros_like(known[0])

    phi1 = -math.expm1(-h)
    phi2 = 1 - phi1 / h
    ratios = [value / h for value in lambdas[1:]]
    slopes = [(estimate - known[0]) / ratio for estimate, ratio in zip(known[1:], ratios, strict=True)]
    if len(known) == 2:
        return (phi1 / 2 if solver_type == "midpoint" else phi2) * slopes[0]
    if solver_type == "midpoint":
        return phi2 * slopes[1]

    near, far = ratios
    slope = (far * slopes[0] - near * slopes[1]) / (far - near)
    bend = 2 * (slopes[1] - slopes[0]) / (far - near)
    return phi2 * slope + (0.5 - phi2 / h) * bend


def deis(steps: Steps) -> Iterator[Call]:
    """DEIS, arXiv 2204.13902, the log-rho form: the polynomial in log sigma through the last epsilons, integrated over
    sigma. The first steps are of lower order; of fewer than 15 steps the last ones too."""
    x, *old, prediction, _ = basis(steps.order)
    rhos = [level.noise / level.signal for level in steps.levels]
    for i in range(steps.num_steps):
        now, after = steps.levels[i], steps.levels[i + 1]
        x0, eps = steps.estimates(i, x, prediction)
        order = min(steps.order, i + 1, steps.num_steps - i if steps.num_inference_steps < 15 else 3)

        nodes = [math.log(rhos[i - j] / rhos[i]) for j in range(order)]
        ratio = rhos[i + 1] / rhos[i]
        step = np.zeros_like(x)
        for j, slope in enumerate([eps, *old][:order]):
            step = step + rhos[i] * _integral_over_exp(_lagrange(nodes, j), ratio) * slope

        yield steps.call(i, [after.signal * (x / now.signal + step), *[eps, *old][: len(old)]], x0)


def _lagrange(nodes: list[float], j: int) -> np.polynomial.Polynomial:
    """The polynomial that is 1 at nodes[j] and 0 at the others."""
    others = [node for i, node in enumerate(nodes) if i != j]
    roots = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
    return roots / roots(nodes[j])


def _integral_over_exp(p: np.polynomial.Polynomial, ratio: float) -> float:
    """The integral of p(log u) du from 1 to ``ratio`` >= 0: u (p - p' + p'' - ...) at both ends."""
    inner = sum(((-1) ** k * p.deriv(k) for k in range(1, p.degree() + 1)), p)
    return (ratio * float(inner(math.log(ratio))) if ratio > 0 else 0.0) - float(inner(0.0))


def unipc(steps: Steps) -> Iterator[Call]:
    """UniPC, arXiv 2302.04867, algorithms 1 and 2 on x0: each call first corrects the step that led to it, then
    predicts the next. Of lower order at the start and towards the end."""
    size = steps.order + 2
    x, corrected, *old, prediction, _ = basis(size)
    before = 0  # the order of the predictor that led here
    for i in range(steps.num_steps):
        x0, _ = steps.estimates(i, x, prediction)
        now = x
        if before:
            now = _unified_step(steps, i - 1, before, corrected, old, x0)
        before = min(steps.order, i + 1, steps.num_steps - i)

        history = [x0, *old[:-1]]
        yield steps.call(i, [_unified_step(steps, i, before, now, history, None), now, *history], x0)


def _unified_step(steps: Steps, i: int, order: int, x: Array, known: list[Array], new: Array | None) -> Array:
    """Step from point i to i + 1 with the estimates x0 at points i, i - 1, ... and, to correct, ``new`` at i + 1."""
    now, after = steps.levels[i], steps.levels[i + 1]
    h = after.log_snr - now.log_snr
    phi1 = -math.expm1(-h)
    result = after.noise / now.noise * x + after.signal * phi1 * known[0]

    ratios = [(steps.levels[i - j].log_snr - now.log_snr) / h for j in range(1, order)]
    slopes = [(m - known[0]) / r for m, r in zip(known[1:], ratios, strict=False)]
    if new is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, new - known[0]]
    if not slopes:
        return result

    scale = h if steps.solver_type == "bh1" else phi1
    weights = [0.5]  # of order 2 whatever B is, as in the paper's appendix
    if len(slopes) > 1:
        weights = np.linalg.solve(np.vander(ratios, increasing=True).T, _unified_moments(h, len(slopes)) / scale)
    return result + after.signal * scale * sum(w * d for w, d in zip(weights, slopes, strict=True))


def _unified_moments(h: float, count: int) -> Array:
    """k! phi_(k+1)(-h) h, k = 1, ..., count (the paper's appendix): the integrals of a polynomial's terms."""
    rest, moments = 1 + math.expm1(-h) / h, list[float]()
    for k in range(1, count + 1):
        moments.append(rest)
        rest = 1 - (k + 1) * rest / h
    return np.array(moments)


def _dpmpp(order: int, algorithm: str, a1111: str, comfyui: str, sde: bool = False) -> Sampler:
    """A row for a DPM-Solver++, all of which diffusers has in one class."""
    return Sampler(
        partial(dpmpp, sde=sde),
        "multistep",
        "sigma",
        karras_times="rounded unless cosine",
        orders=(order, *(other for other in (1, 2, 3) if other != order)),
        solver_types=("midpoint", "heun"),
        diffusers="DPMSolverMultistepScheduler",
        algorithm=algorithm,
        a1111=a1111,
        comfyui=comfyui,
    )


MULTISTEP: Mapping[str, Sampler] = {
    "pndm": Sampler(pndm, "table", "table", diffusers="PNDMScheduler", a1111="PLMS"),
    "lms": Sampler(
        lms,
        "sigma",
        "clean",
        exploding=True,
        orders=(4, 1, 2, 3),
        diffusers="LMSDiscreteScheduler",
        a1111="LMS",
        comfyui="lms",
    ),
    "dpmpp_2m": _dpmpp(2, "dpmsolver++", "DPM++ 2M", "dpmpp_2m"),
    "dpmpp_2m_sde": _dpmpp(2, "sde-dpmsolver++", "DPM++ 2M SDE", "dpmpp_2m_sde", sde=True),
    "dpmpp_3m_sde": _dpmpp(3, "sde-dpmsolver++", "DPM++ 3M SDE", "dpmpp_3m_sde", sde=True),
    "dpmpp_2s": Sampler(
        dpmpp_singlestep,
        "multistep",
        "sigma",
        karras_times="rounded",
        orders=(2, 1, 3),
        solver_types=("midpoint", "heun"),
        diffusers="DPMSolverSinglestepScheduler",
        algorithm="dpmsolver++",
    ),
    "deis": Sampler(
        deis,
        "multistep",
        "lowest",
        karras_times="rounded",
        orders=(2, 1, 3),
        diffusers="DEISMultistepScheduler",
        a1111="DEIS",
        comfyui="deis",
    ),
    "unipc": Sampler(
        unipc,
        "multistep",
        "sigma",
        karras_times="rounded",
        orders=(2, 1, 3),
        solver_types=("bh2", "bh1"),
        diffusers="UniPCMultistepScheduler",
        a1111="UniPC",
        comfyui="uni_pc_bh2",
    ),
}
