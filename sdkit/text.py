"""From prompts to context: CLIP's tokenizer, and the CLIP and OpenCLIP text encoders.

The tokenizer and the encoder are transformers' own classes, built and loaded without a network. SD1 and SD2 differ
only in the encoder's config (quick_gelu or gelu, width, depth) and in the padding token, so one path serves both:
the 23 layers that diffusers stores for SD2 are OpenCLIP's penultimate layer already.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdkit.errors import CheckpointError, ConfigError, NumericalError, one_line
from sdkit.prompts import PromptToken, prompt_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

_MERGES = Path(__file__).parent / "presets" / "clip_merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PREFIX = "text_model."
_UNUSED = "text_projection.weight"  # pools for CLIP's contrastive loss; no Stable Diffusion 1 or 2 network reads it


# Tokenizer


def clip_tokenizer(pad_token_id: int = 49407) -> CLIPTokenizer:
    """CLIP's tokenizer (49,408 tokens, 77 a sequence) from the merges that ship with us.

    ``pad_token_id`` is 49407, the end token (SD1), or 0, the token "!" (SD2). With 0, transformers takes every "!" in
    a prompt for the padding token, as it does for the tokenizer that SD2 is published with.
    """
    symbols = _byte_symbols()
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()[1:]
    words = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges), _START, _END]
    if pad_token_id not in (0, 49407):
        raise ConfigError(f"pad_token_id: expected 49407 (SD1) or 0 (SD2), found {pad_token_id!r}")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": words[pad_token_id]}
    with tempfile.TemporaryDirectory() as folder:
        vocab = {word: i for i, word in enumerate(words)}
        _write_tokenizer(Path(folder), vocab, merges, special | {"model_max_length": 77}, special)
        tokenizer = load_tokenizer(folder)
    tokenizer.name_or_path = ""
    return tokenizer


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Read a diffusers ``tokenizer/`` folder: vocab.json with merges.txt, or tokenizer.json. Never uses a network.

    Raises CheckpointError when the files are missing, damaged, or of another kind of tokenizer.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: no tokenizer here, missing {' and '.join(missing)} (or tokenizer.json)")
    import transformers

    # Before transformers 5, CLIPTokenizer was another, slower class that read no tokenizer.json.
    kind: Any = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        absent = [name for name in ("bos", "eos", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}: not a CLIP tokenizer ({one_line(error)})") from None
    if absent:
        raise CheckpointError(f"{folder}: not a CLIP tokenizer (no {', '.join(absent)} token)")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, the layout of diffusers.

    Old and new transformers read it; added tokens (textual inversion) are kept.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):  # the slow class of transformers 4 writes these files itself
        slow: Any = tokenizer
        slow.save_pretrained(str(folder))
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {f"{name}_token": str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {
        str(index): {field: getattr(token, field) for field in fields}
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    config = special | {"model_max_length": _max_length(tokenizer), "added_tokens_decoder": added}
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_tokenizer(Path(folder), model["vocab"], merges, config, special)


def _max_length(tokenizer: Any) -> int:
    return int(tokenizer.model_max_length)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE, in the vocabulary's order (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _write_tokenizer(
    folder: Path, vocab: Mapping[str, int], merges: list[str], config: dict[str, Any], special: dict[str, str]
) -> None:
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"} | config
    files = {
        "vocab.json": json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in files.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, folder / name)


# Encoder


def build_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """The network of a ``text_encoder/config.json``, in eval mode, torch's default dtype, weights not yet loaded.

    Built under ``torch.device("meta")`` it costs no memory, and ``load_text_state`` gives it its weights.
    Raises ConfigError for another kind of model, or values that describe no network.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise ConfigError(f"text encoder config: expected model_type clip_text_model, found {kind!r}")
    if config.get("use_attention_mask"):
        raise ConfigError("text encoder config: use_attention_mask=True is not supported; CLIP is run without a mask")
    try:
        return CLIPTextModel(CLIPTextConfig(**config)).eval()
    except Exception as error:  # transformers checks values in classes of errors that differ between versions
        raise ConfigError(f"text encoder config: {one_line(error)}") from None


