"""Guidance: from the network's predictions to the one that the sampler steps with.

Classifier-free guidance and its rescaling work on the network's own outputs. A classifier moves the epsilon that the
prediction stands for, thresholding its x0. At a known level both are linear in the latent and the prediction, so their
change is carried back to the prediction, whatever the network predicts and the sampler does with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdkit.checks import expect, is_number
from sdkit.errors import ConfigError
from sdkit.sampling.levels import SMALLEST_ACP, Array, Level, basis

Classifier = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """How a picture is steered: towards its prompt, towards a class, and back into range.

    scale: uncond + scale (cond - uncond). 0 is unconditional, 1 is conditional, between them interpolates, above
        follows the prompt harder.
    rescale: 0 to 1, as in `rescale`.
    interval: (low, high); guidance is on at Karras's noise levels with low < noise / signal <= high (arXiv 2404.07724),
        high may be infinite. At others the scale is 1, nothing is rescaled and no classifier called. Scale 0 stays 0:
        a prompt that is ignored is ignored everywhere.
    dynamic_threshold, sample_max_value, clip_sample_range: at every level, inside the interval or not, the estimate of
        the clean latents is clipped as in `threshold`. The range is 1 where dynamic_threshold comes without one: that
        is for data in [-1, 1], as pixels are; Stable Diffusion's latents reach beyond 4 and turn grey.
    classifier, classifier_scale, class_labels: as in `classifier_gradient`, added to the prediction at that scale; at
        0 the classifier is not called. With ``scale`` 0 it guides an unconditional model. The labels, one for each
        image, become a tuple.

    Of diffusers' scheduler configurations, ``thresholding`` is dynamic_threshold=dynamic_thresholding_ratio with the
    sample_max_value and range 1; where that is off, ``clip_sample`` is clip_sample_range. diffusers' DDIM steps with
    the epsilon from before the clipping unless it is told use_clipped_model_output=True; here epsilon always follows
    from the clipped x0.

    Raises ConfigError, with the pipeline's name of the argument, for a value without meaning.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    dynamic_threshold: float | None = None
    sample_max_value: float | None = None
    clip_sample_range: float | None = None
    classifier: Classifier | None = None
    classifier_scale: float = 1.0
    class_labels: Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        expect(is_number(self.scale, 0), "guidance_scale", "a finite number of at least 0", self.scale)
        expect(is_number(self.rescale, 0, 1), "guidance_rescale", "a number from 0 to 1", self.rescale)
        if self.interval is not None:
            pair = self.interval if isinstance(self.interval, Sequence) and len(self.interval) == 2 else (0, 0)
            low, high = pair
            ok = is_number(low, 0) and (high == math.inf or is_number(high, low)) and low < high
            expect(ok, "guidance_interval", "two noise levels, 0 <= low < high", self.interval)

        self._check_clipping()
        self._check_classifier()

    def _check_clipping(self) -> None:
        fraction, top, limit = self.dynamic_threshold, self.sample_max_value, self.clip_sample_range
        expect(
            fraction is None or (is_number(fraction, 0, 1) and fraction > 0),
            "dynamic_threshold",
            "a fraction above 0, at most 1",
            fraction,
        )
        expect(
            limit is None or (is_number(limit, 0) and limit > 0), "clip_sample_range", "a finite number above 0", limit
        )

        if top is not None:
            least = self.clip_range
            expect(fraction is not None, "sample_max_value", "None without dynamic_threshold", top)
            expect(is_number(top, least), "sample_max_value", f"a finite number of at least {least:g}", top)

    def _check_classifier(self) -> None:
        labels, scale = self.class_labels, self.classifier_scale
        expect(is_number(scale, 0), "classifier_scale", "a finite number of at least 0", scale)
        if self.classifier is None:
            expect(labels is None, "class_labels", "None without classifier", labels)
            return
        expect(callable(self.classifier), "classifier", "a function of (x_t, t)", self.classifier)

        values = labels.tolist() if isinstance(labels, Tensor) else labels
        ok = isinstance(values, Sequence) and all(type(v) is int and v >= 0 for v in values)
        expect(ok, "class_labels", "a class number for each image", labels)
        object.__setattr__(self, "class_labels", tuple(values or ()))

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction has any weight."""
        return self.scale != 1

    @property
    def needs_cond(self) -> bool:
        """Whether the conditional prediction has any weight."""
        return self.scale != 0

    @property
    def needs_classifier(self) -> bool:
        """Whether the classifier has any weight."""
        return self.classifier is not None and self.classifier_scale != 0

    @property
    def clip_range(self) -> float:
        """How far the clean latents may reach, infinite where they are not clipped."""
        if self.clip_sample_range is not None:
            return self.clip_sample_range
        return math.inf if self.dynamic_threshold is None else 1.0

    @property
    def is_linear(self) -> bool:
        """Whether uncond + scale (cond - uncond) is all there is to do, which `sdkernels.sampler_step` does itself."""
        return self.rescale == 0 and not self.needs_classifier and self.clip_range == math.inf

    def at_levels(self, levels: Tensor) -> list[Guidance]:
        """The guidance in force at each network call of a plan with ``levels`` [K + 1, 2]: entry k says which
        predictions call k needs."""
        if self.interval is None:
            return [self] * (len(levels) - 1)

        low, high = self.interval
        off = replace(
            self, scale=float(self.needs_cond), rescale=0.0, interval=None, classifier=None, class_labels=None
        )
        sigmas = (noise / signal if signal else math.inf for signal, noise in levels[:-1].tolist())
        return [self if low < sigma <= high else off for sigma in sigmas]


def guide(
    guidance: Guidance,
    uncond: Tensor | None,
    cond: Tensor | None,
    x_in: Tensor,
    t: float,
    level: Level,
    prediction_type: str,
) -> Tensor:
    """The prediction that the sampler is to step with, whatever the guidance; ``guidance.interval`` is not looked at.

    uncond, cond, x_in [B, ...]: the network's predictions, of ``prediction_type``, and its input, in one float32 or
    float64; t the timestep; ``level`` the latent's, in any scaling. Like x_in. Raises ConfigError for a classifier
    where the latent holds no signal, and as `classifier_gradient` does.
    """
    prediction = combine(uncond, cond, guidance.scale)
    if guidance.rescale > 0 and uncond is not None and cond is not None:
        prediction = rescale(prediction, cond, guidance.rescale)

    unit = Level(level.signal / level.scale, level.noise / level.scale)
    x0, eps = unit.estimates(prediction_type, *basis(1)[:2])
    if guidance.classifier is not None and guidance.needs_classifier:
        acp, scale = unit.signal**2, guidance.classifier_scale
        if acp < 2 * SMALLEST_ACP:  # epsilon is all of the latent, and moving it moves x0 by any amount
            raise ConfigError(
                f"classifier: cannot guide at timestep {t:g}, which holds no signal (zero terminal SNR); "
                "a guidance_interval can leave it out"
            )
        gradient = classifier_gradient(guidance.classifier, x_in, t, guidance.class_labels or ())
        prediction = _changed(prediction, x_in, eps, lambda eps: classifier_guidance(eps, gradient, acp, scale))

    if guidance.clip_range < math.inf:
        args = guidance.clip_range, guidance.dynamic_threshold, guidance.sample_max_value
        prediction = _changed(prediction, x_in, x0, lambda x0: threshold(x0, *args))
    return prediction


def _changed(prediction: Tensor, x_in: Tensor, row: Array, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The prediction for which the value row[0] x_in + row[1] prediction becomes ``change(value)``."""
    of_x, of_prediction = row[:2].tolist()
    value = of_x * x_in + of_prediction * prediction
    return prediction + (change(value) - value) / of_prediction


