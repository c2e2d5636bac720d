"""The families that are functions of the weight, against their formulas written out anew, row by row."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import finetune
from finetune.lora.reading import read_lora
from finetune.lora.targets import Target, match_targets, places_in
from finetune.lora.update import LowRankUpdate, WeightChange
from sdkit.errors import CheckpointError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import places

pytestmark = pytest.mark.usefixtures("clean")

Parts = dict[str, Tensor]
ENDS = {"linear": "attn2.to_k", "1x1": "proj_in", "3x3": "conv1"}


def drawn(name: str, *shape: int) -> Tensor:
    return 0.4 * draw(name, shape).float()


def turning(block: Tensor) -> Tensor:
    """Cayley's transform of a block's skew part, in float64."""
    skew = (block - block.T).double()
    one = torch.eye(len(skew), dtype=torch.float64)
    return torch.linalg.solve((one - skew).T, (one + skew).T).T


def oft(weight: Tensor, alpha: float, rescaled: bool) -> tuple[Parts, Tensor]:
    """One matrix with all blocks on its diagonal, whose transpose multiplies the flat weight."""
    out, blocks = len(weight), drawn("oft", 4, len(weight) // 4, len(weight) // 4)
    parts = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
    if alpha:  # the norm of all skew parts is at most alpha times the rows
        norm = torch.cat([(b - b.T).flatten() for b in blocks]).norm()
        assert norm > alpha * out, "the limit has no effect"
        blocks = blocks * (alpha * out / norm)
    matrix = torch.block_diag(*map(turning, blocks)).T
    numbers = torch.ones(out)
    if rescaled:
        numbers = 1 + drawn("rescale", out)
        parts["rescale"] = numbers.view(-1, *(1,) * (weight.dim() - 1))
    moved = numbers.double().diag() @ matrix @ weight.flatten(1).double()
    return parts, moved.view(weight.shape) - weight


def boft(weight: Tensor) -> tuple[Parts, Tensor]:
    """Stage i: row r meets the rows that differ from it by multiples of 2^i (b / 2) within its group, two and two."""
    out, b = len(weight), 4
    blocks = drawn("boft", 3, out // b, b, b)
    moved = weight.flatten(1).double()
    for i, stage in enumerate(blocks):
        apart = 2**i * b // 2
        # Rows in the order: group by group of 2 * apart, in it each row with its partner `apart` further on.
        order = [g + k + s * apart for g in range(0, out, 2 * apart) for k in range(apart) for s in (0, 1)]
        after = moved.clone()
        for block, start in zip(stage, range(0, out, b), strict=True):
            rows = order[start : start + b]
            after[rows] = turning(block) @ moved[rows]
        moved = after
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, moved.view(weight.shape) - weight


def ia3(weight: Tensor, on_input: bool) -> tuple[Parts, Tensor]:
    side = 1 if on_input else 0
    numbers = drawn("ia3", weight.shape[side])
    difference = weight.double().clone()
    for i, number in enumerate(numbers):
        difference.select(side, i).mul_(float(number))
    stored = numbers if weight.dim() == 2 else numbers.view(1, -1, 1, 1)  # as LyCORIS has it
    return {"weight": stored, "on_input": torch.tensor(int(on_input))}, difference


def glora(weight: Tensor, old: bool, scalar: float | None = None) -> tuple[Parts, Tensor]:
    out, width, *kernel = weight.shape
    ones = (1,) * len(kernel)
    a1, a2 = drawn("a1", width, 3, *ones), drawn("a2", 3, width, *ones)
    b1, b2 = drawn("b1", out, 3, *ones), drawn("b2", 3, width, *kernel)
    mixed = sum(
        (weight[:, i : i + 1].double() * float((a1.flatten(1) @ a2.flatten(1))[i, j]) * basis(weight, j))
        for i in range(width)
        for j in range(width)
    )
    difference = (mixed + (b1.flatten(1) @ b2.flatten(1)).view(weight.shape)) * 2 / 3
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    parts = {f"{name}.weight": value for name, value in zip(names, (a1, a2, b1, b2), strict=True)}
    parts["alpha"] = torch.tensor(2.0)
    if scalar is not None:
        parts["scalar"], difference = torch.tensor(scalar), difference * scalar
    return parts, difference


def basis(weight: Tensor, column: int) -> Tensor:
    """[1, in, 1...] with a 1 in one column."""
    return torch.eye(weight.shape[1], dtype=torch.float64)[column].view(1, -1, *(1,) * (weight.dim() - 2))


def whole(weight: Tensor) -> tuple[Parts, Tensor]:
    difference = 0.1 * drawn("diff", *weight.shape)
    return {"diff": difference}, difference


CASES: dict[str, Callable[[Tensor], tuple[Parts, Tensor]]] = {
    "OFT": lambda weight: oft(weight, 0.0, rescaled=False),
    "OFT with a limit": lambda weight: oft(weight, 0.02, rescaled=False),
    "OFT, rescaled": lambda weight: oft(weight, 0.0, rescaled=True),
    "BOFT": boft,
    "IA3": lambda weight: ia3(weight, on_input=False),
    "IA3 on the input": lambda weight: ia3(weight, on_input=True),
    "GLoRA": lambda weight: glora(weight, old=False),
    "GLoRA, names of its first files": lambda weight: glora(weight, old=True),
    "GLoRA with a scalar": lambda weight: glora(weight, old=False, scalar=0.5),
    "whole": whole,
}


def target_of(sd: StableDiffusion, end: str) -> Target:
    return match_targets(places(sd), [ENDS[end]])[0]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_file_changes_the_weight_as_its_formula_says(
    sd: StableDiffusion, name: str, end: str, tmp_path: Path
) -> None:
    """And counts as often as it is asked to."""
    target = target_of(sd, end)
    weight = sd.unet.get_submodule(target.path).weight
    own = weight.detach().clone()
    parts, difference = CASES[name](own)
    save_file({f"{target.kohya}.{end}": part.contiguous() for end, part in parts.items()}, tmp_path / "it.safetensors")

    finetune.load_lora(sd, tmp_path / "it.safetensors")
    assert relative_error(weight.detach() - own, difference) < 2e-5  # of a sum, in float32
    assert relative_error(weight.detach(), own + difference) < 1e-6
    finetune.set_scale(sd, -0.5)
    assert relative_error(weight.detach(), own - 0.5 * difference) < 1e-6
    finetune.remove(sd)
    assert torch.equal(weight.detach(), own)


def test_glora_with_a_middle() -> None:
    """As LoCon's: b2 and b1 are 1x1, and the middle has the kernel between them."""
    weight = drawn("w", 8, 6, 3, 3)
    a1, a2, b1, b2 = drawn("a1", 6, 2), drawn("a2", 2, 6), drawn("b1", 8, 2), drawn("b2", 2, 6)
    middle = drawn("bm", 2, 2, 3, 3)
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "bm.weight": middle}
    x = drawn("x", 1, 6, 5, 5)
    mixed = torch.conv2d(torch.conv2d(x, (a1 @ a2)[..., None, None]), weight)
    chained = torch.conv2d(torch.conv2d(torch.conv2d(x, b2[..., None, None]), middle), b1[..., None, None])
    assert relative_error(torch.conv2d(x, WeightChange(parts).delta(weight)), mixed + chained) < 1e-5


