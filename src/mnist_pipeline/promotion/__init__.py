"""Decide which model is good enough: the gate, the champion, and CI's report on a retraining."""
