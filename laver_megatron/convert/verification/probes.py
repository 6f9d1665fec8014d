"""What two models are compared on: prompts and pictures as tokens and pixels, the same for both.

Letters: T tokens of one probe, S tokens of a pack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from laver_megatron.data.batch.packing import EncodedSample, PackBatch, PackedSample, build_packs
from laver_megatron.data.read.conversations import IMAGE_PLACEHOLDER, Message
from laver_megatron.data.read.images import decode_image
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.encoders import open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer
from laver_megatron.objective.language import IGNORE_LABEL

TEXT_PROMPTS = (
    "The capital of France is Paris, the capital of Italy is Rome, and the capital of Portugal is",
    "请用一句话解释为什么天空是蓝色的,然后说明日落时为什么会变红。",
    'def mean(values: list[float]) -> float:\n    """Arithmetic mean; ValueError if there are none."""\n    if not',
    "In 1969, 2 of the 3 astronauts walked on the Moon; 3 - 2 =",
)
PICTURE_PROMPTS = (
    "<image>\nDescribe this picture in one sentence.",
    "First picture: <image>\nSecond picture: <image>\n这两张图片有什么不同?",
)
# Of the built-in photographs, each of another size: enough to show two different ones in one prompt.
_NUM_PHOTOGRAPHS = 3


@dataclass(frozen=True)
class Probe:
    """A prompt as both models are given it.

    Attributes:
        sample: its tokens.
        pixels: its pictures in order, float32 `[3, height, width]`.
        pictures: the same before preprocessing.
    """

    prompt: str
    sample: EncodedSample
    pixels: tuple[Tensor, ...] = ()
    pictures: tuple[Image.Image, ...] = ()

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def visual_T(self) -> Tensor:
        """Which tokens are an image's, bool `[T]`."""
        return self.sample.image_number_T >= 0


@dataclass(frozen=True)
class PackedProbes:
    """Probes as Megatron's model is given them.

    Attributes:
        packs: of one length, a micro-batch each.
        places: where every probe lies: number of its pack, first position.
        seq_length, visual_seq_length: tokens and visual tokens of a pack.
    """

    packs: list[PackBatch]
    places: list[tuple[int, int]]
    seq_length: int
    visual_seq_length: int


def make_probes(
    model_dir: Path,
    encoder_dir: Path | None,
    prompts: Sequence[str],
    image_files: Sequence[Path],
    max_image_tokens: int | None = None,
) -> list[Probe]:
    """Text prompts, and prompts with pictures if there is an encoder.

    Args:
        model_dir, encoder_dir: where training finds the tokenizer and the image preprocessor.
        prompts: in place of the built-in ones of their kind; `<image>` stands for a picture.
        image_files: in place of the built-in photographs; shown in order, and over again from the first.
        max_image_tokens: visual tokens of a picture at most; None for the limit of the image preprocessor.

    Raises:
        ValueError: pictures for a text-only model, no pictures to show, a file that cannot be read, an empty prompt.
    """
    given_text = [prompt for prompt in prompts if IMAGE_PLACEHOLDER not in prompt]
    given_pictures = [prompt for prompt in prompts if IMAGE_PLACEHOLDER in prompt]
    tokenizer = load_tokenizer(model_dir)
    probes = [
        Probe(prompt, _text_sample(prompt, tokenizer(prompt, add_special_tokens=False)["input_ids"]))
        for prompt in given_text or TEXT_PROMPTS
    ]
    if encoder_dir is None:
        if given_pictures or image_files:
            raise ValueError("the model is text only: leave out --image and <image> in --prompt")
        return probes
    preprocessor = open_preprocessor(encoder_dir, max_image_tokens)
    pictures = list(_pictures(image_files))
    pixels = [preprocessor(picture) for picture in pictures]
    grids = [preprocessor.grid(*picture.size) for picture in pictures]
    encoder = SampleEncoder(tokenizer)
    next_picture = 0
    for prompt in given_pictures or PICTURE_PROMPTS:
        count = prompt.count(IMAGE_PLACEHOLDER)
        shown = [(next_picture + i) % len(pictures) for i in range(count)]
        next_picture += count
        question = Message("user", tuple(prompt.split(IMAGE_PLACEHOLDER)))
        sample = encoder.encode([question], [grids[i] for i in shown], prompt)
        probes.append(Probe(prompt, sample, tuple(pixels[i] for i in shown), tuple(pictures[i] for i in shown)))
    return probes


def _text_sample(prompt: str, tokens: Sequence[int]) -> EncodedSample:
    if not tokens:
        raise ValueError(f"the prompt {prompt!r} has no tokens; give --prompt some text")
    tokens_T = torch.tensor(tokens, dtype=torch.int64)
    nothing_T, none_T = torch.zeros_like(tokens_T), torch.full_like(tokens_T, -1)
    return EncodedSample(
        prompt, tokens_T, torch.full_like(tokens_T, IGNORE_LABEL), none_T, nothing_T, nothing_T.clone(), ()
    )


def _pictures(files: Sequence[Path]) -> Iterator[Image.Image]:
    if files:
        for file in files:
            try:
                yield decode_image(file.read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(f"--image {file}: {error}") from error
        return
    from laver_megatron.demo.photographs import photographs

    try:
        found = photographs()
    except ValueError as error:
        raise ValueError(f"there are no pictures to compare on ({error}); or give some with --image FILE") from error
    of_size: dict[tuple[int, int], Image.Image] = {}
    for _, picture in found:
        of_size.setdefault(picture.size, picture)
    yield from list(of_size.values())[:_NUM_PHOTOGRAPHS]


def pack_probes(probes: Sequence[Probe]) -> PackedProbes:
    """Lays short probes into the room that the longest leaves, each into the first pack that has room for it."""
    seq_length = max(len(probe) for probe in probes)
    packs: list[list[PackedSample]] = []
    lengths: list[int] = []
    places = []
    for number, probe in enumerate(probes):
        fitting = [i for i, length in enumerate(lengths) if length + len(probe) <= seq_length]
        if not fitting:
            packs.append([])
            lengths.append(0)
        pack = fitting[0] if fitting else len(packs) - 1
        places.append((pack, lengths[pack]))
        packs[pack].append(PackedSample(number, len(probe), probe.sample, probe.pixels))
        lengths[pack] += len(probe)
    visual = max(sum(int((s.encoded.image_number_T >= 0).sum()) for s in pack if s.encoded) for pack in packs)
    return PackedProbes(
        packs=[build_packs([pack], seq_length=seq_length, padding_token=0) for pack in packs],
        places=places,
        seq_length=seq_length,
        visual_seq_length=max(visual, 1),
    )
