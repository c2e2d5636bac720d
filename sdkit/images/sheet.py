"""Sheets of pictures: with a caption each, with labels of rows and columns, and sheets one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from sdkit.checks import Range, check_kind, check_range
from sdkit.errors import ConfigError

PAPER, INK = (250, 250, 248), (70, 70, 74)


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    gap: int = 8,
    font_size: int = 12,
) -> Image.Image:
    """Lay pictures out on a sheet, row by row, each with its caption (wrapped to the cell's width) below it.

    Cells have the size of the largest picture; smaller ones are centred. Raises ConfigError for no picture, or
    when the numbers of captions and pictures differ.
    """
    check_kind("images", images, Sequence, "a list of Pillow's images")
    for image in images:
        check_kind("images", image, Image.Image, "Pillow's images")
    for name, value, least in (("columns", columns, 1), ("gap", gap, 0), ("font_size", font_size, 1)):
        check_range(name, value, Range(least, 10_000), whole=True)
    check_kind("captions", captions, (Sequence, type(None)), "a list of texts, or None")
    if not images:
        raise ConfigError("contact sheet: expected pictures, found none")
    if captions is not None and len(captions) != len(images):
        raise ConfigError(f"contact sheet: {len(captions)} captions for {len(images)} pictures")

    columns = min(columns, len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    font = ImageFont.load_default(font_size)
    texts = [_wrap(text, font, width) for text in captions or [""] * len(images)]
    line = round(font_size * 1.35)
    tallest = max(text.count("\n") + 1 if text else 0 for text in texts)
    label = tallest * line + (gap // 2 if tallest else 0)

    rows = -(-len(images) // columns)
    cell = (width + gap, height + label + gap)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), PAPER)
    draw = ImageDraw.Draw(sheet)

    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(image.convert("RGB"), (x + (width - image.width) // 2, y + (height - image.height) // 2))
        for n, part in enumerate(text.split("\n")):
            draw.text((x + width / 2, y + height + gap // 2 + n * line), part, INK, font, anchor="ma")
    return sheet


def labelled_grid(
    images: Mapping[tuple[int, int], Image.Image],
    columns: Sequence[str],
    rows: Sequence[str],
    gap: int = 8,
    font_size: int = 13,
) -> Image.Image:
    """Pictures by (row, column), under the columns' labels and beside the rows'; a place without a picture stays empty.

    Raises ConfigError for no picture.
    """
    if not images:
        raise ConfigError("labelled grid: expected pictures, found none")
    width, height = max(i.width for i in images.values()), max(i.height for i in images.values())
    font, line = ImageFont.load_default(font_size), round(font_size * 1.35)
    heads, sides = ([_wrap(text, font, width) for text in labels] for labels in (columns, rows))
    top = gap + line * max((text.count("\n") + 1 if text else 0 for text in heads), default=0)
    longest = max((font.getlength(part) for text in sides for part in text.split("\n")), default=0.0)
    left = gap + round(longest) + (gap if longest else 0)

    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, text in enumerate(heads):
        draw.text((left + k * (width + gap) + width / 2, top - gap / 2), text, INK, font, anchor="md", align="center")
    for k, text in enumerate(sides):
        middle = top + k * (height + gap) + height / 2
        draw.text((left - gap, middle), text, INK, font, anchor="rm", align="right")
    for (row, column), image in images.items():
        sheet.paste(image.convert("RGB"), (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """A picture whose pixels are repeated so often that each side has at least ``side`` of them."""
    factor = max(1, -(-side // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def stacked(images: Sequence[Image.Image], titles: Sequence[str] = (), font_size: int = 15) -> Image.Image:
    """Pictures one above the other, from the left, on the sheet's paper; each under its title, where there are some."""
    font, line = ImageFont.load_default(font_size), round(1.8 * font_size) if titles else 0
    height = sum(image.height + line for image in images)
    whole = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    draw, top = ImageDraw.Draw(whole), 0
    for image, title in zip(images, titles or [""] * len(images), strict=True):
        draw.text((line // 3, top + line), title, INK, font, anchor="ls")
        whole.paste(image, (0, top + line))
        top += line + image.height
    return whole


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break between words wherever a line would be wider than ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
