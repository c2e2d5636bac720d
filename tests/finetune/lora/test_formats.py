"""LoRA files: what we write is the same picture in the program that owns the format, and back in ours."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_text_encoder_lora_key, _convert_unet_lora_key
from safetensors.torch import load_file, save_file
from torch import nn

import finetune
from finetune.lora.reading import DIFFUSERS_FILE, METADATA, read_lora, split_key
from finetune.lora.targets import Target, match_targets, published_targets
from finetune.lora.update import Updates
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_header
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import drawn_updates, latents, model, pipeline, places, their_latents

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*steps_offset:FutureWarning")  # of diffusers' scheduler

BAR = 1e-3
SAME = 1e-5  # of updates: what folding scales into one alpha may round


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture(scope="module")
def base(sd: StableDiffusion) -> torch.Tensor:
    return latents(sd)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture(autouse=True)
def clean(sd: StableDiffusion) -> Iterator[None]:
    yield
    finetune.remove(sd)


def by_depth(target: Target) -> int:
    return 6 if "up_blocks" in target.path or "layers.1" in target.path else 3


def by_kind(target: Target) -> float:
    return 1.5 if "attn" in target.path else 0.5


CASES: dict[str, dict[str, Any]] = {
    "alpha is rank": {"targets": "cross_attention"},
    "alpha is not rank": {"targets": "attention", "scale": lambda target: 0.5, "text": True},
    "mixed ranks and alphas": {"targets": "all", "rank": by_depth, "scale": by_kind},
    "mixed ranks": {"targets": "attention", "rank": by_depth, "text": True},
    "one alpha for mixed ranks": {"targets": "all", "rank": by_depth, "scale": lambda target: 4 / by_depth(target)},
    "everything": {"targets": "all", "rank": by_depth, "scale": by_kind, "text": True},
}
QUICK = 3
NAMES = [pytest.param(name, marks=[] if i < QUICK else pytest.mark.slow) for i, name in enumerate(CASES)]


def case(sd: StableDiffusion, targets: str, text: bool = False, **options: Any) -> Updates:
    chosen = match_targets(places(sd), targets)
    return drawn_updates([target for target in chosen if text or target.network == "unet"], **options)


def load_theirs(pipe: Any, path: Path, format: str) -> torch.Tensor:
    """The picture of the owning program, which must take every key without a warning."""
    if format == "peft":
        whole = copy.copy(pipe)
        whole.unet = peft.PeftModel.from_pretrained(copy.deepcopy(pipe.unet), path).eval()
        if (path / "text_encoder").is_dir():
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(pipe.text_encoder), path / "text_encoder")
            whole.text_encoder = adapted.eval()
        return their_latents(whole)
    pipe.load_lora_weights(path.parent if path.is_file() else path, weight_name=path.name if path.is_file() else None)
    try:
        return their_latents(pipe)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_is_the_same_picture_in_the_owning_program_and_in_ours(
    sd: StableDiffusion,
    base: torch.Tensor,
    pipe: Any,
    name: str,
    format: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    updates = case(sd, **CASES[name])
    first, path = tmp_path / "first", tmp_path / ("it.safetensors" if format == "kohya" else "it")
    write_lora(updates, first)
    finetune.load_lora(sd, first)
    finetune.save_lora(sd, path, format)
    ours = latents(sd)
    assert relative_error(ours, base) > 0.05
    with caplog.at_level(logging.WARNING):
        theirs = load_theirs(pipe, path, format)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    assert relative_error(ours, theirs) < BAR

    finetune.remove(sd)
    finetune.load_lora(sd, path)
    assert relative_error(latents(sd), ours) < BAR
    again = read_lora(path, places(sd))
    assert again.keys() == updates.keys()
    assert all(relative_error(again[target].delta(), updates[target].delta()) < SAME for target in updates)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_dora(sd: StableDiffusion, pipe: Any, format: str, tmp_path: Path) -> None:
    write_lora(case(sd, "all", text=True, dora=True), tmp_path / "it", format)
    finetune.load_lora(sd, tmp_path / "it")
    assert relative_error(latents(sd), load_theirs(pipe, tmp_path / "it", format)) < BAR


# What others write

THEIRS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(
        r=4,
        lora_alpha=2,
        use_rslora=True,
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"to_v": 5},
        target_modules=["to_q", "to_k", "to_v", "proj_in"],
    ),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["to_k", "conv1"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["to_k", "conv2"], use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["to_k", "conv2"]),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_folder_that_peft_wrote(sd: StableDiffusion, pipe: Any, kind: str, tmp_path: Path) -> None:
    whole = copy.copy(pipe)
    whole.unet = draw_adapters(peft.get_peft_model(copy.deepcopy(pipe.unet), THEIRS[kind])).eval()
    whole.unet.save_pretrained(tmp_path / "it")
    finetune.load_lora(sd, tmp_path / "it")
    assert relative_error(latents(sd), their_latents(whole)) < BAR


def test_a_file_that_diffusers_wrote(sd: StableDiffusion, pipe: Any, tmp_path: Path) -> None:
    pipe.unet.add_adapter(copy.deepcopy(THEIRS["lora"]))
    draw_adapters(pipe.unet)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    theirs = their_latents(pipe)
    pipe.unload_lora_weights()
    finetune.load_lora(sd, tmp_path, name="it")
    assert relative_error(latents(sd), theirs) < BAR


def draw_adapters(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if re.search("lora_|hada_|lokr_", name):
            values = draw(name, tuple(parameter.shape)).float()
            parameter.data = 1 + 0.2 * values if "magnitude" in name else 0.3 * values
    return network


def up_and_down(key: str, name: str) -> str:
    return key.replace("lora_A", f"{name}.down").replace("lora_B", f"{name}.up")


def old_diffusers(key: str) -> str:
    """The names of diffusers' first LoRAs: attention processors, and to_out without its number."""
    key = re.sub(r"(attn\d)\.to_(q|k|v|out)(\.0)?\.lora_(A|B)", r"\1.processor.to_\2_lora.\4", key)
    key = re.sub(r"self_attn\.(q|k|v|out)_proj\.lora_(A|B)", r"self_attn.to_\1_lora.\2", key)
    key = re.sub(r"(mlp\.fc\d)\.lora_(A|B)", r"\1.lora_linear_layer.\2", key)
    return key.replace(".A.weight", ".down.weight").replace(".B.weight", ".up.weight")


