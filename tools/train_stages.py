"""The same as `laver stages`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed

from laver_megatron.stages.stages_command import main  # noqa: E402

if __name__ == "__main__":
    main()
