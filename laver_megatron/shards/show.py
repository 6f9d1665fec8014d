"""A pack for the eye: its text, and one picture of tokens, attention and masked images.

Letters: B packs (here one), S tokens of a pack, N visual tokens of an image, L a row of the token strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import mask_pack
from laver_megatron.data.batch.pack_reader import PackReader
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.encoders import ImagePreprocessor
from laver_megatron.model.spans import language_spans, spans_to_mask
from laver_megatron.objective import schedules
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.shards.build import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds of tokens in the strip, with their colours; images alternate between two, so that neighbours differ.
PADDING, TEXT, ANSWER, IMAGE, OTHER_IMAGE, MASKED = range(6)
KINDS = {
    "padding": "#f1f2f4",
    "text, not trained": "#a9afb8",
    "text to predict": "#3a9150",
    "image": "#8fb9e0",
    "next image": "#2a6fb0",
    "masked": "#c43c3c",
}
_ROW_TOKENS = 256
_MASK_PIXELS = 512  # side of the attention picture at most
_MOST_EPOCHS = 100  # every pack before the one that is shown has to be planned
_COLUMNS = 6  # images side by side
_COLOURS = ListedColormap(list(KINDS.values()))


@dataclass(frozen=True)
class ShownPack:
    """One pack with what is drawn over it.

    Attributes:
        pack: a batch of one pack.
        masked_BS: its masked visual tokens.
        number: of the pack in the run.
        mask_ratio: the ratio it was masked with.
    """

    pack: PackBatch
    masked_BS: Tensor
    number: int
    mask_ratio: float
    visual_seq_length: int
    attention: str

    @property
    def num_documents(self) -> int:
        return int(self.pack.document_BS.max()) + 1

    def headline(self) -> str:
        """The pack in one line: its contents relative to its capacity."""
        pack = self.pack
        visual, used = int((pack.image_BS >= 0).sum()), int((pack.document_BS >= 0).sum())
        length, labels = pack.tokens_BS.shape[1], int((pack.labels_BS != IGNORE_LABEL).sum())
        return (
            f"pack {self.number}: {self.num_documents} samples, {len(pack.pixels[0])} images; "
            f"{used} of {length} tokens ({used / length:.1%}), "
            f"{visual} of {self.visual_seq_length} visual slots ({visual / self.visual_seq_length:.1%}); "
            f"{labels} to predict; {int(self.masked_BS.sum())} masked (ratio {self.mask_ratio:.3f}); {self.attention}"
        )


# --- in words ------------------------------------------------------------------------------------------


def describe(shown: ShownPack, tokenizer: PreTrainedTokenizerBase) -> str:
    """The headline, then each sample: key, counts and text. Trained text stands in [[ ]]; an image is one word."""
    pack = shown.pack
    lines = [shown.headline()]
    for document, key in enumerate(pack.keys[0]):
        places = (pack.document_BS[0] == document).nonzero().flatten()
        num_trained = int((pack.labels_BS[0, places] != IGNORE_LABEL).sum())
        num_images = len(pack.image_BS[0, places].unique()) - int((pack.image_BS[0, places] < 0).any())
        counts = f"{num_trained} trained, {num_images} images"
        lines.append(f"--- {key}: {len(places)} tokens from {int(places[0])} on, {counts}")
        lines.append("".join(_segments(pack, places, tokenizer)))
    return "\n".join(lines)


def _segments(pack: PackBatch, places: Tensor, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Runs of tokens of one kind, as text. A label stands one position before the token that it names."""
    labels, images = pack.labels_BS[0], pack.image_BS[0]
    first = int(places[0])
    trained = [place > first and int(labels[place - 1]) != IGNORE_LABEL for place in places.tolist()]
    kinds = [(int(images[place]), is_trained) for place, is_trained in zip(places.tolist(), trained, strict=True)]
    start = 0
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start]:
            continue
        image, is_trained = kinds[start]
        run = places[start:end]
        if image >= 0:
            rows, columns = int(pack.row_BS[0, run].max()) + 1, int(pack.col_BS[0, run].max()) + 1
            yield f"<{rows} x {columns} visual tokens>"
        else:
            text = tokenizer.decode(pack.tokens_BS[0, run])
            yield f"[[{text}]]" if is_trained else text
        start = end


# --- as a picture --------------------------------------------------------------------------------------


