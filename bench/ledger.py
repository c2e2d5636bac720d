"""Launches, bytes and operations of a whole call, ours and diffusers', counted on tensors without data.

    python -m bench.ledger                  the table that stands in bench/README.md
    python -m bench.ledger --kinds NUMBER   a call of the table by kind of operation, ours beside diffusers'
    python -m bench.ledger --lines NUMBER   where in our code its launches are made

No GPU is needed, and it takes seconds. A launch is a kernel that runs on the GPU: each of ours is counted where Triton
would launch it, each operator of PyTorch as CUDA runs it in eager mode (a convolution and its bias are two, a native
group norm three, a copy by which cuDNN gets its layout one). Bytes are those of the operands, each read or written
once. Operations are those of matrix products, convolutions and attention, 2 a multiply-add. Views are free.

What it cannot see: launches inside libraries, such as split sums; time; what caches save. A test holds our counts to
recorded ceilings, `tests/bench/test_ledger.py`.
"""

from __future__ import annotations

import argparse
import inspect
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from triton import knobs
from triton.runtime.jit import JITFunction

import finetune
from sdkernels.launches import noting
from sdkit.checkpoints.components import Components, build_text
from sdkit.checkpoints.presets import read_preset
from sdkit.devices import fast_layout
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion

ARCHITECTURE = 90
RANK = 8
ROOMS = ("sdkit", "finetune", "sdkernels")
"""The packages whose lines are told."""

