"""Make the model in the workspace the registry's champion, or undo that (`mnist promote`)."""

import os
import platform

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.paths import MODEL
from mnist_pipeline.promotion.gate import judge, render_verdicts
from mnist_pipeline.tracking.git import commit_tags, run_git
from mnist_pipeline.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, REGISTERED_MODEL, Registry
from mnist_pipeline.tracking.store import Store, store_errors


def promote_model(reason: str) -> None:
    """Make the model in the workspace the challenger and, if the gate passes, the champion.

    Raises:
        UserError: the gate fails, MLflow fails or has no run of the model, or another promotion came between.
    """
    if not MODEL.is_file():
        raise UserError(f"{MODEL} is absent: `dvc repro` makes it, `dvc pull` brings it")
    with store_errors():
        registry = Registry(Store(patient=True))
    with registry.lock():
        with store_errors():
            version, champion = registry.register(MODEL), registry.find(CHAMPION)
            if version == champion:
                registry.drop_alias(CHALLENGER, version)  # a promotion that died may have left it
                print(f"{version} of {REGISTERED_MODEL} is the champion already")
                return
        verdicts = judge()
        print(render_verdicts(verdicts), flush=True)
        failed = [verdict.rule for verdict in verdicts if not verdict.passed]
        move = _describe_move(reason) | {"gate": f"failed: {', '.join(failed)}" if failed else "passed"}
        with store_errors():
            registry.challenge(version, move)
            if failed:
                aliases = f"{version} of {REGISTERED_MODEL} is the challenger, {champion or 'none'} the champion"
                raise UserError(f"the gate failed: {aliases}")
            registry.promote(version, champion, move)
    print(f"{version} of {REGISTERED_MODEL} is the champion" + (f", {champion} the previous one" if champion else ""))


def roll_back_model(reason: str) -> None:
    """Make the previous champion the champion again.

    Raises:
        UserError: there is no previous champion, or MLflow fails.
    """
    with store_errors():
        registry = Registry(Store(patient=True))
        with registry.lock():
            champion, previous = registry.find(CHAMPION), registry.find(PREVIOUS)
            if previous is None:
                raise UserError(f"{REGISTERED_MODEL} has no previous champion: there is nothing to undo")
            registry.roll_back(champion, previous, _describe_move(reason))
    print(f"{previous} of {REGISTERED_MODEL} is the champion again")


def _describe_move(reason: str) -> dict[str, str]:
    """Return who makes a move (git's committer, else account and machine), the commit and the reason."""
    identity, _, _ = run_git("var", "GIT_COMMITTER_IDENT").rpartition(" <")
    account = f"{os.environ.get('USER', 'unknown')} at {platform.node()}"
    return {"by": identity or account, "commit": commit_tags()["git_commit"], "reason": reason}