def load_text_state(model: CLIPTextModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load weights whose names start with ``text_model.`` or not; every weight must be there, with its shape.

    Returns the tensors that the network has no place for: ``text_projection.weight``, if it is there, for a writer
    of single files. ``position_ids`` buffers of old files are passed over. Weights are cast to the model's dtype;
    a model on the meta device takes the tensors themselves instead, with their dtype and device.
    Raises CheckpointError that names what is missing, left over, or of another shape.
    """
    target = {name.removeprefix(_PREFIX): (name, value) for name, value in model.state_dict().items()}
    given: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(_PREFIX)
        if name in given:
            raise CheckpointError(f"text encoder: {name} is there twice, with and without the prefix {_PREFIX}")
        if name != "embeddings.position_ids":
            given[name] = tensor
    unused = {_UNUSED: given.pop(_UNUSED)} if _UNUSED in given else {}
    shapes = [
        f"{name} is {list(given[name].shape)} where {list(value.shape)} is expected"
        for name, (_, value) in target.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", sorted(target.keys() - given.keys())),
            ("not understood:", sorted(given.keys() - target.keys())),
            ("wrong shape:", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"text encoder: {'; '.join(problems)}")
    on_meta = model.device.type == "meta"
    model.load_state_dict({target[name][0]: tensor for name, tensor in given.items()}, assign=on_meta)
    if on_meta:  # position_ids is no weight, so it is made here
        embeddings = _core(model).embeddings
        length = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(length, device=model.device).expand(1, -1)
    return unused


def text_state_dict(model: CLIPTextModel) -> dict[str, Tensor]:
    """The weights under the names of the file formats, each with the prefix ``text_model.``."""
    return {_PREFIX + k.removeprefix(_PREFIX): v.detach().contiguous() for k, v in model.state_dict().items()}


def pooled(hidden_states: Tensor, input_ids: Tensor, eos_token_id: int) -> Tensor:
    """The state [B, D] at each row's first end token, of ``hidden_states`` [B, N, D] for ``input_ids`` [B, N].

    Configs written before transformers 4.31 say ``eos_token_id`` 2, wrongly; they mean the highest id in the row.
    Raises ConfigError when a row has no end token.
    """
    is_end = input_ids == (input_ids.amax(-1, keepdim=True) if eos_token_id == 2 else eos_token_id)
    if not bool(is_end.any(-1).all()):
        raise ConfigError(f"pooled output: a row of input_ids has no end token {eos_token_id}")
    rows = torch.arange(len(input_ids), device=hidden_states.device)
    return hidden_states[rows, is_end.int().argmax(-1).to(hidden_states.device)]


def _core(model: CLIPTextModel) -> Any:
    """The module that holds embeddings, encoder and final_layer_norm: one level down before transformers 5.6."""
    return getattr(model, "text_model", model)


# Prompts


def encode_prompts(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    *,
    clip_skip: int = 0,
    weighted: bool = True,
    embeddings: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Encode B prompts, and as many negative prompts, to contexts [B, 77 * n, D] in the encoder's dtype and device.

    A prompt longer than 75 tokens (the tokenizer's ``model_max_length`` less 2) takes several chunks, each with its
    own begin and end token, joined along the sequence; all prompts and negative prompts are padded to the same n.
    Nothing is cut. Run it under ``torch.no_grad()`` unless the encoder or the embeddings are trained.

    ``weighted`` reads A1111's grammar (``parse_weights``): weights multiply the embeddings, after which each prompt's
    mean over all its tokens and channels is restored. False takes every character literally.
    ``clip_skip`` leaves out the last layers, then applies the final layer norm: diffusers' numbering, A1111's
    "Clip skip" is one higher. ``embeddings`` are textual inversions, trigger to vectors [n, D] (`prompt_tokens`), in
    prompts and negative prompts alike; gradients reach them. Without negative prompts the second context is None.
    Raises ConfigError for arguments without meaning, NumericalError when weights cancel the mean to 0.
    """
    layers = int(text_encoder.config.num_hidden_layers)
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip < layers:  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"clip_skip: expected an integer from 0 to {layers - 1}, found {clip_skip!r}")
    _check_prompts("prompt", prompts)
    groups = [prompts]
    if negative_prompts is not None:
        _check_prompts("negative_prompt", negative_prompts)
        if len(negative_prompts) != len(prompts):
            raise ConfigError(f"negative_prompt: expected {len(prompts)} as prompts, found {len(negative_prompts)}")
        groups.append(negative_prompts)

    length = min(_max_length(tokenizer), int(text_encoder.config.max_position_embeddings))
    tokens_of = partial(prompt_tokens, tokenizer, weighted=weighted, embeddings=embeddings, max_length=length)
    chunks = [[tokens_of(prompt) for prompt in group] for group in groups]
    _check_widths(embeddings or {}, int(text_encoder.config.hidden_size))
    count = max(len(prompt) for group in chunks for prompt in group)
    tokens = [[_pad(tokenizer, prompt, count, length) for prompt in group] for group in chunks]
    contexts = [_encode(text_encoder, group, length, clip_skip) for group in tokens]
    return contexts[0], contexts[1] if len(contexts) > 1 else None


