"""What the pages name exists: files, headings, tests, modules, commands, metrics, rules and rooms."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch, train
from torch import Tensor, nn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import DEFAULT_RULES, load_rules
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.metrics import METRIC_CLASSES
from attnmonitor.metrics.catalog import METRICS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
PAGES = [*TOP, *sorted(DOCS.glob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # a changelog names what is gone, too


def prose(page: Path) -> str:
    """The page without its code blocks, in which brackets are code."""
    return re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def section(page: Path, heading: str) -> str:
    """The page's text under a heading of the second level."""
    [text] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)
    return text


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page is called: its words in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
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


def missing_files(page: Path) -> list[str]:
    """The source files and folders that a page names and that are nowhere in the repository."""
    text = page.read_text()
    files = set(re.findall(r"(?<![\w/.*<])[\w./-]*\w\.(?:py|toml)\b", text))
    folders = set(re.findall(r"`([\w/]+/)`", text))
    places = [ROOT, ROOT / "attnmonitor", ROOT / "tests", DOCS]
    sources = ("attnmonitor", "callbacks", "tests", "benchmarks", "examples", "docs")
    known = {path.name for place in sources for path in (ROOT / place).rglob("*.py")}
    return sorted(
        name
        for name in files | folders
        if not any((place / name).exists() for place in places) and not ("/" not in name and name in known)
    )


def missing_names(page: Path) -> list[str]:
    """The dotted names of the package that a page names and that cannot be imported."""
    found = []
    for dotted in sorted(set(re.findall(r"\battnmonitor(?:\.\w+)+", page.read_text()))):
        if re.fullmatch(r"attnmonitor\.(sqlite|pt|svg)", dotted):
            continue
        value, rest = importlib.import_module("attnmonitor"), dotted.split(".")[1:]
        for index, part in enumerate(rest):
            if not hasattr(value, part):
                try:
                    importlib.import_module(".".join(["attnmonitor", *rest[: index + 1]]))
                except ModuleNotFoundError:
                    found.append(dotted)
                    break
            value = getattr(value, part)
    return found


def missing_commands(page: Path) -> list[str]:
    """The commands of a page, ``python -m package.module`` or ``python file``, for which there is no file."""
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:benchmarks|attnmonitor)[\w.]*)", text))
    scripts = set(re.findall(r"python ([\w/]+\.py)", text))

    def is_command(module: str) -> bool:
        path = ROOT / module.replace(".", "/")
        return path.with_suffix(".py").exists() or (path / "__main__.py").exists()

    gone = {name for name in modules if not is_command(name)} | {name for name in scripts if not (ROOT / name).exists()}
    return sorted(gone)


