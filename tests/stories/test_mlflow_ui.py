"""A run in MLflow's own pages, in a real browser: its name, its description, its curves and its report."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page, expect
from support.browser import browser, is_local  # noqa: F401 (a fixture)
from support.in_process import run_stage
from support.repository import REPORTS, Repository
from support.servers import serving

pytestmark = [pytest.mark.pipeline, pytest.mark.thorough]

EPOCHS = 3
PATIENCE = 30_000  # milliseconds, for pages of some megabytes


@dataclass(frozen=True)
class Tracked:
    """A run in the database of its repository, and the address of a server on it."""

    repository: Repository
    address: str

    @property
    def commit(self) -> str:
        return self.repository.run("git", "rev-parse", "--short=7", "HEAD").stdout.strip()

    @property
    def experiment(self) -> str:
        """The address of the list of runs."""
        [run] = self.repository.runs()
        return f"{self.address}/#/experiments/{run.info.experiment_id}"

    @property
    def page(self) -> str:
        """The address of the run."""
        [run] = self.repository.runs()
        return f"{self.experiment}/runs/{run.info.run_id}"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    repository = Repository.create_with_data(tmp_path_factory.mktemp("tracked")).init()
    repository.set_param("epochs", EPOCHS)
    for stage in ("train", "evaluate", "report"):
        said = run_stage(repository, stage)
        assert said.returncode == 0, said.stdout
    with serving(repository.root, f"sqlite:///{repository.root / 'mlflow.db'}") as server:
        yield Tracked(repository, server.uri)


@pytest.fixture
def ui(browser: Browser) -> Iterator[Page]:
    """Open an empty page; the test fails if it asks another machine for anything."""
    foreign: list[str] = []
    with browser.new_context(viewport={"width": 1400, "height": 1000}) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: None if is_local(request.url) else foreign.append(request.url))
        yield page
    assert foreign == []


def test_the_run_is_listed_by_the_commit_and_what_differs_from_it(ui: Page, tracked: Tracked) -> None:
    ui.goto(f"{tracked.experiment}?workflowType=machine_learning")
    run = ui.get_by_role("link", name=f"{tracked.commit} train.epochs={EPOCHS}")
    expect(run).to_be_visible(timeout=PATIENCE)
    run.click()
    expect(ui.get_by_role("heading", name=f"{tracked.commit} train.epochs={EPOCHS}")).to_be_visible(timeout=PATIENCE)


def test_the_run_is_described_by_what_its_test_found(ui: Page, tracked: Tracked) -> None:
    ui.goto(tracked.page)
    description = ui.get_by_text(re.compile(r"of 200 test images right, \d+ wrong\. Loss \d\.\d{4}, calibration error"))
    expect(description).to_be_visible(timeout=PATIENCE)
    expect(description.locator("strong")).to_have_text(re.compile(r"^\d+\.\d\d%$"))


@pytest.mark.parametrize("metric", ["train_loss", "train_accuracy", "monitor_loss", "monitor_accuracy"])
def test_the_run_has_its_curves(ui: Page, tracked: Tracked, metric: str) -> None:
    ui.goto(f"{tracked.page}/model-metrics")
    ui.get_by_placeholder("Search metric charts").fill(f"^{metric}$")
    expect(ui.locator(".js-plotly-plot")).to_have_count(1, timeout=PATIENCE)
    expect(ui.locator(".js-plotly-plot .scatterlayer path.point")).to_have_count(EPOCHS, timeout=PATIENCE)


def test_the_report_is_displayed_among_the_artifacts(ui: Page, tracked: Tracked) -> None:
    ui.goto(f"{tracked.page}/artifacts/reports/report.html")
    for name in REPORTS:
        expect(ui.get_by_text(name, exact=True).first).to_be_visible(timeout=PATIENCE)
    report = ui.frame_locator("iframe")
    expect(report.locator("h1")).to_have_text("MNIST digit classification with 19,210 parameters", timeout=PATIENCE)
    expect(report.locator(".chart svg")).to_have_count(8, timeout=PATIENCE)
