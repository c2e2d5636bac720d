"""Where networks run."""

import pytest
import torch

from sdkit.devices import LARGE, default_dtype, find_device
from sdkit.errors import ConfigError


def test_the_gpu_if_there_is_one() -> None:
    gpu = torch.cuda.is_available()
    assert find_device().type == ("cuda" if gpu else "cpu")
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    assert default_dtype(torch.device("cpu")) == torch.float32 and default_dtype(torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_large_model_is_bfloat16_where_the_processor_multiplies_it(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdkit.devices.multiplies_bfloat16", lambda: multiplies)
    cpu = torch.device("cpu")
    assert default_dtype(cpu, LARGE) == (torch.bfloat16 if multiplies else torch.float32)
    assert default_dtype(cpu, LARGE - 1) == torch.float32


@pytest.mark.parametrize("device", ["warp9", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: ") as caught:
        find_device(device)
    assert "\n" not in str(caught.value)
