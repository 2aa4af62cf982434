"""Metrics in a process of their own, where nothing else made their library importable."""

from __future__ import annotations

import subprocess
import sys

import house

CODE = """
from cpd import tasks
print(list(tasks.resolve({name!r}).metrics()))
"""


def test_metrics_come_first() -> None:
    for name, found in (
        ("segmentation", "['segmentation']"),
        ("classification", "['top1', 'top5']"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(name=name)],
            cwd=house.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, found), done.stderr
