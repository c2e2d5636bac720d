"""From prompts to the contexts that the UNet looks at: tokens in chunks, through the text encoder, weighted."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdkit.errors import ConfigError, NumericalError
from sdkit.graphs import Graphs
from sdkit.networks.text_encoder import inner_model
from sdkit.prompts.tokenizer import max_length
from sdkit.prompts.tokens import PromptToken, prompt_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


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
    groups = {"prompt": prompts}
    if negative_prompts is not None:
        groups["negative_prompt"] = negative_prompts
        if not isinstance(negative_prompts, str) and len(negative_prompts) not in (0, len(prompts)):
            raise ConfigError(f"negative_prompt: expected {len(prompts)} as prompts, found {len(negative_prompts)}")

    contexts = encode_groups(
        tokenizer, text_encoder, groups, clip_skip=clip_skip, weighted=weighted, embeddings=embeddings
    )
    return contexts["prompt"], contexts.get("negative_prompt")


def encode_groups(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    groups: Mapping[str, Sequence[str]],
    *,
    clip_skip: int = 0,
    weighted: bool = True,
    embeddings: Mapping[str, Tensor] | None = None,
    graphs: Graphs | None = None,
) -> dict[str, Tensor]:
    """Encode several groups of texts, each by the name of the argument that it came from, to contexts [B, 77 * n, D].

    n is the same for all. ``graphs``: the encoder runs by them. Otherwise as `encode_prompts`.
    """
    layers = int(text_encoder.config.num_hidden_layers)
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip < layers:  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"clip_skip: expected an integer from 0 to {layers - 1}, found {clip_skip!r}")
    for name, texts in groups.items():
        _check_prompts(name, texts)

    length = min(max_length(tokenizer), int(text_encoder.config.max_position_embeddings))
    tokens_of = partial(prompt_tokens, tokenizer, weighted=weighted, embeddings=embeddings, max_length=length)
    chunks = {name: [tokens_of(text) for text in texts] for name, texts in groups.items()}
    _check_widths(embeddings or {}, int(text_encoder.config.hidden_size))

    count = max(len(text) for texts in chunks.values() for text in texts)
    tokens = {name: [_pad(tokenizer, text, count, length) for text in texts] for name, texts in chunks.items()}
    return {name: _encode(text_encoder, texts, length, clip_skip, graphs) for name, texts in tokens.items()}


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


def _encode(
    text_encoder: CLIPTextModel, prompts: list[list[PromptToken]], length: int, clip_skip: int, graphs: Graphs | None
) -> Tensor:
    """Encode B prompts of n * length tokens each, ``length`` at a time, to [B, n * length, D]."""
    ids = torch.tensor([[token.id for token in prompt] for prompt in prompts])
    weights = torch.tensor([[token.weight for token in prompt] for prompt in prompts])
    highest, vocabulary = int(ids.max()), int(text_encoder.config.vocab_size)
    if highest >= vocabulary:
        raise ConfigError(f"the tokenizer gives token {highest}, the text encoder takes only {vocabulary}")

    with _vectors_in_place(text_encoder, [token.vector for prompt in prompts for token in prompt]):
        run, rows = partial(_hidden, text_encoder, clip_skip), ids.view(-1, length).to(text_encoder.device)
        hidden = run(rows) if graphs is None else graphs.call(("text", clip_skip), text_encoder, run, rows)
    hidden = hidden.reshape(*ids.shape, -1)
    return hidden if bool((weights == 1).all()) else _apply_weights(hidden, weights.to(hidden.device))


def _hidden(text_encoder: CLIPTextModel, clip_skip: int, ids: Tensor) -> Tensor:
    """The encoder's output [N, length, D] for tokens [N, length], without its last ``clip_skip`` layers."""
    output = text_encoder(ids, output_hidden_states=clip_skip > 0)
    if not clip_skip:
        return output.last_hidden_state
    return inner_model(text_encoder).final_layer_norm(output.hidden_states[-(clip_skip + 1)])


@contextmanager
def _vectors_in_place(text_encoder: CLIPTextModel, vectors: list[Tensor | None]) -> Generator[None]:
    """Let the encoder's embedding layer give these vectors [D] where they are not None, for its tokens in order.

    The layer is changed only while this lasts: the encoder as it is saved, and its tokenizer, stay as they are.
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

    hook = inner_model(text_encoder).embeddings.token_embedding.register_forward_hook(put)
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
