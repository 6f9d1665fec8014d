"""The section of the configuration that says how long, at what rates and in what precision a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import ABOVE_ZERO, BELOW_ONE, NOT_NEGATIVE, POSITIVE, SEED, option
from laver_megatron.config.refused import refused

# Megatron's names.
LR_DECAY_STYLES = ("cosine", "linear", "constant", "WSD")
LR_WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, rates and precision of the training."""

    train_iters: int = option("iterations of the whole run; the schedules end there", valid=POSITIVE)
    exit_interval: int | None = option(
        "save and stop at the first iteration divisible by this", valid=POSITIVE, default=None
    )
    lr: float = option("highest learning rate", valid=NOT_NEGATIVE, default=2e-5)
    min_lr: float = option("learning rate at the end of the decay", valid=NOT_NEGATIVE, default=0.0)
    lr_warmup_iters: int = option("iterations of linear warm-up", valid=NOT_NEGATIVE, default=0)
    encoder_lr: float | None = option(
        "--lr for the image encoder alone (default: --lr); warm-up and decay are in proportion, --min-lr as well",
        valid=NOT_NEGATIVE,
        default=None,
    )
    connector_lr: float | None = option(
        "--lr for the connector alone (default: --lr), as --encoder-lr", valid=NOT_NEGATIVE, default=None
    )
    decoupled_lr: float | None = option(
        "--lr for the embedding and the LM head alone (default: --lr), as --encoder-lr",
        valid=NOT_NEGATIVE,
        default=None,
    )
    lr_decay_style: str = option(
        "from --lr to --min-lr along a half cosine or a line; constant: --lr to the end; WSD: --lr, then the decay of "
        "the last --lr-wsd-decay-iters",
        choices=LR_DECAY_STYLES,
        default="cosine",
    )
    lr_wsd_decay_iters: int | float | None = option(
        "iterations of WSD's decay, at least 2, or a share of --train-iters such as 0.1: of the last D the first still "
        "has --lr, the D - 1 after it decay, and --min-lr is what one more would have",
        valid=ABOVE_ZERO,
        default=None,
    )
    lr_wsd_decay_style: str = option(
        "shape of WSD's decay; minus_sqrt: falls as 1 - sqrt", choices=LR_WSD_DECAY_STYLES, default="exponential"
    )
    weight_decay: float = option(
        "decoupled weight decay of matrices; tensors of one dimension (biases, norms, [MASK]) do not decay, nor do "
        "parts of a trained encoder that its features do not depend on",
        valid=NOT_NEGATIVE,
        default=0.0,
    )
    adam_beta1: float = option("decay of Adam's first moment", valid=BELOW_ONE, default=0.9)
    adam_beta2: float = option("decay of Adam's second moment", valid=BELOW_ONE, default=0.999)
    adam_eps: float = option("added to the denominator of Adam's update", valid=ABOVE_ZERO, default=1e-8)
    clip_grad: float = option("largest norm of the gradient; 0 does not clip", valid=NOT_NEGATIVE, default=1.0)
    bf16: bool = option("compute in bfloat16, with fp32 master weights; otherwise fp32", default=False)
    fp8_format: str | None = option(
        "the student's decoder layers multiply in FP8 (TransformerEngine, with --bf16); hybrid: E4M3 forward and E5M2 "
        "backward",
        choices=("hybrid", "e4m3"),
        default=None,
    )
    fp8_recipe: str = option(
        "how FP8 tensors are scaled; blockwise needs Hopper, mxfp8 Blackwell",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
        default="tensorwise",
    )
    teacher_fp8: bool = option("the teacher's decoder layers multiply as --fp8-format says, too", default=False)
    optimizer: str = option(refused("optimizer", "adam, or muon"), choices=("adam", "muon"), default="adam")
    use_mup: bool = option(refused("use_mup", "maximal update parametrisation"), default=False)
    use_precision_aware_optimizer: bool = option(
        "TransformerEngine's Adam that keeps 16 of the master weights' 32 bits beside the bf16 weights, without LaVer",
        default=False,
    )
    seed: int = option("of initial weights, data order and masks", valid=SEED, default=1234)
    max_skipped_iterations: int = option(
        "iterations with a NaN or infinite gradient, in a row, after which the run ends with an error",
        valid=POSITIVE,
        default=5,
    )
