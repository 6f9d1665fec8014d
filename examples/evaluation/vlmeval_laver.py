"""Scores an export with VLMEvalKit: its `run.py` with one more model.

    python examples/evaluation/vlmeval_laver.py --export EXPORT --data MMBench_DEV_EN AI2D_TEST --mode infer
    torchrun --nproc-per-node 8 examples/evaluation/vlmeval_laver.py ...      # a copy of the model each

EXPORT is a directory in laver format; the code that it brings is run. All other options are run.py's own; results
stand under the export's name, or that of --name. Needs a clone of VLMEvalKit that is installed from where it lies
(pip install -e), torch and transformers, and nothing of this repository.
"""

import argparse
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.vlm.base import BaseModel

_PICTURE_IN_TEXT = "<image>"


class Laver(BaseModel):
    """Answers one question at a time, as VLMEvalKit asks them; any number of pictures in it, where the text has them.

    model_path: the export. dtype: of the weights, `auto` as exported. generation: for transformers' generate.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        max_new_tokens: int = 1024,
        **generation: Any,
    ) -> None:
        super().__init__()
        self.generation = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
        if not self.generation["do_sample"]:
            self.generation.update(temperature=None, top_p=None, top_k=None)
        self.device = _device()
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(
            model_path, trust_remote_code=True, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self.device).eval()

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """message: parts {"type": "text" | "image", "value": words | file}, in order."""
        return self._answer([{"role": "user", "content": message}])

    def chat_inner(self, messages: list[dict], dataset: str | None = None) -> str:
        """messages: turns {"role", "content": parts}, the last of which is a question."""
        return self._answer(messages)

    @torch.inference_mode()
    def _answer(self, turns: list[dict]) -> str:
        pictures: list[str] = []
        conversation = [{"role": turn["role"], "content": _content(turn["content"], pictures)} for turn in turns]
        if pictures:
            # A data set may mark the places of its pictures in the text, too. Here a mark would be a word, where
            # training put a picture in its place.
            for part in (part for turn in conversation for part in turn["content"] if part["type"] == "text"):
                part["text"] = part["text"].replace(_PICTURE_IN_TEXT, "")
        text = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[pictures], return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        tokens_1L = self.model.generate(**inputs, **self.generation)
        (answer,) = self.processor.batch_decode(tokens_1L[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer.strip()


def _device() -> torch.device:
    """This process's GPU. run.py shows each process its own, unless CUDA was asked for GPUs before that."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _content(parts: list[dict], pictures: list[str]) -> list[dict]:
    """Parts for the chat template; their pictures are added to `pictures`."""
    content = []
    for part in parts:
        if part["type"] == "image":
            pictures.append(part["value"])
            content.append({"type": "image"})
        elif part["type"] == "text":
            content.append({"type": "text", "text": part["value"]})
        else:
            raise ValueError(f"laver sees pictures, but no {part['type']}")
    return content


def main() -> None:
    """VLMEvalKit's run.py, which can now find the export under its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="directory in laver format")
    parser.add_argument("--name", help="of the results (default: the directory's)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as exported)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    options, others = parser.parse_known_args()

    import vlmeval
    from vlmeval.config import supported_VLM

    program = Path(vlmeval.__file__).resolve().parents[1] / "run.py"
    if not program.is_file():
        parser.error(f"{program} does not exist; clone VLMEvalKit and install it from there with pip install -e")
    name = options.name or options.export.resolve().name
    supported_VLM[name] = partial(
        Laver, model_path=str(options.export), dtype=options.dtype, max_new_tokens=options.max_new_tokens
    )
    sys.argv = [str(program), "--model", name, *others]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
