"""Hypernetworks in a model: against diffusers' UNet with A1111's formula before its to_k and to_v; beside LoRA."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune
import sdkit
from finetune.hypernetwork.attach import (
    add_hypernetwork,
    list_hypernetworks,
    load_hypernetwork,
    remove_hypernetworks,
    without_hypernetworks,
)
from finetune.hypernetwork.files import read_hypernetwork
from finetune.hypernetwork.network import Hypernetwork
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw_weights, relative_error
from tests.finetune.hypernetwork.a1111 import a1111
from tests.finetune.tiny import UNET, latents, model, pipeline, their_latents

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*steps_offset:FutureWarning")  # of diffusers' scheduler

TEXT, SELF = 32, 16  # the widths of the tiny model's contexts; its middle block's self-attention is 32 wide too


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture(scope="module")
def base(sd: StableDiffusion) -> Tensor:
    return latents(sd)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fur.pt for the text, ink.pt for self-attention as well."""
    folder = tmp_path_factory.mktemp("hypernetworks")
    draw_weights(Hypernetwork([TEXT], activation_func="swish"), seed=1).save(folder / "fur.pt")
    draw_weights(Hypernetwork([SELF, TEXT], (1, 1), is_layer_norm=True), seed=2).save(folder / "ink.pt")
    return folder


@pytest.fixture(autouse=True)
def clean(sd: StableDiffusion) -> Iterator[None]:
    modules, keys = list(sd.unet.modules()), list(sd.unet.state_dict())
    yield
    finetune.remove(sd)
    remove_hypernetworks(sd)
    assert all(a is b for a, b in zip(sd.unet.modules(), modules, strict=True)) and list(sd.unet.state_dict()) == keys
    assert "hypernet" not in sd.extra_networks
    assert not any("key_value" in vars(module) for module in sd.unet.modules())


# The numbers


def apply_to_theirs(unet: nn.Module, file: Path, multiplier: float) -> None:
    """Hooks run in the order in which they came, each on what the one before has left."""
    content = torch.load(file, weights_only=True)

    def hook(index: int) -> Callable[[nn.Module, Any], Any]:
        return lambda layer, args: (a1111(content, index, args[0].double(), multiplier).float(),)

    for name, layer in unet.named_modules():
        for index, end in enumerate((".to_k", ".to_v")):
            if name.endswith(end) and layer.in_features in content:
                layer.register_forward_pre_hook(hook(index))


@pytest.mark.parametrize("chain", [{"fur": 1.0}, {"ink": 0.5, "fur": -0.7}], ids=" ".join)
def test_pictures_are_those_of_diffusers_with_a1111s_formula(
    sd: StableDiffusion, base: Tensor, files: Path, chain: dict[str, float]
):
    pipe = pipeline()
    for name, multiplier in chain.items():
        assert load_hypernetwork(sd, files / f"{name}.pt", multiplier) == name
        apply_to_theirs(pipe.unet, files / f"{name}.pt", multiplier)
    ours = latents(sd)
    assert relative_error(ours, their_latents(pipe)) < 1e-4 and relative_error(ours, base) > 0.02
    if len(chain) == 2:
        remove_hypernetworks(sd)
        for name, multiplier in reversed(chain.items()):
            load_hypernetwork(sd, files / f"{name}.pt", multiplier)
        assert relative_error(latents(sd), ours) > 1e-3, "the order must tell"


def test_multiplier_0_and_a_removed_one_leave_exactly_the_base(sd: StableDiffusion, base: Tensor, files: Path):
    for name in ("fur", "ink"):
        load_hypernetwork(sd, files / f"{name}.pt", 0.0)
    sd.known_adapters.clear()  # of tests before
    with pytest.warns(UserWarning, match="loaded, but does nothing: its scale is 0"):
        assert torch.equal(latents(sd), base)
    finetune.set_scale(sd, 0.5)
    both = latents(sd)
    assert {name: network.multiplier for name, network in list_hypernetworks(sd).items()} == {"fur": 0.5, "ink": 0.5}
    finetune.set_scale(sd, 0.0, "ink")
    alone = latents(sd)
    remove_hypernetworks(sd, "ink")
    assert list(list_hypernetworks(sd)) == ["fur"]
    assert torch.equal(latents(sd), alone) and not torch.equal(alone, both)
    remove_hypernetworks(sd)
    assert torch.equal(latents(sd), base)


