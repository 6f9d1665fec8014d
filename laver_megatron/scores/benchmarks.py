"""The benchmarks that the table knows: their type, and where each kit writes the score that is meant.

Of the paper's 17 benchmarks the public summary names 8 (`in_paper`); the others here are common ones of the same types.
The types of OCRBench, MMVP, RealWorldQA, CV-Bench 2D, AI2D and HallusionBench are the paper's; the rest are ours.

The names of tasks, files, columns and units are those of lmms-eval 0.7.3 and of VLMEvalKit at e8e78f05.
"""

from dataclasses import dataclass

OCR, VISION, GENERAL, HALLUCINATION, OTHER = "OCR", "vision-centric", "general", "hallucination", "other"
TYPES = (OCR, VISION, GENERAL, HALLUCINATION, OTHER)
LMMS_EVAL, VLMEVALKIT = "lmms-eval", "VLMEvalKit"


@dataclass(frozen=True)
class Source:
    """Where one kit writes the score of a benchmark.

    Attributes:
        dataset: the kit's name of the task or dataset.
        metric: the kit's name of the score.
        scale: from the kit's unit to the table's: percent, or points of OCRBench.
        field: of a sample's record, where its score is, 0 to 1. "" where samples have none.
        file: ending of VLMEvalKit's file with the samples' scores; `*` stands for the name of the judge.
    """

    dataset: str
    metric: str
    scale: float = 1.0
    field: str = ""
    file: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    Attributes:
        divisor: of the score in averages: 10 for OCRBench, whose score has up to 1000 points.
        questions_per_sample: consecutive questions that count together, as right or wrong.
    """

    name: str
    type: str
    in_paper: bool
    lmms_eval: Source | None
    vlmevalkit: Source | None
    divisor: float = 1.0
    questions_per_sample: int = 1


def _choice(dataset: str) -> Source:
    """VLMEvalKit's multiple choice: accuracy as a fraction, `hit` of each question."""
    return Source(dataset, "Overall", 100, "hit", "_*_result")


def _answer(dataset: str) -> Source:
    """VLMEvalKit's short answers: percent."""
    return Source(dataset, "Overall", 1, "eval_score", "_results")


def _yes_no(dataset: str, metric: str) -> Source:
    """VLMEvalKit's yes or no: percent."""
    return Source(dataset, f"split=Overall|{metric}", 1, "score", "_auxmatch")


BENCHMARKS = (
    Benchmark(
        "OCRBench", OCR, True,
        Source("ocrbench", "ocrbench_accuracy", 1000, "score"), Source("OCRBench", "Final Score"), divisor=10,
    ),
    Benchmark("AI2D", OCR, True, Source("ai2d", "exact_match", 100, "exact_match"), _choice("AI2D_TEST")),
    Benchmark(
        "ChartQA", OCR, True, Source("chartqa", "relaxed_overall", 100, "relaxed_overall"), _answer("ChartQA_TEST")
    ),
    Benchmark("TextVQA", OCR, True, Source("textvqa_val", "exact_match", 100, "exact_match"), _answer("TextVQA_VAL")),
    Benchmark("DocVQA", OCR, False, Source("docvqa_val", "anls", 100), _answer("DocVQA_VAL")),
    Benchmark("InfoVQA", OCR, False, Source("infovqa_val", "anls", 100), _answer("InfoVQA_VAL")),
    Benchmark(
        "MMVP", VISION, True, Source("mmvp", "mmvp_pair_accuracy", 100, "is_correct"), _choice("MMVP"),
        questions_per_sample=2,
    ),
    Benchmark(
        "CV-Bench 2D", VISION, True, Source("cv_bench_2d", "cv_bench_acc", 100, "is_correct"), _choice("CV-Bench-2D")
    ),
    Benchmark(
        "CV-Bench 3D", VISION, False, Source("cv_bench_3d", "cv_bench_acc", 100, "is_correct"), _choice("CV-Bench-3D")
    ),
    Benchmark("BLINK", VISION, False, None, _choice("BLINK")),
    Benchmark(
        "RealWorldQA", GENERAL, True, Source("realworldqa", "exact_match", 100, "exact_match"), _choice("RealWorldQA")
    ),
    Benchmark("MMStar", GENERAL, False, Source("mmstar", "average", 100, "score"), _choice("MMStar")),
    Benchmark(
        "MMBench EN", GENERAL, False, Source("mmbench_en_dev", "gpt_eval_score"), _choice("MMBench_DEV_EN")
    ),
    Benchmark("SEED image", GENERAL, False, Source("seedbench", "seed_image", 100), _choice("SEEDBench_IMG")),
    Benchmark(
        "HallusionBench", HALLUCINATION, True,
        Source("hallusion_bench_image", "aAcc"), _yes_no("HallusionBench", "aAcc"),
    ),
    Benchmark(
        "POPE", HALLUCINATION, False, Source("pope", "pope_accuracy", 100, "score"), _yes_no("POPE", "acc")
    ),
)  # fmt: skip


def known(kit: str, dataset: str) -> tuple[Benchmark, Source] | None:
    """The benchmark that a kit calls so; None if the table does not know it."""
    for benchmark in BENCHMARKS:
        source = benchmark.lmms_eval if kit == LMMS_EVAL else benchmark.vlmevalkit
        if source is not None and source.dataset == dataset:
            return benchmark, source
    return None
