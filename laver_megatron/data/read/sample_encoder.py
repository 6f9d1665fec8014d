"""From a sample's conversation to tokens and labels, by the ChatML template of Qwen2.5.

Letters: T tokens of one sample, M messages, I images, V visual tokens of all its images.

    <|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n

Only the assistant's texts and the <|im_end|> after them are trained, except turns that the record excludes. A picture
in the text becomes <|vision_start|>, one <|image_pad|> for each visual token, <|vision_end|>; none of these is ever
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from laver_megatron.data.batch.packing import EncodedSample
from laver_megatron.data.read.conversations import IMAGE_PLACEHOLDER, Message
from laver_megatron.objective.language import IGNORE_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


class SampleEncoder:
    """Tokens and labels of conversations. Safe to call from several threads.

    Raises:
        ValueError: the tokenizer lacks a special token, or its chat template is not Qwen2.5's ChatML.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # A copy of our own: the transformers wrapper sets truncation on the shared one, whatever threads do.
        self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vision_start, self.image_pad, self.vision_end = (self._id(token) for token in _VISION_TOKENS)
        self.turn_end = self._id("<|im_end|>")
        self._id("<|im_start|>")
        padding = tokenizer.pad_token_id
        self.padding = self._id("<|endoftext|>") if padding is None else padding
        self.default_system = _default_system(tokenizer)
        self._check_template(tokenizer)

    def encode(
        self,
        messages: Sequence[Message],
        grids: Sequence[tuple[int, int]],
        key: str,
        limits: tuple[int, int] | None = None,
    ) -> EncodedSample:
        """Tokens, labels and image positions of one sample, equal to those of the tokenizer's own `apply_chat_template`
        on the text with the image tokens written out.

        Args:
            grids: (rows, columns) of the visual tokens of each picture.
            limits: (tokens, visual tokens); a longer sample loses its last turns, with their images, until it fits and
                ends with a trained answer. If not even the first answer fits, it is returned whole, and the plan leaves
                it out.

        Raises:
            ValueError: the text has more or fewer places than pictures, or contains image tokens.
        """
        text, assistant_spans, ends = self._render(messages)
        found = sum(message.num_images for message in messages)
        if found != len(grids):
            raise ValueError(f"sample {key!r}: the text has places for {found} pictures but there are {len(grids)}")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens_T = torch.tensor(encoding.ids, dtype=torch.int64)
        num_pads = int((tokens_T == self.image_pad).sum())
        if num_pads != len(grids):
            raise ValueError(
                f"sample {key!r}: the text holds {num_pads} image tokens but there are {len(grids)} "
                f"pictures; write {IMAGE_PLACEHOLDER} for a picture, and {_VISION_TOKENS[1]} never"
            )
        starts_T, ends_T = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        trained_T = self._trained(tokens_T, starts_T, ends_T, assistant_spans)
        whole = _with_images(tokens_T, trained_T, self.image_pad, grids, key)
        if limits is None or (len(whole) <= limits[0] and whole.num_visual_tokens <= limits[1]):
            return whole
        # Turns end with a special token and a line break, which never merge with what follows: the tokens of the
        # first turns are the first tokens.
        first_tokens_M = np.searchsorted(np.sort(starts_T), ends)
        return _without_last_turns(whole, messages, first_tokens_M, limits)

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The conversation as ChatML with one image token for each picture; the spans to be trained, with their end of
        turn; and where each given message ends."""
        added = messages[0].role != "system"
        if added:
            messages = [Message("system", (self.default_system,)), *messages]
        pieces, spans, ends, end = [], [], [], 0
        for message in messages:
            head = f"<|im_start|>{message.role}\n"
            said = "".join(_VISION_TOKENS).join(message.texts) + "<|im_end|>"
            pieces += [head, said, "\n"]
            start = end + len(head)
            if message.is_trained:
                spans.append((start, start + len(said)))
            end = start + len(said) + 1
            ends.append(end)
        return "".join(pieces), spans, ends[added:]

    def _trained(
        self, tokens_T: Tensor, starts_T: np.ndarray, ends_T: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Which tokens lie wholly in a trained span and are not an image's: bool `[T]`. starts_T, ends_T: their
        positions in the text."""
        if not spans:
            return torch.zeros_like(tokens_T, dtype=torch.bool)
        span_starts, span_ends = np.array(spans, dtype=np.int64).T  # in order, none within another
        span_T = np.searchsorted(span_starts, starts_T, side="right") - 1  # the last that has begun there; -1 for none
        trained_T = torch.from_numpy((span_T >= 0) & (ends_T <= span_ends[span_T]))
        vision = torch.tensor([self.vision_start, self.image_pad, self.vision_end])
        return trained_T & ~torch.isin(tokens_T, vision)

    def _id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no {token} token; Qwen2.5's tokenizers have it")
        return index

    def _check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compares our rendering with the tokenizer's, to detect a model with another template."""
        messages = [{"role": role, "content": f"{role} speaks"} for role in ("system", "user", "assistant", "user")]
        for probe in (messages, messages[1:3]):
            theirs = tokenizer.apply_chat_template(probe, tokenize=False)
            ours = self._render([Message(turn["role"], (turn["content"],)) for turn in probe])[0]
            if theirs != ours:
                raise ValueError(
                    f"the tokenizer's chat template is not Qwen2.5's ChatML: it gives {theirs!r}, not {ours!r}"
                )


