"""Draws packs of a run as the model will see them: tokens, sample bounds, labels, attention, masked patches.

    python tools/show_sample.py --config examples/demo.yaml --packs 0 1 --output shown/
    python tools/show_sample.py --config examples/demo.yaml --packs 7 --step 90 --mask-ratio 0.3 --output shown/

Every option of the trainer may follow. Prints each pack's text (what is trained in [[ ]]) and writes pack-N.png.
"""

import argparse
import sys
from pathlib import Path

from laver_megatron.config.command_line import from_command_line
from laver_megatron.config.fields import ConfigError
from laver_megatron.data.batch.dataset import open_reader
from laver_megatron.hf.tokenizer import load_tokenizer
from laver_megatron.shards.show import describe, draw, show_packs
from laver_megatron.start import find_start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--packs", type=int, nargs="+", default=[0], metavar="N", help="numbers of packs (default: 0)")
    parser.add_argument("--step", type=int, help="mask as at this step (default: the step that trains on the pack)")
    parser.add_argument("--validation", action="store_true", help="packs of --valid-data-path")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the pictures go")
    options, of_trainer = parser.parse_known_args()
    config = from_command_line(of_trainer).config
    try:
        start = find_start(config)
        paths = config.data.valid_data_path if options.validation else config.data.data_path
        if start.model_dir is None or start.encoder_dir is None or not paths or min(options.packs) < 0:
            raise ValueError("model, encoder, data and packs from 0 on are needed: --load, --encoder, --data-path")
        reader = open_reader(config, paths, start.model_dir, start.encoder_dir)
        tokenizer = load_tokenizer(start.model_dir)
        options.output.mkdir(parents=True, exist_ok=True)
        for shown in show_packs(config, reader, options.packs, options.step):
            print(describe(shown, tokenizer))
            path = options.output / f"pack-{shown.number}.png"
            draw(shown, reader.maker.preprocessor, path)
            print(path)
        reader.close()
    except (ConfigError, ValueError, OSError) as error:
        print(f"show_sample: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
