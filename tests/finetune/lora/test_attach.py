"""LoRA on a model: made and loaded whole or not at all, asked for by prompts, shared by threads, swapped without a new
compilation."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import finetune
from finetune.lora.adapters import layers
from finetune.lora.layers import LoraConv2d, LoraLinear
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.fusion import Sum
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import drawn_updates, latents, places

pytestmark = pytest.mark.usefixtures("clean")


# Made


def test_a_new_one_changes_nothing_until_it_is_trained(sd: StableDiffusion, base: torch.Tensor) -> None:
    parameters = finetune.add_lora(sd, rank=2, targets="all", text_encoder=True)
    assert len(parameters) == 2 * len(match_targets(places(sd), "all"))
    assert relative_error(latents(sd), base) < 1e-6
    out = sd.unet(draw("x", (1, 4, 8, 8)).float(), 5, draw("c", (1, 77, 32)).float())
    out.square().mean().backward()
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p -= 5 * p.grad / p.grad.norm().clamp(min=1e-12)
    assert relative_error(latents(sd), base) > 0.01


@pytest.mark.parametrize(
    "format, options",
    [
        ("diffusers", {}),
        ("kohya", {"use_rslora": True}),
        ("peft", {"use_rslora": True}),
        ("peft", {"use_dora": True}),
        ("kohya", {"use_dora": True}),
    ],
)
def test_what_was_trained_is_loaded_again(
    sd: StableDiffusion, format: str, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    for parameter in finetune.add_lora(sd, rank=4, alpha=6, targets="transformer", text_encoder=True, **options):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    scale = 6 / 4**0.5 if options.get("use_rslora") else 6 / 4
    finetune.set_scale(sd, 1.0)
    assert {layer.scaling["default"] for _, _, layer in layers(sd)} == {scale}
    trained = latents(sd)
    finetune.set_scale(sd, 0.3)  # is no part of the file
    path = tmp_path / ("it.safetensors" if format == "kohya" else "it")
    finetune.save_lora(sd, path, format)
    finetune.remove(sd)
    assert finetune.load_lora(sd, path) == "it"
    assert relative_error(latents(sd), trained) < 1e-5


def test_the_first_weights_are_those_of_the_choice(sd: StableDiffusion) -> None:
    for init, deviation in (
        ("kaiming", lambda layer: (1 / layer.in_features / 3) ** 0.5),
        ("gaussian", lambda _: 1 / 64),
    ):
        torch.manual_seed(0)
        finetune.add_lora(sd, rank=64, init=init, name=init)
        for _, _, layer in layers(sd):
            a, b = layer.lora_A[init].weight.detach(), layer.lora_B[init].weight.detach()
            assert abs(float(a.std()) / deviation(layer) - 1) < 0.1
            assert float(b.abs().max()) == 0


def test_arguments_without_meaning(sd: StableDiffusion) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank: expected a whole number from 1 to 16384, found 0"),
        ({"rank": 2.0}, "rank: expected a whole number from 1 to 16384, found 2.0"),
        ({"alpha": 0}, "alpha: expected a finite number above 0"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"init": "pissa"}, "init: expected one of kaiming, gaussian"),
        ({"name": "a:b"}, "expected a name without : < >"),
        ({"name": "a "}, "without white space around it"),
        ({"name": ""}, "expected a name"),
        ({"targets": "self-attention"}, "nothing matches self-attention"),
        ({"targets": r"attn2\.", "text_encoder": True}, "matches nothing in the text_encoder"),
    ]
    for arguments, message in bad:
        with pytest.raises(ConfigError, match=message):
            finetune.add_lora(sd, **arguments)
    assert finetune.list_adapters(sd) == {}
    finetune.add_lora(sd)
    with pytest.raises(ConfigError, match="'default': the model has one of this name"):
        finetune.add_lora(sd)


# Whole or not at all


def interrupted_at(monkeypatch: pytest.MonkeyPatch, where: type[Any], method: str, call: int) -> None:
    """Let this call of a method raise KeyboardInterrupt, and only it."""
    original, calls = getattr(where, method), itertools.count()

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(where, method, interrupted)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("where", "method"), [(LoraLinear, "load"), (LoraLinear, "__init__"), (LoraConv2d, "load")])
@pytest.mark.parametrize("call", [0, 7])
def test_an_interrupted_loading_leaves_the_model_as_it_was(
    sd: StableDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    merged: bool,
    where: type[Any],
    method: str,
    call: int,
) -> None:
    chosen = match_targets(places(sd), "all")
    for name, seed in (("one", 1), ("two", 2)):
        write_lora(drawn_updates(chosen if name == "two" else chosen[::2], seed=seed), tmp_path / name)
    finetune.load_lora(sd, tmp_path / "one")
    if merged:
        finetune.merge(sd)
    before, expected = finetune.list_adapters(sd), latents(sd)
    modules = {name: type(module) for name, module in sd.unet.named_modules()}
    trains = {name: p.requires_grad for name, p in sd.unet.named_parameters()}

    with monkeypatch.context() as patch:
        interrupted_at(patch, where, method, call)
        with pytest.raises(KeyboardInterrupt):
            finetune.load_lora(sd, tmp_path / "two", trainable=not merged)
    assert finetune.list_adapters(sd) == before and torch.equal(latents(sd), expected)
    assert {name: type(module) for name, module in sd.unet.named_modules()} == modules
    assert {name: p.requires_grad for name, p in sd.unet.named_parameters()} == trains
    finetune.load_lora(sd, tmp_path / "two")
    assert relative_error(latents(sd), expected) > 1e-3


def test_an_interrupted_new_one_leaves_the_model_as_it_was(
    sd: StableDiffusion, base: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = {name: p.requires_grad for name, p in sd.unet.named_parameters()}
    with monkeypatch.context() as patch:
        interrupted_at(patch, LoraLinear, "__init__", 5)
        with pytest.raises(KeyboardInterrupt):
            finetune.add_lora(sd, targets="all")
    assert finetune.list_adapters(sd) == {} and not layers(sd) and torch.equal(latents(sd), base)
    assert {name: p.requires_grad for name, p in sd.unet.named_parameters()} == trains and not sd.extra_networks


def test_an_interrupted_swap_leaves_the_slot_as_it_was(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = match_targets(places(sd), "transformer")
    for name, rank in (("one", 4), ("two", 6)):
        write_lora(drawn_updates(chosen, lambda target, rank=rank: rank, seed=rank), tmp_path / name)
    finetune.load_lora(sd, tmp_path / "one", scale=0.7, name="slot", slot_rank=8)
    expected = latents(sd)
    with monkeypatch.context() as patch:
        interrupted_at(patch, LoraLinear, "load", 9)
        with pytest.raises(KeyboardInterrupt):
            finetune.swap_lora(sd, tmp_path / "two", "slot")
    assert torch.equal(latents(sd), expected)


@pytest.mark.parametrize("scale", ["x", float("nan"), None, True])
def test_a_scale_that_is_no_number_is_refused_before_anything_changes(
    sd: StableDiffusion, base: torch.Tensor, tmp_path: Path, scale: Any
) -> None:
    write_lora(drawn_updates(match_targets(places(sd), "transformer")), tmp_path / "one")
    with pytest.raises(ConfigError, match="scale: expected a finite number"):
        finetune.load_lora(sd, tmp_path / "one", scale=scale)
    assert finetune.list_adapters(sd) == {} and torch.equal(latents(sd), base)
    finetune.load_lora(sd, tmp_path / "one")
    finetune.merge(sd)
    merged = latents(sd)
    with pytest.raises(ConfigError, match="scale: expected a finite number"):
        finetune.set_scale(sd, scale)
    assert torch.equal(latents(sd), merged)


# Several threads


def test_threads_that_share_a_model_have_their_own_networks_and_words(sd: StableDiffusion, tmp_path: Path) -> None:
    """Each draws with another LoRA by its tag, and with a word that stands for other vectors in the other thread."""
    chosen = match_targets(places(sd), "transformer")
    for name, seed in (("one", 1), ("two", 2)):
        write_lora(drawn_updates(chosen, seed=seed), tmp_path / name)
        finetune.load_lora(sd, tmp_path / name)
    weights = ((1, 0.1), (-1, 0.5), (0.1, 0.1), (0.3, 1))
    prompts = [f"a cat<lora:one:{one}><lora:two:{two}>" for one, two in weights]
    alone = {prompt: latents(sd, prompt) for prompt in prompts}
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda prompt: (prompt, latents(sd, prompt)), prompts * 6))
    assert all(torch.equal(found, alone[prompt]) for prompt, found in drawn)


def test_adapters_change_between_pictures_and_not_within(sd: StableDiffusion, base: torch.Tensor, tmp_path: Path):
    write_lora(drawn_updates(match_targets(places(sd), "transformer")), tmp_path / "one")
    finetune.load_lora(sd, tmp_path / "one")
    whole = latents(sd)
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            finetune.disable(sd)
            finetune.enable(sd)

    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        drawn = [latents(sd) for _ in range(12)]
        done.set()
        switching.result()
    assert all(torch.equal(found, base) or torch.equal(found, whole) for found in drawn)


# Asked for by a prompt


def test_a_prompts_tag_sets_the_scale_for_its_picture(sd: StableDiffusion, base: torch.Tensor, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        write_lora(drawn_updates(match_targets(places(sd), "transformer"), seed=seed), tmp_path / name)
    finetune.load_lora(sd, tmp_path / "one")
    expected: dict[float, torch.Tensor] = {}
    for scale in (1.0, 0.5):
        finetune.set_scale(sd, scale)
        expected[scale] = latents(sd)
    finetune.load_lora(sd, tmp_path / "two", scale=0.0)
    finetune.disable(sd)
    before = finetune.list_adapters(sd)
    with pytest.warns(UserWarning, match="lora 'two': loaded, but does nothing: it is disabled"):
        assert torch.equal(latents(sd), base)
    assert relative_error(latents(sd, "a cat<lora:one:0.5>"), expected[0.5]) < 1e-6
    assert relative_error(latents(sd, "a cat<lora:one:0.25><lora:one:0.75>"), expected[1.0]) < 1e-6
    assert relative_error(latents(sd, "a cat<lora:one:0>"), base) < 1e-6
    with pytest.raises(ConfigError, match="'three': expected one of the model's: one, two"):
        latents(sd, "a cat<lora:one:2><lora:three:1>")
    assert finetune.list_adapters(sd) == before
    finetune.enable(sd)
    finetune.merge(sd)
    assert relative_error(latents(sd, "a cat<lora:one:1>"), expected[1.0]) < 1e-4
    assert relative_error(latents(sd), expected[0.5]) < 1e-4


# Swapped


@pytest.mark.parametrize("part", ["mid_block.attentions.0", pytest.param("", marks=pytest.mark.slow)])
def test_a_swap_is_the_other_file_without_a_new_compilation(sd: StableDiffusion, part: str, tmp_path: Path) -> None:
    """One transformer of the UNet; the whole of it is slow to compile."""
    chosen = [s for s in places(sd) if s.network == "unet" and s.path.startswith(part)]
    loras = {
        "a": drawn_updates(chosen, lambda s: 4, seed=1),
        "b": drawn_updates(chosen, lambda s: 7, lambda s: 0.5, seed=2),
        "some": drawn_updates(chosen[::2], lambda s: 8, lambda s: 2.0, seed=3),
    }
    for name, updates in loras.items():
        write_lora(updates, tmp_path / name)
    module: Any = sd.unet.get_submodule(part)
    x, context = draw("x", (1, 32 if part else 4, 8, 8)).float(), draw("c", (1, 77, 32)).float()

    def run() -> torch.Tensor:
        if not part:
            return module(x, torch.tensor(5), context)
        return module(Sum(x), module.project_context(context)).total()

    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter)
    with torch.no_grad():
        base, expected = run(), {}
        for name in loras:
            finetune.load_lora(sd, tmp_path / name, scale=0.8)
            expected[name] = run()
            finetune.remove(sd)
        finetune.load_lora(sd, tmp_path / "a", scale=0.8, name="slot", slot_rank=8)
        assert relative_error(compiled(), expected["a"]) < 1e-5
        compilations = counter.frame_count
        assert compilations > 0
        for name in ("b", "some", "a"):
            finetune.swap_lora(sd, tmp_path / name, "slot")
            assert relative_error(compiled(), expected[name]) < 1e-5
        finetune.set_scale(sd, 0.0)
        assert relative_error(compiled(), base) < 1e-5
        assert counter.frame_count == compilations

    finetune.swap_lora(sd, tmp_path / "b", "slot")
    finetune.save_lora(sd, tmp_path / "saved")
    saved = read_lora(tmp_path / "saved", places(sd))
    assert all(relative_error(saved[target].delta(), update.delta()) < 1e-6 for target, update in loras["b"].items())


def test_what_does_not_fit_the_slot_is_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    chosen = match_targets(places(sd), "cross_attention")
    for name, updates in (
        ("fits", drawn_updates(chosen)),
        ("high", drawn_updates(chosen, lambda s: 9)),
        ("dora", drawn_updates(chosen, dora=True)),
        ("wide", drawn_updates(match_targets(places(sd), "attention"))),
    ):
        write_lora(updates, tmp_path / name)
    for name, message in (("high", "rank 8 at most, found LoRA of rank 9"), ("dora", "found DoRA of rank 4")):
        with pytest.raises(CheckpointError, match=message):
            finetune.load_lora(sd, tmp_path / name, slot_rank=8)
    finetune.load_lora(sd, tmp_path / "fits", slot_rank=8)
    finetune.load_lora(sd, tmp_path / "fits", name="plain")
    for name, message in (
        ("high", "rank 8 at most"),
        ("dora", "DoRA"),
        ("wide", r"attn1\.to_k: expected a module that"),
    ):
        with pytest.raises(CheckpointError, match=message):
            finetune.swap_lora(sd, tmp_path / name, "fits")
    for name in ("plain", "other"):
        with pytest.raises(ConfigError, match=f"'{name}' is no adapter that was loaded with slot_rank"):
            finetune.swap_lora(sd, tmp_path / "fits", name)
    finetune.merge(sd)
    with pytest.raises(ConfigError, match="merged"):
        finetune.swap_lora(sd, tmp_path / "fits", "fits")
