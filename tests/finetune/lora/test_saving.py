"""A model's LoRA as a file: which one, and with what."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.tiny import drawn_updates, places

pytestmark = pytest.mark.usefixtures("clean")


def test_saving_asks_which_of_several(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        finetune.save_lora(sd, tmp_path)
    finetune.add_lora(sd, name="a", targets="attention")
    finetune.add_lora(sd, name="b", rank=2)
    with pytest.raises(ConfigError, match="has a, b"):
        finetune.save_lora(sd, tmp_path)
    finetune.save_lora(sd, tmp_path, name="b")
    read = read_lora(tmp_path, places(sd))
    assert len(read) == 16 and {update.rank for update in read.values()} == {2}


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_a_scalar_that_is_zero_stays_so(sd: StableDiffusion, format: str, tmp_path: Path) -> None:
    """LyCORIS begins to train there; the other modules' scales say what the file's alpha is."""
    chosen = match_targets(places(sd), "cross_attention")
    write_lora(drawn_updates(chosen), tmp_path / "a.safetensors", "kohya")
    silent = {f"{target.kohya}.scalar": torch.zeros(()) for target in chosen[1:]}
    save_file(load_file(tmp_path / "a.safetensors") | silent, tmp_path / "a.safetensors")
    finetune.load_lora(sd, tmp_path / "a.safetensors")
    finetune.save_lora(sd, tmp_path / "b.safetensors", format)
    first, again = (read_lora(tmp_path / f"{name}.safetensors", places(sd)) for name in "ab")
    deltas = [[update[target].delta() for target in chosen] for update in (first, again)]
    assert all(torch.allclose(x, y) for x, y in zip(*deltas, strict=True))
    assert float(deltas[1][0].abs().max()) > 0 and not any(float(d.abs().max()) for d in deltas[1][1:])
