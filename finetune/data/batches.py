"""Training batches: which pictures, in which order, cut and captioned how. All of it follows from seed and position."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from finetune.data.buckets import Size, bucket_sizes, nearest_bucket
from finetune.data.cache import View
from finetune.data.folders import Picture, read_folder
from finetune.seeds import seeded
from sdkit.checks import check_count, check_number
from sdkit.errors import ConfigError

Latents = Annotated[
    Literal["mean", "sample"],
    "What of the VAE's posterior is trained on; Stable Diffusion's is so narrow that it makes no difference.",
]


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are shown. Random crops and orders of tags come from a fixed number of each,
    so that each is encoded once."""

    data: Annotated[Path, "Folder of pictures with metadata.jsonl, .txt captions or folders like 10_name."]
    instance_prompt: Annotated[str | None, "Caption of the pictures that have none."] = None
    caption_column: Annotated[str, "Key of the caption in metadata.jsonl."] = "text"
    class_data: Annotated[Path | None, "Pictures of the class that must not be forgotten (prior preservation)."] = None
    class_prompt: Annotated[str | None, "Their caption; also makes the pictures that --num-class-images lacks."] = None
    num_class_images: Annotated[int, "Make pictures of --class-prompt until --class-data holds so many."] = 0
    prior_loss_weight: Annotated[float, "Weight of their loss."] = 1.0
    resolution: Annotated[int | None, "Pixels: a picture's area is at most its square (default: the model's)."] = None
    aspect_buckets: Annotated[bool, "Keep each picture's aspect ratio, about; else all become squares."] = True
    shortest_side: Annotated[int | None, "Shortest side of a bucket (default: half the resolution)."] = None
    longest_side: Annotated[int | None, "Longest side of a bucket (default: twice the resolution)."] = None
    random_crops: Annotated[int, "Crop each picture at so many random places; 0: in the middle."] = 0
    random_flip: Annotated[bool, "Mirror half of the pictures."] = False
    latents: Latents = "mean"
    caption_prefix: Annotated[str, "Put before every caption."] = ""
    shuffle_tags: Annotated[int, "Shuffle the caption's parts between commas, in so many orders; 0: not."] = 0
    keep_tags: Annotated[int, "The first parts that keep their place."] = 0
    caption_dropout: Annotated[float, "Share of captions replaced by the empty one, so that guidance works."] = 0.0
    train_batch_size: Annotated[int, "Pictures a process and micro-batch."] = 1
    cache_dir: Annotated[Path | None, "Encoded pictures and captions (default: OUTPUT/cache)."] = None

    def __post_init__(self) -> None:
        check_number("caption_dropout", self.caption_dropout, 0, 1)
        check_count("train_batch_size", self.train_batch_size)
        for name in ("num_class_images", "random_crops", "shuffle_tags", "keep_tags"):
            check_count(name, getattr(self, name), 0)

        if self.class_data is None and (self.num_class_images or self.class_prompt):
            raise ConfigError("class_prompt, num_class_images: expected a class_data with them")
        if self.num_class_images and not self.class_prompt:
            raise ConfigError("num_class_images: expected a class_prompt to make them from")


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch of B samples.

    latents [B, C, h, w] float32, in the noise predictor's scale; weights [B] float32, of each sample's loss;
    prior [B] bool: which are pictures of the class that must not be forgotten; generators: each sample's own, from
    which what else it needs is drawn (timestep, noise).
    """

    latents: Tensor
    captions: list[str]
    weights: Tensor
    prior: Tensor
    generators: list[torch.Generator]


def read_pictures(config: DataConfig) -> list[Picture]:
    """The pictures of both folders. Raises ConfigError that lists all problems of both."""
    found: list[Picture] = []
    problems: list[str] = []
    folders = [(config.data, config.instance_prompt, False)]
    if config.class_data is not None:
        folders.append((config.class_data, config.class_prompt, True))

    for folder, caption, prior in folders:
        try:
            found += read_folder(folder, caption, config.caption_column, prior)
        except ConfigError as error:
            problems.append(str(error))

    if problems:
        raise ConfigError("\n".join(problems))
    return found


class TrainingData:
    """``batch(n)`` is micro-batch ``n`` of a run without end, the same whatever was asked for before.

    All samples of a micro-batch, over all processes, lie in one bucket; each bucket's last micro-batch of an epoch
    is filled up from the epoch's beginning. Of the concept's pictures and of those of the prior class, the fewer
    are repeated until there are as many as of the others, as in diffusers' DreamBooth script. ``step``: what the
    sides of buckets are multiples of.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        config: DataConfig,
        resolution: int,
        step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.seed, self.rank, self.world = config, seed, rank, world

        shortest = config.shortest_side or resolution // 2
        sizes = bucket_sizes(resolution, step, shortest, config.longest_side or 2 * resolution)
        if not config.aspect_buckets:
            sizes = [(resolution, resolution)]

        self.samples = _repeated(pictures)
        self.buckets: dict[Size, list[Picture]] = defaultdict(list)
        for picture in self.samples:
            self.buckets[nearest_bucket(picture.size, sizes)].append(picture)
        self._epoch = (-1, list[tuple[Size, list[Picture]]]())

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(pictures) // self._together) for pictures in self.buckets.values())

    @property
    def fingerprint(self) -> str:
        """A hash that changes with anything that changes a batch."""
        shown = [(p.digest, p.caption, p.is_prior, bucket) for bucket, ps in self.buckets.items() for p in ps]
        rules = replace(
            self.config, data=Path(), class_data=None, class_prompt=None, num_class_images=0, cache_dir=None
        )
        return hashlib.sha256(repr((shown, rules, self.seed)).encode()).hexdigest()

    def views(self) -> list[View]:
        """All views that a latent cache has to hold."""
        crops = range(self.config.random_crops) if self.config.random_crops else [None]
        flips = (False, True) if self.config.random_flip else (False,)
        shown = [(p, bucket) for bucket, pictures in self.buckets.items() for p in dict.fromkeys(pictures)]
        return [(p, bucket, crop, flip) for p, bucket in shown for crop in crops for flip in flips]

    def captions(self) -> list[str]:
        """All captions that a text cache has to hold."""
        every = [order for picture in dict.fromkeys(self.samples) for order in self._orders(picture.caption)]
        return list(dict.fromkeys(every))

    def batch(self, n: int, latents: Callable[[View, torch.Generator | None], Tensor]) -> Batch:
        """This process's share of micro-batch ``n``; ``latents`` is a LatentCache, or what gives tensors as it does."""
        epoch, place = divmod(n, self.batches_per_epoch)
        bucket, pictures = self._batches(epoch)[place]
        size = self.config.train_batch_size
        own = pictures[self.rank * size : (self.rank + 1) * size]
        first = n * self._together + self.rank * size  # samples are numbered through the run

        generators = [seeded("sample", self.seed, first + i) for i in range(size)]
        drawn = [self._draw(p, bucket, g) for p, g in zip(own, generators, strict=True)]

        prior = torch.tensor([p.is_prior for p in own])
        weights = torch.where(prior, self.config.prior_loss_weight, 1.0)
        sample = self.config.latents == "sample"
        stacked = torch.stack(
            [latents(view, g if sample else None) for (view, _), g in zip(drawn, generators, strict=True)]
        )
        return Batch(stacked, [caption for _, caption in drawn], weights, prior, generators)

    @property
    def _together(self) -> int:
        return self.config.train_batch_size * self.world

    def _batches(self, epoch: int) -> list[tuple[Size, list[Picture]]]:
        """The micro-batches of an epoch, over all processes, in order."""
        if self._epoch[0] != epoch:
            found: list[tuple[Size, list[Picture]]] = []
            for bucket, pictures in self.buckets.items():
                order = torch.randperm(len(pictures), generator=seeded("order", self.seed, epoch, *bucket)).tolist()
                count = -(-len(order) // self._together)
                filled = list(islice(cycle(order), count * self._together))
                parts = [filled[i * self._together : (i + 1) * self._together] for i in range(count)]
                found += [(bucket, [pictures[i] for i in part]) for part in parts]

            places = torch.randperm(len(found), generator=seeded("batches", self.seed, epoch)).tolist()
            self._epoch = (epoch, [found[i] for i in places])
        return self._epoch[1]

    def _draw(self, picture: Picture, bucket: Size, generator: torch.Generator) -> tuple[View, str]:
        """How this sample is cut and captioned: crop, flip, dropout and order, drawn in this order."""
        config = self.config
        crop, flip, drop, order = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        view = (
            picture,
            bucket,
            int(crop * config.random_crops) if config.random_crops else None,
            config.random_flip and flip < 0.5,
        )

        orders = self._orders(picture.caption)
        return view, "" if drop < config.caption_dropout else orders[int(order * len(orders))]

    def _orders(self, caption: str) -> list[str]:
        """The caption with its prefix, in every order of its tags that is used."""
        config = self.config
        prefix = f"{config.caption_prefix} " if config.caption_prefix else ""
        if not config.shuffle_tags:
            return [prefix + caption]

        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        kept, free = tags[: config.keep_tags], tags[config.keep_tags :]
        orders = [
            torch.randperm(len(free), generator=seeded("tags", caption, k)).tolist() for k in range(config.shuffle_tags)
        ]
        return [prefix + ", ".join([*kept, *(free[i] for i in order)]) for order in orders]


def _repeated(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures of one epoch, each as often as it is shown."""
    subject = [p for p in pictures if not p.is_prior for _ in range(p.repeats)]
    prior = [p for p in pictures if p.is_prior for _ in range(p.repeats)]

    if not subject:
        raise ConfigError("training data: no picture is shown, every folder has 0 repeats")
    if not prior:
        return subject

    count = max(len(subject), len(prior))
    return [*islice(cycle(subject), count), *islice(cycle(prior), count)]


def describe(data: TrainingData) -> str:
    """How many pictures lie in which bucket, for the summary."""
    sizes = Counter({bucket: len(set(pictures)) for bucket, pictures in data.buckets.items()})
    return ", ".join(f"{count} of {width}×{height}" for (width, height), count in sizes.most_common())
