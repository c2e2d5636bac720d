"""What a LoRA file holds: the keys, tensors and facts of diffusers', peft's and kohya's formats."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from finetune.branch import Branches
from sdkit.errors import ConfigError


def peft_state(branches: Branches, spelling: Literal["diffusers", "peft"]) -> dict[str, Tensor]:
    """lora_A and lora_B, nothing else: diffusers takes the dialect of a whole file from its first key."""
    state: dict[str, Tensor] = {}
    for site, branch in branches.items():
        module = site.diffusers if spelling == "diffusers" else site.peft
        state |= {f"{module}.lora_A.weight": branch.down, f"{module}.lora_B.weight": branch.up}
        if branch.magnitude is not None:
            # transformers, which reads diffusers' text encoders, does not add the ".weight" that peft leaves out
            end = ".weight" if spelling == "diffusers" and site.network == "text_encoder" else ""
            value = branch.magnitude if len(site.shape) == 2 else branch.magnitude.view(1, -1, 1, 1)
            state[f"{module}.lora_magnitude_vector{end}"] = value
    return state


def peft_config(branches: Branches) -> dict[str, Any]:
    """The LoraConfig of one network's branches: the common rank and alpha, and the modules that differ."""
    if any(b.normalizes_columns for b in branches.values()):
        raise ConfigError("DoRA that norms columns cannot be written for peft or diffusers, which norm rows: use kohya")
    dora = {b.magnitude is not None for b in branches.values()}
    if len(dora) > 1:
        raise ConfigError("peft and diffusers take DoRA in all modules or in none: use kohya for a mixture")
    paths = {site: site.path.removeprefix("text_model.") for site in branches}
    ranks = {paths[site]: branch.rank for site, branch in branches.items()}
    alphas = {paths[site]: _number(branch.scale * branch.rank) for site, branch in branches.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": list(paths.values()),
        "use_dora": dora == {True},
    }


def kohya_layout(branches: Branches) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One alpha for the whole file, other scales folded into ``up``: diffusers mis-scales files of several alphas."""
    alpha = _commonest(b.scale * b.rank for b in branches.values())
    rank = _commonest(b.rank for b in branches.values())
    state: dict[str, Tensor] = {}
    for site, branch in branches.items():
        up = branch.up * (branch.scale * branch.rank / alpha) if branch.scale * branch.rank != alpha else branch.up
        state[f"{site.kohya}.lora_down.weight"] = branch.down
        state[f"{site.kohya}.lora_up.weight"] = up
        state[f"{site.kohya}.alpha"] = torch.tensor(float(alpha))
        if branch.magnitude is not None:
            rows = (-1, *(1,) * (len(site.shape) - 1))
            columns = branch.normalizes_columns
            state[f"{site.kohya}.dora_scale"] = branch.magnitude if columns else branch.magnitude.view(rows)
    kernels = any(site.shape[2:].numel() > 1 for site in branches)
    second = any(s.shape[1] == 1024 for s in branches if s.path.endswith(("attn2.to_k", "attn2.to_v")))
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    return state, {
        "ss_v2": str(second),
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(_number(alpha)),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(_number(alpha))} if kernels else {}),
        "sshs_model_hash": _kohya_hash(state),
    }


def _kohya_hash(state: Mapping[str, Tensor]) -> str:
    """A1111's hash of a LoRA: SHA-256 of the file without its header."""
    content = save(dict(state))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
