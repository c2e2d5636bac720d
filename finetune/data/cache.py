"""Latents and text embeddings on disk, each computed once.

A file's name is the hash of everything that its content depends on: the picture's bytes, how it was cut, the caption,
the weights that encoded it. Change any of them and the name is another one, so nothing stale can be read. Files are
written under a temporary name and renamed; processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data.buckets import Size, prepare
from finetune.data.folders import Picture
from sdkit.checkpoints.tensors import write_state
from sdkit.errors import CheckpointError
from sdkit.images.pixels import open_image
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.encoding import encode_prompts

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

FORMAT = 2  # a part of every name: raise it when the meaning of a file's content changes


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Store:
    """Tensors by key, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether there is a whole file; reads its header, which says how long the file must be."""
        try:
            with safe_open(self.path(key), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Raises CheckpointError when the file cannot be written."""
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        write_state(tensors, path)

    def get(self, key: str) -> dict[str, Tensor]:
        """Raises CheckpointError when the file has gone or was damaged since it was checked."""
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path(key)}: cached tensors cannot be read ({error}); start again") from None


def key_of(**parts: Any) -> str:
    """The key of what depends on ``parts``."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


View = tuple[Picture, Size, int | None, bool]
"""A picture as the network sees it: the picture, its bucket, its crop (None: the middle) and whether it is flipped."""


class LatentCache:
    """The posteriors of pictures, in the noise predictor's scale."""

    def __init__(self, vae: AutoencoderKL, folder: Path) -> None:
        self.vae, self.store = vae, Store(folder / "latents")
        self.weights = weights_hash(vae.encoder) + ("" if vae.quant_conv is None else weights_hash(vae.quant_conv))

    def key(self, view: View) -> str:
        picture, bucket, crop, flip = view
        return key_of(
            picture=picture.digest,
            bucket=bucket,
            crop=crop,
            flip=flip,
            vae=self.weights,
            scale=self.vae.config.scaling_factor,
        )

    def fill(self, views: Sequence[View], share: slice = slice(None), progress: bool = True) -> int:
        """Encode what is missing of ``views``, or of the ``share`` of what is missing; returns how many it was."""
        missing = [view for view in dict.fromkeys(views) if self.key(view) not in self.store][share]
        for view in tqdm(missing, desc="encode pictures", disable=not (progress and missing)):
            mean, std = self._encode(view)
            self.store.put(self.key(view), {"mean": mean, "std": std})
        return len(missing)

    def __call__(self, view: View, generator: torch.Generator | None = None) -> Tensor:
        """Latents [C, h, w], float32: drawn from the posterior by ``generator``, or without one its mean."""
        cached = self.store.get(self.key(view))
        if generator is None:
            return cached["mean"]
        return cached["mean"] + cached["std"] * torch.randn(cached["mean"].shape, generator=generator)

    @torch.no_grad()
    def _encode(self, view: View) -> tuple[Tensor, Tensor]:
        picture, bucket, crop, flip = view
        pixels = prepare(open_image(picture.path), bucket, crop, flip, picture.digest)
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        mean, std = (x[0].float() * self.vae.config.scaling_factor for x in (posterior.mean, posterior.std))

        if not bool(mean.isfinite().all() and std.isfinite().all()):
            raise CheckpointError(f"{picture.path}: its latents are not finite in {self.vae.dtype}; use float32")

        return mean.cpu().contiguous(), std.cpu().contiguous()


class TextCache:
    """The text encoder's hidden states of captions, taken literally: no brackets that weigh words."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, folder: Path, clip_skip: int = 0) -> None:
        self.store = Store(folder / "text")
        self.encode = text_encoding(tokenizer, text_encoder, clip_skip)
        vocabulary = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
        self.weights = {"weights": weights_hash(text_encoder), "vocabulary": vocabulary, "clip_skip": clip_skip}

    def key(self, caption: str) -> str:
        return key_of(caption=caption, **self.weights)

    @torch.no_grad()
    def fill(self, captions: Sequence[str], share: slice = slice(None), progress: bool = True) -> int:
        """Encode what is missing of ``captions`` and of the empty one; returns how many it was."""
        missing = [caption for caption in dict.fromkeys(["", *captions]) if self.key(caption) not in self.store][share]
        for caption in tqdm(missing, desc="encode captions", disable=not (progress and missing)):
            self.store.put(self.key(caption), {"states": self.encode([caption])[0].cpu().contiguous()})
        return len(missing)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Contexts [B, M, D] on the CPU; a short caption is filled up with empty chunks, as ``encode_prompts`` does."""
        states = [self.store.get(self.key(caption))["states"] for caption in captions]
        longest = max(len(s) for s in states)
        if any(len(s) < longest for s in states):
            empty = self.store.get(self.key(""))["states"]
            states = [torch.cat([s, empty.repeat((longest - len(s)) // len(empty), 1)]) for s in states]
        return torch.stack(states)


def text_encoding(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, clip_skip: int
) -> Callable[[Sequence[str]], Tensor]:
    """A function from captions to contexts [B, M, D], with gradients where the encoder has them."""
    return lambda captions: encode_prompts(
        tokenizer, text_encoder, captions, None, clip_skip=clip_skip, weighted=False
    )[0]
