"""What README and docs/ refer to is there."""

import ast
import re
from pathlib import Path

import pytest

from laver_megatron.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files(page):
    """Not of the changelog, which names files that are gone."""
    path = r"(?<![\w/])((?:laver_megatron|tools|examples|tests|docs)/[\w/-]+\.(?:py|sh|yaml|md))"
    named = re.findall(path, page.read_text())
    assert page.stem == "CHANGELOG" or [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", ["architecture", "method"])
def test_files_and_functions_of_the_package(page):
    """Every path, and every `file.py:name`, relative to laver_megatron/."""
    text = (ROOT / f"docs/{page}.md").read_text()
    for name in re.findall(r"`([\w/]+(?:\.py|/))[`:]", text):
        assert (ROOT / "laver_megatron" / name).exists() or (ROOT / name).exists(), name
    for name, defined in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        body = ast.parse((ROOT / "laver_megatron" / name).read_text()).body
        for part in defined.split("."):
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
            assert found, f"{name} defines no {defined}"
            body = found[0].body


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for first, second in re.findall(r"(?:^| )laver ([a-z][\w-]*)(?: ([a-z]\w*))?", "\n".join(blocks), re.MULTILINE):
        assert first in COMMANDS or f"{first} {second}" in COMMANDS, f"{page.name}: laver {first} {second}"


def test_hooks_run_the_pinned_ruff():
    pinned = re.search(r"^ruff==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\w.]+", hooks)) == {pinned}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
