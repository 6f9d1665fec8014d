"""The families of questions by name."""

from __future__ import annotations

from collections.abc import Callable

from laver_megatron.tasks.families.figures import chart, detail
from laver_megatron.tasks.families.prior import prior
from laver_megatron.tasks.families.reading import digits, text
from laver_megatron.tasks.families.scenes import conjunction, counting, position
from laver_megatron.tasks.question import Question, Request

Family = Callable[[Request], Question]
FAMILIES: dict[str, Family] = {
    "text": text,
    "digits": digits,
    "counting": counting,
    "position": position,
    "conjunction": conjunction,
    "chart": chart,
    "detail": detail,
    "prior": prior,
}
