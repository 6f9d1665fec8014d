"""Packs by number: indexes the shards, plans, decodes in threads, and has the next call's samples under way.

Letters: I sample ids.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from laver_megatron.data.images import ImagePreprocessor, decode_image
from laver_megatron.data.packing import IGNORE_LABEL, PackBatch, PackedSample, build_packs, check_features
from laver_megatron.data.plan import PackPlan
from laver_megatron.data.samples import SampleEncoder, parse_conversation
from laver_megatron.data.shards import ShardSample, index_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSizes:
    """Tokens, visual tokens, pictures and trained tokens of each sample; unusable ones have 0 tokens and are counted
    by reason."""

    tokens_I: list[int]
    visual_I: list[int]
    images_I: list[int]
    labels_I: list[int]
    unusable: Counter[str]


class PackReader:
    """Reads packs of a plan, the same ones for any number of workers and in any order.

    num_workers: threads that decode; with 0 everything happens in the caller and nothing in advance.
    num_bad_samples counts the samples that turned out bad when they were decoded; the slots of such a sample
    stay padding and the rest of its pack stays where it was planned.
    """

    def __init__(
        self,
        samples: Sequence[ShardSample],
        encoder: SampleEncoder,
        preprocessor: ImagePreprocessor,
        plan: PackPlan,
        num_workers: int = 0,
    ) -> None:
        self.samples, self.encoder, self.preprocessor, self.plan = samples, encoder, preprocessor, plan
        self.num_bad_samples = 0
        self._threads = ThreadPoolExecutor(num_workers, "reader") if num_workers > 0 else None
        self._under_way: dict[int, list[Future[PackedSample]]] = {}
        self._last_first_pack: int | None = None

    def read(self, first_pack: int, num_packs: int, micro_batch_size: int) -> list[PackBatch]:
        """Packs `first_pack` to `first_pack + num_packs` as micro-batches of `micro_batch_size`, in order.

        Meanwhile the samples of the likely next call are decoded: as far on from this call as this call is
        from the one before, which is the global batch for any number of data-parallel ranks.

        Raises:
            ValueError: a picture's features do not match its tokens, or the shards have changed.
        """
        assert num_packs % micro_batch_size == 0, (num_packs, micro_batch_size)
        numbers = range(first_pack, first_pack + num_packs)
        if self._threads is None:
            packs = [[self._decode(sample) for sample in self.plan.pack(number)] for number in numbers]
        else:
            packs = self._read_ahead(numbers)
        self.num_bad_samples += sum(sample.encoded is None for pack in packs for sample in pack)
        return [
            build_packs(
                packs[start : start + micro_batch_size],
                seq_length=self.plan.seq_length,
                padding_token=self.encoder.padding,
            )
            for start in range(0, num_packs, micro_batch_size)
        ]

    @property
    def fingerprint(self) -> str:
        """Changes whenever any pack could: a position counts packs and means nothing on other data."""
        return self.plan.fingerprint()

    def close(self) -> None:
        """Ends the threads; what is under way is dropped."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _read_ahead(self, numbers: range) -> list[list[PackedSample]]:
        last, self._last_first_pack = self._last_first_pack, numbers.start
        stride = len(numbers) if last is None or last >= numbers.start else numbers.start - last
        ahead = [number + stride for number in numbers]
        for number in set(self._under_way).difference(numbers, ahead):  # guessed wrongly
            for future in self._under_way.pop(number):
                future.cancel()
        for number in (*numbers, *ahead):  # threads take them in this order
            if number not in self._under_way:
                self._under_way[number] = self._submit(number)
        packs = [[future.result() for future in self._under_way[number]] for number in numbers]
        for number in set(numbers).difference(ahead):
            del self._under_way[number]
        return packs

    def _submit(self, number: int) -> list[Future[PackedSample]]:
        assert self._threads is not None
        return [self._threads.submit(self._decode, sample) for sample in self.plan.pack(number)]

    def _decode(self, sample_id: int) -> PackedSample:
        sample, num_tokens = self.samples[sample_id], int(self.plan.token_counts_I[sample_id])
        contents = [sample.read(member) for member in sample.images]
        try:
            images = [decode_image(content) for content in contents]
        except OSError as error:
            logger.warning("%s stays padding: %s", sample.name, error)
            return PackedSample(sample_id, num_tokens, None)
        pixels = tuple(self.preprocessor(image) for image in images)
        grids = [self.preprocessor.grid(*image.size) for image in images]
        messages = parse_conversation(sample.read(sample.text), sample.name)
        encoded = self.encoder.encode(messages, grids, sample.key)
        check_features(encoded, [self.preprocessor.num_features(pixels_3HW) for pixels_3HW in pixels])
        return PackedSample(sample_id, num_tokens, encoded, pixels)


