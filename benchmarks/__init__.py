"""Measure what the pipeline costs, and copy figures into the pages. The pipeline itself does not need this folder."""
