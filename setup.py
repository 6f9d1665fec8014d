"""The package and what it needs.

The versions that were tested together are pinned in constraints.txt (Python 3.11) and constraints-py312.txt (>= 3.12).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="laver_megatron",
    version=re.findall(r'__version__ = "(.+)"', (HERE / "laver_megatron/__init__.py").read_text())[0],
    description="LaVer (CVPR 2026) for multimodal language models on Megatron-Core",
    license="Apache-2.0",
    # The wheel brings the examples as a folder of the package, for `laver examples` and as the launcher's script.
    packages=[*find_packages(include=["laver_megatron", "laver_megatron.*"]), "laver_megatron.examples"],
    package_dir={"laver_megatron.examples": "examples"},
    package_data={"laver_megatron": ["py.typed"], "laver_megatron.examples": ["**/*"]},
    entry_points={"console_scripts": ["laver = laver_megatron.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        # 0.16 is the last line that supports Python 3.11; what differs stands in laver_megatron/runtime/engine.py.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "transformers>=5",
        "webdataset",
        "fsspec[http]",
        "pillow",
        "safetensors",
        "psutil",  # Megatron-Core's checkpoint writer needs it and does not say so
        "pyyaml",
        "tqdm",
        "numpy",
        "scipy",
        "matplotlib",
        "xxhash",
        "pyarrow",
        "filelock",
        "packaging",
        "braceexpand",
    ],
    extras_require={
        # Megatron-Core uses these where it finds them. apex is not here: what pip finds under that name is
        # another project; NVIDIA's comes with the image of the Dockerfile, or from source.
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        # Remote shards of these stores.
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        # VLMEvalKit's files of samples, for `laver scores`.
        "scores": ["openpyxl"],
        "test": [
            "openpyxl",
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "import-linter",
            "hypothesis",
            "scikit-image",
            "scikit-learn",
        ],
        "demo": ["scikit-image", "scikit-learn"],
        "log": ["tensorboard", "wandb"],
        "analysis": ["matplotlib", "scikit-learn"],
    },
)
