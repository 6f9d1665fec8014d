"""examples/scaling: every file passes --dry-run with nothing but config.json of its model, and says what it is."""

import json
import re
from pathlib import Path

import pytest

from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation, load_config
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning.models import MODELS
from laver_megatron.studies.sweep_sizes import language_model_parameters

FILES = sorted((Path(__file__).parents[3] / "examples" / "scaling").glob("*.yaml"))
# config.json of the published models: layers, width, MLP width, query heads, key/value heads, words, tied.
RELEASED = {
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "72b": (80, 8192, 29568, 64, 8, 152064, False),
    "110b": (80, 8192, 49152, 64, 8, 152064, False),
}
NAMES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
# What the published checkpoints hold.
PUBLISHED_PARAMETERS = {
    "0.5b": 494_032_768, "1.5b": 1_543_714_304, "3b": 3_085_938_688, "7b": 7_615_616_512, "14b": 14_770_033_664,
    "32b": 32_763_876_352, "72b": 72_706_203_648, "110b": 111_209_914_368,
}  # fmt: skip
SIGLIP2 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
IMAGE_TOKENS = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, in which the files' relative paths lead to configurations without weights."""
    monkeypatch.chdir(tmp_path)
    write(Path("siglip2-so400m-patch14-384/config.json"), SIGLIP2)
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}}
    write(Path("siglip2-so400m-patch14-384/preprocessor_config.json"), processor)
    return tmp_path


def write_model(directory, size):
    shape = dict(zip(NAMES, RELEASED[size], strict=True))
    rest = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
    write(directory / "config.json", {**shape, **rest})
    tokens = [{"id": number, "content": token} for token, number in IMAGE_TOKENS.items()]
    write(directory / "tokenizer.json", {"added_tokens": tokens})
    write(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}"})


def test_every_size_is_there():
    assert {path.stem for path in FILES} == set(RELEASED)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_files_pass_a_dry_run_and_say_what_they_are(file, place):
    config = load_config(["--config", str(file)])
    write_model(Path(config.start.model), file.stem)
    text = file.read_text()
    (layout,) = re.findall(r"GPUs of 80 GB.*, as (.*);", text)
    sizes = {name: int(number) for name, number in re.findall(r"\b(TP|PP|DP|of) (\d+)", layout)}
    tp, pp = sizes.get("TP", 1), sizes.get("PP", 1)
    assert (tp, pp) == (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
    assert sizes.get("of") == config.parallel.num_layers_per_virtual_pipeline_stage
    (words,) = re.findall(r"Hardware: (\w+) GPUs of 80 GB", text)
    num_gpus = {"eight": 8, "sixteen": 16}.get(words) or int(words)
    assert num_gpus == tp * pp * sizes["DP"]
    shape = check(Invocation(config, dry_run=True, dry_run_world_size=num_gpus))
    assert shape == MODELS[file.stem]  # what the planner takes the size to be
    parameters = language_model_parameters(shape)
    assert parameters == PUBLISHED_PARAMETERS[file.stem]
    assert f"{parameters / 1e9:.4g}B parameters" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    num_layouts = 0
    for gpus, tp, pp, chunk, dp in re.findall(r"^# +([\d,]+) +(\d+) +(\d+) +([\d/-]+) +(\d+) ", text, re.MULTILINE):
        num_layouts += 1
        num_gpus = int(gpus.replace(",", ""))
        assert num_gpus == int(tp) * int(pp) * int(dp)
        uneven = [None if size == "-" else int(size) for size in chunk.split("/")] if "/" in chunk else [None, None]
        other = config.replace(
            tensor_model_parallel_size=int(tp),
            pipeline_model_parallel_size=int(pp),
            num_layers_per_virtual_pipeline_stage=int(chunk) if chunk.isdigit() else None,
            decoder_first_pipeline_num_layers=uneven[0],
            decoder_last_pipeline_num_layers=uneven[1],
            sequence_parallel=int(tp) > 1,
        )
        check(Invocation(other, dry_run=True, dry_run_world_size=num_gpus))
    assert num_layouts + text.count("does not fit") == 4


def test_sizes_read_the_same_packs(place):
    """But for the layout, the model and where they lie, the files say the same."""
    configs = [load_config(["--config", str(file)]) for file in FILES]
    own = {
        "load", "model", "run_dir", "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
        "num_layers_per_virtual_pipeline_stage",
    }  # fmt: skip
    differing = {
        name for config in configs for name, value in config.flat().items() if value != configs[0].flat()[name]
    }
    assert differing == own
    for config, file in zip(configs, FILES, strict=True):
        write_model(place / file.stem, file.stem)
        assert config.data.visual_seq_length % config.parallel.tensor_model_parallel_size == 0
        assert read_model_shape(place / file.stem).num_layers % config.parallel.pipeline_model_parallel_size == 0
