"""What to do about tensors that are all there, but under names with another beginning than the model's."""

from collections import Counter
from collections.abc import Collection, Iterator

# What puts itself before all names, and where the model is that should have been saved.
_WRAPPERS = {"_orig_mod.": "torch.compile's; save model._orig_mod", "module.": "data parallelism's; save model.module"}


def misnamed(found: Collection[str], missing: Collection[str], known: Collection[str] = ()) -> str:
    """What most of the missing tensors' names begin with in the files and what they should begin with, and the exact
    remedy; empty if that is not what is wrong.

    Args:
        found: names without a place in the model.
        known: other beginnings that would do.
    """
    pair = _other_beginning(found, missing)
    if pair is None:
        return ""
    beginning, meant = pair
    beginning = next((beginning.removesuffix(end) for end in known if beginning.endswith(end)), beginning)
    if beginning == meant:
        return ""
    wrapper = next((f" ({whose})" for name, whose in _WRAPPERS.items() if beginning.startswith(name)), "")
    begin = f"begin with {beginning!r}{wrapper}" if beginning else f"lack {meant!r} at their beginning"
    instead = f", not with {meant!r}" if beginning and meant else ""
    stripped = f"name.removeprefix({beginning!r})" if beginning else "name"
    new_name = f"{meant!r} + {stripped}" if meant else stripped
    others = [name for name in missing if not (name.startswith(meant) and pair[0] + name.removeprefix(meant) in found)]
    more = f"; besides, {len(others)} are missing, such as {others[0]}" if others else ""
    return (
        f"the names of its tensors {begin}{instead}: rename each such tensor to {new_name}, in the files (load_file "
        f"and save_file of safetensors.torch) and in their index{more}"
    )


def _other_beginning(found: Collection[str], missing: Collection[str]) -> tuple[str, str] | None:
    """(beginning, meant): under what most of the missing tensors are found, and what their names should begin with.
    `_orig_mod.model.norm.weight` for `model.norm.weight` is ("_orig_mod.", "")."""
    beginnings_of: dict[str, list[str]] = {}
    for name in found:
        for beginning, end in _splits(name):
            beginnings_of.setdefault(end, []).append(beginning)
    votes: Counter[tuple[str, str]] = Counter()
    for name in missing:
        # The longest end that both have.
        meant, end = next(((meant, end) for meant, end in _splits(name) if end in beginnings_of), ("", ""))
        votes.update((beginning, meant) for beginning in beginnings_of.get(end, ()))
    best, num_votes = max(votes.items(), key=lambda item: (item[1], item[0]), default=(None, 0))
    return best if 2 * num_votes > len(missing) else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """(beginning, end) of a name, the longest end first. An end has at least two words, and no layer number before it:
    that would be a tensor of another layer."""
    words = name.split(".")
    for i in range(len(words) - 1):
        yield "".join(f"{word}." for word in words[:i]), ".".join(words[i:])
        if words[i].isdecimal():
            return
