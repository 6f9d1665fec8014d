#!/usr/bin/env python
"""Says whether a Hugging Face directory and a Megatron checkpoint hold the same model.

Compares the names and shapes of all tensors, and final hidden states and logits in fp32, on prompts and pictures:
of transformers (one process, CPU) and of Megatron at one layout or, with --grid, at all that fit. Exits with 0 if
nothing differs, 1 if something does, 2 if the two cannot be compared. A laver export runs the code that it brings.

    python tools/verify_conversion.py --hf Qwen2.5-0.5B --megatron checkpoints/ --grid
    python tools/verify_conversion.py --hf export/ --megatron runs/mine/checkpoints --image cat.jpg
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="Qwen2.5, or an export in the laver format")
    add("--megatron", type=Path, required=True, metavar="DIR", help="a checkpoint, or a folder of iter_* checkpoints")
    add("--tensor-model-parallel-size", type=int, metavar="N", help="default: 1; not with --grid")
    add("--pipeline-model-parallel-size", type=int, metavar="N", help="default: 1; not with --grid")
    add("--grid", action="store_true", help="every TP of 1, 2, 4, 8 and PP of 1, 2, 4 that model and processes allow")
    add("--max-processes", type=int, default=4, metavar="N", help="largest TP x PP of --grid (default: 4)")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="instead of the built-in prompts; <image>: a picture")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help="instead of scikit-image's photographs")
    add("--tolerance", type=float, default=1e-4, metavar="X", help="largest absolute difference (default: 1e-4)")
    add("--weights", choices=("student", "teacher"), default="student", help="which of them --hf was exported with")
    options = parser.parse_args(arguments)
    sizes = (options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    if options.grid and any(size is not None for size in sizes):
        parser.error("--grid tries all layouts: leave out the parallel sizes, or leave out --grid")

    from laver_megatron.convert.verification.verify import verify  # torch and transformers: too slow for --help

    layout = tuple(1 if size is None else size for size in sizes)
    try:
        report = verify(
            options.hf,
            options.megatron,
            layouts=None if options.grid else [layout],
            max_processes=options.max_processes,
            prompts=options.prompt,
            image_files=options.image,
            tolerance=options.tolerance,
            weights=options.weights,
        )
    except (ValueError, OSError) as error:
        print(f"verify_conversion: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report.table())
    return 0 if report.is_same else 1


if __name__ == "__main__":
    sys.exit(main())
