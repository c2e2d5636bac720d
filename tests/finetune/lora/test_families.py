"""LoHa, LoKr, LoCon and DoRA as low-rank updates, against peft's own layers and against the formulas."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import finetune
from finetune.lora.reading import read_lora
from finetune.lora.targets import Target, match_targets
from sdkit.errors import CheckpointError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import drawn_updates, places

pytestmark = pytest.mark.usefixtures("clean")


def lycoris(kind: str, target: Target, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of peft's own LoHa or LoKr layer for a place, and the update that they stand for."""
    shape = target.shape
    base = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    make = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
    config = {"r": 3, "alpha": 2, "init_weights": False, "target_modules": ["0"]} | config
    torch.manual_seed(0)
    net = peft.inject_adapter_in_model(make(**config), nn.Sequential(base))
    state = {
        k.removeprefix("0.").removesuffix(".default"): v for k, v in net.state_dict().items() if "base_layer" not in k
    }
    return state, net[0].get_delta_weight("default")


LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loha": ("loha", "attn2.to_k", {}),
    "loha of a high rank": ("loha", "attn2.to_k", {"r": 8}),
    "loha, 3x3 flat": ("loha", "conv1", {}),
    "loha, 3x3 Tucker": ("loha", "conv1", {"use_effective_conv2d": True}),
    "loha, 1x1": ("loha", "proj_in", {}),
    "lokr": ("lokr", "attn2.to_k", {"r": 1}),
    "lokr of two products": ("lokr", "attn2.to_k", {"r": 1, "decompose_both": True}),
    "lokr, whole": ("lokr", "attn2.to_k", {"r": 16}),
    "lokr, 3x3": ("lokr", "conv1", {"r": 1}),
    "lokr, 3x3 Tucker": ("lokr", "conv1", {"r": 1, "use_effective_conv2d": True}),
    "lokr, 3x3 whole": ("lokr", "conv1", {"r": 16}),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_loha_and_lokr_are_rewritten_exactly(sd: StableDiffusion, name: str, tmp_path: Path) -> None:
    kind, target, config = LYCORIS[name]
    target = match_targets(places(sd), [target])[0]
    state, delta = lycoris(kind, target, config)
    whole = "lokr_w1" in state and "lokr_w2" in state  # has no rank: LyCORIS then takes no notice of alpha
    alpha = {} if whole else {f"{target.kohya}.alpha": torch.tensor(2.0)}
    save_file({f"{target.kohya}.{k}": v for k, v in state.items()} | alpha, tmp_path / "it.safetensors")
    update = read_lora(tmp_path / "it.safetensors", places(sd))[target]
    assert relative_error(update.delta() * (2 / config["r"] if whole else 1), delta) < 1e-6
    assert update.rank <= min(target.shape[0], target.shape[1:].numel())


def test_locon_with_a_middle(sd: StableDiffusion, tmp_path: Path) -> None:
    target = match_targets(places(sd), ["conv1"])[0]
    down, up, mid = (
        draw("down", (4, target.shape[1], 1, 1)),
        draw("up", (target.shape[0], 4, 1, 1)),
        draw("mid", (4, 4, 3, 3)),
    )
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    save_file({f"{target.kohya}.{k}": v.float() for k, v in parts.items()}, tmp_path / "it.safetensors")
    x = draw("x", (1, target.shape[1], 5, 5))
    chained = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    delta = read_lora(tmp_path / "it.safetensors", places(sd))[target].delta()
    assert relative_error(torch.conv2d(x, delta.double(), padding=1), chained) < 1e-6


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("end", ["attn2.to_out.0", "conv2"])
def test_a_dora_scale_norms_rows_or_columns(sd: StableDiffusion, axis: str, end: str, tmp_path: Path) -> None:
    """As LyCORIS has it, by the shape of dora_scale; these modules are square, so the number says nothing."""
    target = match_targets(places(sd), [end])[0]
    update = drawn_updates([target])[target]
    dims = len(target.shape)
    shape = (target.shape[0], *(1,) * (dims - 1)) if axis == "rows" else (1, target.shape[1], *(1,) * (dims - 2))
    scale = 1 + 0.3 * draw("scale", shape).float().abs()
    parts = {"lora_down.weight": update.down, "lora_up.weight": update.up, "dora_scale": scale}
    save_file({f"{target.kohya}.{k}": v for k, v in parts.items()}, tmp_path / "it.safetensors")
    weight = sd.unet.get_submodule(target.path).weight
    moved = weight.detach() + update.delta()
    kept = 0 if axis == "rows" else 1
    expected = scale * moved / moved.transpose(0, kept).flatten(1).norm(dim=1).view(shape)
    finetune.load_lora(sd, tmp_path / "it.safetensors")
    finetune.merge(sd)
    assert relative_error(weight.detach(), expected) < 1e-6


@pytest.mark.parametrize(
    ("role", "shape"),
    [("hada_w1_a", (4,)), ("hada_w2_b", (2, 2, 2)), ("lora_up.weight", ()), ("lora_down.weight", (4,))],
)
def test_a_tensor_of_other_dimensions_is_named(
    sd: StableDiffusion, role: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    target = match_targets(places(sd), "cross_attention")[0]
    rows, columns = target.shape
    shapes = {"lora_up.weight": (rows, 2), "lora_down.weight": (2, columns)}
    if role.startswith("hada"):
        shapes = {f"hada_w{i}_{side}": (rows, 2) if side == "a" else (2, columns) for i in (1, 2) for side in "ab"}
    state = {f"{target.kohya}.{name}": torch.ones(shape) for name, shape in (shapes | {role: shape}).items()}
    save_file(state, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a matrix, found the shape \["):
        read_lora(tmp_path / "it.safetensors", places(sd))
