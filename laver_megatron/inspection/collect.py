"""All that is measured of one model over a set of samples.

Letters: O observations (images, or conversations), L decoder layers, C = L + 1 with the decoder's input as layer 0, P
positions in the answer, N visual tokens of one image, H width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laver_megatron.inspection import measures
from laver_megatron.inspection.model import InspectedModel, Observation
from laver_megatron.inspection.reconstruction import Reconstruction
from laver_megatron.inspection.samples import Sample
from laver_megatron.inspection.sources import Source, exported, has_teacher
from laver_megatron.objective.similarity import mean_pairwise_cosine

# Of each kind of token, in one picture of points.
MOST_POINTS = 300
GRAM_BINS = np.linspace(-1, 1, 81)


@dataclass(frozen=True)
class Measure:
    """A curve over the layers: what the page calls it, and one sentence on it."""

    title: str
    explanation: str


MEASURES = {
    "visual_similarity": Measure(
        "Similarity of visual tokens", "mean cosine of all pairs of visual tokens of an image; 1: they have become one"
    ),
    "effective_rank": Measure(
        "Effective rank", "directions that an image's visual tokens fill: exp of the entropy of their singular values"
    ),
    "cknna": Measure(
        "Alignment with the encoder (CKNNA)", "whether tokens have the neighbours that the encoder's features have"
    ),
    "attention_mass": Measure(
        "Attention to visual tokens", "share of its attention that text behind the image gives to visual tokens"
    ),
    "centroid_distance": Measure(
        "Distance of visual and text tokens", "between the means of their unit vectors, from 0 to 2"
    ),
    "silhouette": Measure(
        "Separation of visual and text tokens", "mean silhouette with cosine distance; 1: apart, 0: mixed"
    ),
}


@dataclass(frozen=True)
class Settings:
    """What may be chosen. patch: of the similarity map, as shares of the height and of the width."""

    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 32
    neighbours: int = measures.NEIGHBOURS
    num_pictures: int = 3
    patch: tuple[float, float] = (0.5, 0.5)
    mask_ratio: float | None = None


@dataclass(frozen=True)
class View:
    """An image at some layers: its patches in the colours of their principal components, `[rows, columns, 3]`, and
    their similarity to one patch, `[rows, columns]`."""

    name: str
    picture: Image.Image
    patch: tuple[int, int]
    layers: tuple[int, ...]
    colours: list[np.ndarray]
    similarities: list[np.ndarray]


@dataclass(frozen=True)
class Gram:
    """Student against teacher, by image. matrices: both Gram matrices of the first image, `[N, N]`."""

    values: dict[str, list[float]] = field(default_factory=lambda: {"share": [], "positive": [], "negative": []})
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(GRAM_BINS) - 1))
    matrices: list[np.ndarray] = field(default_factory=list)


@dataclass
class Inspection:
    """One model's results.

    Attributes:
        curves: by MEASURES, `[O, C]`; NaN where there is no value.
        answers: share of attention to visual tokens by layer and position in the answer, `[L, P]` of each sample.
        points: by layer, visual and text tokens `[points, H]`, of the first samples.
        gram: None without a teacher.
    """

    source: Source
    num_layers: int
    num_images: int = 0
    curves: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    answers: list[np.ndarray] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    points: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)
    gram: Gram | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def mean(self, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean over the observations that have a value, its standard error (NaN for one), their number; `[C]` each."""
        return mean_and_error(np.stack(self.curves[measure]))

    def decay(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the samples of the attention by layer and answer position, `[L, P]`, and how many samples have the
        position, `[P]`; as far as half of them reach."""
        counts_P = np.array([answer.shape[1] for answer in self.answers])
        length = int(np.median(counts_P)) if len(counts_P) else 0
        padded = np.full((len(self.answers), self.num_layers, length), np.nan)
        for row, answer in zip(padded, self.answers, strict=True):
            row[:, : answer.shape[1]] = answer[:, :length]
        reached_P = (counts_P[:, None] > np.arange(length)).sum(0)
        return (np.nanmean(padded, axis=0) if length else np.zeros((self.num_layers, 0))), reached_P


def mean_and_error(values_OC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Along the first axis, without NaN: mean, standard error, number."""
    is_there = ~np.isnan(values_OC)
    count = is_there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(is_there, values_OC, 0).sum(0) / count
        squares = (np.where(is_there, values_OC - mean, 0) ** 2).sum(0)
        return mean, np.sqrt(squares / (count - 1) / count), count


def inspect_model(
    source: Source, samples: Sequence[Sample], settings: Settings, on_sample: Callable[[], object]
) -> Inspection:
    """Measures a model on all samples. on_sample: called after each.

    Raises:
        ValueError: it cannot be loaded, a layer's numbers are not finite, or no image has more than one visual token.
    """
    with exported(source) as directory:
        inspected = InspectedModel(directory, source.model_type, settings.device, settings.dtype)
        reconstruction = None
        if has_teacher(directory):
            ratio = source.mask_ratio if settings.mask_ratio is None else settings.mask_ratio
            reconstruction = Reconstruction(inspected, directory, ratio)
        found = Inspection(source, inspected.num_layers, gram=Gram() if reconstruction else None)
        for sample in samples:
            try:
                seen = inspected.observe(*inspected.prepare(sample, settings.max_new_tokens))
                check_finite(seen)
            except ValueError as error:
                raise ValueError(f"{source.name}, sample {sample.name!r}: {error}") from error
            if reconstruction is not None:
                _add_gram(found, seen, reconstruction)
            add_observation(found, seen, settings.neighbours)
            _add_points(found, seen)
            if len(found.views) < settings.num_pictures:
                found.views.append(view_of(sample, seen, settings.patch))
            on_sample()
    if np.isnan(found.curves["visual_similarity"]).all():
        raise ValueError(
            f"{source.name}: no image has more than one visual token, so there are no pairs to compare; show it larger "
            "images"
        )
    return found


def check_finite(seen: Observation) -> None:
    """Raises ValueError with the first layer that holds NaN or infinity: all numbers of the page would be absent."""
    for layer, hidden_SH in enumerate(seen.hidden):
        if not torch.isfinite(hidden_SH).all():
            raise ValueError(
                f"layer {layer} of {len(seen.hidden) - 1} gives numbers that are not finite; in 16 bits they may "
                "overflow, so try --dtype float32; otherwise the weights are damaged, or the training has diverged"
            )


def add_observation(found: Inspection, seen: Observation, neighbours: int) -> None:
    """The curves of one conversation."""
    of_image: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "visual_similarity": lambda tokens_NH, features_NE: mean_pairwise_cosine(tokens_NH),
        "effective_rank": lambda tokens_NH, features_NE: measures.effective_rank(tokens_NH),
        "cknna": partial(measures.cknna, neighbours=neighbours),
    }
    for image, features_NE in zip(seen.images, seen.features, strict=True):
        found.num_images += 1
        for name, measure in of_image.items():
            values = [float(measure(hidden_SH[image.places_N], features_NE)) for hidden_SH in seen.hidden]
            found.curves[name].append(np.array(values))
    visual_T = torch.cat([image.places_N for image in seen.images])
    for name, apart in (("centroid_distance", measures.centroid_distance), ("silhouette", measures.silhouette)):
        values = [float(apart(hidden_SH[visual_T], hidden_SH[seen.text_M])) for hidden_SH in seen.hidden]
        found.curves[name].append(np.array(values))
    mass_L = seen.mass_LS[:, seen.text_queries].mean(1)
    found.curves["attention_mass"].append(np.array([np.nan, *mass_L.tolist()]))  # the input attends to nothing
    found.answers.append(seen.mass_LS[:, seen.answer_Q].cpu().numpy())


