"""Pictures of every shape, and an encoder of ours held against transformers' own class on them."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from laver_megatron.encoders import build_encoder, open_preprocessor

# Odd sizes, elongated ones, some smaller than a visual token, and the same size twice.
SIZES = ((97, 61), (33, 200), (640, 37), (64, 64), (5, 3), (200, 1), (1, 90), (1023, 767), (97, 61))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blots of colour: smooth enough that resizing means something."""
    rng = np.random.default_rng([seed, width, height])
    coarse = rng.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pictures() -> list[Image.Image]:
    return [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


def random_sizes(count: int = 200, longest: int = 900) -> list[tuple[int, int]]:
    rng = random.Random(5)
    return [(rng.randint(1, longest) // rng.choice((1, 1, 1, 30)) + 1, rng.randint(1, longest)) for _ in range(count)]


def features(directory: Path, images: list[Image.Image], layer: int | None = None, **options) -> Tensor:
    """Ours, of all images in one call."""
    preprocessor = open_preprocessor(directory, **options)
    encoder = build_encoder(directory, layer, torch.float32, load_weights=True)
    with torch.no_grad():
        return encoder([preprocessor(image) for image in images])


def assert_same_encoder(directory: Path, expected: Path) -> None:
    """Two directories hold the same encoder: weights to the last bit, and the features of all pictures."""
    loaded, wanted = (
        build_encoder(path, None, torch.float32, load_weights=True).state_dict() for path in (directory, expected)
    )
    assert loaded.keys() == wanted.keys()
    different = [name for name, tensor in loaded.items() if not torch.equal(tensor, wanted[name])]
    assert not different, f"{len(different)} of {len(loaded)} tensors differ: {different[:5]}"
    # Two loads need not lie alike in memory, and kernels sum in another order there: fp32 rounding of a few layers.
    torch.testing.assert_close(features(directory, pictures()), features(expected, pictures()), atol=1e-5, rtol=1e-5)


def assert_same_features(ours_TE: Tensor, of_each: list[Tensor]) -> None:
    """of_each: what transformers' class makes of every image alone. fp32: other orders of summation."""
    torch.testing.assert_close(ours_TE, torch.cat(of_each), atol=1e-5, rtol=1e-5)


def hidden_states(model: nn.Module, inputs: dict) -> list[Tensor]:
    """Input of the first layer and output of each, seen from outside: what `hidden_states` should be."""
    layers = next(
        getattr(model.encoder, name)
        for name in ("layers", "layer")
        if isinstance(getattr(model.encoder, name, 0), nn.ModuleList)
    )
    states: list[Tensor] = []
    hooks = [layers[0].register_forward_pre_hook(lambda module, args, kwargs: states.append(
        args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]  # fmt: skip
    hooks += [
        layer.register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return states


def altered(directory: Path, target: Path, name: str, **changes) -> Path:
    """A copy of an encoder's directory with other values in one of its JSON files; None removes one."""
    shutil.copytree(directory, target)
    settings = {**json.loads((target / name).read_text()), **changes}
    kept = {key: value for key, value in settings.items() if value is not None}
    (target / name).write_text(json.dumps(kept))
    return target