_FREE = {
    "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "detach", "alias", "as_strided", "unflatten", "_reshape_alias", "narrow",
    "movedim", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
"""Operators that launch nothing."""

_LAUNCHES = {"native_group_norm": 3, "native_group_norm_backward": 4, "native_layer_norm_backward": 2}
"""Operators of more than one launch in ATen's CUDA code."""


@dataclass(frozen=True)
class Entry:
    """One operation: its kind, its launches, bytes and operations, and the line of ours that asked for it."""

    kind: str
    launches: int
    bytes: int
    flops: int
    line: str


class Ledger(TorchDispatchMode):
    """Inside ``with Ledger() as ledger`` every operation on tensors without data is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def enter(self, kind: str, launches: int, tensors: Iterable[Tensor], flops: int = 0) -> None:
        moved = sum(t.numel() * t.element_size() for t in tensors)
        self.entries.append(Entry(kind, launches, moved, flops, _line(inspect.currentframe())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name == "convolution":
            return self._convolution(func, args)

        out = func(*args, **(kwargs or {}))
        if name not in _FREE:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            count = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))  # addmm_ counts as addmm
            operands = [
                a for a in args if not isinstance(a, torch.dtype)
            ]  # of the result, which some products are told
            flops = 0 if count is None else int(count(*operands, **(kwargs or {}), out_val=out))
            self.enter(name, self._launches(name, args), tensors, flops)
        return out

    @staticmethod
    def _launches(name: str, args: Sequence[Any]) -> int:
        if name == "convolution_backward":
            return sum(args[-1])  # of the input, the weight and the bias: those that are asked for
        return _LAUNCHES.get(name, 1)

    def _convolution(self, func: Any, args: Sequence[Any]) -> Tensor:
        """cuDNN computes channels-last where the input or the weight is so; the other one is copied. The bias is a pass
        of its own."""
        x, weight, bias = args[:3]
        last = _is_channels_last(x) or _is_channels_last(weight)
        layout = torch.channels_last if last else torch.contiguous_format
        for part, tensor in (("input", x), ("weight", weight)):
            if not tensor.is_contiguous(memory_format=layout):
                self.enter(f"layout of a convolution's {part}", 1, [tensor, tensor])

        out = torch.empty_like(func(*args), memory_format=layout)
        self.enter("convolution", 1, [x, weight, out], int(flop_registry[func._overloadpacket](*args, out_val=out)))
        if bias is not None:
            self.enter("bias of a convolution", 1, [bias, out, out])
        return out


def _is_channels_last(x: Tensor) -> bool:
    """Whether this is channels-last, and could be told from the usual layout."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _line(frame: FrameType | None) -> str:
    """The innermost line of our packages at or above this frame, beside those that only watch launches."""
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if parts[-2:] == ("sdkernels", "launches.py"):
            frame = frame.f_back
            continue
        room = next((len(parts) - 1 - i for i, part in enumerate(reversed(parts)) if part in ROOMS), None)
        if room is not None and "site-packages" not in parts:
            return f"{'/'.join(parts[room:])}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def counting(architecture: int = ARCHITECTURE) -> Generator[Ledger]:
    """Enter everything inside the block; our kernels are those that "auto" takes on a GPU of this architecture.

    Raises RuntimeError under Triton's interpreter, which launches nothing on tensors without data.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("ledger: TRITON_INTERPRET is set, and the interpreter launches nothing: unset it")

    ledger, run = Ledger(), JITFunction.run

    def entering(self: Any, *args: Any, **given: Any) -> Any:
        result = run(self, *args, **given)
        tensors = {name: a for name, a in zip(self.arg_names, args, strict=False) if isinstance(a, Tensor)}
        ledger.enter(f"our {self.__name__}", 1, tensors.values(), _operations(self.__name__, tensors))
        return result

    JITFunction.run = entering  # type: ignore[method-assign]
    try:
        with noting(architecture, "auto"), ledger:
            yield ledger
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def _operations(kernel: str, tensors: Mapping[str, Tensor]) -> int:
    """Operations of the products in one of our kernels: of an attention the scores and the values, in a backward pass
    both again and each one's gradients; of a LoRA the layer's and the branch's."""
    if "q_ptr" in tensors and "k_ptr" in tensors:
        (batch, queries, heads, width), keys = tensors["q_ptr"].shape, tensors["k_ptr"].shape[1]
        products = {"backward_q": 3, "backward_kv": 4, "backward": 5}
        count = next((n for name, n in products.items() if name in kernel), 2)
        return 2 * count * batch * heads * queries * keys * width
    if kernel.startswith("linear_geglu"):
        return 2 * tensors["x_ptr"].numel() * len(tensors["weight_ptr"])
    if kernel.startswith("lora_linear"):
        (rows, columns), rank, out = tensors["x_ptr"].shape, len(tensors["a_ptr"]), len(tensors["weight_ptr"])
        return 2 * rows * (columns * out + rank * (columns + out))
    return 0


# The calls


@dataclass(frozen=True)
class Call:
    """A call of the table: its name, and who computes it how; each function returns the entries."""

    name: str
    by: Mapping[str, Callable[[], list[Entry]]]


def our_unet(preset: str, batch: int, side: int) -> list[Entry]:
    """A call of our UNet as the sampling loop makes it: keys, values and times are there already."""
    unet = _laid_out(_on_meta(lambda: UNet2DConditionModel.from_config(read_preset(preset)["unet"])))
    sample, time, context = _unet_inputs(preset, batch, side)
    with torch.no_grad(), noting(ARCHITECTURE, "auto"):
        contexts, times = unet.context_kv(context), unet.time_projections(time)
    with torch.no_grad(), counting() as ledger:
        unet(sample, time, None, context_kv=contexts, time_projections=times)
    return ledger.entries


def their_unet(preset: str, batch: int, side: int, last: bool = True, fused: bool = False) -> list[Entry]:
    """A call of diffusers' UNet. last: weights and input are channels-last; fused: Q, K and V are one product."""
    import diffusers

    unet: Any = _on_meta(lambda: diffusers.UNet2DConditionModel.from_config(read_preset(preset)["unet"]))
    sample, time, context = _unet_inputs(preset, batch, side)
    if fused:
        unet.fuse_qkv_projections()
    if last:
        unet, sample = unet.to(memory_format=torch.channels_last), sample.to(memory_format=torch.channels_last)
    with torch.no_grad(), counting() as ledger, _attention_of(ledger):
        unet(sample, time, context, return_dict=False)
    return ledger.entries


def our_decoder(preset: str, side: int) -> list[Entry]:
    """Our VAE from the latents of one picture to its pixels."""
    vae = _laid_out(_on_meta(lambda: AutoencoderKL.from_config(read_preset(preset)["vae"])))
    with torch.no_grad(), counting() as ledger:
        vae.decode(_latents(1, side))
    return ledger.entries


def their_decoder(preset: str, side: int, last: bool = True) -> list[Entry]:
    import diffusers

    vae: Any = _on_meta(lambda: diffusers.AutoencoderKL.from_config(read_preset(preset)["vae"]))
    latents = _latents(1, side)
    if last:
        vae, latents = vae.to(memory_format=torch.channels_last), latents.to(memory_format=torch.channels_last)
    with torch.no_grad(), counting() as ledger, _attention_of(ledger):
        vae.decode(latents, return_dict=False)
    return ledger.entries


def our_training_step(preset: str, batch: int, side: int) -> list[Entry]:
    """Forward and backward of the UNet with a LoRA of rank 8 on its cross-attention."""
    configs = read_preset(preset)
    unet = _laid_out(_on_meta(lambda: UNet2DConditionModel.from_config(configs["unet"])))
    vae = _on_meta(lambda: AutoencoderKL.from_config(configs["vae"]))
    text = build_text(configs["text_encoder"], preset)
    sd = StableDiffusion(Components(unet, vae, text, clip_tokenizer(), configs["scheduler"]))
    finetune.add_lora(sd, RANK, name="ledger")
    return _trained(lambda *inputs: unet(*inputs), preset, batch, side)


def their_training_step(preset: str, batch: int, side: int) -> list[Entry]:
    """The same by diffusers and peft, channels-last."""
    import diffusers
    from peft import LoraConfig

    unet: Any = _on_meta(lambda: diffusers.UNet2DConditionModel.from_config(read_preset(preset)["unet"]))
    targets = r".*attn2\.(to_q|to_k|to_v|to_out\.0)"
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    unet.to(memory_format=torch.channels_last)
    return _trained(lambda *inputs: unet(*inputs, return_dict=False)[0], preset, batch, side)


def _trained(predict: Callable[..., Tensor], preset: str, batch: int, side: int) -> list[Entry]:
    sample, time, context = _unet_inputs(preset, batch, side)
    sample = sample.to(memory_format=torch.channels_last)
    with counting() as ledger, _attention_of(ledger):
        predict(sample, time, context).float().square().mean().backward()
    return ledger.entries


def _on_meta(build: Callable[[], Any]) -> Any:
    """A frozen network in float16 without data."""
    with torch.device("meta"):
        return build().half().eval().requires_grad_(False)


def _laid_out(network: Any) -> Any:
    """As `sdkit.DiffusionModel.to` lays it out on a GPU."""
    lay_out(network, fast_layout(torch.device("cuda"), torch.float16))
    return network


def _latents(batch: int, side: int) -> Tensor:
    return torch.empty(batch, 4, side, side, dtype=torch.float16, device="meta")


def _unet_inputs(preset: str, batch: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    width = read_preset(preset)["unet"]["cross_attention_dim"]
    context = torch.empty(batch, 77, width, dtype=torch.float16, device="meta")
    return _latents(batch, side), torch.empty(1, device="meta"), context


@contextmanager
def _attention_of(ledger: Ledger) -> Generator[None]:
    """PyTorch's attention as on a GPU: one launch, backward three (flash attention 2); it is taken apart here else."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            out = q.new_empty(*q.shape[:-1], v.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)
            ledger.enter("attention", 1, [q, k, v, out], sdpa_flop_count(q.shape, k.shape, v.shape))
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            q, k, v = ctx.saved_tensors
            results = tuple(torch.empty_like(t) for t in (q, k, v))
            flops = 5 * sdpa_flop_count(q.shape, k.shape, v.shape) // 2
            ledger.enter("attention, backward", 3, [q, k, v, grads[0], *results], flops)
            return results

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return Attention.apply(q, k, v)  # type: ignore[no-any-return]

    functional: Any = nn.functional
    before, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def calls() -> list[Call]:
    """The table's calls: Stable Diffusion 1 at 512 pixels and 2 at 768."""
    found: list[Call] = []
    for name, preset, side in (("SD1.5, 512", "sd1", 64), ("SD2.1, 768", "sd2", 96)):
        unet = {
            "ours": lambda p=preset, s=side: our_unet(p, 2, s),
            "diffusers": lambda p=preset, s=side: their_unet(p, 2, s, last=False),
            "diffusers, channels-last": lambda p=preset, s=side: their_unet(p, 2, s),
            "diffusers, channels-last, fused QKV": lambda p=preset, s=side: their_unet(p, 2, s, fused=True),
        }
        decoder = {
            "ours": lambda p=preset, s=side: our_decoder(p, s),
            "diffusers": lambda p=preset, s=side: their_decoder(p, s, last=False),
            "diffusers, channels-last": lambda p=preset, s=side: their_decoder(p, s),
        }
        step = {
            "ours": lambda p=preset, s=side: our_training_step(p, 4, s),
            "diffusers + peft, channels-last": lambda p=preset, s=side: their_training_step(p, 4, s),
        }
        found += [
            Call(f"{name}: UNet, one picture with guidance", unet),
            Call(f"{name}: VAE, one picture decoded", decoder),
            Call(f"{name}: LoRA training step, 4 pictures", step),
        ]
    return found


# Tables


def totals(entries: Iterable[Entry]) -> tuple[int, float, float]:
    """Launches, gigabytes and tera-operations."""
    entries = list(entries)
    launches = sum(entry.launches for entry in entries)
    return launches, sum(entry.bytes for entry in entries) / 1e9, sum(entry.flops for entry in entries) / 1e12


def table(chosen: Iterable[Call]) -> str:
    rows = ["| call | by | launches | GB of operands | TFLOP |", "|---|---|---|---|---|"]
    for call in chosen:
        for who, count in call.by.items():
            launches, gigabytes, operations = totals(count())
            rows.append(f"| {call.name} | {who} | {launches:,} | {gigabytes:.2f} | {operations:.2f} |")
    return "\n".join(rows)


def by(key: str, entries: Iterable[Entry]) -> dict[str, tuple[int, float, float]]:
    """Totals by "kind" or "line", the most launches first."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[getattr(entry, key)].append(entry)
    return dict(sorted(((name, totals(own)) for name, own in groups.items()), key=lambda item: -item[1][0]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description="Count launches without a GPU.")
    every = calls()
    parser.add_argument("--kinds", type=int, choices=range(len(every)), help="a call of the table, from 0")
    parser.add_argument("--lines", type=int, choices=range(len(every)), help="a call of the table, from 0")
    arguments = parser.parse_args(argv)

    for key, number in (("kind", arguments.kinds), ("line", arguments.lines)):
        if number is None:
            continue
        call = every[number]
        for who, count in call.by.items():
            if key == "line" and who != "ours":
                continue
            print(f"\n{call.name}, {who}")
            for name, (launches, gigabytes, operations) in by(key, count()).items():
                print(f"  {launches:5d} launches {1e3 * gigabytes:9.1f} MB {operations:7.3f} TFLOP  {name}")
    if arguments.kinds is None and arguments.lines is None:
        print(table(every))


if __name__ == "__main__":
    main()