def _default_system(tokenizer: PreTrainedTokenizerBase) -> str:
    """The system prompt that the template inserts when a conversation has none (it differs between the base and the
    instruction-tuned checkpoints)."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; Qwen2.5's tokenizers have one")
    text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    head, tail = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    if not (text.startswith(head) and text.endswith(tail)):
        raise ValueError(f"the tokenizer's chat template is not Qwen2.5's ChatML: it gives {text!r}")
    return text.removeprefix(head).removesuffix(tail)


def _with_images(
    tokens_T: Tensor, trained_T: Tensor, image_pad: int, grids: Sequence[tuple[int, int]], key: str
) -> EncodedSample:
    """Repeats each image token over its grid, and shifts the labels."""
    pads_T = tokens_T == image_pad
    rows_I, columns_I = np.array(grids, dtype=np.int64).reshape(-1, 2).T
    sizes_I = rows_I * columns_I
    counts_T = torch.ones_like(tokens_T)
    counts_T[pads_T] = torch.from_numpy(sizes_I)
    number_T = torch.where(pads_T, pads_T.cumsum(0) - 1, -1)
    # numpy's repeat: torch's starts its threads however short the tensor, which costs 100 times the work here.
    source_T = torch.from_numpy(np.repeat(np.arange(len(tokens_T)), counts_T.numpy()))
    tokens_T, trained_T, number_T = tokens_T[source_T], trained_T[source_T], number_T[source_T]
    row_T, col_T = torch.zeros_like(tokens_T), torch.zeros_like(tokens_T)
    place_V = np.arange(sizes_I.sum()) - np.repeat(sizes_I.cumsum() - sizes_I, sizes_I)
    columns_V = np.repeat(columns_I, sizes_I)
    visual_T = number_T >= 0
    row_T[visual_T], col_T[visual_T] = (torch.from_numpy(part_V) for part_V in np.divmod(place_V, columns_V))
    labels_T = torch.full_like(tokens_T, IGNORE_LABEL)
    labels_T[:-1] = torch.where(trained_T[1:], tokens_T[1:], IGNORE_LABEL)
    return EncodedSample(key, tokens_T, labels_T, number_T, row_T, col_T, tuple(grids))


def _without_last_turns(
    whole: EncodedSample, messages: Sequence[Message], first_tokens_M: np.ndarray, limits: tuple[int, int]
) -> EncodedSample:
    """The turns that fit, ending with a trained answer; the whole sample if there are none. first_tokens_M: tokens up
    to the end of each turn, an image counting as one."""
    is_image_T = whole.image_number_T >= 0
    # Where a token before the images were spread out stands now: an image's is its first visual token.
    begins_T = torch.ones_like(is_image_T)
    begins_T[1:] = ~is_image_T[1:] | (whole.image_number_T[1:] != whole.image_number_T[:-1])
    places = np.append(begins_T.nonzero().flatten().numpy(), len(whole))
    lengths_M = places[first_tokens_M]
    visual_M = np.append(0, is_image_T.numpy().cumsum())[lengths_M]
    is_trained_M = np.array([message.is_trained for message in messages])
    (fits,) = (is_trained_M & (lengths_M <= limits[0]) & (visual_M <= limits[1])).nonzero()
    if not len(fits):
        return whole
    length = int(lengths_M[fits[-1]])
    columns = whole.tokens_T, whole.labels_T, whole.image_number_T, whole.row_T, whole.col_T
    tokens_T, labels_T, number_T, row_T, col_T = (column_T[:length] for column_T in columns)
    grids = whole.grids[: int(number_T.max()) + 1]
    num_dropped = len(messages) - int(fits[-1]) - 1
    return EncodedSample(whole.key, tokens_T, labels_T, number_T, row_T, col_T, grids, num_dropped)
