"""Picture files on their way into a shard: looked at, and copied as they are if training can read them.

JPEG, PNG and WebP keep their bytes; GIF, BMP and TIFF become PNG, of which an animation's first picture.
"""

import io
from dataclasses import dataclass

from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read.images import decode_image, image_size

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_RIFF_HEADER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """A file for a shard. extension: `jpg`, `png` or `webp`; width, height: in pixels, as it is to be seen."""

    extension: str
    content: bytes
    width: int
    height: int


def prepare_picture(content: bytes, name: str, decode: bool) -> Picture:
    """A picture for a shard, with the bytes that it came with wherever training can read them.

    decode: whether to decode it to its end. Otherwise its header is read, and only a file that does not end as its
    format does is decoded, which finds truncated files but not garbled ones.

    Raises:
        SampleFault: unreadable_image, image_too_large or image_shape.
    """
    try:
        width, height = image_size(content)
        extension = _extension(content)
        if extension is None:
            content = _to_png(content)
            return Picture("png", content, *image_size(content))
        if decode or not _ends_well(content, extension):
            decode_image(content)
        return Picture(extension, content, width, height)
    except SampleFault as fault:
        raise SampleFault(fault.fault, f"{name}: {fault}") from fault


def _extension(content: bytes) -> str | None:
    if content.startswith(_JPEG_START):
        return "jpg"
    if content.startswith(_PNG_START):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _ends_well(content: bytes, extension: str) -> bool:
    if extension == "webp":
        return int.from_bytes(content[4:8], "little") + _RIFF_HEADER_BYTES <= len(content)
    return content.endswith(_JPEG_END if extension == "jpg" else _PNG_END)


def _to_png(content: bytes) -> bytes:
    """The picture as training sees it, upright and opaque, without loss."""
    buffer = io.BytesIO()
    decode_image(content).save(buffer, "PNG")
    return buffer.getvalue()
