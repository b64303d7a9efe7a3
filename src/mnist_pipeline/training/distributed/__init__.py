"""One training in several processes. The training loop knows nothing of it: skip this folder on a first reading."""
