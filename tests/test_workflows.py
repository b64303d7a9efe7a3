"""The workflows have least privilege, pin everything and hold no logic; GitLab's page calls the same commands."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

GITHUB = sorted((ROOT / ".github/workflows").glob("*.yml"))
GITLAB = ROOT / "docs/gitlab-ci.yml"
SECRETS = re.compile(r"\$\{\{ secrets\.\w+ \}\}")


def load(path: Path) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(path)["jobs"]
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def commands(script: str) -> set[str]:
    """Return the targets of make and the commands of `mnist` that a script calls, such as `make repro`."""
    return set(re.findall(r"\b((?:make|mnist) [a-z-]+)", script))


@pytest.fixture(scope="module")
def retrain() -> Path:
    [path] = [path for path in GITHUB if path.stem == "retrain"]
    return path


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(path: Path) -> None:
    lines = re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_no_expression_is_written_into_a_script(path: Path) -> None:
    scripts = [step["run"] for step in steps(path) if "run" in step]
    assert scripts
    assert [script for script in scripts if "${{" in script] == []


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_a_job_has_only_its_own_rights_and_a_time_limit(path: Path) -> None:
    assert load(path)["permissions"] == {}
    assert load(path)["concurrency"]["group"]
    for job in jobs(path).values():
        assert job["permissions"]
        assert 0 < job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_no_job_that_may_write_runs_anything_of_a_pull_request(retrain: Path) -> None:
    assert "pull_request_target" not in retrain.read_text(encoding="utf-8")
    writing = [job for job in jobs(retrain).values() if "write" in job["permissions"].values()]
    assert len(writing) == 1
    assert all("run" not in step and "checkout" not in step["uses"] for step in writing[0]["steps"])
    assert "github.event.pull_request.head.repo.full_name == github.repository" in writing[0]["if"]


def test_only_a_push_to_main_promotes(retrain: Path) -> None:
    [promotion] = [step for step in steps(retrain) if "promote" in step.get("run", "")]
    assert promotion["if"].startswith("github.event_name == 'push' && ")
    assert load(retrain)[True]["push"]["branches"] == ["main"]  # YAML reads `on` as true


def test_pull_requests_and_pushes_of_the_same_files_retrain(retrain: Path) -> None:
    on = load(retrain)[True]
    assert on["pull_request"]["paths"] == on["push"]["paths"]
    for pattern in on["push"]["paths"]:
        assert list(ROOT.glob(pattern)), pattern


def test_scripts_hold_no_logic(retrain: Path) -> None:
    for path in GITHUB:
        for step in steps(path):
            for line in step.get("run", "").splitlines():
                assert re.match(r"(make|mnist) [a-z-]+|cat ci-report\.md >> ", line), line


def test_pull_requests_get_the_quick_suite_and_main_gets_all_tests_every_week() -> None:
    [ci] = [path for path in GITHUB if path.stem == "ci"]
    on = load(ci)[True]
    assert set(on) == {"pull_request", "push", "schedule"}
    assert on["push"]["branches"] == ["main"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", on["schedule"][0]["cron"])  # once a week
    conditions = {step["run"]: step.get("if") for step in steps(ci) if "run" in step}
    assert conditions == {
        "make check": None,
        "make test": "github.event_name == 'pull_request'",
        "make test-all": "github.event_name != 'pull_request'",
    }


def test_every_target_is_in_the_makefile(retrain: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = set().union(*(commands(step.get("run", "")) for path in GITHUB for step in steps(path)))
    assert {command.removeprefix("make ") for command in called if command.startswith("make ")} <= targets


def test_gitlabs_page_calls_the_same(retrain: Path) -> None:
    page = load(GITLAB)
    called = [command for path in GITHUB for step in steps(path) for command in commands(step.get("run", ""))]
    assert commands("\n".join(page["test"]["script"] + page["retrain"]["script"])) == set(called)
    [matrix] = [
        job["strategy"]["matrix"]["python"] for path in GITHUB for job in jobs(path).values() if "strategy" in job
    ]
    assert page["test"]["parallel"]["matrix"] == [{"PYTHON": matrix}]
    assert {pattern.removesuffix("/*") for pattern in page["retrain"]["rules"][1]["changes"]} == {
        pattern for pattern in load(retrain)[True]["push"]["paths"] if not pattern.startswith(".github")
    }


def test_zizmor_finds_nothing() -> None:
    command = ["zizmor", "--offline", "--quiet", "--strict-collection", ".github"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
