"""Adapters in a model: how they add up, and that whatever is done with them can be undone."""

from pathlib import Path

import pytest
import torch

import finetune
from finetune.lora.adapters import changing, is_merged, layers, without_adapters
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.finetune.tiny import drawn_updates, latents, model, places

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def files(sd: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs that overlap, and a DoRA."""
    folder = tmp_path_factory.mktemp("loras")
    everything = match_targets(places(sd), "all")
    part = [target for target in everything if "up_blocks" in target.path or target.network != "unet"]
    made = {
        "whole": drawn_updates(everything, seed=1),
        "part": drawn_updates(part, seed=2),
        "dora": drawn_updates(part, dora=True, seed=3),
    }
    for name, updates in made.items():
        write_lora(updates, folder / name)
    return {name: folder / name for name in made}


def weights(sd: StableDiffusion) -> dict[str, torch.Tensor]:
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    return {f"{n}.{k}": v.clone() for n, network in networks.items() for k, v in network.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("names", [["whole"], ["whole", "part"], ["dora"], ["whole", "dora"]])
def test_merged_is_the_same_picture_and_unmerged_the_same_bits(
    sd: StableDiffusion, base: torch.Tensor, files: dict[str, Path], names: list[str]
) -> None:
    for name in names:
        finetune.load_lora(sd, files[name], scale=0.7)
    before, apart = weights(sd), latents(sd)
    finetune.merge(sd)
    assert not same(before, weights(sd))
    assert relative_error(latents(sd), apart) < 1e-4
    finetune.merge(sd)  # a second time does nothing
    finetune.unmerge(sd)
    assert same(before, weights(sd))
    assert torch.equal(latents(sd), apart)
    assert relative_error(apart, base) > 0.05


def test_unmerging_is_exact_in_half_precision_after_the_adapter_went_on_training(sd: StableDiffusion) -> None:
    """Subtracting what was added would be wrong twice here."""
    half = model()
    half.unet.half()
    for parameter in finetune.add_lora(half, alpha=80):
        parameter.data.normal_()
    before = weights(half)
    finetune.merge(half)
    for _, _, layer in layers(half):
        layer.lora_A["default"].weight.data.add_(1)
    finetune.unmerge(half)
    after = weights(half)
    assert all(torch.equal(before[k], after[k]) for k in before if "lora_" not in k)


def test_adapters_add_up_by_their_scales(sd: StableDiffusion, files: dict[str, Path]) -> None:
    """W + 0.5 whole + 2 part, against the deltas that the files' updates stand for."""
    kept = weights(sd)
    finetune.load_lora(sd, files["whole"], scale=0.5, name="a")
    finetune.load_lora(sd, files["part"], name="b")
    finetune.set_scale(sd, 2.0, "b")
    finetune.merge(sd)
    whole, part = (drawn_updates(match_targets(places(sd), "all"), seed=seed) for seed in (1, 2))
    for network, path, layer in layers(sd):
        name = "unet" if network is sd.unet else "text_encoder"
        target = next(s for s in whole if s.network == name and s.path == path)
        delta = 0.5 * whole[target].delta() + (2 * part[target].delta() if "b" in layer.strength else 0)
        assert relative_error(layer.base.weight.detach(), kept[f"{name}.{path}.weight"] + delta) < 1e-6
    found = finetune.list_adapters(sd)
    assert (found["a"].scale, found["b"].scale, found["b"].enabled) == (0.5, 2.0, True)
    assert found["a"].modules == len(whole) > found["b"].modules
    assert found["a"].parameters == sum(b.down.numel() + b.up.numel() for b in whole.values())


def test_disabled_enabled_scaled_and_removed(sd: StableDiffusion, base: torch.Tensor, files: dict[str, Path]) -> None:
    """Each change also holds while the adapters are merged, and leaves them merged."""
    modules, kept = dict(sd.unet.named_modules()), weights(sd)
    finetune.load_lora(sd, files["whole"], name="a")
    only_a = latents(sd)
    finetune.load_lora(sd, files["part"], name="b")
    both = latents(sd)
    for merged in (False, True):
        if merged:
            finetune.merge(sd)
        bar = 1e-4 if merged else 1e-9
        finetune.disable(sd, "b")
        assert relative_error(latents(sd), only_a) < bar
        finetune.enable(sd, "b")
        finetune.set_scale(sd, 0.0, "b")
        assert relative_error(latents(sd), only_a) < bar
        finetune.set_scale(sd, 1.0, "b")
        assert relative_error(latents(sd), both) < bar
        assert is_merged(sd) == merged
    finetune.disable(sd)
    assert torch.equal(latents(sd), base)
    finetune.enable(sd)
    finetune.remove(sd, "b")
    assert list(finetune.list_adapters(sd)) == ["a"] and relative_error(latents(sd), only_a) < 1e-4
    finetune.remove(sd)
    assert all(sd.unet.get_submodule(path) is module for path, module in modules.items())
    assert same(kept, weights(sd)) and torch.equal(latents(sd), base)
    assert not is_merged(sd)


def test_the_adapters_of_a_half_precision_model_train_in_float32() -> None:
    half = model()
    half.unet.half()
    assert {p.dtype for p in finetune.add_lora(half, use_dora=True)} == {torch.float32}


def test_an_adapter_put_into_a_model_that_does_not_train_does_not_drop(sd: StableDiffusion) -> None:
    for parameter in finetune.add_lora(sd, targets="all", dropout=0.9):
        parameter.data.normal_(std=0.1)
    finetune.add_lora(sd, targets="all", dropout=0.9, name="second")
    assert torch.equal(latents(sd), latents(sd))
    assert not any(module.training for module in sd.unet.modules())


def test_a_baked_adapter_is_a_part_of_a_plain_model(files: dict[str, Path], tmp_path: Path) -> None:
    sd = model()
    kinds = {path: type(module) for path, module in sd.unet.named_modules()}
    finetune.load_lora(sd, files["whole"], scale=0.7)
    expected = latents(sd)
    finetune.bake(sd)
    assert finetune.list_adapters(sd) == {}
    assert {path: type(module) for path, module in sd.unet.named_modules()} == kinds
    sd.save_pretrained(tmp_path / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    assert relative_error(latents(again), expected) < 1e-4


def test_an_error_while_something_changes_leaves_a_merged_model_merged(
    sd: StableDiffusion, files: dict[str, Path]
) -> None:
    finetune.load_lora(sd, files["whole"])
    finetune.merge(sd)
    before = weights(sd)
    with pytest.raises(KeyError), changing(sd):
        assert not is_merged(sd)
        raise KeyError
    assert is_merged(sd) and same(before, weights(sd))


def test_nothing_new_trains_beside_what_is_merged(sd: StableDiffusion, files: dict[str, Path]) -> None:
    """It would be merged as well, so that no gradient reached it."""
    finetune.load_lora(sd, files["whole"])
    finetune.merge(sd)
    for train in (lambda: finetune.add_lora(sd), lambda: finetune.load_lora(sd, files["part"], trainable=True)):
        with pytest.raises(ConfigError, match="expected adapters beside the weights, found them merged; unmerge"):
            train()
    assert list(finetune.list_adapters(sd)) == ["whole"] and is_merged(sd)
    finetune.load_lora(sd, files["part"])  # only to be used, it may
    assert is_merged(sd)


def test_an_unknown_name_is_an_error_that_lists_the_known(sd: StableDiffusion, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="'x': expected one of the model's: it has none"):
        finetune.enable(sd, "x")
    finetune.load_lora(sd, files["part"])
    for call in (finetune.enable, finetune.disable, finetune.remove, lambda sd, n: finetune.set_scale(sd, 1.0, n)):
        with pytest.raises(ConfigError, match="'x': expected one of the model's: part"):
            call(sd, "x")


def test_only_what_was_added_trains(sd: StableDiffusion, files: dict[str, Path]) -> None:
    finetune.load_lora(sd, files["part"])
    parameters = finetune.add_lora(sd, rank=2, targets="attention", name="new")
    finetune.load_lora(sd, files["whole"])
    finetune.disable(sd, "part")
    finetune.set_scale(sd, 0.5, "whole")
    trains = {id(p) for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters() if p.requires_grad}
    assert trains == {id(p) for p in parameters} and len(parameters) == 2 * 32


def test_one_that_is_loaded_to_go_on_training_is_all_that_trains(files: dict[str, Path]) -> None:
    sd = model()
    finetune.load_lora(sd, files["dora"], trainable=True)
    trains = {n: p.requires_grad for m in (sd.unet, sd.vae, sd.text_encoder) for n, p in m.named_parameters()}
    assert all(trains[name] == (".dora" in name) for name in trains)
    assert sum(trains.values()) == 3 * finetune.list_adapters(sd)["dora"].modules


def test_switched_off_for_a_while_is_the_model_alone(sd: StableDiffusion, base: torch.Tensor, files: dict[str, Path]):
    for name in ("whole", "part"):
        finetune.load_lora(sd, files[name], name=name)
    finetune.disable(sd, "part")
    finetune.add_lora(sd, 2, name="trains")
    with torch.no_grad():
        for _, _, layer in layers(sd):
            if "trains" in layer.lora_B:
                layer.lora_B["trains"].weight.fill_(0.1)
    with pytest.warns(UserWarning, match="lora 'part': loaded, but does nothing: it is disabled"):
        adapted, trains = latents(sd), [p.requires_grad for p in sd.unet.parameters()]
    with pytest.raises(KeyError), without_adapters(sd) as unet:
        assert unet is sd.unet and torch.equal(latents(sd), base)
        raise KeyError
    assert not torch.allclose(adapted, base, atol=1e-3) and torch.equal(latents(sd), adapted)
    assert [p.requires_grad for p in sd.unet.parameters()] == trains and True in trains and False in trains
    assert {n: a.enabled for n, a in finetune.list_adapters(sd).items()} == {
        "whole": True,
        "part": False,
        "trains": True,
    }
