"""What the pages point at is there: files, headings and tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import TinyGPT, token_batch

from attnmonitor.alerts import load_rules
from attnmonitor.metrics import METRIC_CLASSES
from attnmonitor.metrics.catalog import METRICS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """The page without its code blocks, in which brackets are code."""
    return re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page is called: its words in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dangling(page: Path) -> list[str]:
    """The links of a page, inside the repository, that lead to no file or no heading."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert dangling(page) == []


def test_a_link_to_what_is_not_there_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Memory of `q` and k\n")
    page.write_text(
        "[a](other.md) [b](other.md#memory-of-q-and-k) [c](https://example.org/x) [d](#here)\n## Here\n"
        "[e](gone.md) [f](other.md#gone) [g](#gone)\n```\n[h](gone.py)\n```\n"
    )
    assert dangling(page) == ["gone.md", "other.md#gone", "#gone"]


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"(test_\w+\.py)::(\w+)", page.read_text())}
    there = {
        (file.name, node.name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 50
    assert sorted(named - there) == []


def test_every_metric_is_in_the_readme_and_has_its_definition() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "what-is-measured.md"):
        text = page.read_text()
        assert [name for name in METRICS if f"`{name}`" not in text] == [], page.name


def test_every_metric_has_a_class_but_the_ratio_of_two_others() -> None:
    assert set(METRICS) - set(METRIC_CLASSES) == {"spectral_gap"}
    assert set(METRIC_CLASSES) <= set(METRICS)


def test_the_rules_that_the_page_on_alerts_shows_can_be_used_as_they_are(in_own_folder: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "alerts.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"model": TinyGPT(), "probe": token_batch()}
    exec(snippet, names)
    assert load_rules("rules.json")[-1] == names["sink"]


@pytest.mark.soak
def test_the_tables_of_large_models_are_those_their_command_prints() -> None:
    command = [sys.executable, "-m", "benchmarks.cost.scale"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {line.strip() for line in (ROOT / "docs" / "cost.md").read_text().splitlines()}
    printed = [line.strip().replace("%", " %") for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(printed) == 12
    assert not [line for line in printed if line not in rows]