def draw(shown: ShownPack, preprocessor: ImagePreprocessor, path: Path) -> None:
    """Writes one picture: the token strip, the attention of the language stream, and every image with the
    patches that are masked."""
    images = shown.pack.pixels[0]
    num_rows = -(-len(images) // _COLUMNS)
    strip_rows = -(-shown.pack.tokens_BS.shape[1] // _ROW_TOKENS)
    heights = [0.5 + 0.3 * strip_rows, 4.5, *[2.4] * num_rows]
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(13, sum(heights) + 1), dpi=100)
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(shown.headline(), fontsize=9)
        grid = figure.add_gridspec(2 + num_rows, _COLUMNS, height_ratios=heights)
        _draw_strip(figure.add_subplot(grid[0, :]), shown)
        _draw_attention(figure.add_subplot(grid[1, :]), shown)
        for number, pixels_3HW in enumerate(images):
            axes = figure.add_subplot(grid[2 + number // _COLUMNS, number % _COLUMNS])
            _draw_image(axes, shown, number, pixels_3HW, preprocessor)
        figure.savefig(path)


def token_kinds(shown: ShownPack) -> Tensor:
    """The kind of every token of the pack, int64 `[S]`. A token is to be predicted if the label before it names it."""
    pack = shown.pack
    image_S, document_S = pack.image_BS[0], pack.document_BS[0]
    is_target_S = torch.zeros_like(document_S, dtype=torch.bool)
    is_target_S[1:] = pack.labels_BS[0, :-1] != IGNORE_LABEL
    kind_S = torch.where(document_S < 0, PADDING, TEXT)
    kind_S[is_target_S] = ANSWER
    kind_S = torch.where(image_S >= 0, IMAGE + image_S % 2, kind_S)
    kind_S[shown.masked_BS[0]] = MASKED
    return kind_S


def _draw_strip(axes: Axes, shown: ShownPack) -> None:
    kind_S = token_kinds(shown)
    num_rows = -(-len(kind_S) // _ROW_TOKENS)
    strip = torch.full((num_rows * _ROW_TOKENS,), PADDING)
    strip[: len(kind_S)] = kind_S
    axes.imshow(
        strip.view(num_rows, _ROW_TOKENS).numpy(), cmap=_COLOURS, vmin=0, vmax=len(KINDS) - 1, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    document_S = shown.pack.document_BS[0]
    for start in ((document_S[1:] != document_S[:-1]).nonzero().flatten() + 1).tolist():
        row, column = divmod(start, _ROW_TOKENS)
        axes.plot([column - 0.5] * 2, [row - 0.5, row + 0.5], color="black", linewidth=1.5)
    axes.set_yticks(range(num_rows), [str(row * _ROW_TOKENS) for row in range(num_rows)])
    axes.set_title("tokens; a black line begins a sample", loc="left")
    entries: list[Any] = [Patch(facecolor=colour, label=kind) for kind, colour in KINDS.items()]
    axes.legend(
        handles=entries, ncols=len(entries), loc="lower right", bbox_to_anchor=(1, 1), fontsize=7, frameon=False
    )


def _draw_attention(axes: Axes, shown: ShownPack) -> None:
    pack = shown.pack
    spans_B2S = language_spans(pack.document_BS, pack.image_BS, shown.attention)
    step = -(-pack.tokens_BS.shape[1] // _MASK_PIXELS)
    # One key in `step` for one query in `step`: enough to see the shape.
    seen_SS = spans_to_mask(spans_B2S)[0, ::step, ::step]
    visual_S = pack.image_BS[0, ::step] >= 0
    colour_SS = np.where(seen_SS, np.where(visual_S[:, None], 2, 1), 0)
    axes.imshow(
        colour_SS, cmap=ListedColormap(["white", "#a9afb8", "#2a6fb0"]), vmin=0, vmax=2, interpolation="nearest"
    )
    ticks = np.linspace(0, len(visual_S) - 1, 5).astype(int)
    axes.set_xticks(ticks, [str(tick * step) for tick in ticks])
    axes.set_yticks(ticks, [str(tick * step) for tick in ticks])
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(
        f"{shown.attention} attention of the language stream; blue: queries that are visual tokens", loc="left"
    )


def _draw_image(axes: Axes, shown: ShownPack, number: int, pixels_3HW: Tensor, preprocessor: ImagePreprocessor) -> None:
    pack = shown.pack
    places_N = (pack.image_BS[0] == number).nonzero().flatten()
    document = int(pack.document_BS[0, places_N[0]])
    rows, columns = int(pack.row_BS[0, places_N].max()) + 1, int(pack.col_BS[0, places_N].max()) + 1
    picture = _to_picture(pixels_3HW, preprocessor)
    height, width, _ = picture.shape
    axes.imshow(picture)
    masked = shown.masked_BS[0, places_N].view(rows, columns).float()
    cover = np.zeros((rows, columns, 4), dtype=np.float32)
    cover[..., 0], cover[..., 3] = 0.77, 0.75 * masked.numpy()
    # A border narrower than a patch has no token.
    covered = preprocessor.token_size * columns, preprocessor.token_size * rows
    axes.imshow(cover, extent=(-0.5, covered[0] - 0.5, covered[1] - 0.5, -0.5), interpolation="nearest")
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_axis_off()
    masked_share = f"{int(masked.sum())} of {rows} x {columns} masked"
    axes.set_title(f"{pack.keys[0][document]}\n{masked_share}", fontsize=7)


def _to_picture(pixels_3HW: Tensor, preprocessor: ImagePreprocessor) -> np.ndarray:
    """The pixels as the encoder sees them, with the normalisation undone: `[height, width, 3]` in [0, 1]."""
    processor = preprocessor.processor
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels_3HW = pixels_3HW * std + mean
    return pixels_3HW.clamp(0, 1).permute(1, 2, 0).numpy()


# --- from a configuration ------------------------------------------------------------------------------


def show_packs(
    config: Config, reader: PackReader, numbers: Sequence[int], step: int | None = None
) -> Iterator[ShownPack]:
    """Packs of a run by number, masked as at a step: by default the one that trains on the pack."""
    most = _MOST_EPOCHS * reader.plan.estimate_num_packs()
    for number in numbers:
        if number >= most:
            raise UsageError(f"pack {number} is far beyond the data: an epoch has about {most // _MOST_EPOCHS} packs")
        (pack,) = reader.read(number, 1, 1)
        at = number // config.data.global_batch_size if step is None else step
        mask_ratio = (
            schedules.mask_ratio(at, config.objective, config.training.train_iters) if config.objective.laver else 0.0
        )
        masked_BS = mask_pack(pack, config, mask_ratio, at)
        yield ShownPack(pack, masked_BS, number, mask_ratio, config.data.visual_seq_length, config.model.attention)
