"""Compare a retraining with a base commit, as a comment on the pull request (`mnist ci-report`)."""
