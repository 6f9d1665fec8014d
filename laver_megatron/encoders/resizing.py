"""Native resolution: the size in pixels that a picture is resized to. Arithmetic alone."""

import math


def native_size(width: int, height: int, token_size: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) nearest to those of the picture that are multiples of `token_size` and hold between `min_pixels`
    and `max_pixels` pixels; width to height stays what it is, as nearly as the multiples let it.

    It is Qwen2.5-VL's own size wherever that keeps to `max_pixels`. Of a picture so long and narrow that one token on
    its short side is already too many, the long side is cut down, which Qwen's does not do. max_pixels goes before
    min_pixels (0: none), and must hold one token.
    """
    assert max_pixels >= token_size**2, (max_pixels, token_size)
    # Halves go to the even neighbour, as Python rounds.
    rows, columns = round(height / token_size), round(width / token_size)
    if rows * columns * token_size**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / token_size)) for side in (height, width))
    elif rows * columns * token_size**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / token_size) for side in (height, width))
    rows, columns = max(1, rows), max(1, columns)
    most_tokens = max_pixels // token_size**2
    if rows * columns > most_tokens:
        rows = min(rows, most_tokens if rows >= columns else max(1, most_tokens // columns))
        columns = min(columns, most_tokens // rows)
    return rows * token_size, columns * token_size
