"""Final hidden states and logits of one set of probes, by transformers and by Megatron, each in fp32.

Both functions run in a process of their own (`laver_megatron.convert.verification.workers`). They share nothing but the
files: transformers reads the Hugging Face directory, on the CPU and one probe at a time; Megatron reads the
checkpoint at a layout, packs the probes, and runs them through its own pipeline schedule.

Letters: T tokens of a probe, S tokens of a pack, B packs (one here), H hidden, W vocabulary.
"""

import datetime
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laver_megatron.checkpoint.directory import has_encoder
from laver_megatron.config.fields import Config
from laver_megatron.convert.verification.probes import PackedProbes, Probe
from laver_megatron.convert.verification.workers import Worker
from laver_megatron.data.read.conversations import IMAGE_PLACEHOLDER
from laver_megatron.hf.parts import ModelSettings
from laver_megatron.hf.shape import read_config, read_model_shape
from laver_megatron.runtime.engine import load_sharded, stored_tensors
from laver_megatron.runtime.sharded_state import sharded_tensors, sharding_metadata

STUDENT, TEACHER = "student", "teacher"
# A 7B model in fp32 is loaded from slow disks in some minutes.
_TIMEOUT_MINUTES = 30
# In every checkpoint, and of the type that the student was trained in.
_LAST_NORM = "decoder.final_layernorm.weight"
# Of normalising in another order; a pixel is a 255th apart from the next.
_PIXEL_ROUNDING = 1e-6


@dataclass(frozen=True)
class Outputs:
    """The outputs for every probe, fp32 on the CPU, and the weights that no tensor of the directory reached."""

    hidden_TH: list[Tensor]
    logits_TW: list[Tensor]
    unread: list[str]


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint directory, the weights to take from it (STUDENT or TEACHER), and the settings beside them."""

    checkpoint: Path
    weights: str
    settings: ModelSettings

    @property
    def encoder_dir(self) -> Path | None:
        """None for a text-only checkpoint."""
        return self.checkpoint / "encoder" if has_encoder(self.checkpoint) else None

    def config(self, packed: PackedProbes, tensor_parallel: int, pipeline_parallel: int) -> Config:
        """A run that only computes the student's language stream."""
        return Config.of(
            data_path=(),
            run_dir="",
            train_iters=1,
            laver=False,
            **asdict(self.settings),
            attention_kernel="dense",
            seq_length=packed.seq_length,
            visual_seq_length=packed.visual_seq_length,
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
        )


# --- transformers --------------------------------------------------------------------------------------


def run_transformers(worker: Worker, directory: Path, probes: list[Probe]) -> tuple[Outputs, list[str]]:
    """`transformers_outputs` and `input_problems`, in a process of their own."""
    _quiet()
    return transformers_outputs(directory, probes), input_problems(directory, probes)


def is_text_only(directory: Path) -> bool:
    """Whether a Hugging Face directory holds a plain Qwen2."""
    return read_config(directory)[1]["model_type"] == "qwen2"


@torch.no_grad()
def transformers_outputs(directory: Path, probes: list[Probe]) -> Outputs:
    """A text-only Qwen2 or an export with images; the latter runs the code that came with it."""
    from transformers import AutoModelForImageTextToText, Qwen2ForCausalLM

    common: dict[str, Any] = {
        "dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True, "local_files_only": True,
    }  # fmt: skip
    if is_text_only(directory):
        model, info = Qwen2ForCausalLM.from_pretrained(directory, **common)
    else:
        model, info = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, **common)
    model.eval()
    hidden, logits = [], []
    for probe in probes:
        tokens_1T = probe.sample.tokens_T[None]
        images: dict[str, Tensor] = {}
        if probe.pixels:  # laver exports know in which form they take pictures
            has_form = hasattr(model, "image_inputs")
            images = model.image_inputs(probe.pixels) if has_form else {"pixel_values": torch.stack(probe.pixels)}
        output = model(
            input_ids=tokens_1T,
            attention_mask=torch.ones_like(tokens_1T),
            output_hidden_states=True,
            use_cache=False,
            **images,
        )
        hidden.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    return Outputs(hidden, logits, sorted(info["missing_keys"]))


