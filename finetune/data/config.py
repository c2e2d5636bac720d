"""The options of pictures and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from finetune.options import check_options, refuse_unread_options
from sdkit.checks import POSITIVE, SHARE, Range
from sdkit.errors import ConfigError

Latents = Annotated[
    Literal["mean", "sample"],
    "What of the VAE's posterior is trained on; Stable Diffusion's is so narrow that it makes no difference.",
]


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are shown. Random crops and orders of tags come from a fixed number of each,
    so that each is encoded once."""

    data: Annotated[
        Path, "Folder of pictures with metadata.jsonl, .csv or .parquet, .txt captions or folders like 10_name."
    ]
    instance_prompt: Annotated[str | None, "Caption of the pictures that have none but their folder's name."] = None
    caption_column: Annotated[str, "Column of the caption in metadata.jsonl, .csv or .parquet."] = "text"
    folder_repeats: Annotated[bool, "A folder like 10_name: 10 times an epoch, captioned by the name."] = True
    class_data: Annotated[Path | None, "Pictures of the class that must not be forgotten (prior preservation)."] = None
    class_prompt: Annotated[str | None, "Their caption; also makes the pictures that --num-class-images lacks."] = None
    num_class_images: Annotated[int, "Make pictures of --class-prompt until --class-data holds so many.", Range(0)] = 0
    prior_loss_weight: Annotated[float, "Weight of their loss.", POSITIVE] = 1.0
    resolution: Annotated[
        int | None, "Pixels: a picture's area is at most its square (default: the model's).", Range(1)
    ] = None
    aspect_buckets: Annotated[bool, "Keep each picture's aspect ratio, about; else all become squares."] = True
    shortest_side: Annotated[int | None, "Shortest side of a bucket (default: half the resolution).", Range(1)] = None
    longest_side: Annotated[int | None, "Longest side of a bucket (default: twice the resolution).", Range(1)] = None
    random_crops: Annotated[int, "Crop each picture at so many random places; 0: in the middle.", Range(0)] = 0
    random_flip: Annotated[bool, "Mirror half of the pictures."] = False
    latents: Latents = "mean"
    caption_prefix: Annotated[str, "Put before every caption."] = ""
    shuffle_tags: Annotated[int, "Shuffle the caption's parts between commas, in so many orders; 0: not.", Range(0)] = 0
    keep_tags: Annotated[int, "The first parts that keep their place.", Range(0)] = 0
    caption_dropout: Annotated[float, "Share of captions replaced by the empty one, so that guidance works.", SHARE] = (
        0.0
    )
    train_batch_size: Annotated[int, "Pictures a process and micro-batch.", Range(1)] = 1
    cache_dir: Annotated[Path | None, "Encoded pictures and captions (default: OUTPUT/cache)."] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.class_data is None and (self.num_class_images or self.class_prompt):
            raise ConfigError("class_prompt, num_class_images: expected a class_data with them")
        if self.num_class_images and not self.class_prompt:
            raise ConfigError("num_class_images: expected a class_prompt to make them from")
        if self.class_data is None:
            refuse_unread_options(self, ("prior_loss_weight",), "without class_data")
        if not self.aspect_buckets:
            refuse_unread_options(self, ("shortest_side", "longest_side"), "without aspect_buckets")
        if not self.shuffle_tags:
            refuse_unread_options(self, ("keep_tags",), "without shuffle_tags")
