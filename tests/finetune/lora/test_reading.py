"""LoRA files of others: peft's, diffusers', every spelling of a key; and files that are refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import finetune
from finetune.adapters import KINDS
from finetune.lora.reading import DIFFUSERS_FILE, METADATA, read_lora
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.checkpoints.inspection import inspect_file
from sdkit.errors import CheckpointError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.lora.cases import BAR, case
from tests.finetune.tiny import drawn_updates, latents, places, their_latents

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:(?s).*steps_offset:FutureWarning"),  # of diffusers' scheduler
]

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


def draw_adapters(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if re.search("lora_|hada_|lokr_", name):
            values = draw(name, tuple(parameter.shape)).float()
            parameter.data = 1 + 0.2 * values if "magnitude" in name else 0.3 * values
    return network


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
    "peft's name for the adapter": lambda key: re.sub(r"(lora_[AB])", r"\1.default", key),
    "DistributedDataParallel": lambda key: f"module.{key}",
    "a wrapped network": lambda key: re.sub(r"^(unet|text_encoder)\.", r"\1.module._orig_mod.", key),
    "a wrapped network in kohya's names": lambda key: in_kohyas_names(key).replace(
        "lora_unet_", "lora_unet__orig_mod_"
    ),
    "blocks of single files": lambda key: key if "text_" in key else f"diffusion_model.{in_ldms_blocks(key)}",
    "blocks of single files in kohya's names": lambda key: (
        in_kohyas_names(key) if "text_" in key else in_kohyas_names(in_ldms_blocks(key), "lora_unet_")
    ),
}


def in_kohyas_names(key: str, prefix: str = "") -> str:
    module, end = re.split(r"\.(?=lora_)", key)
    module = module.replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_").replace(".", "_")
    return f"{prefix}{module}.{end.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"


def in_ldms_blocks(key: str) -> str:
    """A layer of the tiny UNet, of one ResNet block per level, as CompVis numbers its blocks."""
    for theirs, ours in (
        (r"^unet\.", ""),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^mid_block\.resnets\.0", "middle_block.0"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"),
        (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
        (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
        (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
        (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
        (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
        (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.1.1"),
        (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
        (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
        (r"^up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
        (r"^up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
        (r"(\.0)\.conv1\.", r"\1.in_layers.2."),
        (r"(\.[02])\.conv2\.", r"\1.out_layers.3."),
        (r"(middle_block\.2)\.conv1\.", r"\1.in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ):
        key = re.sub(theirs, ours, key)
    return key


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names_for_the_same(sd: StableDiffusion, spelling: str, tmp_path: Path) -> None:
    updates = case(sd, "attention" if "old" in spelling or "attn" in spelling else "all", text=True)
    write_lora(updates, tmp_path / "new.safetensors")
    renamed = {SPELLINGS[spelling](k): v for k, v in load_file(tmp_path / "new.safetensors").items()}
    assert renamed.keys() != load_file(tmp_path / "new.safetensors").keys()
    save_file(renamed, tmp_path / "old.safetensors")
    assert inspect_file(tmp_path / "old.safetensors")["kind"] in KINDS[0].files
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


@pytest.mark.parametrize(
    "config", [{"lora_alpha": "many"}, {"alpha_pattern": ["x"]}, {"alpha_pattern": {"(": 3}}, {"lora_alpha": [4]}]
)
def test_a_config_of_peft_that_is_none(sd: StableDiffusion, config: dict[str, object], tmp_path: Path) -> None:
    write_lora(case(sd, "cross_attention"), tmp_path / "it.safetensors")
    header = json.dumps({f"unet.{key}": value for key, value in ({"lora_alpha": 4} | config).items()})
    save_file(load_file(tmp_path / "it.safetensors"), tmp_path / "bad.safetensors", {METADATA: header})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: unet\..*expected numbers as alpha and rank in its"):
        finetune.load_lora(sd, tmp_path / "bad.safetensors")


def test_the_rank_of_a_whole_lokr_is_in_peft_s_config(sd: StableDiffusion, tmp_path: Path) -> None:
    """Its matrices do not tell, and peft divides by it: the pattern's, where there is one for the module."""
    first, second = match_targets(places(sd), ["attn2.to_k"])[:2]
    pairs = [(s, {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(s.shape[0] // 4, 8)}) for s in (first, second)]
    save_file({f"{s.peft}.{k}": v for s, w in pairs for k, v in w.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 4, "alpha": 6, "rank_pattern": {second.path: 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = read_lora(tmp_path, places(sd))
    assert [read[s].scale for s in (first, second)] == [1.5, 0.5]


def test_two_adapters_of_peft_in_one_file_are_one_too_many(sd: StableDiffusion, tmp_path: Path) -> None:
    write_lora(case(sd, "cross_attention"), tmp_path / "it.safetensors")
    state = load_file(tmp_path / "it.safetensors")
    state = {re.sub("(lora_[AB])", rf"\1.{name}", k): v.clone() for k, v in state.items() for name in "ab"}
    save_file(state, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_A\.[ab]\.weight \(its down is there twice\)"):
        finetune.load_lora(sd, tmp_path / "it.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_short_numbers_are_those_that_they_stand_for(
    sd: StableDiffusion, dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    write_lora(case(sd, "cross_attention"), tmp_path / "it.safetensors", "kohya")
    short = {k: v.to(dtype) for k, v in load_file(tmp_path / "it.safetensors").items()}
    if suffix == "pt":
        torch.save(short, tmp_path / "short.pt")
    else:
        save_file(short, tmp_path / "short.safetensors")
    save_file({k: v.float() for k, v in short.items()}, tmp_path / "wide.safetensors")

    finetune.load_lora(sd, tmp_path / f"short.{suffix}")
    ours = latents(sd)
    finetune.remove(sd)
    finetune.load_lora(sd, tmp_path / "wide.safetensors")
    assert torch.equal(latents(sd), ours)


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
        "only_down": (spoiled(good, up, None), r"attn2\.to_k.*expected down and up.*found alpha, down"),
        "key": (spoiled(good, f"{module}.oft_diag", torch.ones(1)), r"1 of \d+ keys.*oft_diag"),
        "module": (spoiled(good, down.replace("to_k", "to_w"), torch.ones(4, 32)), "to_w.*no such module"),
        "twice": (
            spoiled(good, "unet." + places(sd)[0].path + ".alpha", torch.ones(()))
            | {places(sd)[0].kohya + ".alpha": torch.ones(())},
            "its alpha is there twice",
        ),
        "nan": (spoiled(good, up, torch.full((16, 4), torch.nan)), r"attn2\.to_k.*finite"),
        "alpha": (spoiled(good, f"{module}.alpha", torch.tensor(torch.nan)), r"attn2\.to_k.*finite"),
        "scalar": (spoiled(good, f"{module}.scalar", torch.tensor(torch.inf)), r"attn2\.to_k.*finite"),
        "dora": (spoiled(good, f"{module}.dora_scale", torch.full((16, 1), torch.nan)), r"attn2\.to_k.*finite"),
        "alphas": (spoiled(good, f"{module}.alpha", torch.ones(2)), r"one number as alpha, found the shape \[2\]"),
        "oft": ({f"{module}.oft_blocks": torch.ones(4, 4, 4), f"{module}.alpha": torch.ones(2)}, "one number as alpha"),
        "rank": ({down: torch.ones(0, 32), up: torch.ones(16, 0)}, r"attn2\.to_k.*rank of at least 1"),
        "lokr": ({f"{module}.lokr_w1_a": torch.ones(2, 2)}, "one other family.*found lokr_w1_a"),
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


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(a|a?)+", ".*.*.*.*b", "a{1,1000}", "x" * 400])
def test_a_pattern_that_could_take_forever_is_refused(sd: StableDiffusion, tmp_path: Path, pattern: str) -> None:
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), tmp_path / "it", "peft")
    config = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 2}}))
    with pytest.raises(CheckpointError, match="repeats at most twice"):
        read_lora(tmp_path / "it", places(sd))


@pytest.mark.parametrize("pattern", [r"down_blocks\.\d+\..*to_k", "(?:down|up)_blocks.*", r"^.*attn2\.to_k$", "to_k"])
def test_patterns_that_people_write_are_read(sd: StableDiffusion, tmp_path: Path, pattern: str) -> None:
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), tmp_path / "it", "peft")
    config = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    rank = config["r"]
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 3 * rank}}))
    scales = {target.file_path: update.scale for target, update in read_lora(tmp_path / "it", places(sd)).items()}
    assert {scale for path, scale in scales.items() if path.endswith("to_k") and "down" in path} == {3.0}
