"""Changes of weights in a model have the verbs of all adapters, and leave no trace."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import finetune
from finetune.lora.adapters import is_merged, without_adapters
from finetune.lora.targets import match_targets, places_in
from finetune.lora.writing import write_lora
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import drawn_updates, latents, model, places

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def files(sd: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of many families, one of norms, and a LoRA on the same layers."""
    folder, everything = tmp_path_factory.mktemp("changes"), match_targets(places(sd), "all")
    mixed: dict[str, Tensor] = {}
    for i, target in enumerate(everything):
        rows, columns, kohya = target.shape[0], target.shape[1], target.kohya
        if rows % 4 == 0 and i % 3 == 0:
            blocks = (rows // 4, 4, 4) if i % 2 else (2, rows // 4, 4, 4)
            mixed[f"{kohya}.oft_blocks"] = 0.3 * draw(kohya, blocks).float()
            mixed[f"{kohya}.alpha"] = torch.tensor(0.0)
        elif i % 3 == 1:
            mixed[f"{kohya}.weight"] = 0.4 * draw(kohya, (columns,)).float()
            mixed[f"{kohya}.on_input"] = torch.tensor(1)
        else:
            mixed[f"{kohya}.diff"] = 0.02 * draw(kohya, tuple(target.shape)).float()
    norms = {
        f"{t.kohya}.{end}": 0.3 * draw(f"{t.kohya}{end}", tuple(t.shape)).float()
        for t in places_in(sd)
        if len(t.shape) == 1
        for end in ("w_norm", "b_norm")
    }
    save_file(mixed, folder / "mixed.safetensors")
    save_file(norms, folder / "norms.safetensors")
    write_lora(drawn_updates(everything), folder / "lora.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("mixed", "norms", "lora")}


def weights(sd: StableDiffusion) -> dict[str, Tensor]:
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    return {
        f"{n}.{key.replace('.base_layer', '')}": value.clone()
        for n, network in networks.items()
        for key, value in network.state_dict().items()
        if ".lora_" not in key
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_switched_scaled_and_removed(sd: StableDiffusion, base: Tensor, files: dict[str, Path]) -> None:
    own = weights(sd)
    finetune.load_lora(sd, files["mixed"])
    alone = latents(sd)
    assert relative_error(alone, base) > 0.05
    finetune.load_lora(sd, files["norms"], scale=0.7)
    finetune.load_lora(sd, files["lora"])
    assert list(finetune.list_adapters(sd)) == ["mixed", "norms", "lora"]
    everything = latents(sd)

    finetune.disable(sd)
    assert torch.equal(latents(sd), base) and same(weights(sd), own)
    finetune.enable(sd, "mixed")
    assert torch.equal(latents(sd), alone)
    finetune.set_scale(sd, 0.0, "mixed")
    assert same(weights(sd), own) and finetune.list_adapters(sd)["mixed"].scale == 0.0
    finetune.set_scale(sd, 1.0, "mixed")
    finetune.enable(sd)
    assert torch.equal(latents(sd), everything)

    finetune.merge(sd)
    merged = latents(sd)
    assert is_merged(sd) and relative_error(merged, everything) < 1e-4
    finetune.disable(sd, "norms")
    finetune.enable(sd, "norms")
    assert torch.equal(latents(sd), merged)
    finetune.unmerge(sd)
    assert torch.equal(latents(sd), everything)

    finetune.remove(sd, "lora")
    finetune.remove(sd, "norms")
    assert torch.equal(latents(sd), alone)
    finetune.remove(sd)
    assert same(weights(sd), own) and torch.equal(latents(sd), base) and sd.adapter_states == {}


def test_loaded_into_a_merged_model(sd: StableDiffusion, files: dict[str, Path]) -> None:
    """In whatever order: what is merged stays so, and each is computed from the model's own weights."""
    own = weights(sd)
    for name in ("mixed", "lora"):
        finetune.load_lora(sd, files[name])
    finetune.merge(sd)
    expected = weights(sd)
    finetune.remove(sd)

    finetune.load_lora(sd, files["lora"])
    finetune.merge(sd)
    finetune.load_lora(sd, files["mixed"])
    assert is_merged(sd) and same(weights(sd), expected)
    finetune.unmerge(sd)
    finetune.remove(sd, "mixed")
    assert same(weights(sd), own)


def test_several_add_up_each_computed_from_the_models_own_weights(sd: StableDiffusion, files: dict[str, Path]) -> None:
    own = weights(sd)
    finetune.load_lora(sd, files["mixed"])
    single = weights(sd)
    finetune.load_lora(sd, files["mixed"], scale=2.0, name="again")
    for key, value in weights(sd).items():
        assert torch.allclose(value, own[key] + 3 * (single[key] - own[key]), atol=1e-5), key


def test_a_prompt_names_it(sd: StableDiffusion, base: Tensor, files: dict[str, Path]) -> None:
    finetune.load_lora(sd, files["norms"], scale=0.4)
    expected = latents(sd)
    finetune.disable(sd)
    assert torch.equal(latents(sd, "a cat<lora:norms:0.4>"), expected)
    assert torch.equal(latents(sd), base)


def test_in_half_precision_and_when_the_model_is_cast(files: dict[str, Path]) -> None:
    """The sum is rounded once, and what comes back are the model's own bits."""
    half, wide = model(), model()
    half.to(torch.float16)
    own = weights(half)
    wide.unet.load_state_dict(half.unet.state_dict())
    for sd in (half, wide):
        finetune.load_lora(sd, files["mixed"])
    expected = {key: value.half() for key, value in wide.unet.state_dict().items()}
    assert same(expected, half.unet.state_dict())
    finetune.remove(half)
    assert same(weights(half), own)

    wide.to(torch.float16)
    finetune.remove(wide)
    assert same(wide.unet.state_dict(), half.unet.state_dict())


def test_switched_off_for_a_while_and_beside_one_that_trains(
    sd: StableDiffusion, base: Tensor, files: dict[str, Path]
) -> None:
    finetune.load_lora(sd, files["mixed"])
    trained = finetune.add_lora(sd, 2)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.2)
    adapted = latents(sd)
    x, context = draw("x", (1, 4, 8, 8)).float(), draw("c", (1, 77, 32)).float()
    loss = sd.unet(x, 5, context).square().mean()
    with without_adapters(sd) as unet:
        assert unet is sd.unet and torch.equal(latents(sd), base)
    assert torch.equal(latents(sd), adapted)
    loss.backward()  # what it kept of the weights is there again
    assert all(parameter.grad is not None for parameter in trained)
    assert {id(p) for p in sd.unet.parameters() if p.requires_grad} == {id(p) for p in trained}


def test_baked(files: dict[str, Path], tmp_path: Path) -> None:
    sd = model()
    for name in ("mixed", "norms", "lora"):
        finetune.load_lora(sd, files[name], scale=0.5)
    expected = latents(sd)
    for name in ("lora", "mixed"):
        with pytest.raises(ConfigError, match=r"the model has adapters in it: call finetune\.bake"):
            sd.save_pretrained(tmp_path / "model")
        finetune.disable(sd, name)
    finetune.enable(sd)
    finetune.bake(sd)
    assert finetune.list_adapters(sd) == {} and sd.adapter_states == {}
    sd.save_pretrained(tmp_path / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    assert relative_error(latents(again), expected) < 1e-4


def test_what_does_not_train_or_swap_is_refused(sd: StableDiffusion, files: dict[str, Path]) -> None:
    own = weights(sd)
    with pytest.raises(ConfigError, match="expected LoRA to go on training, found IA3, OFT, whole difference"):
        finetune.load_lora(sd, files["mixed"], trainable=True)
    with pytest.raises(CheckpointError, match="expected plain LoRA in a slot, found"):
        finetune.load_lora(sd, files["norms"], slot_rank=4)
    finetune.load_lora(sd, files["lora"], slot_rank=4)
    with pytest.raises(CheckpointError, match="expected plain LoRA in a slot, found whole difference"):
        finetune.swap_lora(sd, files["norms"], "lora")
    finetune.remove(sd)
    assert same(weights(sd), own)


def test_a_model_with_changed_weights_is_no_file_of_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    sd = model()
    finetune.load_lora(sd, files["norms"])
    for save in (sd.save_pretrained, sd.save_single_file):
        with pytest.raises(ConfigError, match=r"the model has adapters in it: call finetune\.bake or finetune\.remove"):
            save(tmp_path / "model.safetensors")
    finetune.remove(sd)
    sd.save_pretrained(tmp_path / "model")
