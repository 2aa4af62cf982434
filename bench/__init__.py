"""Side-by-side measurements: CPD and Torch-Pruning on the same networks, in the same run.

`python -m bench` prints the table, writes `out/bench.json`, and with `--write-docs` the page
`docs/bench.md`. Each (network, tool) has a process of its own with one thread; the two of a network
take turns, in alternating order, so that whatever else the machine does meets both.
"""
