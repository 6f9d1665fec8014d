"""What of the configuration's FP8 goes to Megatron-Core: the student's settings, and the teacher's apart.

Nothing here has run on a GPU.
"""

from dataclasses import replace
from typing import Any

from megatron.core.transformer import TransformerConfig

from laver_megatron.config.fields import Config


def fp8_settings(config: Config) -> dict[str, Any]:
    """Fields of TransformerConfig for the student's decoder layers; embedding, heads and encoder stay in bf16."""
    training = config.training
    return {} if training.fp8_format is None else {"fp8": training.fp8_format, "fp8_recipe": training.fp8_recipe}


def teacher_config(config: Config, student: TransformerConfig) -> TransformerConfig:
    """The student's, in bf16 unless the teacher computes in FP8 as well."""
    if student.fp8 is None or config.training.teacher_fp8:
        return student
    return replace(student, fp8=None)
