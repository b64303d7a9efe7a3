"""The README tells the truth: its figures are those of the reports, its commands and files are there."""

import re

import pytest
from mnist_pipeline.BENCH.pages import renew
from support import ROOT

from mnist_pipeline.common.params import Params, flatten

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_figures_are_those_of_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert renew(README) == README, "make readme"


def test_a_figure_that_is_not_of_the_reports_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    altered = README.replace("| Parameters | 19,210", "| Parameters | 19,211")
    assert altered != README
    assert renew(altered) == README


def test_it_opens_with_the_results() -> None:
    assert README.index("| Final test accuracy |") < README.index("## ")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_target_that_it_names_is_in_the_makefile(page: str) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = re.findall(
        r"(?:^|`)(?:\w+=\S+ )?make (\w+)(?![\w=])", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {"repro", "test"} <= set(named)
    assert set(named) <= set(targets)


def test_every_param_that_it_sets_is_in_the_params(params: Params) -> None:
    named = re.findall(r"-S (\S+?)=", README)
    assert named
    assert set(named) <= set(flatten(params.model_dump()))


def test_its_tree_names_every_module() -> None:
    package = ROOT / "src/mnist_pipeline"
    tree = README[README.index("params.yaml              ") : README.index("reports/                 ")]
    named = re.findall(r"^    (\w+(?:\.py|/)) ", tree, flags=re.MULTILINE)
    modules = {f"{file.name}" for file in package.glob("*.py")} - {"__init__.py"}
    packages = {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert sorted(named) == sorted(modules | packages)
