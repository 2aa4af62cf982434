"""Accuracy after pruning: every importance, strategy and repair, beside Torch-Pruning.

`python -m bench.accuracy` runs what of the grid has no record yet, writes docs/results.jsonl, and
makes docs/results.md and its plots of it. Stopped at any time, it goes on where it was.
"""
