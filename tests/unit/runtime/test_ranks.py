"""An error of one rank that all raise together."""

import pytest

from laver_megatron.runtime import ranks
from laver_megatron.runtime.exit_status import OF_ANOTHER_RANK


@pytest.mark.parametrize("rank, notes", [(0, [OF_ANOTHER_RANK]), (1, []), (2, [OF_ANOTHER_RANK])])
def test_the_others_know_that_it_is_not_theirs(monkeypatch, rank, notes):
    """As on three ranks, of which the second, and later the third, fails."""
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(ranks, "gathered", lambda problem: [None, (OSError, "full"), (ValueError, "x")])

    with pytest.raises(OSError, match="^could not write: rank 1: full") as caught:
        ranks.all_ranks("write", lambda: None)
    assert getattr(caught.value, "__notes__", []) == notes
