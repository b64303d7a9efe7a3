"""What tests share. No test imports a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "digits"  # five hundred real digits
