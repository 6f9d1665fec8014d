"""Real photographs that come inside scikit-image and scikit-learn, and what is to be seen on them."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from laver_megatron.data.read.images import decode_image

# Files within the installed packages (nothing is fetched), and what they show.
_SKIMAGE = {
    "astronaut.png": "an astronaut",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "old coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "horse.png": "a horse",
    "hubble_deep_field.jpg": "distant galaxies",
    "ihc.png": "tissue under a microscope",
    "moon.png": "the surface of the moon",
    "motorcycle_left.png": "a motorcycle",
    "page.png": "a page of text",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
}
_SKLEARN = {"china.jpg": "a temple", "flower.jpg": "a flower"}
_LARGEST_SIDE = 400


@cache
def photographs() -> tuple[tuple[str, Image.Image], ...]:
    """(what it shows, RGB picture) of every photograph that is there, at most 400 pixels on a side.

    Raises:
        ValueError: the packages are not installed, or none of the files is in them.
    """
    found = []
    for package, subdirectory, files in (("skimage", "data", _SKIMAGE), ("sklearn", "datasets/images", _SKLEARN)):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError("the demo's photographs come with scikit-image and scikit-learn: pip install both")
        folder = Path(spec.origin).parent / subdirectory
        for name, shows in files.items():
            if (folder / name).is_file():
                picture = decode_image((folder / name).read_bytes())
                picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
                found.append((shows, picture))
    if not found:
        raise ValueError("scikit-image and scikit-learn are installed without their pictures")
    return tuple(found)