def _check_prompts(argument: str, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"{argument}: expected a non-empty sequence of strings, found {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
            raise ConfigError(f"{argument}: expected a string, found {type(prompt).__name__} {prompt!r}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"{argument}: {prompt!r} is not valid Unicode text")


def _check_widths(embeddings: Mapping[str, Tensor], width: int) -> None:
    for name, vectors in embeddings.items():
        if vectors.shape[1] != width:
            raise ConfigError(f"embeddings: {name!r} is {vectors.shape[1]} wide, the text encoder takes {width}")


def _pad(tokenizer: Any, chunks: list[list[PromptToken]], count: int, length: int) -> list[PromptToken]:
    """Add begin, end and padding tokens to each chunk, and empty chunks: ``count * length`` tokens in a row."""
    start, end, pad = (
        PromptToken(int(i)) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    filled = chunks + [[]] * (count - len(chunks))
    return [token for chunk in filled for token in (start, *chunk, end, *[pad] * (length - 2 - len(chunk)))]


def _encode(text_encoder: CLIPTextModel, prompts: list[list[PromptToken]], length: int, clip_skip: int) -> Tensor:
    """Encode B prompts of n * length tokens each, ``length`` at a time, to [B, n * length, D]."""
    ids = torch.tensor([[token.id for token in prompt] for prompt in prompts])
    weights = torch.tensor([[token.weight for token in prompt] for prompt in prompts])
    highest, vocabulary = int(ids.max()), int(text_encoder.config.vocab_size)
    if highest >= vocabulary:
        raise ConfigError(f"the tokenizer gives token {highest}, the text encoder takes only {vocabulary}")
    with _vectors_in_place(text_encoder, [token.vector for prompt in prompts for token in prompt]):
        output = text_encoder(ids.view(-1, length).to(text_encoder.device), output_hidden_states=clip_skip > 0)
    hidden: Tensor = output.last_hidden_state
    if clip_skip:
        hidden = _core(text_encoder).final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    hidden = hidden.reshape(*ids.shape, -1)
    return hidden if bool((weights == 1).all()) else _apply_weights(hidden, weights.to(hidden.device))


@contextmanager
def _vectors_in_place(text_encoder: CLIPTextModel, vectors: list[Tensor | None]) -> Generator[None]:
    """Let the encoder's embedding layer give these vectors [D] where they are not None, for its tokens in order.

    The layer is changed while this lasts alone: what is saved of the encoder, and its tokenizer, stay as they are.
    A compiled encoder does not look for hooks again, so it runs eagerly.
    """
    given = [(i, vector) for i, vector in enumerate(vectors) if vector is not None]
    if not given:
        yield
        return

    def put(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        rows = torch.tensor([i for i, _ in given], device=output.device)
        values = torch.stack([vector.to(output) for _, vector in given])
        return output.flatten(0, 1).index_copy(0, rows, values).view_as(output)

    hook = _core(text_encoder).embeddings.token_embedding.register_forward_hook(put)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        hook.remove()


def _apply_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply [B, N, D] by weights [B, N], then restore each row's mean over (N, D); in float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scaled = wide * weights[..., None].to(wide.dtype)
    ratio = wide.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True)
    plain = (weights == 1).all(1)[:, None, None]
    if not bool((ratio.isfinite() | plain).all()):
        raise NumericalError("prompt weights: the weighted embedding has mean 0, so its mean cannot be restored")
    return torch.where(plain, hidden, (scaled * ratio).to(hidden.dtype))
