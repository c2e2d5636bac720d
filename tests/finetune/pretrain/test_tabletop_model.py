"""The model that ships with us: its files, its pictures, and what the probe sees in them."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import sdkit
from finetune.pretrain import evaluate
from finetune.pretrain.autoencoder import mean_psnr, unseen_renders
from finetune.pretrain.clip import retrieval
from finetune.pretrain.evaluate import (
    PROMPT_SEED,
    as_many_as_asked,
    both_right,
    draw,
    is_well_formed,
    reconstruct_clip,
    single,
)
from finetune.pretrain.probe import Probe, Verdict, accuracy, load_probe
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.checkpoints.loading import MODELS
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error

FOLDER = MODELS / "tabletop"


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load_probe()


def test_its_weights_are_float16_and_at_most_25_megabytes() -> None:
    files = list(FOLDER.rglob("*.safetensors"))
    assert len(files) >= 4 and sum(f.stat().st_size for f in files) <= 25e6
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as content:
            assert {content.get_slice(k).get_dtype() for k in content.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_diffusers_loads_the_folder_and_draws_our_picture(sd: StableDiffusion) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 10, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(3)
    expected = theirs("a red sphere", generator=generator, output_type="pt", **settings).images
    ours = sd.text_to_image("a red sphere", seed=3, output_type="pt", progress=False, **settings).images
    assert relative_error(ours, expected) < 1e-4


def test_the_probe_sees_what_the_prompts_say(sd: StableDiffusion, probe: Probe) -> None:
    """A quick look; the model card has the full table. Chance is about 3 %."""
    scenes = sample_scenes(24, PROMPT_SEED + 7, counts=(1.0, 0.0, 0.0))
    prompts = captions(scenes, PROMPT_SEED + 7)
    figures = single(prompts, scenes, draw(sd, probe, prompts, 5, guidance=7.5, steps=12))
    assert figures["colour and shape right"] >= 75
    with pytest.warns(UserWarning, match="prompt: ignored at guidance_scale 0"):
        ignored = single(prompts, scenes, draw(sd, probe, prompts, 5, guidance=0.0, steps=12))
    assert ignored["colour and shape right"] <= 25


def test_as_many_alike_are_counted_and_nothing_else_may_be_there() -> None:
    red, blue = {"color": "red", "shape": "cube"}, {"color": "blue", "shape": "cube"}
    verdicts = [Verdict(seen, [], [], "white") for seen in ([red, red], [red], [red, red, blue], [red, red, red], [])]
    assert as_many_as_asked([(2, "red", "cube")] * 5, verdicts) == 20


def test_a_scene_is_well_formed_where_the_probe_is_sure_of_every_object() -> None:
    def verdict(*pairs: tuple[float, float]) -> Verdict:
        return Verdict([{}] * len(pairs), [{"color": c, "shape": s} for c, s in pairs], [], "white")

    assert is_well_formed(verdict((0.95, 0.99))) and is_well_formed(verdict((0.95, 0.99), (0.91, 0.91)))
    assert not any(map(is_well_formed, (verdict(), verdict((0.99, 0.8)), verdict((0.99, 0.99), (0.5, 0.99)))))


def test_the_vae_reconstructs_unseen_renders(sd: StableDiffusion) -> None:
    assert mean_psnr(sd.vae, unseen_renders(count=64)) >= 34.0


def test_captions_find_their_pictures() -> None:
    assert min(retrieval(*reconstruct_clip(FOLDER), rounds=2)) >= 0.8


def test_the_probe_is_right_on_unseen_renders(probe: Probe) -> None:
    figures = accuracy(probe, 192)
    assert min(figures.values()) >= 95, figures


@pytest.mark.slow
def test_the_bars_of_the_model_card(sd: StableDiffusion, probe: Probe) -> None:
    """One seed of what `python -m finetune.pretrain.evaluate` measures at three."""
    one = sample_scenes(300, PROMPT_SEED, counts=(1.0, 0.0, 0.0))
    prompts = captions(one, PROMPT_SEED)
    figures = single(prompts, one, draw(sd, probe, prompts, 1000, guidance=7.5, steps=30))
    assert figures["colour and shape right"] >= 90
    assert figures["colour and shape right, each with probability over 0.9"] >= 85
    assert figures["worst shape"] >= 75 and figures["exactly one object"] >= 93
    assert mean_psnr(sd.vae, unseen_renders()) >= 33 and retrieval(*reconstruct_clip(FOLDER)).picture >= 0.8
    assert min(accuracy(probe).values()) >= 98


@pytest.mark.slow
def test_two_objects(sd: StableDiffusion, probe: Probe) -> None:
    two = sample_scenes(200, PROMPT_SEED + 2, counts=(0.0, 1.0, 0.0))
    prompts = captions(two, PROMPT_SEED + 2)
    assert both_right(two, draw(sd, probe, prompts, 1000, guidance=7.5, steps=30)) >= 80


def test_the_model_card_names_its_command() -> None:
    card = Path(FOLDER / "README.md").read_text()
    assert "python -m finetune.pretrain.evaluate" in card and (FOLDER / "grid.png").exists()


def test_an_evaluation_that_was_killed_goes_on_with_the_next_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(FOLDER, model)
    (model / "results.json").unlink()
    seen: list[int] = []

    def measured(sd: StableDiffusion, probe: Probe, seed: int, guidance: float, steps: int) -> dict[str, float]:
        if len(seen) == 1 and seed == 2000:
            seen.append(0)
            raise KeyboardInterrupt
        seen.append(seed)
        return {"right": seed / 100}

    monkeypatch.setattr(evaluate, "measure", measured)
    for name in ("mean_psnr", "unseen_renders", "draw_grid"):
        monkeypatch.setattr(evaluate, name, lambda *given: Image.new("RGB", (8, 8)) if len(given) == 3 else 1.0)
    for owner, name in ((evaluate.word_attention, "measure"), (evaluate, "of_towers"), (evaluate, "accuracy")):
        monkeypatch.setattr(owner, name, lambda *given: {"a": 2.0})

    with pytest.raises(KeyboardInterrupt):
        evaluate.main(model, seeds=2)
    evaluate.main(model, seeds=2)
    assert seen == [1000, 0, 2000]
    assert "| right | 10.0 | 20.0 |" in (model / "README.md").read_text()
    evaluate.main(model, seeds=2)
    assert len(seen) == 3
    evaluate.main(model, seeds=1, guidance=4.0)  # other figures
    assert seen[3:] == [1000]
