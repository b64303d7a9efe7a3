"""The report: tables and charts of a run, beside the published figures, as Markdown and as a page."""