def test_no_page_holds_an_unresolved_merge() -> None:
    assert not [page.name for page in PAGES if re.search("^[<>]{7} ", page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_named_files_names_and_commands_exist(page: Path) -> None:
    assert missing_files(page) == []
    assert missing_names(page) == []
    assert missing_commands(page) == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Memory of `q` and k\n")
    page.write_text(
        "[a](other.md) [b](other.md#memory-of-q-and-k) [c](https://example.org/x) [d](#here)\n## Here\n"
        "[e](gone.md) [f](other.md#gone) [g](#gone)\n```\n[h](gone.py)\n```\n"
        "`messages.py` `capture/mode.py` `alerts/` `capture/gone.py` `nowhere/`\n"
        "attnmonitor.alerts.Rule attnmonitor.alerts.Gone attnmonitor.gone\n"
        "python -m benchmarks.detection and python -m benchmarks.gone and python examples/gone.py\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#gone", "#gone"]
    assert missing_files(page) == ["capture/gone.py", "examples/gone.py", "gone.py", "nowhere/"]
    assert missing_names(page) == ["attnmonitor.alerts.Gone", "attnmonitor.gone"]
    assert missing_commands(page) == ["benchmarks.gone", "examples/gone.py"]


def test_moved_names_are_where_the_changelog_says(tmp_path: Path) -> None:
    [tables] = re.findall(r"^### Moved and renamed\n(.*?)^### ", TOP[2].read_text(), flags=re.DOTALL | re.MULTILINE)
    rows = [row.split("|")[1:3] for row in re.findall(r"^\| `.*$", tables, flags=re.MULTILINE)]
    before, now = tmp_path / "before.md", tmp_path / "now.md"
    before.write_text("\n".join(old for old, _ in rows))
    now.write_text("\n".join(new for _, new in rows))
    gone = sorted(set(re.findall(r"\battnmonitor(?:\.\w+)+", before.read_text())))
    assert len(gone) > 55
    assert missing_names(before) == gone
    assert missing_names(now) == []
    assert missing_commands(now) == []


def test_named_tests_exist() -> None:
    named = {name for page in CURRENT for name in re.findall(r"([\w/]*test_\w+\.py)::(\w+)", page.read_text())}
    there = {
        (file.relative_to(ROOT / "tests").as_posix(), node.name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 50
    assert sorted(named - there) == []


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "what-is-measured.md"], ids=lambda page: page.name)
def test_every_metric_has_a_row(page: Path) -> None:
    rows = "".join(re.findall(r"^\| `.*$", page.read_text(), flags=re.MULTILINE))
    assert [name for name in METRICS if f"`{name}`" not in rows] == []


def test_every_metric_but_a_ratio_has_a_class() -> None:
    assert set(METRICS) - set(METRIC_CLASSES) == {"spectral_gap"}
    assert set(METRIC_CLASSES) <= set(METRICS)


def test_every_default_rule_has_a_row_with_its_kind() -> None:
    rows = section(DOCS / "alerts.md", "The default rules").splitlines()
    listed = {
        (name, kind.strip(" `"))
        for names, kind in (row.split("|")[1:3] for row in rows if row.startswith("| `"))
        for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == {(rule.name, rule.kind) for rule in DEFAULT_RULES}


def test_alerts_guide_is_short() -> None:
    assert len((DOCS / "alerts.md").read_text().splitlines()) < 150


def test_design_lists_the_rooms_in_their_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    enforced = {(layer, room.strip()) for layer, rooms in enumerate(layers, start=1) for room in rooms.split("|")}
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)`", section(DOCS / "design.md", "Rooms"), flags=re.MULTILINE)
    assert {(int(layer), room) for layer, room in rows} == enforced


def test_rules_of_the_alerts_guide_work(in_own_folder: Path) -> None:
    [snippet] = snippets(DOCS / "alerts.md")
    names: dict[str, Any] = {"model": TinyGPT(), "probe": token_batch()}
    exec(snippet, names)
    assert load_rules("rules.json")[-1] == names["sink"]


def test_architectures_page_opens_as_generated() -> None:
    from benchmarks.pages.architectures import HEADINGS, PREAMBLE

    text = (DOCS / "architectures.md").read_text()
    assert text.startswith(PREAMBLE)
    assert "| " + " | ".join(HEADINGS) + " |" in text


def test_evaluation_page_has_the_generated_headings() -> None:
    generated = (ROOT / "benchmarks" / "detection" / "__main__.py").read_text()
    headings = re.findall(r"\"(### [^\"]+)\"", generated)
    assert len(headings) == 8
    assert [line for line in headings if f"\n{line}\n" not in (DOCS / "alert-evaluation.md").read_text()] == []


def test_extending_has_its_six_recipes() -> None:
    headings = re.findall(r"^## (.+)$", (DOCS / "extending.md").read_text(), flags=re.MULTILINE)
    wanted = ["A metric", "An attention the capture does not see", "A logger", "An adapter", "A rule", "A plot"]
    assert headings == wanted


def recipe(heading: str) -> str:
    """The first snippet under a heading of the page on extending."""
    return re.findall(r"```python\n(.*?)```", section(DOCS / "extending.md", heading), flags=re.DOTALL)[0]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def test_capture_recipe_works() -> None:
    def unseen_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT / query.shape[-1] ** 0.5).exp().tril()
        return weights / weights.sum(-1, keepdim=True) @ value

    names: dict[str, Any] = {"nn": nn, "my_kernel": unseen_softmax}
    exec(recipe("An attention the capture does not see"), names)

    class Layer(names["MyAttention"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.project, self.scale = nn.Linear(16, 48), nn.Linear(16, 16), 8**-0.5

        def heads(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    monitor = AttentionMonitor(nn.Sequential(nn.Linear(16, 16), Layer()), torch.randn(2, 12, 16), record=None)
    [layer] = monitor.coverage.values()
    assert layer.how == "explicit"
    assert layer.measured
    assert layer.error < 1e-5


def test_logger_recipe_works() -> None:
    model = TinyGPT()
    optimizer = optimizer_of(model)
    names: dict[str, Any] = {"attach": attach, "model": model, "optimizer": optimizer, "probe": token_batch()}
    exec(recipe("A logger"), names)
    train(model, optimizer, 1)
    names["monitor"].close()
    [line] = Path("heads.jsonl").read_text().splitlines()
    assert "attention/key_rms/median" in json.loads(line)


def test_adapter_recipe_works() -> None:
    steps: list[int] = []
    names: dict[str, Any] = {
        "model": TinyGPT(),
        "probe": token_batch(),
        "loader": range(100),
        "train_step": steps.append,
    }
    exec(recipe("An adapter"), names)
    assert names["monitor"].history.steps == [0, 100]
    assert len(steps) == 100


def test_rule_and_plot_recipes_work() -> None:
    with AttentionMonitor(TinyGPT(), token_batch()) as monitor:
        monitor.sample(0), monitor.sample(1)
    names: dict[str, Any] = {"path": monitor.record_path, "model": TinyGPT(), "probe": token_batch()}
    exec(recipe("A rule"), names)
    assert "keys_flat" in names["monitor"].describe()["alerts"]
    exec(recipe("A plot"), names)
    assert Path("key_rms.png").stat().st_size > 10_000


@pytest.mark.soak
def test_tables_of_large_models_are_as_printed() -> None:
    command = [sys.executable, "-m", "benchmarks.cost.scale"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {line.strip() for line in (DOCS / "cost.md").read_text().splitlines()}
    printed = [line.strip().replace("%", " %") for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(printed) == 12
    assert not [line for line in printed if line not in rows]
