"""Images as they enter shards; what is wrong with one is named by its file."""

from __future__ import annotations

import io
from typing import Any

from PIL import ExifTags, Image, ImageOps

from distill.data.decode import open_image, pixels
from distill.data.manifest import DataError
from distill.data.sources.base import Options


def prepared(options: Options) -> dict[str, Any]:
    """What the manifest says of how images were prepared."""
    if options.size is None:
        return {"preparation": "as they are, PNG"}
    size = options.size
    return {"preparation": f"shorter side scaled to {size} (Lanczos), centre {size}x{size}, PNG"}


def opened(content: Any, where: str) -> Image.Image:
    """A still image of 8 bits a channel, not decoded yet. content: bytes or a binary file. Raises DataError."""
    try:
        image = open_image(content)
    except ValueError as error:
        raise DataError(f"{where}: {error}; remove or replace it") from None
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise DataError(f"{where}: is of mode {image.mode}, which has more than 8 bits; convert it to 8 bits a channel")
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{where}: is an animation; take single images")
    return image


def orientation(image: Image.Image) -> int:
    """How the camera was held, by EXIF: 1 upright, from 5 on width and height are exchanged."""
    if "exif" not in image.info:  # asking a PNG for it would decode the whole of it
        return 1
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in range(1, 9) else 1


def decoded(image: Image.Image, where: str, mode: str | None = None) -> Image.Image:
    """The image upright and, if asked for, in a mode; transparency is dropped."""
    try:
        pixels(image)
        return image if mode is None else ImageOps.exif_transpose(image).convert(mode)
    except (ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{where}: {error}; remove or replace it") from None


def sized(image: Image.Image, size: int | None) -> Image.Image:
    """The shorter side scaled to `size` (Lanczos), then the centre cut out; None: as it is."""
    if size is None:
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