def _add_gram(found: Inspection, seen: Observation, reconstruction: Reconstruction) -> None:
    assert found.gram is not None
    gram = found.gram
    for image in seen.images:
        number = len(gram.values["share"])
        student_NK, teacher_NK = reconstruction.logits(seen.hidden[0][image.places_N], image, number)
        for name, value in measures.gram_excess(student_NK, teacher_NK).items():
            gram.values[name].append(float(value))
        matrices = [measures.cosines(logits_NK).cpu().numpy() for logits_NK in (student_NK, teacher_NK)]
        others_NN = ~np.eye(len(student_NK), dtype=bool)
        gram.histogram[:] += np.histogram((matrices[0] - matrices[1])[others_NN].clip(-1, 1), GRAM_BINS)[0]
        if not gram.matrices:
            gram.matrices.extend(matrices)


def shown_layers(num_layers: int) -> tuple[int, ...]:
    """The layers of pictures: the decoder's input, a third, two thirds, the last."""
    return tuple(dict.fromkeys(round(share * num_layers / 3) for share in range(4)))


def _add_points(found: Inspection, seen: Observation) -> None:
    """Evenly chosen tokens, until there are MOST_POINTS of a kind."""
    visual_T = torch.cat([image.places_N for image in seen.images])
    for layer in shown_layers(found.num_layers):
        kinds = found.points.setdefault(layer, ([], []))
        for kept, places in zip(kinds, (visual_T, seen.text_M), strict=True):
            room = min(MOST_POINTS - sum(map(len, kept)), MOST_POINTS // 4)
            if room > 0:
                chosen = places[torch.linspace(0, len(places) - 1, min(room, len(places))).round().long()]
                kept.append(seen.hidden[layer][chosen].float().cpu())


def view_of(sample: Sample, seen: Observation, patch: tuple[float, float]) -> View:
    """The first image of a conversation."""
    image, layers = seen.images[0], shown_layers(len(seen.hidden) - 1)
    rows, columns = image.grid
    place = (min(int(patch[0] * rows), rows - 1), min(int(patch[1] * columns), columns - 1))
    tokens = [seen.hidden[layer][image.places_N] for layer in layers]
    picture = sample.pictures[0].copy()
    picture.thumbnail((384, 384))
    return View(
        name=sample.name,
        picture=picture,
        patch=place,
        layers=layers,
        colours=[measures.pca_colours(tokens_NH, image.grid).cpu().numpy() for tokens_NH in tokens],
        similarities=[measures.patch_similarity(tokens_NH, image.grid, place).cpu().numpy() for tokens_NH in tokens],
    )


def inspect_models(
    sources: Sequence[Source], samples: Sequence[Sample], settings: Settings, on_sample: Callable[[], object]
) -> list[Inspection]:
    """`inspect_model` of each, one in memory at a time."""
    return [inspect_model(source, samples, settings, on_sample) for source in sources]


def is_run(inspections: Sequence[Inspection]) -> bool:
    """Whether these are several steps of one run, in order."""
    steps = [it.source.step for it in inspections]
    folders: set[Path] = {it.source.directory.absolute().parent for it in inspections}
    known = [step for step in steps if step is not None]
    return len(steps) > 1 and len(known) == len(steps) and len(folders) == 1 and known == sorted(known)
