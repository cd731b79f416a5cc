"""What belongs to a release: one version everywhere, and workflows that are pinned and run commands of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attnmonitor import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_version_is_the_same_everywhere() -> None:
    [cited] = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0]
    assert cited == newest == __version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_pinned_and_may_only_read(path: Path) -> None:
    text = path.read_text()
    actions = re.findall(r"uses: (.+)$", text, flags=re.MULTILINE)
    assert actions
    assert [each for each in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", each)] == []
    assert "\npermissions:\n  contents: read\n" in text
    assert re.findall(r": write", text) == [": write"] * (path.stem == "release")


def test_workflows_run_commands_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    run = set(re.findall(r"run: make (\w+)", text)) | set(re.findall(r"versions: (\w+)", text)) - {"pinned"}
    run |= set(",".join(re.findall(r"target: \[(.+)\]", text)).replace(" ", "").split(","))
    assert len(run) >= 8
    assert run - targets == set()


def test_matrix_has_every_python_and_both_ends_of_versions() -> None:
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    matrix = set(re.findall(r"versions: (\w+), python: \"([\d.]+)\"", text))
    classified = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert classified == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert {("newest", python) for python in classified} <= matrix
    assert ("lowest", classified[0]) in matrix
