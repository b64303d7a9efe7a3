"""README and docs tell the truth: figures come from the reports; commands, options, params, links and folders exist."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from benchmarks.pages import renew
from support import ROOT

from mnist_pipeline.cli import mnist
from mnist_pipeline.common.params import Params, flatten

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def lines_of_code(page: Path) -> list[str]:
    """Return what stands in code blocks, without comments, and in code spans."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in blocks for line in block.splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_its_figures_are_those_of_the_reports(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert renew(read(page)) == read(page), "make readme"


def test_a_figure_that_is_not_of_the_reports_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    altered = read(README).replace("19,210            | 19,210", "19,211            | 19,210")
    assert altered != read(README)
    assert renew(altered) == read(README)


def test_the_readme_opens_with_the_results_and_stays_short() -> None:
    text = read(README)
    assert text.index("| Final test accuracy ") < text.index("\n## ")
    assert len(text.split()) <= 1500
    assert len(text.splitlines()) <= 160


def test_the_readme_links_every_page() -> None:
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in read(README)] == []


def test_the_readmes_tree_names_every_folder_of_the_package() -> None:
    folders = {path.parent.name for path in (ROOT / "src/mnist_pipeline").glob("*/__init__.py")}
    assert set(re.findall(r"^    (\w+)/ ", read(README), flags=re.MULTILINE)) == folders


@each_page
def test_every_target_that_it_names_is_in_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    named = {match[1] for line in lines_of_code(page) if (match := re.match(r"(?:\w+=\S+ )?make ([a-z-]+)", line))}
    assert named <= targets
    assert page != README or {"repro", "test"} <= named


@each_page
def test_every_command_of_mnist_that_it_names_exists_and_takes_its_options(page: Path) -> None:
    for line in lines_of_code(page):
        if not (match := re.match(r"(?:\w+=\S+ )?mnist (\w.*)", line)):
            continue
        words = shlex.split(match[1])
        command: click.Command = mnist
        while isinstance(command, click.Group) and words:
            name = words.pop(0)
            assert name in command.commands, line
            command = command.commands[name]
        if command.context_settings.get("ignore_unknown_options"):  # they go to DVC
            continue
        known = {option for param in command.params for option in param.opts}
        assert [word for word in words if word.startswith("-") and word not in known] == [], line


@each_page
def test_every_param_that_it_sets_is_in_the_params(page: Path, params: Params) -> None:
    named = re.findall(r"-S (\S+?)=", read(page))
    assert set(named) <= set(flatten(params.model_dump()))
    assert named or page.name != "compare-runs.md"


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", read(page))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each_page
def test_every_change_of_code_that_it_shows_fits_the_code(page: Path) -> None:
    for change in re.findall(r"^```diff\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL):
        subprocess.run(["git", "apply", "--check"], cwd=ROOT, input=change, text=True, check=True)
