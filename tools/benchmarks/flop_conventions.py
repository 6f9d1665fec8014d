"""What other ways of counting make of one and the same step: the table in docs/performance.md.

python -m tools.benchmarks.flop_conventions
"""

from __future__ import annotations

from laver_megatron.flops.step import document_area, model_flops, step_flops
from laver_megatron.planning.models import MODELS, SIGLIP2
from tools.benchmarks import report

# A pack of four samples: a picture of 729 tokens and 295 of text, of which half are answers. LaVer is off.
SEQ_LENGTH, NUM_SAMPLES, IMAGE_TOKENS, NUM_LABELS = 4096, 4, 729, 590
SHAPE = MODELS["7b"]


def flops_by_convention() -> dict[str, int]:
    """FLOPs of the step by how they are counted, ours first."""
    model = model_flops(SHAPE, encoder=SIGLIP2)
    decoder = model_flops(SHAPE)
    length = SEQ_LENGTH // NUM_SAMPLES
    area = NUM_SAMPLES * document_area(length, [IMAGE_TOKENS])
    num_visual = NUM_SAMPLES * IMAGE_TOKENS

    def step(area: int, num_labels: int | None = NUM_LABELS, trained: bool = False) -> int:
        flops = step_flops(
            model,
            num_tokens=SEQ_LENGTH,
            lm_span_area=area,
            num_visual_tokens=num_visual,
            reconstruction_span_area=NUM_SAMPLES * IMAGE_TOKENS**2,
            num_images=NUM_SAMPLES,
            num_label_tokens=num_labels,
            laver=False,
            frozen=() if trained else ("encoder",),
        )
        return flops.total

    def text(num_tokens: int) -> int:
        return step_flops(decoder, num_tokens=num_tokens, lm_span_area=num_tokens**2, laver=False).total

    ours = step(area)
    with_encoder = step(area, None, trained=True) - step(area, None)
    encoder_weights = SIGLIP2.num_layers * (
        4 * SIGLIP2.hidden_size**2 + SIGLIP2.num_mlp_matrices * SIGLIP2.hidden_size * SIGLIP2.intermediate_size
    )
    return {
        "`mfu`: exact area, LM head at labels, the frozen encoder forward alone": ours,
        "scaling laws (`tflops_per_gpu`): LM head on every token": step(area, None),
        "`mfu_full_square`: attention over the pack's square as well": step(SEQ_LENGTH**2, None),
        "a frozen encoder billed as a trained one": ours + with_encoder,
        "the encoder's weights billed for every token of the decoder": ours + 6 * encoder_weights * SEQ_LENGTH,
        "samples unpacked, each billed at the configuration's length of 4096": NUM_SAMPLES * text(SEQ_LENGTH),
        "the same at 8192": NUM_SAMPLES * text(2 * SEQ_LENGTH),
    }


def main() -> None:
    counted = flops_by_convention()
    ours = next(iter(counted.values()))
    rows = [[name, f"{flops / 1e12:.1f}", f"{flops / ours:.2f}"] for name, flops in counted.items()]
    print(report.table(["counted as", "TFLOP", "times ours"], rows))


if __name__ == "__main__":
    main()
