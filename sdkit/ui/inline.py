"""Pictures inside HTML: no file lies behind them that could change while the browser reads it."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

from PIL import Image


def img(image: Image.Image, alt: str, format: str = "PNG") -> str:
    """An img element that holds the picture itself, ``format`` "PNG" or "JPEG"."""
    buffer = BytesIO()
    image.save(buffer, format=format)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{format.lower()};base64,{data}" alt="{escape(alt)}">'
