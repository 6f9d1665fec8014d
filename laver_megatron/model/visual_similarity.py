"""The homogenisation curve of a run: mean pairwise cosine of an image's visual tokens after each decoder layer.

Letters: S language tokens, V visual slots, B packs, R rows of the language stream on this rank, I images of a
micro-batch, H width, G = H + 1, L decoder layers.

Of the student's language stream, while validation runs; forward hooks are there only then. Under sequence parallelism a
rank has some of an image's tokens: the sums over them are added up (`objective/similarity.py`), `[layers, I, G]` in one
all-reduce a micro-batch and stage.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laver_megatron.model.laver import LaverStage
from laver_megatron.model.streams import MicroBatch
from laver_megatron.objective.similarity import cosines_of_sums, unit_sums
from laver_megatron.runtime.transfer import on_device


class SimilarityCurve:
    """Collects the curve of a rank's stages over the forward passes within `collecting`."""

    def __init__(self, stages: Sequence[LaverStage]) -> None:
        self.stages = stages
        num_layers = stages[0].shape.num_layers
        device = next(stages[0].parameters()).device
        self._sum_L = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self._count_L = torch.zeros_like(self._sum_L)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within it the stages are hooked."""
        with ExitStack() as hooks:
            for stage in self.stages:
                current = _Pass(stage)
                handles = [stage.register_forward_pre_hook(current.begin)]
                layers: Any = stage.decoder.layers
                for layer in layers:
                    handles.append(layer.register_forward_hook(partial(current.keep, layer.layer_number - 1)))
                handles.append(stage.register_forward_hook(partial(self._add, current)))
                for handle in handles:
                    hooks.callback(handle.remove)
            yield

    def _add(self, current: "_Pass", stage: nn.Module, arguments: Any, output: Any) -> None:
        for layer, cosine_I in current.finish():
            has_value_I = current.num_tokens_I > 1
            self._sum_L[layer] += cosine_I[has_value_I].sum(dtype=torch.float64)
            self._count_L[layer] += has_value_I.sum()

    def result(self) -> list[float | None] | None:
        """One number a layer, the mean over all images of more than one token, the same on all ranks; null where it is
        not finite. None if there was no such image. Collective over all processes."""
        totals_2L = torch.stack([self._sum_L, self._count_L])
        # Tensor-parallel ranks count the same images, and both numbers as often.
        dist.all_reduce(totals_2L)
        sums, counts = totals_2L.tolist()
        if not all(counts):
            return None
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        return [mean if math.isfinite(mean) else None for mean in means]


class _Pass:
    """One forward pass of a stage."""

    def __init__(self, stage: LaverStage) -> None:
        self.stage = stage
        self._sums_IG: dict[int, Tensor] = {}

    def begin(self, module: nn.Module, arguments: tuple[MicroBatch, Any]) -> None:
        """Which rows of this rank's part of the student's stream are whose visual tokens."""
        batch = arguments[0]
        num_tokens_I = torch.tensor(batch.image_num_tokens, dtype=torch.int64)
        image_T = torch.arange(len(num_tokens_I)).repeat_interleave(num_tokens_I)
        device = batch.language_rows_T.device
        self.num_tokens_I, image_T = on_device(num_tokens_I, device), on_device(image_T, device)
        stage, rows_T = self.stage, batch.language_rows_T
        self._is_split = stage.config.sequence_parallel and stage.tp_group.size() > 1
        if self._is_split:
            length, num_packs = batch.student_spans_B2L.shape[2], len(batch.tokens_BS)
            num_rows = length * num_packs // stage.tp_group.size()
            rows_T = rows_T - stage.tp_group.rank() * num_rows
            here_T = (rows_T >= 0) & (rows_T < num_rows)
            rows_T, image_T = rows_T[here_T], image_T[here_T]
        self._rows_T, self._image_T = rows_T, image_T
        self._sums_IG.clear()

    def keep(self, layer: int, module: nn.Module, arguments: Any, output: Any) -> None:
        """Sums over the visual tokens after a layer; its output is `[length, B, H]`, first of a tuple."""
        hidden_LBH = output[0] if isinstance(output, tuple) else output
        tokens_TH = hidden_LBH.flatten(0, 1).index_select(0, self._rows_T)
        self._sums_IG[layer] = unit_sums(tokens_TH, self._image_T, len(self.num_tokens_I))

    def finish(self) -> Iterator[tuple[int, Tensor]]:
        """(layer from 0, cosine of each image) of the layers of this stage."""
        if not self._sums_IG or not len(self.num_tokens_I):
            return
        layers = list(self._sums_IG)
        sums = torch.stack([self._sums_IG[layer] for layer in layers])
        if self._is_split:
            dist.all_reduce(sums, group=self.stage.tp_group)
        for layer, sums_IG in zip(layers, sums, strict=True):
            yield layer, cosines_of_sums(sums_IG, self.num_tokens_I)
