# Training on NVIDIA GPUs. The image brings Python 3.12, torch 2.14, CUDA 13.4, TransformerEngine 2.19, flash-attn and
# apex, built for one another, so none of them is installed again here. megatron-core 0.19.2 asks for Python >= 3.12,
# torch >= 2.6, numpy and packaging >= 24.2, and has no limit for TransformerEngine.
#
#   docker build -t laver-megatron .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/laver/runs" laver-megatron \
#       torchrun --nproc-per-node 8 examples/pretrain_laver.sh --config my_run.yaml
#
# Never built yet: the first who builds it should run
# `make gpu-wheels test-gpu PYTHON=python3 BASE_PYTHON=python3` in it.
FROM nvcr.io/nvidia/pytorch:26.09-py3

# The image constrains pip to its own version of every package; the ones named below are newer.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /workspace/laver
COPY constraints-py312.txt ./

# What depends on torch comes without its dependencies, so that pip has no reason to touch the image's torch; numpy
# and scipy stay the image's too, as its compiled packages were built against them.
RUN grep -Ev '^(torch|numpy|scipy)==' constraints-py312.txt > /tmp/constraints.txt \
    && pip install --no-deps -c /tmp/constraints.txt megatron-core transformers safetensors webdataset braceexpand \
    && pip install -c /tmp/constraints.txt packaging tokenizers huggingface-hub typer regex pillow psutil pyyaml tqdm \
        matplotlib xxhash pyarrow filelock aiohttp tensorboard wandb pytest pytest-xdist hypothesis ruff mypy \
        import-linter scikit-image scikit-learn

COPY . .
RUN pip install --no-deps --no-build-isolation --editable . \
    && python -c "import laver_megatron.train, megatron.core, torch, transformer_engine, flash_attn; print(torch.__version__, megatron.core.__version__)"
