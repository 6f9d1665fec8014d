"""What is seen in a model is what transformers' own `output_hidden_states` and `output_attentions` say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import silhouette_score

from laver_megatron.data.read.conversations import Message
from laver_megatron.inspection.collect import Inspection, add_observation
from laver_megatron.inspection.model import InspectedModel
from laver_megatron.inspection.samples import Sample
from laver_megatron.inspection.sources import Source
from tests.unit.inspection.models import write_model

KINDS = (
    "laver", "laver-clip", "laver-dinov2_with_registers", "laver-qwen2_5_vl", "laver-patches", "llava-clip",
    "llava-siglip", "qwen2_5_vl",
)  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def sample_of(*pictures: Image.Image, answer: str | None = "a red house") -> Sample:
    texts = ("Look:", *[" and "] * (len(pictures) - 1), "\nWhat is there?")
    return Sample("sample", (Message("user", texts),), answer, pictures)


@pytest.fixture(scope="module")
def models(demo_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    opened = {}

    def model(kind: str) -> InspectedModel:
        if kind not in opened:
            path = write_model(kind, directory / kind, demo_dir)
            opened[kind] = InspectedModel(path, kind.partition("-")[0], "cpu", "float32")
        return opened[kind]

    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_observations_are_what_transformers_returns(models, kind):
    inspected = models(kind)
    inputs, before = inspected.prepare(sample_of(picture(1), picture(2, (64, 80))), max_new_tokens=4)
    seen = inspected.observe(inputs, before)

    inspected.decoder.norm, norm = torch.nn.Identity(), inspected.decoder.norm  # it is in the last hidden state
    output = inspected.model(**inputs, output_hidden_states=True, output_attentions=True)
    inspected.decoder.norm = norm
    assert len(seen.hidden) == len(output.hidden_states) == inspected.num_layers + 1
    for ours, theirs in zip(seen.hidden, output.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[0])
    visual = inputs["input_ids"][0] == inspected.model.config.image_token_id
    for layer, weights in enumerate(output.attentions):
        torch.testing.assert_close(seen.mass_LS[layer], weights[0, :, :, visual].sum(-1).mean(0))
    places = torch.cat([image.places_N for image in seen.images])
    assert len(seen.images) == 2 and torch.equal(places, visual.nonzero().flatten())
    assert torch.equal(seen.text_M, (~visual).nonzero().flatten())
    assert (seen.text_queries > places[0]).all() and len(seen.text_queries) > 5

    answer = inspected.processor.tokenizer.decode(inputs["input_ids"][0, seen.answer_Q + 1])
    assert answer == "a red house"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_in_the_order_of_the_visual_tokens(models, kind):
    """The connector on the features gives the visual tokens that enter the decoder."""
    inspected = models(kind)
    inputs, before = inspected.prepare(sample_of(picture(3), picture(4, (48, 96))), max_new_tokens=4)
    seen = inspected.observe(inputs, before)
    for image, features_NE in zip(seen.images, seen.features, strict=True):
        assert len(features_NE) == image.grid[0] * image.grid[1] == len(image.places_N) > 1
        torch.testing.assert_close(inspected.connector(features_NE), seen.hidden[0][image.places_N])


def test_grids_are_upright_and_of_the_picture(models):
    inputs, before = models("qwen2_5_vl").prepare(sample_of(picture(5, (96, 48))), max_new_tokens=4)
    ((rows, columns),) = [image.grid for image in models("qwen2_5_vl").observe(inputs, before).images]
    assert columns == 2 * rows


@pytest.mark.parametrize("kind", ["laver", "qwen2_5_vl"])
def test_without_an_answer_the_model_gives_one(models, kind):
    inspected = models(kind)
    inputs, before = inspected.prepare(sample_of(picture(6), answer=None), max_new_tokens=5)
    assert before <= inputs["input_ids"].shape[1] <= before + 10
    assert len(inspected.observe(inputs, before).answer_Q) == inputs["input_ids"].shape[1] - before


def aligned(tokens: np.ndarray, features: np.ndarray, neighbours: int) -> float:
    """CKNNA in numpy."""
    kernels = [unit @ unit.T for unit in (tokens, features)]
    near = []
    for kernel in kernels:
        order = np.argsort(-kernel + 9 * np.eye(len(kernel)), axis=1)  # itself comes last
        near.append(np.zeros_like(kernel))
        np.put_along_axis(near[-1], order[:, :neighbours], 1, axis=1)

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        n = len(k)
        rest = k.sum() * other.sum() / (n - 1) / (n - 2) - 2 * (k @ other).sum() / (n - 2)
        return (np.trace(k @ other) + rest) / n / (n - 3)

    both = near[0] * near[1]
    own = [hsic(mask * kernel, mask * kernel) for mask, kernel in zip(near, kernels, strict=True)]
    return hsic(both * kernels[0], both * kernels[1]) / np.sqrt(own[0] * own[1])


@pytest.mark.parametrize("kind", ["laver", "llava-clip", "qwen2_5_vl"])
@torch.no_grad()
def test_every_curve_is_that_of_a_computation_by_hand(models, kind):
    inspected = models(kind)
    inputs, before = inspected.prepare(sample_of(picture(1)), max_new_tokens=4)
    seen = inspected.observe(inputs, before)
    found = Inspection(Source(kind, Path(kind), kind), inspected.num_layers)
    add_observation(found, seen, neighbours=5)

    inspected.decoder.norm, norm = torch.nn.Identity(), inspected.decoder.norm
    output = inspected.model(**inputs, output_hidden_states=True, output_attentions=True)
    inspected.decoder.norm = norm
    visual = (inputs["input_ids"][0] == inspected.model.config.image_token_id).numpy()
    features = seen.features[0].double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for layer, hidden in enumerate(output.hidden_states):
        unit = hidden[0].double().numpy()
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        tokens, text = unit[visual], unit[~visual]
        cosines, shares = tokens @ tokens.T, np.linalg.svd(tokens, compute_uv=False)
        shares /= shares.sum()
        expected = {
            "visual_similarity": cosines[~np.eye(len(tokens), dtype=bool)].mean(),
            "effective_rank": np.exp(-(shares * np.log(shares + 1e-300)).sum()),
            "cknna": aligned(tokens, features, 5),
            "centroid_distance": np.linalg.norm(tokens.mean(0) - text.mean(0)),
            "silhouette": silhouette_score(unit, visual, metric="cosine"),
        }
        for name, value in expected.items():
            assert found.curves[name][0][layer] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, layer)
    behind = ~visual & (np.arange(len(visual)) > visual.argmax())
    for layer, weights in enumerate(output.attentions):
        mass = weights[0].double().numpy()[:, :, visual].sum(-1).mean(0)
        assert found.curves["attention_mass"][0][layer + 1] == pytest.approx(mass[behind].mean(), rel=1e-5)
        np.testing.assert_allclose(found.answers[0][layer], mass[before - 1 : -1], rtol=1e-5)
