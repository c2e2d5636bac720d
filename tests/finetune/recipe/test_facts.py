"""The facts of a run: they change with what changes a batch, and with nothing else."""

from dataclasses import replace
from pathlib import Path

from finetune.data.config import DataConfig
from finetune.recipe.facts import data_facts
from tests.finetune.data.painted import dataset, paint


def test_the_facts_of_the_data_see_what_changes_batches(tmp_path: Path):
    folder = tmp_path / "data"
    for n in range(2):
        paint(folder / f"{n}.png", seed=n).with_suffix(".txt").write_text(f"{n}")
    paint(folder / "3_often" / "o.png")
    config = DataConfig(folder)
    seen = [data_facts(dataset(folder, c)) for c in (config, replace(config, caption_dropout=0.1))]
    seen.append(data_facts(dataset(folder, config, resolution=64)))
    (folder / "0.txt").write_text("new")
    seen.append(data_facts(dataset(folder, config)))
    paint(folder / "1.png", seed=99)
    seen.append(data_facts(dataset(folder, config)))
    (folder / "3_often").rename(folder / "2_often")
    seen.append(data_facts(dataset(folder, config)))
    assert all(seen.count(facts) == 1 for facts in seen)

    (folder / "stray.txt").write_text("of no picture")
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert data_facts(dataset(moved, replace(config, data=moved, cache_dir=Path("x")))) == seen[-1]
