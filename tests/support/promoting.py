"""One model after another on its way to the champion's place."""

import json
import subprocess
from dataclasses import dataclass, field

from support.repository import Repository

BOUNDS = {"lowest_accuracy": 0.5, "largest_calibration_error": 0.5, "margin": 0.1}


@dataclass(frozen=True)
class Story:
    """What the commands said that promoted one model after another, and where the aliases were after each."""

    repository: Repository
    ended: dict[str, "subprocess.CompletedProcess[str]"] = field(default_factory=dict)
    after: dict[str, dict[str, int]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    def train(self, name: str, epochs: int) -> None:
        """Run the pipeline and commit what it made."""
        self.repository.set_param("epochs", epochs)
        ended = self.repository.dvc("repro", MNIST_TRACKING="required")
        assert ended.returncode == 0, ended.stdout
        self.repository.commit()
        self.commits[name] = self.repository.run("git", "rev-parse", "HEAD").stdout.strip()

    def do(self, name: str, *command: str) -> None:
        self.ended[name] = self.repository.run(*command)
        self.after[name] = self.aliases()

    def said(self, name: str) -> str:
        return self.ended[name].stdout

    def aliases(self) -> dict[str, int]:
        [model] = self.repository.client.search_registered_models()
        return {alias: int(number) for alias, number in model.aliases.items()}

    def records(self, number: int) -> list[dict[str, object]]:
        tags = self.repository.client.get_model_version("mnist", str(number)).tags
        return [json.loads(value) for _, value in sorted(tags.items())]

    def settle(self, champion: int, versions: set[int]) -> None:
        """Begin anew with one champion and no others but these versions."""
        client = self.repository.client
        for version in client.search_model_versions("name = 'mnist'"):
            if int(version.version) not in versions:
                client.delete_model_version("mnist", version.version)
        for alias in self.aliases():
            client.delete_registered_model_alias("mnist", alias)
        client.set_registered_model_alias("mnist", "champion", str(champion))