def test_norms_and_biases(sd: StableDiffusion, tmp_path: Path) -> None:
    """w_norm and diff add to a weight, b_norm and diff_b to a bias, also beside low-rank matrices."""
    found = {target.path: target for target in places_in(sd)}
    group, layer, conv = "mid_block.resnets.0.norm2", "mid_block.attentions.0.transformer_blocks.0.norm2", "conv_out"
    text = next(path for path in found if path.endswith("layers.0.layer_norm1"))
    linear = match_targets(places(sd), ["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"])[0]
    size = {path: found[path].shape[0] for path in found}
    file = {
        f"{found[group].kohya}.w_norm": drawn("gw", size[group]),
        f"{found[group].kohya}.b_norm": drawn("gb", size[group]),
        f"{found[layer].kohya}.diff": drawn("lw", size[layer]),
        f"{found[layer].kohya}.diff_b": drawn("lb", size[layer]),
        f"{found[text].kohya}.w_norm": drawn("tw", size[text]),
        f"{found[text].kohya}.b_norm": drawn("tb", size[text]),
        f"{found[conv].kohya}.diff_b": drawn("cb", size[conv]),
        f"{linear.kohya}.lora_down.weight": drawn("down", 2, linear.shape[1]),
        f"{linear.kohya}.lora_up.weight": drawn("up", linear.shape[0], 2),
        f"{linear.kohya}.diff_b": drawn("ob", linear.shape[0]),
    }
    save_file(file, tmp_path / "it.safetensors")
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    own = {n: {k: v.clone() for k, v in network.state_dict().items()} for n, network in networks.items()}
    finetune.load_lora(sd, tmp_path / "it.safetensors", scale=0.5)
    finetune.merge(sd)

    after = {n: network.state_dict() for n, network in networks.items()}
    changed = {
        (found[p].network, f"{p}.{kind}"): file[f"{found[p].kohya}.{end}"]
        for p, ends in {
            group: ("w_norm", "b_norm"),
            layer: ("diff", "diff_b"),
            text: ("w_norm", "b_norm"),
            conv: (None, "diff_b"),
            linear.path: (None, "diff_b"),
        }.items()
        for kind, end in zip(("weight", "bias"), ends, strict=True)
        if end
    }
    for (network, key), difference in changed.items():
        inside = key.replace(linear.path, f"{linear.path}.base_layer")
        assert relative_error(after[network][inside], own[network][key] + 0.5 * difference) < 1e-6, key
    product = file[f"{linear.kohya}.lora_up.weight"] @ file[f"{linear.kohya}.lora_down.weight"]
    expected = own["unet"][f"{linear.path}.weight"] + 0.5 * product
    assert relative_error(after["unet"][f"{linear.path}.base_layer.weight"], expected) < 1e-6
    others = {(n, k) for n in own for k in own[n]} - changed.keys() - {("unet", f"{linear.path}.weight")}
    assert all(torch.equal(own[n][k], after[n][k.replace(linear.path, f"{linear.path}.base_layer")]) for n, k in others)

    finetune.remove(sd)
    assert all(torch.equal(own[n][k], v) for n, network in networks.items() for k, v in network.state_dict().items())


