"""Lesson: a text encoder learns what words look like."""

import torch

from docs.lessons.lesson import SCENE_SEED, Lesson, Subject
from finetune.pretrain.clip import build, distinct_scenes, embed_images, embed_text, retrieval, tokenize
from finetune.pretrain.evaluate import reconstruct_clip
from finetune.pretrain.world.captions import captions
from sdkit.checkpoints.loading import MODELS
from sdkit.figures import similarity_figure
from sdkit.images.sheet import stacked

SHOWN = 8
ROUNDS = 4


def lesson(subject: Subject) -> Lesson:
    size = subject.sd.picture_size[0]
    trained, tokenizer = reconstruct_clip(MODELS / "tabletop")
    torch.manual_seed(0)
    towers = {"before training": build(tokenizer, size).eval(), "after": trained}

    scenes = distinct_scenes(SHOWN, SCENE_SEED)
    texts, pixels = captions(scenes, SCENE_SEED), subject.renders(scenes) * 2 - 1
    matrices, found = [], []
    for name, clip in towers.items():
        with torch.no_grad():
            likeness = embed_text(clip.text_model, tokenize(tokenizer, texts)) @ embed_images(clip, pixels).T
        matrices.append(similarity_figure(likeness, texts, f"{name}: cosine of caption and picture"))
        found.append(retrieval(clip, tokenizer, rounds=ROUNDS, size=size))

    before, after = found
    return Lesson(
        stacked(matrices),
        f"Among 64 unseen scenes the picture nearest to a caption is its own in {100 * before.picture:.1f} % before "
        f"training and {100 * after.picture:.1f} % after, the caption nearest to a picture in "
        f"{100 * before.caption:.1f} and {100 * after.caption:.1f} %.",
    )
