"""`laver inspect`: what trained models make of images, layer by layer."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laver_megatron.program import find_device, positive_integer, program, program_parser
from laver_megatron.runtime.files import check_place, new_directory

if TYPE_CHECKING:
    from laver_megatron.inspection.samples import Sample

DESCRIPTION = """
Looks inside trained models: how alike the visual tokens of an image are after each layer, how many directions they
fill, how well they are aligned with the encoder, how much text attends to them; maps of patches; the Gram matrices of
student and teacher. Writes one page that needs no network, with its pictures and numbers beside it.

A model is a Hugging Face directory (our exports, LLaVA, Qwen2.5-VL), a run, or a checkpoint of any layout. A laver
export runs the code that it brings: use those that you trust.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Measures the models and writes the page."""
    options = _parse(argv)
    if options.output.exists():
        raise ValueError(f"--output {options.output} is there already; name a directory that is not")
    check_place(options.output, "--output")
    if not options.no_tsne and importlib.util.find_spec("sklearn") is None:
        raise ValueError("t-SNE needs scikit-learn: install laver_megatron[analysis], or leave it out with --no-tsne")

    # Here, because they take seconds, which --help should not.
    from tqdm import tqdm

    from laver_megatron.inspection.collect import Settings, inspect_models
    from laver_megatron.inspection.page import write_page
    from laver_megatron.inspection.sources import find_sources

    device = find_device(options.device)
    sources = find_sources(options.compare or [options.model])
    samples, shown = _samples(options)
    settings = Settings(
        device=device,
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        neighbours=options.neighbours,
        num_pictures=options.num_pictures,
        patch=tuple(options.patch),
        mask_ratio=options.mask_ratio,
    )
    total = len(sources) * len(samples)
    with tqdm(total=total, desc="inspecting", unit="sample", disable=not sys.stderr.isatty()) as bar:
        inspections = inspect_models(sources, samples, settings, lambda: bar.update())
    facts = [shown, f"CKNNA over {options.neighbours} nearest neighbours; weights of type {options.dtype} on {device}."]
    with new_directory(options.output) as directory:
        write_page(inspections, directory, facts=facts, with_tsne=not options.no_tsne)
    print(options.output / "index.html")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    examples = [
        '--model exports/mine --images photos/ --question "What is this?" --output seen/',
        "--compare runs/baseline runs/cga --data-path shards/ --samples 64 --output seen/",
        "--compare runs/cga/checkpoints/iter_* --data-path shards/ --output steps/",
    ]
    parser = program_parser("inspect", DESCRIPTION, examples)
    models = parser.add_argument_group("models").add_mutually_exclusive_group(required=True).add_argument
    models("--model", type=Path, metavar="DIR", help="one model")
    models("--compare", type=Path, nargs="+", metavar="DIR", help="several, in one page; steps of a run: layer by step")
    what = parser.add_argument_group("what they are shown")
    sources = what.add_mutually_exclusive_group(required=True).add_argument
    sources("--images", type=Path, nargs="+", metavar="PATH", help="pictures, or folders of them")
    sources("--data-path", nargs="+", metavar="SHARDS", help="samples of WebDataset shards, with their answers")
    show = what.add_argument
    show("--question", metavar="TEXT", help='about each picture (default: "Describe this picture.")')
    show("--answer", metavar="TEXT", help="to the question (default: the model's own)")
    show("--samples", type=positive_integer, default=16, metavar="N", help="of --data-path, spread evenly")
    show("--max-new-tokens", type=positive_integer, default=32, metavar="N", help="longest answer of the model's own")
    how = parser.add_argument_group("how").add_argument
    how("--neighbours", type=positive_integer, default=10, metavar="K", help="of CKNNA")
    how("--patch", type=_share, nargs=2, default=(0.5, 0.5), metavar=("DOWN", "RIGHT"),
        help="the patch that others are compared with, as shares of the height and the width")  # fmt: skip
    how("--num-pictures", type=positive_integer, default=3, metavar="N", help="images with maps of their patches")
    how("--mask-ratio", type=_share, metavar="X",
        help="of the student's Gram matrix (default: the run's, or 0.05 where no run is known)")  # fmt: skip
    how("--no-tsne", action="store_true", help="PCA alone; t-SNE needs scikit-learn")
    how("--device", metavar="DEVICE", help="such as cuda:1 (default: cuda if there is one, else cpu)")
    how("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: as it is stored")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the directory to make")
    options = parser.parse_args(argv)
    if options.data_path and (options.question or options.answer):
        parser.error("--question and --answer belong to --images; shards have their own")
    return options


def _samples(options: argparse.Namespace) -> tuple[list[Sample], str]:
    """What is shown, and a line on it for the page."""
    from laver_megatron.inspection.samples import DEFAULT_QUESTION, samples_of_files, samples_of_shards

    if options.data_path:
        samples = samples_of_shards(options.data_path, options.samples)
        return samples, f"{len(samples)} samples of {', '.join(options.data_path)}."
    question = options.question or DEFAULT_QUESTION
    samples = samples_of_files(options.images, question, options.answer)
    answer = "the model's own answer" if options.answer is None else f'the answer "{options.answer}"'
    return samples, f'{len(samples)} pictures with the question "{question}" and {answer}.'


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return value
