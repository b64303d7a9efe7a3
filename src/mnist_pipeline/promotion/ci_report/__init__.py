"""What a retraining changed against a base commit, as a comment on the pull request (`mnist ci-report`)."""
