"""The share of right answers is the same at every division, and the one that transformers gives of an export."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from laver_megatron import train
from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from laver_megatron.objective.language import IGNORE_LABEL
from tests.distributed.build import (
    IMAGE_TOKEN,
    ONE_PROCESS,
    PACKS_PER_STEP,
    VOCABULARY,
    SyntheticReader,
    make_config,
    make_trainer,
)
from tests.distributed.harness import Layout

EVAL_ITERS = 2


def family_of(sample_id):
    return f"family-{sample_id % 3}"


def train_and_save(layout, config):
    """Job: one step."""
    trainer = make_trainer(config)
    train.train_step(trainer)
    train.save(trainer)


def evaluate(layout, config, labels_of):
    """Job: a validation in which samples have these labels, by their id, and families."""
    trainer = make_trainer(config)
    reader = trainer.validation_data.reader
    if reader is not None:
        read = reader.read
        reader.read = lambda *args: [with_labels(packs, labels_of) for packs in read(*args)]
    return {name: value for name, value in train.evaluate(trainer).items() if name.startswith("answer")}


def with_labels(packs, labels_of):
    families = []
    for row, document_S in enumerate(packs.document_BS):
        families.append([])
        for document in range(int(document_S.max()) + 1):
            sample_id = int(packs.sample_id_BS[row, document_S == document][0])
            packs.labels_BS[row, document_S == document] = labels_of[sample_id]
            families[-1].append(family_of(sample_id))
    return replace(packs, families=families)


@torch.no_grad()
def predictions(export, samples):
    """The likeliest next word at every position of each sample, by transformers."""
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    found = {}
    for sample in samples:
        tokens_T = sample.encoded.tokens_T.clone()
        tokens_T[sample.encoded.image_number_T >= 0] = IMAGE_TOKEN
        pixels = model.image_inputs(list(sample.pixels)) if sample.pixels else {}
        found[sample.sample_id] = model(input_ids=tokens_T[None], **pixels).logits[0].argmax(-1)
    return found


def test_accuracy_by_family_at_every_division_and_in_transformers(pool, files, tmp_path):
    pool.run(train_and_save, ONE_PROCESS, make_config(files, tmp_path / "run"))
    export = tmp_path / "export"
    megatron_to_hf(latest_checkpoint(tmp_path / "run/checkpoints"), export)
    reader = SyntheticReader("other-answers")
    samples = [sample for number in range(EVAL_ITERS * PACKS_PER_STEP) for sample in reader._pack(number)]
    predicted = predictions(export, samples)

    # Two answers a sample, right but for one token in some.
    labels_of, right = {}, defaultdict(list)
    for sample in samples:
        places = (sample.encoded.labels_T != IGNORE_LABEL).nonzero().flatten()
        labels_T = torch.full_like(sample.encoded.labels_T, IGNORE_LABEL)
        middle = len(places) // 2
        for number, answer in enumerate((places[:middle], places[middle + 1 :])):
            labels_T[answer] = predicted[sample.sample_id][answer]
            is_right = (sample.sample_id // 2 + number) % 4 > 0
            if not is_right:
                wrong = answer[sample.sample_id % len(answer)]
                labels_T[wrong] = (labels_T[wrong] + 1) % VOCABULARY
            right[family_of(sample.sample_id)].append(is_right)
        labels_of[sample.sample_id] = labels_T
    expected = {f"answer_accuracy/{name}": sum(values) / len(values) for name, values in right.items()}
    expected["answer_accuracy"] = sum(map(sum, right.values())) / sum(map(len, right.values()))
    assert len(set(expected.values())) > 2 and all(0 < value < 1 for value in expected.values())

    for layout in (ONE_PROCESS, Layout(tp=2, pp=2, sp=True), Layout(tp=2, dp=2)):
        config = make_config(
            files,
            tmp_path / "other",
            layout,
            load=f"hf:{export}",
            valid_data_path=("other-answers",),
            eval_iters=EVAL_ITERS,
        )
        for of_rank in pool.run(evaluate, layout, config, labels_of):
            assert of_rank == pytest.approx(expected), str(layout)
