"""A process for one network and one tool: answers each line of input with one line of JSON."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys

TOOLS = ("cpd", "torch_pruning")


def main() -> None:
    """`python -m bench.worker TOOL NETWORK`, then lines "warm_up" and "round"."""
    name, network = sys.argv[1:]
    answers = sys.stdout
    tool = None
    for line in sys.stdin:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the tools may print
                if tool is None:
                    tool = importlib.import_module(f"bench.with_{name}").Tool(network)
                answer = getattr(tool, line.strip())()
        except Exception as error:  # noqa: BLE001 - an exception is a result, and is reported
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[threads] = "1"
    main()