def test_what_is_for_the_text_runs_once_per_prompt(files: Path):
    """However many steps: only self-attention needs its networks at every step."""
    sd = model()
    sd.unet = draw_weights(sdkit.UNet2DConditionModel.from_config(UNET | {"mid_block_type": None})).eval()
    for name in ("fur", "ink"):
        load_hypernetwork(sd, files / f"{name}.pt")
    calls: list[int] = []
    for network in list_hypernetworks(sd).values():
        for pair in network.layers.values():
            pair[0].register_forward_hook(lambda _, args, out: calls.append(args[0].shape[-1]))
    cross = sum(name.endswith("attn2") for name, _ in sd.unet.named_modules())
    for steps in (2, 5):
        calls.clear()
        sd.text_to_image("a cat", num_inference_steps=steps, seed=0, output_type="latent", progress=False)
        assert calls.count(TEXT) == 2 * cross, "fur and ink, once in each layer"
        assert calls.count(SELF) == steps * cross


# In the model


def test_lora_and_hypernetworks_go_in_and_out_in_any_order(sd: StableDiffusion, base: Tensor, files: Path):
    def lora() -> None:
        torch.manual_seed(0)
        for p in finetune.add_lora(sd, rank=2, targets="attention"):
            p.data.add_(0.1 * torch.randn_like(p))

    def hypernetwork() -> None:
        load_hypernetwork(sd, files / "ink.pt")

    lora()
    with_lora = latents(sd)
    hypernetwork()
    both = latents(sd)
    finetune.remove(sd, "default")
    with_hypernetwork = latents(sd)
    lora()
    assert torch.equal(latents(sd), both)
    finetune.merge(sd)
    assert relative_error(latents(sd), both) < 1e-4
    finetune.unmerge(sd)
    remove_hypernetworks(sd)
    assert torch.equal(latents(sd), with_lora)
    finetune.remove(sd)
    assert torch.equal(latents(sd), base)
    for a, b in ((both, with_lora), (both, with_hypernetwork), (with_lora, base), (with_hypernetwork, base)):
        assert relative_error(a, b) > 0.01
    assert finetune.list_adapters(sd) == {}


def test_a_model_is_saved_without_them(sd: StableDiffusion, base: Tensor, files: Path, tmp_path: Path):
    keys = list(sd.unet.state_dict())
    load_hypernetwork(sd, files / "ink.pt")
    assert list(sd.unet.state_dict()) == keys
    sd.save_pretrained(tmp_path)
    assert torch.equal(latents(StableDiffusion.from_pretrained(tmp_path, device="cpu")), base)


def test_they_follow_the_model(files: Path):
    sd = model()
    load_hypernetwork(sd, files / "ink.pt")
    context = torch.zeros(1, 3, TEXT, dtype=torch.bfloat16)
    (k, v), *_ = [kv for kvs in sd.to(torch.bfloat16).unet.context_kv(context) for kv in kvs]
    assert k.dtype == v.dtype == torch.bfloat16 and list_hypernetworks(sd)["ink"].dtype == torch.float32
    sd.unet.to("meta").context_kv(context.to("meta"))
    assert list_hypernetworks(sd)["ink"].device.type == "meta"


def test_one_that_is_trained_gets_gradients_through_the_unet(sd: StableDiffusion):
    torch.manual_seed(0)
    network = Hypernetwork([TEXT], activation_func="relu", weight_initialization="Zero")
    add_hypernetwork(sd, network)
    sd.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, TEXT)).square().mean().backward()
    last = [p for key, p in network.named_parameters() if ".2." in key]
    assert len(last) == 4 and all(float(p.grad.abs().max()) > 0 for p in last)
    assert not {id(p) for p in network.parameters()} & {id(p) for p in sd.unet.parameters()}
    sd.unet.zero_grad(set_to_none=True)


