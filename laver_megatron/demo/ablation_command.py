"""`laver ablation-parts`: what an ablation starts from, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser

DESCRIPTION = """
Makes what an ablation on procedural tasks starts from: model/ (a Qwen2.5 with random weights and a tokenizer of their
texts), encoder/ (a SigLIP trained on procedural pictures and captions; encoder/probes.json says what linear probes read
of its features) and captions/ (shards of pictures with descriptions). Parts that are there are kept; PART.json says
what they were made with, and other settings are refused.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the parts."""
    parser = program_parser(
        "ablation-parts",
        DESCRIPTION,
        [
            "--dir runs/ablation",
            "--dir runs/ablation-gpu --hidden-size 512 --num-layers 8 --encoder-width 256 --encoder-steps 20000",
        ],
    )
    add = parser.add_argument
    add("--dir", type=Path, default=Path("runs/ablation"), help="where to make the parts")
    add("--hidden-size", type=int, default=64, metavar="N", help="width of the language model")
    add("--num-layers", type=int, default=4, metavar="N", help="layers of the language model")
    add("--encoder-width", type=int, default=64, metavar="N", help="width of the encoder")
    add("--encoder-layers", type=int, default=3, metavar="N", help="layers of the encoder")
    add("--encoder-steps", type=int, default=2500, metavar="N", help="steps of 64 pictures that train the encoder")
    add("--num-pictures", type=int, default=16384, metavar="N", help="pictures with captions that it learns from")
    add("--num-captions", type=int, default=24000, metavar="N", help="pictures with descriptions")
    options = vars(parser.parse_args(argv))

    from laver_megatron.demo.ablation import make_parts  # torch and transformers: too slow for --help

    make_parts(options.pop("dir"), **options)