def combine(uncond: Tensor | None, cond: Tensor | None, scale: float) -> Tensor:
    """uncond + scale (cond - uncond) (arXiv 2207.12598); where one is None the other is the whole prediction."""
    if uncond is None or cond is None:
        only = cond if uncond is None else uncond
        if only is None:
            raise ConfigError("guidance: needs a prediction, conditional or unconditional; found neither")
        return only
    return uncond + scale * (cond - uncond)


def compose(uncond: Tensor | None, conds: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """uncond + the sum of w_i (cond_i - uncond) for each image (composable diffusion, arXiv 2206.01714).

    conds [N, ...] has the predictions of the first image's prompts, then those of the second's, and so on; weights:
    theirs. uncond [B, ...] may be None where the weights of each image sum to 1. Where every image has one prompt of
    weight 1 the result is ``conds`` as it is, else float32 or wider.
    """
    if all(tuple(own) == (1,) for own in weights):
        return conds

    wide = conds.to(torch.promote_types(conds.dtype, torch.float32))
    sums: list[Tensor] = []
    for i, own in enumerate(weights):
        first = sum(map(len, weights[:i]))
        total = sum(w * wide[first + j] for j, w in enumerate(own))
        rest = 1 - math.fsum(own)
        sums.append(torch.as_tensor(total if uncond is None else total + rest * uncond[i].to(wide.dtype)))
    return torch.stack(sums)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring the standard deviation of ``guided`` back towards that of ``cond`` (arXiv 2305.08891, section 3.4).

    guided, cond [B, ...]: the network's own outputs; deviations are taken per sample over everything but B. phi 0 is
    the identity, phi 1 gives the conditional prediction's deviation.
    """
    dims = tuple(range(1, guided.dim()))
    factor = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (phi * factor + (1 - phi))


def threshold(x0: Tensor, limit: float, fraction: float | None = None, most: float | None = None) -> Tensor:
    """Clip clean latents to [-s, s] and scale them to [-limit, limit]; x0 [B, ...] float32 or float64, like it.

    s is ``limit``, or with a ``fraction`` that quantile of each sample's absolute values, clamped between ``limit`` and
    ``most`` (no bound when None): dynamic thresholding (arXiv 2205.11487, section 2.3), where the limit is 1.
    """
    if fraction is None:
        return x0.clamp(-limit, limit)
    s = x0.abs().flatten(1).quantile(fraction, dim=1).clamp(limit, most)
    s = s.reshape(-1, *(1,) * (x0.dim() - 1))
    return x0.clamp(-s, s) * (limit / s)


def classifier_gradient(classifier: Classifier, x_t: Tensor, t: float, labels: Sequence[int] | Tensor) -> Tensor:
    """grad_x log p(y | x_t, t), like x_t, also under ``torch.no_grad`` and ``torch.inference_mode``.

    classifier(x_t, t) answers logits or log-probabilities [B, classes] for the network's input x_t [B, ...], variance
    preserving, and t [B], both of x_t's dtype; a picture's answer must not depend on the others'. labels [B]: each
    picture's class. Raises ConfigError when the answer is of another shape, holds no such class, or has no gradient.
    """
    index = [int(label) for label in labels]
    if len(index) != len(x_t):
        raise ConfigError(f"class_labels: expected {len(x_t)}, one for each image, found {len(index)}")

    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        logits = classifier(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
        if logits.dim() != 2 or len(logits) != len(x):
            raise ConfigError(f"classifier: expected logits [{len(x)}, classes], found {list(logits.shape)}")
        if not 0 <= min(index) <= max(index) < logits.shape[1]:
            raise ConfigError(f"class_labels: expected 0 to {logits.shape[1] - 1}, found {index}")
        if not logits.requires_grad:
            raise ConfigError("classifier: expected an answer with a gradient, found one detached from x_t")

        log_p = logits.to(x.dtype).log_softmax(1)[torch.arange(len(x)), index]
        return torch.autograd.grad(log_p.sum(), x)[0]


def classifier_guidance(eps: Tensor, gradient: Tensor, alphas_cumprod_t: float | Tensor, scale: float = 1.0) -> Tensor:
    """eps - sqrt(1 - acp_t) scale grad_x log p(y | x_t, t) (arXiv 2105.05233, algorithm 2).

    eps and gradient [B, ...], taken at x_t in the variance-preserving scaling; ``alphas_cumprod_t`` a number or
    a tensor that is [] or [B]. Like eps.
    """
    if isinstance(alphas_cumprod_t, Tensor):
        acp = alphas_cumprod_t.to(eps.device)
        sigma = (1 - acp).sqrt().to(eps.dtype)
        sigma = sigma.reshape(-1, *(1,) * (eps.dim() - 1)) if sigma.dim() else sigma
    else:
        sigma = math.sqrt(1 - alphas_cumprod_t)
    return eps - scale * sigma * gradient
