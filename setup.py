"""The package and what it needs; the versions that were tested together are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="laver_megatron",
    version="0.1.0",
    description="LaVer (CVPR 2026) for multimodal language models on Megatron-Core",
    packages=find_packages(include=["laver_megatron", "laver_megatron.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        # 0.16.1 is the last line that supports Python 3.11.
        "megatron-core>=0.16.1,<0.17",
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
        "braceexpand",
    ],
    extras_require={
        # Megatron-Core uses these where it finds them. apex is not here: what pip finds under that name is
        # another project; NVIDIA's comes with the image of the Dockerfile, or from source.
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        "test": ["pytest", "pytest-xdist", "ruff", "mypy", "hypothesis", "scikit-image", "scikit-learn"],
        # Remote shards of these stores.
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "demo": ["scikit-image", "scikit-learn"],
        "log": ["tensorboard", "wandb"],
        "analysis": ["matplotlib", "scikit-learn"],
    },
)
