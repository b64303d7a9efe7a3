"""Which model is good enough: the gate, the champion, and the report that CI writes on a retraining."""
