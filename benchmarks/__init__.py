"""What the pipeline costs, and how measured figures get into the pages. Using the pipeline needs none of it."""
