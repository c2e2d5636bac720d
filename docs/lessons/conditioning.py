"""Lesson: conditioning, a text as vectors that know their neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from docs.lessons.lesson import PAIR, Lesson, Subject, pairs_of, prompts_of, table
from sdkit.figures import similarity_figure
from sdkit.prompts.encoding import encode_prompts
from sdkit.viewing.attention_maps import prompt_words


@torch.no_grad()
def lesson(subject: Subject) -> Lesson:
    sd, scenes = subject.sd, subject.scenes()
    prompts, wanted = prompts_of(scenes), pairs_of(scenes)
    context = encode_prompts(sd.tokenizer, sd.text_encoder, [*prompts, ""], None)[0].float()
    context, nothing = context[:-1], context[-1]

    # Each kind of vector by itself: all others are those of the empty prompt.
    kinds = {"all": slice(None), "the words": slice(1, 4), "the rest: end and padding": slice(4, None)}
    rows: list[list[str]] = []
    for name, kept in kinds.items():
        embeds = nothing.repeat(len(context), 1, 1)
        embeds[:, kept] = context[:, kept]
        images = subject.draw(None, prompt_embeds=embeds.to(sd.dtype))
        rows.append([name, f"{subject.right(images, wanted):.0f}"])

    return Lesson(
        similarity_figure(likeness_of_words(subject, PAIR), words(subject, PAIR), "cosine of the vectors of the words"),
        f"{len(prompts)} pictures with some of the vectors, the others being those of the empty prompt:\n\n"
        + table(["vectors of the prompt", "colour and shape right, %"], rows),
    )


def words(subject: Subject, prompt: str) -> list[str]:
    return [word.text for word in prompt_words(subject.sd.tokenizer, prompt)]


def likeness_of_words(subject: Subject, prompt: str) -> Tensor:
    """[words, words]: the cosine of the mean vectors of their tokens, after the mean of all has been taken off."""
    sd = subject.sd
    context = encode_prompts(sd.tokenizer, sd.text_encoder, [prompt], None)[0][0].float()
    vectors = torch.stack([context[list(w.positions)].mean(0) for w in prompt_words(sd.tokenizer, prompt)])
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    return vectors @ vectors.T
