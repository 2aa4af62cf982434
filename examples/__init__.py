"""`cpd.Pruner` in five training loops; run each from here: ``python -m examples.plain``."""
