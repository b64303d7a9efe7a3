"""One training in several processes. Nothing outside this folder knows of it; skip it on a first reading."""