# Prompts


def test_prompts_weigh_them(sd: StableDiffusion, base: Tensor, files: Path):
    load_hypernetwork(sd, files / "fur.pt", 0.0)
    load_hypernetwork(sd, files / "ink.pt", 0.0, name="ink v1.2")
    sd.known_adapters.clear()
    with pytest.warns(UserWarning, match="loaded, but does nothing: its scale is 0"):
        assert torch.equal(latents(sd), base)
    finetune.set_scale(sd, 0.7, "fur")
    weighed = latents(sd)
    finetune.set_scale(sd, 0.2, "fur")
    now = latents(sd)
    assert torch.equal(latents(sd, "a cat<hypernet:fur:0.7>"), weighed)
    assert torch.equal(
        latents(sd, "<hypernet:fur:0.5>a cat<hypernet:fur:0.25>"), latents(sd, "a cat<hypernet:fur:0.75>")
    )
    assert torch.equal(latents(sd, "a cat<hypernet:ink v1.2:0>"), now), "the others have what they had"
    assert relative_error(latents(sd, "a cat<hypernet:ink v1.2>"), now) > 0.01
    assert torch.equal(latents(sd), now), "and after it they are as before"
    with pytest.raises(ConfigError, match=r"hypernetwork 'ink': expected one of the model's: fur, ink v1\.2"):
        latents(sd, "a cat<hypernet:fur:3><hypernet:ink>")
    assert torch.equal(latents(sd), now)


# Mistakes


def test_mistakes(sd: StableDiffusion, files: Path, tmp_path: Path):
    Hypernetwork([TEXT, 320, 768]).save(tmp_path / "sd1.pt")
    with pytest.raises(CheckpointError, match=r"sd1\.pt: .*of width 320, 768; expected those of the model: 16, 32"):
        load_hypernetwork(sd, tmp_path / "sd1.pt")
    assert list_hypernetworks(sd) == {}
    load_hypernetwork(sd, files / "fur.pt")
    network = read_hypernetwork(files / "fur.pt")
    add_hypernetwork(sd, network, name="again")
    with pytest.raises(ConfigError, match="'fur': the model has one of this name already"):
        load_hypernetwork(sd, files / "fur.pt")
    with pytest.raises(ConfigError, match="'twice': the model has this one, under another name already"):
        add_hypernetwork(sd, network, name="twice")
    with pytest.raises(ConfigError, match="hypernetwork 'wide': made for contexts of width 7"):
        add_hypernetwork(sd, Hypernetwork([7]), name="wide")
    with pytest.raises(ConfigError, match="finite number, found nan"):
        load_hypernetwork(sd, files / "ink.pt", float("nan"))
    with pytest.raises(ConfigError, match="finite number, found inf"):
        finetune.set_scale(sd, float("inf"))
    assert {name: network.multiplier for name, network in list_hypernetworks(sd).items()} == {"fur": 1, "again": 1}
    for call in (remove_hypernetworks, finetune.remove, lambda sd, name: finetune.set_scale(sd, 1.0, name)):
        with pytest.raises(ConfigError, match="'ink': expected one of the model's: fur, again"):
            call(sd, "ink")


def test_the_public_names_and_the_entry_point_are_there() -> None:
    assert all(callable(getattr(finetune, name)) for name in finetune.__all__)
    tables = [point.load() for point in entry_points(group="sdkit.adapters")]
    assert {kind.name for table in tables for kind in table} >= {"lora", "hypernetwork"}


def test_switched_off_for_a_while_is_the_model_alone(sd: StableDiffusion, base: Tensor, files: Path):
    load_hypernetwork(sd, files / "ink.pt")
    list_hypernetworks(sd)["ink"].train()  # in training its multiplier does not count
    changed = latents(sd)
    with pytest.raises(KeyError), without_hypernetworks(sd) as unet:
        assert unet is sd.unet and torch.equal(latents(sd), base)
        raise KeyError
    assert not torch.allclose(changed, base, atol=1e-3) and torch.equal(latents(sd), changed)
