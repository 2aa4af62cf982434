"""The zoo: networks that people use, each combed, pruned, proved and exported.

`python -m zoo` runs what is not yet known, one process per network, and keeps a row of each under
docs/coverage.jsonl; `--write-docs` makes docs/coverage.md and docs/coverage.csv of all rows.
"""
