"""A small SigLIP that is trained on pictures and captions of what they show, in plain torch.

The similarity of a caption to a picture is that of the patches that fit it best (a soft maximum, as in FILIP), so every
patch's feature learns to say what is there; the loss is SigLIP's, a sigmoid for every pair of a batch. Captions are
short and whether one is true of a picture is known, so no pair of a batch has a wrong label.

Letters: B pictures, C captions, W words of a caption, P patches, E embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionModel

_WORD = re.compile(r"[a-z]+|[A-Z0-9]")  # words; of rendered text every letter and digit
_NUM_CAPTIONS = 6  # of one picture in a batch
_EMBEDDING = 64
_LONGEST = 24


@dataclass(frozen=True)
class Captioned:
    """A picture and all captions that are true of it."""

    picture: Image.Image
    captions: tuple[str, ...]


class CaptionModel(nn.Module):
    """Embeds captions: one transformer layer over their words, and their mean.

    Args:
        captions: those that its vocabulary is made of; other words are unknown.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        super().__init__()
        words = sorted({word for caption in captions for word in _WORD.findall(caption)})
        self._index = {word: number for number, word in enumerate(words, start=2)}  # 0 is padding, 1 unknown
        self.words = nn.Embedding(len(words) + 2, _EMBEDDING, padding_idx=0)
        self.places = nn.Embedding(_LONGEST, _EMBEDDING)
        self.layer = nn.TransformerEncoderLayer(
            _EMBEDDING, 4, 2 * _EMBEDDING, dropout=0.0, batch_first=True, norm_first=True
        )
        self.out = nn.Linear(_EMBEDDING, _EMBEDDING)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of unit length, [C, E]."""
        numbers = [[self._index.get(word, 1) for word in _WORD.findall(caption)[:_LONGEST]] for caption in captions]
        words_CW = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in numbers], batch_first=True)
        is_padding_CW = words_CW == 0
        x_CWE = self.layer(self.words(words_CW) + self.places.weight[: words_CW.shape[1]], None, is_padding_CW)
        x_CWE = x_CWE.masked_fill(is_padding_CW[..., None], 0.0)
        return F.normalize(self.out(x_CWE.sum(1) / (~is_padding_CW).sum(1, keepdim=True)), dim=-1)


class PairLoss(nn.Module):
    """SigLIP's loss, with its learnt scale and bias, over the similarities of patches and captions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, _EMBEDDING)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-8.0))

    def forward(self, features_BPE: Tensor, captions_CE: Tensor, is_true_BC: Tensor) -> Tensor:
        """The mean over pairs, in which true ones and false ones have the same weight together."""
        patches_BPE = F.normalize(self.project(features_BPE), dim=-1)
        scores_BC = torch.logsumexp(self.log_scale.exp() * (patches_BPE @ captions_CE.T), dim=1) + self.bias
        losses_BC = F.binary_cross_entropy_with_logits(scores_BC, is_true_BC.float(), reduction="none")
        return losses_BC[is_true_BC].mean() + losses_BC[~is_true_BC].mean()


def train_encoder(
    model: SiglipVisionModel, examples: Sequence[Captioned], *, num_steps: int, batch_size: int = 64, lr: float = 2e-3
) -> Iterator[tuple[int, float]]:
    """Trains the vision model in place; yields (step, loss) after every step.

    Args:
        examples: pictures of the encoder's size.
    """
    truths = [frozenset(example.captions) for example in examples]
    captions = CaptionModel([caption for example in examples for caption in example.captions])
    loss = PairLoss(model.config.hidden_size)
    parts = nn.ModuleList([model, captions, loss])
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    model.train()
    for step in range(num_steps):
        chosen = rng.choice(len(examples), batch_size, replace=False)
        asked = sorted({
            str(caption)
            for number in chosen
            for caption in rng.choice(sorted(truths[number]), min(_NUM_CAPTIONS, len(truths[number])), replace=False)
        })  # fmt: skip
        is_true_BC = torch.tensor([[caption in truths[number] for caption in asked] for number in chosen])
        pixels_B = torch.stack([pixels_of(examples[number].picture) for number in chosen])
        value = loss(features(model, pixels_B), captions(asked), is_true_BC)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1, value.item()
    model.eval()


def _rate(step: int, num_steps: int) -> float:
    """Share of the highest learning rate: linear over the first tenth, then a half cosine to 0."""
    return min((step + 1) / max(num_steps // 10, 1), (1 + math.cos(math.pi * step / num_steps)) / 2)


def features(model: SiglipVisionModel, pixels: Tensor) -> Tensor:
    """Features of the last layer, before the final norm: [B, P, width]."""
    return model(pixels, output_hidden_states=True).hidden_states[-1]


def pixels_of(picture: Image.Image) -> Tensor:
    """fp32 [3, height, width] between -1 and 1, as the encoder's image processor makes them."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