def input_problems(directory: Path, probes: list[Probe]) -> list[str]:
    """What the directory's own tokenizer, chat template and image processor make of the prompts, where that is not
    what training makes of them. An export without them cannot be used."""
    from transformers import AutoProcessor, AutoTokenizer

    load = AutoTokenizer if is_text_only(directory) else AutoProcessor
    try:
        processor = load.from_pretrained(directory, trust_remote_code=load is AutoProcessor, local_files_only=True)
    except Exception as error:  # what is missing decides what is raised
        return [f"{load.__name__} cannot load the directory: {type(error).__name__}: {error}"]
    problems: list[str] = []
    for probe in probes:
        if probe.pictures:
            message = {"role": "user", "content": _parts(probe.prompt)}
            text = processor.apply_chat_template([message], tokenize=False)
            made = processor(text=[text], images=list(probe.pictures), return_tensors="pt")
            problems += _pixel_problems(made, probe)
        else:
            made = getattr(processor, "tokenizer", processor)([probe.prompt], add_special_tokens=False)
        tokens = torch.as_tensor(made["input_ids"])[0]
        if not torch.equal(tokens, probe.sample.tokens_T):
            problems.append(f"{probe.prompt!r} has other tokens: {len(tokens)}, not the {len(probe)} of training")
    return problems


def _pixel_problems(made: Mapping[str, Tensor], probe: Probe) -> Iterator[str]:
    """Where a processor's pictures are not those of training."""
    for number, (theirs, ours) in enumerate(zip(_made_images(made), probe.pixels, strict=True)):
        where = f"picture {number} of {probe.prompt!r}"
        if theirs.shape != ours.shape:
            yield f"{where} has pixels of shape {tuple(theirs.shape)}, not the {tuple(ours.shape)} of training"
        elif not (gap := (theirs - ours).abs().max().item()) <= _PIXEL_ROUNDING:
            yield f"pixels of {where} differ by {gap:.1e}"


