"""Small models to convert, the tools as programs, and what a directory of weights holds.

write_qwen(directory / "hf", tied=False, dtype=torch.bfloat16)          a text-only Qwen2.5
write_laver(directory / "hf", demo_dir, positions="1d")                 a LaVer export with its training state
run_tool("hf_to_megatron", "--hf", source, "--megatron", target)        as a user does
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel

from laver_megatron.encoders import encoder_tensor_sizes
from laver_megatron.hf.shape import ModelShape, read_model_shape
from laver_megatron.hf.weights import ModelParts, is_training_state, weight_table
from tests.exports import add_processor, write_export
from tests.programs import python_path

ROOT = Path(__file__).resolve().parents[1]

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=50,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)
VISION_HEAD = (20, 30)


def numbered(sizes) -> list[Tensor]:
    """Tensors in which every element of every tensor is another number."""
    tensors, first = [], 0
    for size in sizes:
        count = torch.Size(size).numel()
        tensors.append(torch.arange(first, first + count, dtype=torch.float64).view(size))
        first += count
    return tensors


def write_qwen(
    directory: Path,
    *,
    tied: bool = False,
    num_key_value_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **sizes: int,
) -> Path:
    """A random Qwen2 with eight heads (no zeros and ones of a fresh model) in the form of the published ones: its
    config.json has keys that transformers does not write, and the tokenizer's files lie beside it."""
    config: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": num_key_value_heads, "tie_word_embeddings": tied, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128, **sizes,
    }  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(Qwen2Config(**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(float("norm" in name), 0.3)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    published = {"z_last_first": 1, **config, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(published, indent=3) + "\n\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        (directory / name).write_text(f"content of {name}\n")
    return directory


def write_laver(
    directory: Path,
    demo_dir: Path,
    *,
    positions: str = "2d",
    dtype: torch.dtype = torch.float32,
    teacher: bool = True,
    training_state: bool = True,
) -> Path:
    """An export of the demo's models with random new parts; the teacher is not the student, and in fp32."""
    torch.manual_seed(4)
    model_dir, encoder_dir = demo_dir / "model", demo_dir / "encoder"
    language = Qwen2ForCausalLM.from_pretrained(model_dir)
    encoder = SiglipVisionModel.from_pretrained(encoder_dir)
    width, hidden = encoder.config.hidden_size, language.config.hidden_size
    connector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    write_export(
        directory,
        language.to(dtype),
        encoder.to(dtype),
        connector.to(dtype),
        text_config=json.loads((model_dir / "config.json").read_text()),
        vision_config=json.loads((encoder_dir / "config.json").read_text()),
        attention="mixed",
        positions=positions,
        image_token_id=image_token(model_dir),
    )
    add_processor(directory, model_dir, encoder_dir)
    if training_state:
        parts = ModelParts(
            read_model_shape(directory),
            encoder=encoder_tensor_sizes(directory),
            encoder_type="siglip_vision_model",
            feature_size=width,
            vision_head=VISION_HEAD,
            teacher=teacher,
            centre=teacher,
        )
        named = [pair for weight in weight_table(parts).values() for pair in weight.hugging_face_sizes()]
        state = {
            name: torch.randn(size, dtype=torch.float32 if name.startswith("teacher.") else dtype)
            for name, size in named
            if is_training_state(name)
        }
        save_file(state, directory / "training_state.safetensors")
    return directory


def image_token(model_dir: Path) -> int:
    added = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    return next(token["id"] for token in added if token["content"] == "<|image_pad|>")


def tensors_of(directory: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob(f"{stem}*.safetensors")):
        of_file = load_file(path)
        assert not tensors.keys() & of_file.keys(), f"{path} repeats tensors of other files"
        tensors.update(of_file)
    return tensors


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, (name, found[name].dtype, tensor.dtype)
        assert torch.equal(found[name], tensor), name


def assert_same_files(found: Path, expected: Path) -> None:
    """Two directories hold the same files with the same bytes."""
    names = [{str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()} for d in (found, expected)]
    assert names[0] == names[1], names[0] ^ names[1]
    different = [name for name in sorted(names[0]) if (found / name).read_bytes() != (expected / name).read_bytes()]
    assert different == []


def command(tool: str, *arguments: object, num_processes: int = 1) -> list[str]:
    """A tool's command line, under torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    program = str(ROOT / "tools" / f"{tool}.py") if not tool.endswith(".py") else tool
    return [sys.executable, *(torchrun if num_processes > 1 else []), program, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Without what a surrounding torchrun or an interactive shell would add."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_tool(tool: str, *arguments: object, num_processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a tool to its end; stdout and stderr are text."""
    return subprocess.run(
        command(tool, *arguments, num_processes=num_processes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
