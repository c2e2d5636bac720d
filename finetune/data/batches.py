"""Training batches: which pictures, in which order, cut and captioned how. All of it follows from seed and position."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor

from finetune.data.buckets import Size, bucket_sizes, nearest_bucket
from finetune.data.cache import View
from finetune.data.config import DataConfig
from finetune.data.folders import Picture
from finetune.data.walking import LeftOut
from finetune.seeds import seeded
from sdkit.errors import ConfigError


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


class TrainingData:
    """``batch(n)`` is micro-batch ``n`` of a run without end, the same whatever was asked for before.

    All samples of a micro-batch, over all processes, lie in one bucket; each bucket's last micro-batch of an epoch
    is filled up from the epoch's beginning; what is shown more often so counts less each time, so that over an epoch
    a picture's weights add up to its repeats. Of the concept's pictures and of those of the prior class, the fewer are
    repeated until there are as many as of the others, as in diffusers' DreamBooth script.

    step: what the sides of buckets are multiples of. left_out: files beside the pictures that are not used.
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
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        self.config, self.seed, self.rank, self.world = config, seed, rank, world
        self.pictures, self.left_out = list(pictures), list(left_out)

        shortest = config.shortest_side or resolution // 2
        sizes = bucket_sizes(resolution, step, shortest, config.longest_side or 2 * resolution)
        if not config.aspect_buckets:
            sizes = [(resolution, resolution)]

        self.samples = _repeated(pictures)
        self._repeats = Counter(self.samples)
        self.buckets: dict[Size, list[Picture]] = defaultdict(list)
        for picture in self.samples:
            self.buckets[nearest_bucket(picture.size, sizes)].append(picture)
        self._epoch = _Epoch(-1)

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-len(pictures) // self._together) for pictures in self.buckets.values())

    def views(self) -> list[View]:
        """All views that a latent cache has to hold."""
        crops = range(self.config.random_crops) if self.config.random_crops else [None]
        flips = (False, True) if self.config.random_flip else (False,)
        shown = [(p, bucket) for bucket, pictures in self.buckets.items() for p in dict.fromkeys(pictures)]
        return [(p, bucket, crop, flip) for p, bucket in shown for crop in crops for flip in flips]

    def captions(self) -> list[str]:
        """All captions that a text cache has to hold."""
        every = [order for picture in dict.fromkeys(self.samples) for order in self.orders(picture.caption)]
        return list(dict.fromkeys(every))

    def batch(self, n: int, latents: Callable[[View, torch.Generator | None], Tensor]) -> Batch:
        """This process's share of micro-batch ``n``; ``latents`` is a LatentCache, or what gives tensors as it does."""
        epoch, place = divmod(n, self.batches_per_epoch)
        shown = self._shown(epoch)
        bucket, pictures = shown.batches[place]
        size = self.config.train_batch_size
        own = pictures[self.rank * size : (self.rank + 1) * size]
        first = n * self._together + self.rank * size  # samples are numbered through the run

        generators = [seeded("sample", self.seed, first + i) for i in range(size)]
        drawn = [self._draw(p, bucket, g) for p, g in zip(own, generators, strict=True)]

        prior = torch.tensor([p.is_prior for p in own])
        weights = torch.tensor([shown.weights[p] for p in own])
        weights = torch.where(prior, self.config.prior_loss_weight * weights, weights)
        sample = self.config.latents == "sample"
        stacked = torch.stack(
            [latents(view, g if sample else None) for (view, _), g in zip(drawn, generators, strict=True)]
        )
        return Batch(stacked, [caption for _, caption in drawn], weights, prior, generators)

    @property
    def _together(self) -> int:
        return self.config.train_batch_size * self.world

    def _shown(self, epoch: int) -> _Epoch:
        if self._epoch.number != epoch:
            found: list[tuple[Size, list[Picture]]] = []
            for bucket, pictures in self.buckets.items():
                order = torch.randperm(len(pictures), generator=seeded("order", self.seed, epoch, *bucket)).tolist()
                count = -(-len(order) // self._together)
                filled = list(islice(cycle(order), count * self._together))
                parts = [filled[i * self._together : (i + 1) * self._together] for i in range(count)]
                found += [(bucket, [pictures[i] for i in part]) for part in parts]

            places = torch.randperm(len(found), generator=seeded("batches", self.seed, epoch)).tolist()
            times = Counter(picture for _, part in found for picture in part)
            weights = {picture: self._repeats[picture] / count for picture, count in times.items()}
            self._epoch = _Epoch(epoch, [found[i] for i in places], weights)
        return self._epoch

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

        orders = self.orders(picture.caption)
        return view, "" if drop < config.caption_dropout else orders[int(order * len(orders))]

    def orders(self, caption: str) -> list[str]:
        """The caption with its prefix, in every order of its tags that is used."""
        config = self.config
        if not caption:
            return [config.caption_prefix]
        prefix = f"{config.caption_prefix} " if config.caption_prefix else ""
        if not config.shuffle_tags:
            return [prefix + caption]

        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        kept, free = tags[: config.keep_tags], tags[config.keep_tags :]
        orders = [
            torch.randperm(len(free), generator=seeded("tags", caption, k)).tolist() for k in range(config.shuffle_tags)
        ]
        return [prefix + ", ".join([*kept, *(free[i] for i in order)]) for order in orders]


@dataclass(frozen=True)
class _Epoch:
    """The micro-batches of an epoch, over all processes, in order; and each picture's weight, each time it is shown."""

    number: int
    batches: list[tuple[Size, list[Picture]]] = field(default_factory=list[tuple[Size, list[Picture]]])
    weights: dict[Picture, float] = field(default_factory=dict[Picture, float])


def _repeated(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures of one epoch, each as often as it is shown."""
    subject = [p for p in pictures if not p.is_prior for _ in range(p.repeats)]
    prior = [p for p in pictures if p.is_prior for _ in range(p.repeats)]

    if not subject or (not prior and any(p.is_prior for p in pictures)):
        which = "class_data" if subject else "data"
        raise ConfigError(f"{which}: no picture is shown, every folder has 0 repeats")
    most = max(len(subject), len(prior))
    return [picture for part in (subject, prior) if part for picture in islice(cycle(part), most)]