def test_kohyas_own_oft(sd: StableDiffusion, tmp_path: Path) -> None:
    """sd-scripts' trainer calls its modules oft_unet_..., and its alpha is the same limit."""
    target = target_of(sd, "linear")
    weight = sd.unet.get_submodule(target.path).weight
    parts, difference = oft(weight.detach().clone(), 0.02, rescaled=False)
    module = target.kohya.replace("lora_", "oft_", 1)
    save_file({f"{module}.{end}": part for end, part in parts.items()}, tmp_path / "it.safetensors")
    assert finetune.load_adapter(sd, tmp_path / "it.safetensors") == "it"
    assert finetune.list_adapters(sd)["it"].parameters == sum(part.numel() for part in parts.values())
    finetune.remove(sd)
    assert relative_error(read_lora(tmp_path / "it.safetensors", places(sd))[target].delta(weight), difference) < 2e-5


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_a_scalar_multiplies_the_update(sd: StableDiffusion, kind: str, tmp_path: Path) -> None:
    target = target_of(sd, "linear")
    rows, columns = target.shape
    loha = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
    lokr = {"w1": (2, 2), "w2_a": (rows // 2, 2), "w2_b": (2, columns // 2)}
    shapes = {
        "LoRA": {"lora_down.weight": (2, columns), "lora_up.weight": (rows, 2)},
        "LoHa": {f"hada_{end}": shape for end, shape in loha.items()},
        "LoKr": {f"lokr_{end}": shape for end, shape in lokr.items()},
    }
    parts = {end: drawn(end, *shape) for end, shape in shapes[kind].items()}
    parts["alpha"] = torch.tensor(1.0)
    deltas: list[Tensor] = []
    for extra in ({}, {"scalar": torch.tensor(-0.3)}):
        save_file({f"{target.kohya}.{end}": part for end, part in (parts | extra).items()}, tmp_path / "it.safetensors")
        update = read_lora(tmp_path / "it.safetensors", places(sd))[target]
        assert isinstance(update, LowRankUpdate)
        deltas.append(update.delta())
    assert relative_error(deltas[1], -0.3 * deltas[0]) < 1e-6 and float(deltas[0].norm()) > 0


BAD: dict[str, tuple[Parts, str]] = {
    "blocks": ({"oft_blocks": torch.zeros(3, 4, 4)}, r"OFT for a weight of \[16, 32\], found oft_blocks \[3, 4, 4\]"),
    "blocks that are not square": ({"oft_blocks": torch.zeros(4, 4, 5)}, "expected OFT"),
    "too many stages": ({"oft_blocks": torch.zeros(4, 4, 4, 4)}, "expected OFT"),
    "odd butterflies": ({"oft_blocks": torch.zeros(1, 16, 1, 1)}, "expected OFT"),
    "rescale": ({"oft_blocks": torch.zeros(4, 4, 4), "rescale": torch.ones(4, 1)}, "expected OFT"),
    "IA3 of another width": ({"weight": torch.zeros(32), "on_input": torch.tensor(0)}, "expected IA3"),
    "IA3 without its side": ({"weight": torch.zeros(32)}, "found weight"),
    "half a GLoRA": ({"a1.weight": torch.zeros(32, 2), "a2.weight": torch.zeros(2, 32)}, "found a1.weight, a2.weight"),
    "GLoRA": ({f"{n}.weight": torch.zeros(32, 2) for n in ("a1", "a2", "b1", "b2")}, "expected GLoRA"),
    "difference": ({"diff": torch.zeros(16, 31)}, r"whole difference for a weight of \[16, 32\]"),
    "nan": ({"diff": torch.full((16, 32), torch.nan)}, "expected finite numbers"),
    "bias": ({"diff_b": torch.zeros(16)}, "the model's layer has no bias"),
    "an alpha that says nothing": ({"diff": torch.zeros(16, 32), "alpha": torch.ones(())}, "found alpha, diff"),
    "two families": ({"diff": torch.zeros(16, 32), "oft_blocks": torch.zeros(4, 4, 4)}, "found diff, oft_blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_do_not_fit_are_named(sd: StableDiffusion, name: str, tmp_path: Path) -> None:
    target = target_of(sd, "linear")
    parts, message = BAD[name]
    save_file({f"{target.kohya}.{end}": part for end, part in parts.items()}, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        finetune.load_lora(sd, tmp_path / "it.safetensors")
    assert "it.safetensors" in str(raised.value) and "attn2.to_k" in str(raised.value)
    assert finetune.list_adapters(sd) == {}
