"""A prompt whose words show, under the mouse or the keyboard's focus, where in the picture they were looked at."""

from __future__ import annotations

from html import escape

from PIL import Image

from sdkit.ui.inline import img
from sdkit.viewing.attention_maps import AttentionMaps
from sdkit.viewing.attention_sheet import overlay

SIDE = 256  # pixels of the longer side
CSS = """
.sd-words { position: relative; }
.sd-words > img, .sd-words .sd-word img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
.sd-words .sd-word { cursor: pointer; padding: 1px 3px; border-radius: 4px; line-height: 2; }
.sd-words .sd-word:hover, .sd-words .sd-word:focus { background: var(--primary-200); color: #111; }
.sd-words .sd-word img { position: absolute; top: 0; left: 0; visibility: hidden; pointer-events: none; }
.sd-words .sd-word:hover img, .sd-words .sd-word:focus img { visibility: visible; }
"""


def words_html(picture: Image.Image, maps: AttentionMaps, index: int = 0) -> str:
    """HTML of the picture and, below it, the words of its prompt; each has its map over the picture.

    maps: recorded for a batch in which the picture is number ``index``. Where words follow each other by prompt
    editing, all are listed.
    """
    factor = SIDE / max(picture.size)
    shown = picture.convert("RGB").resize((round(picture.width * factor), round(picture.height * factor)))

    words: list[str] = []
    for word in maps.words[index]:
        heat = maps.values[index, list(word.positions)].mean(0).float().numpy()
        low, high = float(heat.min()), float(heat.max())
        said = f"{word.text}: {100 * low:.1f} to {100 * high:.1f} % of the attention of each place"
        image = img(overlay(shown, heat, low, high), said, "JPEG")
        words.append(f'<span class="sd-word" tabindex="0" title="{escape(said)}">{escape(word.text)}{image}</span>')
    return f'<div class="sd-words">{img(shown, "the picture", "JPEG")}<p>{" ".join(words)}</p></div>'