def open_dataset(
    paths: str | Path | Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    preprocessor: ImagePreprocessor,
    seq_length: int,
    visual_seq_length: int,
    seed: int,
    num_workers: int,
    needs_images: bool = False,
) -> PackReader:
    """Indexes the shards, counts every sample's tokens, plans, and says in one line what it found.

    needs_images: whether data without a single image that fits is an error (with LaVer it is).

    Raises:
        ValueError: missing, empty or damaged shards; a sample whose `<image>` do not match its pictures; a
            tokenizer that is not Qwen2.5's; no sample that fits; nothing to learn from.
    """
    encoder = SampleEncoder(tokenizer)
    samples, skipped = index_shards(paths)
    sizes = count_tokens(samples, encoder, preprocessor)
    plan = PackPlan(sizes.tokens_I, sizes.visual_I, seq_length, visual_seq_length, seed)
    skipped = skipped + sizes.unusable + plan.skipped
    kept = plan.sample_ids
    logger.info(
        "data: %d samples, %d images, %d tokens (%d visual), %d packs in the first epoch; skipped: %s",
        len(kept),
        sum(sizes.images_I[i] for i in kept),
        plan.token_counts_I[kept].sum(),
        plan.visual_counts_I[kept].sum(),
        plan.num_packs(0),
        ", ".join(f"{count} ({reason})" for reason, count in skipped.items()) or "none",
    )
    if not any(sizes.labels_I[i] for i in kept):
        raise ValueError(f"none of the {len(kept)} samples that fit has an answer to learn from (an assistant's turn)")
    if needs_images and not any(sizes.images_I[i] for i in kept):
        raise ValueError(
            f"none of the {len(kept)} samples that fit has an image, so LaVer has nothing to reconstruct; "
            "raise --seq-length or --visual-seq-length, look at the data, or train with --no-laver"
        )
    return PackReader(samples, encoder, preprocessor, plan, num_workers)


def count_tokens(
    samples: Sequence[ShardSample], encoder: SampleEncoder, preprocessor: ImagePreprocessor
) -> SampleSizes:
    """Tokenises every sample and reads its pictures' headers. A sample with an unreadable picture or
    conversation is counted as unusable, and logged.

    Raises:
        ValueError: `<image>` in the text that do not match the pictures.
    """
    sizes = SampleSizes([], [], [], [], Counter())
    for sample in tqdm(samples, "counting tokens", unit="sample", disable=not sys.stderr.isatty(), leave=False):
        encoded, reason = None, "unreadable picture"
        try:
            grids = [preprocessor.grid(*size) for size in sample.image_sizes()]
            reason = "unreadable conversation"
            messages = parse_conversation(sample.read(sample.text), sample.name)
        except Exception as error:  # Pillow raises what it likes on broken headers
            sizes.unusable[reason] += 1
            logger.warning("%s is left out: %s: %s", sample.name, reason, error)
        else:
            encoded = encoder.encode(messages, grids, sample.key)
        sizes.tokens_I.append(0 if encoded is None else len(encoded))
        sizes.visual_I.append(0 if encoded is None else encoded.num_visual_tokens)
        sizes.images_I.append(len(sample.images))
        sizes.labels_I.append(0 if encoded is None else int((encoded.labels_T != IGNORE_LABEL).sum()))
    return sizes
