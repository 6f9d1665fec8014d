"""What an ablation starts from, beside its tasks: a random Qwen2.5 whose tokenizer knows their texts, and a SigLIP
trained on procedural pictures and captions.

Letters: B pictures, C classes, D width of a feature.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import INDEX_NAME, write_index
from laver_megatron.demo.contrastive import features, pixels_of, train_encoder
from laver_megatron.demo.encoders import IMAGE_SIZE, PATCH_SIZE, save_siglip
from laver_megatron.demo.make import check_part, make_part
from laver_megatron.demo.models import check_language_sizes, save_language_model, seeded
from laver_megatron.demo.scenes import description_of, make_descriptions, make_scenes, make_single_shapes
from laver_megatron.demo.shards import write_shards
from laver_megatron.runtime.files import write_json
from laver_megatron.runtime.terminal import quiet_transformers
from laver_megatron.tasks.question import LEVELS, TRAIN
from laver_megatron.tasks.sample import TaskSettings, make_task

_NUM_TEXTS = 4000  # tasks whose texts the tokenizer is trained on
_NUM_PROBED = 1500  # pictures that a probe is fitted to, and as many that it is tried on
_SYSTEM_PROMPT = "Answer."  # short: every sample has it


def make_parts(
    directory: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 4,
    encoder_width: int = 64,
    encoder_layers: int = 3,
    encoder_steps: int = 2500,
    num_pictures: int = 16384,
    num_captions: int = 24000,
) -> None:
    """Makes `model/`, `encoder/` and `captions/` in a directory, one complete part at a time; what is there is kept.

    Raises:
        ValueError: a size that a model cannot have, or a part that is there and was made with other settings.
    """
    if encoder_width < 16 or encoder_width % 16 or min(encoder_layers, encoder_steps) < 1 or num_pictures < 64:
        raise ValueError(
            f"an encoder has a width that is a multiple of 16, at least one layer and step, and 64 pictures, not "
            f"{encoder_width}, {encoder_layers}, {encoder_steps} and {num_pictures}"
        )
    check_language_sizes(hidden_size, num_layers)
    if num_captions < 1:
        raise ValueError(f"--num-captions {num_captions} must be a positive number of pictures")

    def model(place: Path) -> None:
        save_language_model(
            place, _texts(), hidden_size=hidden_size, num_layers=num_layers, system_prompt=_SYSTEM_PROMPT
        )

    def encoder(place: Path) -> None:
        config = SiglipVisionConfig(
            hidden_size=encoder_width,
            intermediate_size=11 * encoder_width // 4,
            num_hidden_layers=encoder_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
        save_trained_encoder(place, config, num_steps=encoder_steps, num_pictures=num_pictures)

    def captions(place: Path) -> None:
        write_shards(place, "train", make_descriptions(num_captions, IMAGE_SIZE), samples_per_shard=4096)
        write_index(index_tars(sorted(place.glob("*.tar"))), place / INDEX_NAME)

    of_encoder = {
        "encoder_width": encoder_width,
        "encoder_layers": encoder_layers,
        "encoder_steps": encoder_steps,
        "num_pictures": num_pictures,
    }
    of_model = {"hidden_size": hidden_size, "num_layers": num_layers}
    parts = (
        ("captions", f"{num_captions} pictures with descriptions", captions, {"num_captions": num_captions}),
        ("model", f"a Qwen2.5 of {num_layers} layers of width {hidden_size}", model, of_model),
        ("encoder", f"a SigLIP, trained for {encoder_steps} steps", encoder, of_encoder),
    )
    for name, _, _, settings in parts:
        check_part(directory / name, settings)
    directory.mkdir(parents=True, exist_ok=True)
    for name, what, build, settings in parts:
        make_part(directory / name, what, build, settings)


def _texts() -> list[str]:
    """Questions, answers and descriptions. What a picture reads is left out: letters stay tokens of their own."""
    settings = TaskSettings(1, _NUM_TEXTS, 1, levels=LEVELS)
    questions = [make_task(settings, TRAIN, number).question for number in range(_NUM_TEXTS)]
    descriptions = [description_of(it.marks, settings.image_size) for it in questions if not it.marks[0].text]
    return [*descriptions, *(text for it in questions for text in (it.question, it.answer) if not text.isupper())]


def save_trained_encoder(place: Path, config: SiglipVisionConfig, *, num_steps: int, num_pictures: int) -> None:
    """Trains an encoder from random weights and writes it, with `probes.json`: what linear probes read of its features
    in new pictures, beside chance and the random weights that it began with."""
    examples = make_scenes(num_pictures, config.image_size)
    interval = max(num_steps // 10, 1)
    with seeded(2):
        model = SiglipVisionModel(config)
        untrained = probes(model)
        losses: list[float] = []
        for step, loss in train_encoder(model, examples, num_steps=num_steps):
            losses.append(loss)
            if step % interval == 0:
                print(f"encoder: step {step} of {num_steps}, loss {sum(losses[-interval:]) / interval:.3f}", flush=True)
    with quiet_transformers():
        save_siglip(place, model)
    found = {
        name: {"accuracy": accuracy, "untrained": untrained[name][0], "chance": chance}
        for name, (accuracy, chance) in probes(model).items()
    }
    write_json(place / "probes.json", found)
    for name, result in found.items():
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in result.items())
        print(f"encoder: a linear probe of {name}: {shares}")


def probes(model: SiglipVisionModel) -> dict[str, tuple[float, float]]:
    """(accuracy, chance) of linear probes on the mean feature of new pictures of one shape: its cell, colour, kind."""
    scenes = make_single_shapes(2 * _NUM_PROBED, model.config.image_size)
    with torch.no_grad():
        pixels_B = torch.stack([pixels_of(scene.picture) for scene, _ in scenes])
        features_BD = torch.cat([features(model, part).mean(1) for part in pixels_B.split(256)])
    found = {}
    for name, answers in zip(
        ("cell", "colour", "shape"), zip(*(facts for _, facts in scenes), strict=True), strict=True
    ):
        words = sorted(set(answers))
        classes_B = torch.tensor([words.index(answer) for answer in answers])
        found[name] = _probe(features_BD, classes_B), 1 / len(words)
    return found


def _probe(features_BD: Tensor, classes_B: Tensor) -> float:
    """Least squares on the first half, tried on the second."""
    x_BD = torch.cat([features_BD, torch.ones(len(features_BD), 1)], dim=1).double()
    half = len(x_BD) // 2
    targets_BC = torch.nn.functional.one_hot(classes_B).double()
    gram_DD = x_BD[:half].T @ x_BD[:half] + 1e-3 * torch.eye(x_BD.shape[1], dtype=torch.float64)
    weights_DC = torch.linalg.solve(gram_DD, x_BD[:half].T @ targets_BC[:half])
    return float(((x_BD[half:] @ weights_DC).argmax(1) == classes_B[half:]).double().mean())
