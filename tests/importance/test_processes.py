"""Two processes with half a batch each find the scores of one with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from importance import two

HERE = Path(__file__).resolve().parent


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    places = [str(HERE.parent.parent / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "two.py"), str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    wanted = two.cases()  # worked out while they run
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    found = load_file(tmp_path / "scores")
    assert set(found) == set(wanted)
    for name, vector in wanted.items():
        torch.testing.assert_close(found[name], vector, rtol=1e-9, atol=1e-13, msg=name)
