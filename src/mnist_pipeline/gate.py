"""A stand-in for the gate until its branch is merged: the interface that `ci_report` calls, and no rule."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a rule asks and what it found, and whether that passes."""

    rule: str
    bound: str
    value: str
    passed: bool


def judge() -> list[Verdict]:
    """Judge the model in the workspace by no rule at all."""
    return []


def render(verdicts: Sequence[Verdict]) -> str:
    """Return a Markdown table of verdicts."""
    rows = [f"| {v.rule} | {v.bound} | {v.value} | {'passed' if v.passed else '**failed**'} |" for v in verdicts]
    return "\n".join(["| Rule | Bound | Value | Verdict |", "| --- | --- | --- | --- |", *rows])
