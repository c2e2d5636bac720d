"""The noise predictor in a sampling step with guidance, beside diffusers': ``python -m bench.unet``.

On a GPU: SD1's network, pictures of 512, float16. Ours gets keys and values of the prompt and time projections as the
sampling loop does, computed before it. diffusers' is timed at its best, channels-last with Q, K and V as one product,
and as it comes; *in a graph* is a CUDA graph of a call, *ours in diffusers* its UNet after ``sdkit.accelerate``.
``--compiled`` times what torch.compile makes of both instead (fullgraph, reduce-overhead and max-autotune). What is not
within 6e-3 of the definitions in float32 is not timed. On a CPU: the shipped model's network, as a rehearsal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import sdkernels
from bench.networks import SIDE, SIZE, compile_whole, our_model, plain_pipeline, their_pipeline, time_all, why_wrong
from bench.record import DEVICE, GPU, Clock, Record, parser_of
from sdkit.diffusers_compat import accelerate
from sdkit.graphs import Graphs
from sdkit.stable_diffusion import StableDiffusion

ALIKE = 6e-3 if GPU else 1e-4  # float16's own rounding is 1.3e-3, an attention that gives zero 5.4e-2
Inputs = tuple[Tensor, Tensor, Tensor]
Predict = Callable[[], Tensor]


def inputs(sd: StableDiffusion, pictures: int) -> Inputs:
    """Latents [2 n, 4, h, w], a timestep [1] and contexts [2 n, 77, D]."""
    g, config = torch.Generator().manual_seed(0), sd.unet.config
    latents = torch.randn(2 * pictures, config.in_channels, SIDE, SIDE, generator=g)
    context = torch.randn(2 * pictures, 77, config.per_block(config.cross_attention_dim)[0], generator=g)
    return latents.to(DEVICE, sd.unet.dtype), torch.tensor([500], device=DEVICE), context.to(DEVICE, sd.unet.dtype)


def expected(sd: StableDiffusion, given: Inputs) -> Tensor:
    """The prediction by the definitions, in float32."""
    latents, t, context = given
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with sdkernels.backend("eager"):
        prediction = sd.to(torch.float32).unet(latents.float(), t, context.float())
    sd.to(latents.dtype)
    return prediction


def ours(sd: StableDiffusion, given: Inputs, mode: str = "") -> Predict:
    latents, t, context = given
    contexts, times = sd.unet.context_kv(context), sd.unet.time_projections(t)
    call = compile_whole(sd.unet, mode) if mode else sd.unet
    return lambda: call(latents, t, None, context_kv=contexts, time_projections=times)


def theirs(sd: StableDiffusion, given: Inputs, mode: str = "") -> Predict:
    latents, t, context = given
    unet = their_pipeline(sd).unet
    latents = latents.to(memory_format=torch.channels_last)
    call = compile_whole(unet, mode) if mode else unet
    return lambda: call(latents, t, context, return_dict=False)[0]


def theirs_as_it_comes(sd: StableDiffusion, given: Inputs, with_ours: bool = False) -> Predict:
    latents, t, context = given
    pipe = plain_pipeline(sd)
    unet = (accelerate(pipe) if with_ours else pipe).unet
    return lambda: unet(latents, t, context, return_dict=False)[0]


def in_a_graph(predict: Predict) -> Predict:
    graph = Graphs().record(predict, DEVICE)

    def replay() -> Tensor:
        graph.replay()
        return graph.result

    return replay


def main() -> int:
    """Time all; 1 where one is missing."""
    parser = parser_of(__doc__)
    parser.add_argument("--pictures", type=int, default=1, help="pictures, with guidance (default: 1)")
    parser.add_argument("--compiled", action="store_true", help="what torch.compile makes of both")
    arguments = parser.parse_args()

    sd = our_model()
    given = inputs(sd, arguments.pictures)
    implementations: dict[str, Callable[[], Predict]] = {
        "ours": lambda: ours(sd, given),
        "ours in a graph": lambda: in_a_graph(ours(sd, given)),
        "diffusers": lambda: theirs(sd, given),
        "diffusers in a graph": lambda: in_a_graph(theirs(sd, given)),
        "diffusers as it comes": lambda: theirs_as_it_comes(sd, given),
        "ours in diffusers": lambda: theirs_as_it_comes(sd, given, with_ours=True),
    }
    if arguments.compiled:
        implementations = {
            f"{who} compiled, {mode}": lambda make=make, mode=mode: make(sd, given, mode)
            for mode in ("reduce-overhead", "max-autotune")
            for who, make in (("diffusers", theirs), ("ours", ours))
        }

    with torch.no_grad():
        truth = expected(sd, given)
        return time_all(
            Record(arguments.out),
            Clock(arguments.seconds),
            implementations,
            lambda prediction: why_wrong(prediction, truth, ALIKE),
            op="UNet, a step with guidance",
            case=f"{SIZE}, {arguments.pictures} picture(s)",
            rounds=30,
            images=arguments.pictures,
        )


if __name__ == "__main__":
    sys.exit(main())