def _made_images(made: Mapping[str, Tensor]) -> list[Tensor]:
    """Pixels `[3, height, width]` of each picture, out of either form (see `modeling_laver.py`)."""
    if "image_grids" not in made:
        return list(made["pixel_values"])
    grids = made["image_grids"].tolist()
    pieces = made["pixel_values"].split([rows * columns for rows, columns in grids])
    side = math.isqrt(made["pixel_values"].shape[1] // 3)
    return [
        torch.cat([torch.cat(list(row.view(-1, 3, side, side)), dim=2) for row in piece.chunk(rows)], dim=1)
        for piece, (rows, _) in zip(pieces, grids, strict=True)
    ]


def _parts(prompt: str) -> list[dict[str, str]]:
    """A prompt as the words and pictures of a message."""
    first, *others = prompt.split(IMAGE_PLACEHOLDER)
    parts = [{"type": "text", "text": first}]
    for words in others:
        parts += [{"type": "image"}, {"type": "text", "text": words}]
    return [part for part in parts if part.get("text") != ""]


# --- Megatron ------------------------------------------------------------------------------------------


def run_megatron(
    worker: Worker,
    model: MegatronModel,
    probes: list[Probe],
    packed: PackedProbes,
    layout: tuple[int, int],
    check_files: bool,
) -> Outputs | list[str]:
    """`megatron_outputs` in a process group of all workers, divided by `layout` (TP, PP). check_files: first compare
    all files of the checkpoint with its manifest."""
    from laver_megatron.checkpoint.state import verify_manifest
    from laver_megatron.runtime.backend import initialise_parallelism, use_backend

    _quiet()
    dist.init_process_group(
        use_backend().communication,
        init_method=f"file://{worker.store}",
        rank=worker.rank,
        world_size=worker.num_workers,
        timeout=datetime.timedelta(minutes=_TIMEOUT_MINUTES),
    )
    initialise_parallelism(
        tensor_model_parallel_size=layout[0],
        pipeline_model_parallel_size=layout[1],
        virtual_pipeline_model_parallel_size=None,
        timeout_minutes=_TIMEOUT_MINUTES,
        seed=0,
    )
    if check_files:
        verify_manifest(model.checkpoint)
    outputs = megatron_outputs(model, probes, packed, layout)
    dist.barrier()
    return outputs


def megatron_outputs(
    model: MegatronModel, probes: list[Probe], packed: PackedProbes, layout: tuple[int, int]
) -> Outputs | list[str]:
    """The outputs on the first rank of the last stage; elsewhere only what this rank found unread. Call on every
    rank of Megatron's parallel groups."""
    from laver_megatron.model.build import build_stages

    shape = read_model_shape(model.checkpoint / "hf")
    (stage,) = build_stages(model.config(packed, *layout), shape, model.encoder_dir)
    for parameter in stage.parameters():  # encoder and connector are built with numbers, which would hide missing ones
        parameter.data.fill_(float("nan"))
    unread = _load(stage, model)
    outputs = _whole_outputs(stage, packed)
    if outputs is None:
        return unread
    hidden_BSH, logits_BSW = outputs
    places = [(pack, slice(start, start + len(p))) for (pack, start), p in zip(packed.places, probes, strict=True)]
    return Outputs(
        [hidden_BSH[pack][slots].float().cpu() for pack, slots in places],
        [logits_BSW[pack][slots].float().cpu() for pack, slots in places],
        unread,
    )


def _load(stage: Any, model: MegatronModel) -> list[str]:
    """Fills the stage; the checkpoint keys of weights that hold NaN afterwards. The teacher's weights take the
    place of the student's, from under keys of their own, and as training uses them: stored in fp32, they are
    rounded to the type of the student's."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def state() -> dict:
        sharded = stage.sharded_state_dict(metadata=sharding_metadata())
        for entry in nested_values(sharded):
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                entry.key = stored_key(entry.key, model.weights)
        return sharded

    # Keys that the checkpoint lacks are left out: their weights stay NaN and are named.
    loaded = load_sharded({"model": state()}, model.checkpoint)
    stage.load_state_dict(loaded["model"], strict=False)
    if model.weights == TEACHER:
        dtype = stored_tensors(model.checkpoint)[_LAST_NORM].dtype
        for parameter in stage.decoder.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
    return sorted({tensor.key for tensor in sharded_tensors(state()) if tensor.data.isnan().any()})


def stored_key(key: str, weights: str) -> str:
    """The checkpoint's key of a weight: the teacher has layers and final norm of its own, and no other part."""
    return f"teacher.{key}" if weights == TEACHER and key.startswith("decoder.") else key


def _whole_outputs(stage: Any, packed: PackedProbes) -> tuple[list[Tensor], list[Tensor]] | None:
    """Hidden states `[S, H]` and logits `[S, W]` of every pack, on the first tensor-parallel rank of the last
    stage; None elsewhere."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from laver_megatron.convert.verification.forward_pass import forward_pass

    hidden: list[Tensor] = []
    logits: list[Tensor] = []
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0

    def keep(batch: Any, hidden_SBH: Tensor, output: Any) -> None:
        whole_SW = gather_from_tensor_model_parallel_region(output.language_logits_RW)
        if is_first:  # a large vocabulary makes large logits
            hidden.append(hidden_SBH[:, 0])
            logits.append(whole_SW)

    nothing_masked = [torch.zeros_like(pack.image_BS, dtype=torch.bool) for pack in packed.packs]
    forward_pass([stage], list(zip(packed.packs, nothing_masked, strict=True)), keep)
    return (hidden, logits) if stage.post_process and is_first else None


def _quiet() -> None:
    """Warnings and notes of the libraries, which every process would repeat."""
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
