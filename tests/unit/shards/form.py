"""Small sources in every form, made of real pictures."""

import io
import json
from pathlib import Path

from PIL import Image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    return Image.effect_noise(size, 50).convert(mode)


def jpeg(size: tuple[int, int] = (40, 30)) -> bytes:
    return encoded(noise(size), "JPEG")


def turns(question: str = "<image>\nWhat is it?", answer: str = "Noise.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_llava(folder: Path, num_samples: int, name: str = "data.json") -> Path:
    """FOLDER/data.json and FOLDER/images/0.jpg, ...: sample i has i % 3 pictures."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(num_samples):
        names = [f"{number}-{part}.jpg" for part in range(number % 3)]
        for part, file in enumerate(names):
            (images / file).write_bytes(jpeg((20 + number, 20 + part)))
        record = {"id": f"sample/{number}", "conversations": turns("<image>" * len(names) + f"Question {number}?")}
        records.append({**record, "image": names[0] if len(names) == 1 else names} if names else record)
    path = folder / name
    path.write_text(json.dumps(records))
    return path