SPELLINGS = {
    "old diffusers": old_diffusers,
    "attn_procs, without the network": lambda key: old_diffusers(key).removeprefix("unet."),
    ".lora.down": lambda key: up_and_down(key, "lora"),
    "lora_linear_layer": lambda key: up_and_down(key, "lora_linear_layer"),
    "without text_model": lambda key: key.replace("text_model.", ""),
    "peft's prefix": lambda key: re.sub(r"^(unet|text_encoder)\.", "base_model.model.", key),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names_for_the_same(sd: StableDiffusion, spelling: str, tmp_path: Path) -> None:
    updates = case(sd, "attention", text=True)
    write_lora(updates, tmp_path / "new.safetensors")
    renamed = {SPELLINGS[spelling](k): v for k, v in load_file(tmp_path / "new.safetensors").items()}
    assert renamed.keys() != load_file(tmp_path / "new.safetensors").keys()
    save_file(renamed, tmp_path / "old.safetensors")
    read = read_lora(tmp_path / "old.safetensors", places(sd))
    assert read.keys() == updates.keys()
    assert all(torch.equal(read[target].delta(), updates[target].delta()) for target in updates)


def test_a_pickled_file_and_the_second_name_of_kohyas_text_encoder(sd: StableDiffusion, tmp_path: Path) -> None:
    updates = case(sd, "attention", text=True)
    write_lora(updates, tmp_path / "it.safetensors", "kohya")
    state = {k.replace("lora_te_", "lora_te1_"): v for k, v in load_file(tmp_path / "it.safetensors").items()}
    torch.save(state, tmp_path / "it.pt")
    assert read_lora(tmp_path / "it.pt", places(sd)).keys() == updates.keys()


def test_alphas_and_their_absence(sd: StableDiffusion, tmp_path: Path) -> None:
    """kohya's alpha tensor; peft's config with rsLoRA and patterns in diffusers' header; scale 1 where neither is."""
    target, other = match_targets(places(sd), ["attn2.to_k"])[:2]

    def tensors(module: str, down: str, up: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{module}.{down}.weight": torch.ones(4, 32), f"{module}.{up}.weight": torch.ones(width, 4)}

    state = {k: v for s in (target, other) for k, v in tensors(s.kohya, "lora_down", "lora_up", s.shape[0]).items()}
    save_file(state | {f"{target.kohya}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", places(sd))
    assert (read[target].scale, read[other].scale) == (0.5, 1.0)

    state = {k: v for s in (target, other) for k, v in tensors(s.diffusers, "lora_A", "lora_B", s.shape[0]).items()}
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.use_rslora": True, "unet.alpha_pattern": {other.path: 6}}
    save_file(state, tmp_path / "b.safetensors", {METADATA: json.dumps(config)})
    read = read_lora(tmp_path / "b.safetensors", places(sd))
    assert (read[target].scale, read[other].scale) == (1.0, 3.0)


# Facts in the files


def test_kohyas_file_has_one_alpha_and_the_facts_that_programs_ask_for(sd: StableDiffusion, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write_lora(case(sd, **CASES["mixed ranks and alphas"]), path, "kohya", {"ss_steps": "7"})
    header, metadata = read_header(path)
    state = load_file(path)
    alphas = {float(v) for k, v in state.items() if k.endswith(".alpha")}
    assert len(alphas) == 1 and float(metadata["ss_network_alpha"]) == alphas.pop()
    assert all(v.dim() == 0 for k, v in state.items() if k.endswith(".alpha"))
    assert (
        metadata.items()
        >= {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "3",
            "ss_steps": "7",
        }.items()
    )
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "3"
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    assert len(header) == 3 * len(read_lora(path, places(sd)))


def test_kohyas_names_lead_back_to_stable_diffusions_modules() -> None:
    """diffusers' own translation, for each module of SD1; SD2 has the same names."""
    found = published_targets(768)
    names = [target.kohya for target in found]
    assert len(set(names)) == len(names)
    for target in found:
        key = f"{target.kohya}.lora_down.weight"
        theirs = (
            _convert_unet_lora_key(key)
            if target.network == "unet"
            else _convert_text_encoder_lora_key(key, target.kohya)
        )
        assert split_key(f"{target.network}.{theirs}") == (target.diffusers, "down")


def test_conversion_without_the_model(tmp_path: Path) -> None:
    found = published_targets(768)
    updates = drawn_updates(match_targets(found, ["mid_block.attentions.0.proj_in", "attn2.to_k", "fc1"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    finetune.convert_lora(tmp_path / "b", tmp_path / "c", "peft")
    finetune.convert_lora(tmp_path / "c", tmp_path / "d.safetensors", "kohya")
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "d.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)


def test_conversion_finds_stable_diffusion_2_by_its_context(tmp_path: Path) -> None:
    found = published_targets(1024)
    updates = drawn_updates(match_targets(found, ["attn2.to_k", "proj_in"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    assert read_header(tmp_path / "a.safetensors")[1]["ss_base_model_version"] == "sd_v2"
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert read_lora(tmp_path / "b.safetensors", found).keys() == updates.keys()


# What is refused


def spoiled(state: dict[str, torch.Tensor], key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {k: v for k, v in (state | {key: value}).items() if v is not None}


def test_a_bad_file_is_one_line_that_names_it(sd: StableDiffusion, tmp_path: Path) -> None:
    write_lora(case(sd, "cross_attention"), tmp_path / "good.safetensors", "kohya")
    good = load_file(tmp_path / "good.safetensors")
    module = next(k for k in good if k.endswith("to_k.alpha")).removesuffix(".alpha")
    down, up = f"{module}.lora_down.weight", f"{module}.lora_up.weight"
    bad = {
        "widths": (spoiled(good, down, torch.ones(4, 48)), r"attn2\.to_k.* expected an update of \[16, 32\], .*48"),
        "rows": (spoiled(good, up, torch.ones(48, 4)), r"attn2\.to_k.*expected an update of \[16, 32\], found \[48"),
        "ranks": (spoiled(good, up, torch.ones(16, 5)), r"attn2\.to_k.*\[16, 5\] @ \[4, 32\]"),
        "only_down": (spoiled(good, up, None), r"attn2\.to_k.*expected down and up.*found down"),
        "key": (spoiled(good, f"{module}.oft_blocks", torch.ones(1)), r"1 of \d+ keys.*oft_blocks"),
        "module": (spoiled(good, down.replace("to_k", "to_w"), torch.ones(4, 32)), "to_w.*no such module"),
        "twice": (
            spoiled(good, "unet." + places(sd)[0].path + ".alpha", torch.ones(()))
            | {places(sd)[0].kohya + ".alpha": torch.ones(())},
            "its alpha is there twice",
        ),
        "nan": (spoiled(good, up, torch.full((16, 4), torch.nan)), r"attn2\.to_k.*finite"),
        "lokr": ({f"{module}.lokr_w1_a": torch.ones(2, 2)}, "LoKr.*found lokr_w1_a"),
        "loha": ({f"{module}.hada_{w}": torch.ones(3, 3) for w in ("w1_a", "w1_b", "w2_a", "w2_b")}, r"\[16, 32\]"),
        "magnitude": (spoiled(good, f"{module}.dora_scale", torch.ones(7, 1)), r"16 rows.*\[7, 1\]"),
        "foreign": (dict(sd.vae.state_dict()), "keys are not understood, the first decoder"),
    }
    for name, (state, message) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        with pytest.raises(CheckpointError, match=message) as raised:
            finetune.load_lora(sd, path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value), name
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated\.safetensors: truncated"):
        finetune.load_lora(sd, truncated)
    with pytest.raises(CheckpointError, match=f"no LoRA here: expected {DIFFUSERS_FILE}"):
        finetune.load_lora(sd, tmp_path)
    assert finetune.list_adapters(sd) == {}


def test_what_a_format_cannot_hold_is_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    plain, dora = case(sd, "cross_attention"), case(sd, "cross_attention", dora=True)
    mixed = dict(list(plain.items())[:3]) | dict(list(dora.items())[3:])
    with pytest.raises(ConfigError, match="in all modules or in none"):
        write_lora(mixed, tmp_path / "it")
    write_lora(mixed, tmp_path / "it.safetensors", "kohya")
    assert read_lora(tmp_path / "it.safetensors", places(sd)).keys() == mixed.keys()
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        write_lora(plain, tmp_path / "it", "kohya")
    with pytest.raises(ConfigError, match="format: expected diffusers, kohya, peft, found 'a1111'"):
        write_lora(plain, tmp_path / "it", "a1111")
    with pytest.raises(ConfigError, match="no adapter"):
        write_lora({}, tmp_path / "it")
