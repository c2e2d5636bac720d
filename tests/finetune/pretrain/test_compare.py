"""The comparison of ways to teach a concept: what is measured, kept and shown. That the bars hold is a slow test."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finetune
from finetune.data.folders import Rules, read_folder
from finetune.pretrain import compare, compare_decoder
from finetune.pretrain.compare import BASE, STEPS, WAYS, Result, Way, folder_of, keep, learning_curves, nbytes, table
from finetune.pretrain.concept import concept_prompts, write_concept_folder
from sdkit.files import section
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune import toy

NOTHING = Result(BASE, 0, 0, 0.0, 5.0, 1.0, 0.0, 98.0, 0.0, 0)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results.json")
    return tmp_path / "results.json"


def test_a_result_takes_the_place_of_an_older_one(results: Path):
    first = Result("LoRA, rank 8", 0, 100, 50.0, 60.0, 70.0, 40.0, 95.0, 30.0, 2000)
    for result in (first, NOTHING, replace(first, seed=1), replace(first, concept=55.0)):
        keep(result)
    assert compare.read_results() == [replace(first, concept=55.0), replace(first, seed=1), NOTHING]
    assert len(json.loads(results.read_text())) == 3


def test_the_table_and_the_curves():
    first = Result("LoRA, rank 8", 0, 100, 70.0, 80.0, 90.0, 60.0, 96.0, 60.0, 250_000)
    hyper = [Result("hypernetwork", s, 100, c, 0.0, 0.0, 0.0, 9.0, 120.0, 1000) for s, c in ((0, 55.0), (1, 100.0))]
    rows = [NOTHING, replace(first, step=50, concept=20.0), first, *hyper]
    text = table(rows)
    assert "| the base | 0 | 0 | 98 |  |  | 1 |" in text
    assert "| LoRA, rank 8 | 70 | 60 | 96 | 250 kB | 1.0 | 1 |" in text
    assert "| hypernetwork | 55 to 100 | 0 | 9 | 1 kB | 2.0 | 2 |" in text and text.count("\n") == 4
    left, right = learning_curves(rows).axes
    (line,) = left.lines
    assert line.get_xydata().tolist() == [[0, 0], [50, 20], [100, 70]]
    assert right.lines[0].get_ydata().tolist() == [98, 96, 96]


def test_pictures_of_the_base_are_drawn_once(tmp_path: Path):
    compare.write_prior(tmp_path / "prior", count=2)
    found = read_folder(tmp_path / "prior", Rules(prior=True)).pictures
    assert len(found) == 2 and all(p.caption and "zorb" not in p.caption for p in found)
    before = (tmp_path / "prior" / "000.png").stat().st_mtime_ns
    compare.write_prior(tmp_path / "prior", count=5)
    assert (tmp_path / "prior" / "000.png").stat().st_mtime_ns == before and len(
        list(tmp_path.glob("prior/*.png"))
    ) == 2


@pytest.mark.parametrize("way", [WAYS[0], *WAYS[4:]], ids=lambda way: way.script)
def test_every_way_runs_and_changes_the_pictures(way: Way, tmp_path: Path):
    """Its script takes its options, and what it writes gets into the model."""
    write_concept_folder(tmp_path / "zorb", 3)
    write_concept_folder(tmp_path / "prior", 3, seed=1)
    toy.forget_accelerate()
    small = replace(way, options=(*way.options, "--train-batch-size", "1", "--lr-warmup-steps", "0"))
    assert compare.train(small, 0, compare.PARTS, tmp_path) > 1
    folder = folder_of(way, 0, tmp_path)
    assert nbytes(folder / way.file) > 500 and (folder / f"checkpoint-1/{way.file}").exists()

    def drawn(sd: StableDiffusion) -> torch.Tensor:
        sd.words = None  # the base has never seen a zorb
        found = sd.text_to_image("a zorb", seed=0, num_inference_steps=2, output_type="latent", progress=False)
        return found.latents

    assert not torch.equal(drawn(compare.taught(way, folder)), drawn(StableDiffusion.from_pretrained("tabletop")))


def test_the_documents_are_what_the_results_make():
    """No figure stands there without a run."""
    rows, page = compare.read_results(), compare.DOCS / "latent-diffusion.md"
    assert section(Path(finetune.__file__).parent / "README.md", compare.SECTION) == table(rows)
    assert section(page, compare.LORA) == table(rows, "LoRA") and section(page, compare.LORA).count("LoRA, rank") == 4
    assert section(page, compare.HYPERNETWORK) == table(rows, "hypernetwork")


def test_the_lora_that_is_on_record_meets_its_bars():
    rows = compare.read_results()
    (base,) = (r for r in rows if r.way == BASE)
    (lora,) = (r for r in rows if (r.way, r.seed, r.step) == (WAYS[0].name, 0, STEPS))
    assert base.concept < 5 and lora.concept >= 70 and lora.base >= base.base - 5 and lora.seconds <= 20 * 60


def test_no_hypernetwork_that_is_on_record_diverged():
    """Every seed taught the bands and some of the shape, and left the base what it could."""
    rows = compare.read_results()
    (base,) = (r for r in rows if r.way == BASE)
    runs = [r for r in rows if r.way == "hypernetwork" and r.step == STEPS]
    assert len({r.seed for r in runs}) >= 5 and base.striped < 5 and base.concept < 5
    assert all(r.striped >= 80 and r.concept >= 30 and r.base >= base.base - 10 for r in runs)


@pytest.mark.slow
def test_a_lora_teaches_the_concept_and_keeps_the_rest(tmp_path: Path):
    """The bar itself, trained anew: about 20 minutes on two cores."""
    unlike = write_concept_folder(tmp_path / "zorb", compare.PICTURES)
    compare.write_prior(tmp_path / "prior")
    compare.train(WAYS[0], 1, STEPS, tmp_path)
    prompts = concept_prompts(100, unlike=unlike)
    before = compare.measure(StableDiffusion.from_pretrained("tabletop"), prompts)
    after = compare.measure(compare.taught(WAYS[0], folder_of(WAYS[0], 1, tmp_path)), prompts)
    assert before["concept"] < 5 and after["concept"] >= 70 and after["base"] >= before["base"] - 5


def test_the_decoders_table_is_what_the_results_make_and_meets_its_bars():
    results = json.loads(compare_decoder.RESULTS.read_text())
    for document in (Path(finetune.__file__).parent / "README.md", compare.DOCS / "latent-diffusion.md"):
        assert section(document, compare_decoder.SECTION) == compare_decoder.table(results)
    striped, photographs = results["striped"], results["photographs"]
    assert striped["PSNR after"] >= striped["PSNR before"] + 1.5
    assert all(photographs[f"{kind} after"] > photographs[f"{kind} before"] for kind in ("PSNR", "SSIM"))


def test_what_decoders_are_measured_on_was_not_trained_on(tmp_path: Path):
    compare_decoder.write_photographs(tmp_path)
    data, unseen = (list((tmp_path / kind).iterdir()) for kind in ("data", "unseen"))
    assert len(data) > len(unseen) >= 12 and not {p.read_bytes() for p in data} & {p.read_bytes() for p in unseen}
    assert not {p.name for p in data} & {p.name for p in unseen}
