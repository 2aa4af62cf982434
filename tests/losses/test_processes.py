"""Losses that learn or remember, on one process and on two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import house

SCRIPT = Path(__file__).with_name("dense_processes.py")


def launched(out: Path, *launcher: str) -> None:
    place = os.pathsep.join([str(house.SOURCE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), str(out)],
        env=os.environ | {"PYTHONPATH": place, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_learn_and_remember_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launched(one)
    launched(two, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    single = load_file(one / "mgd-0")
    first, second = (load_file(two / f"mgd-{rank}") for rank in (0, 1))
    for name, tensor in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
    # the similarities within a batch are of each process's share, the queues of all of it
    first, second = (load_file(two / f"cirkd-{rank}") for rank in (0, 1))
    counts = [name for name in first if name.endswith("count")]
    assert len(counts) == 2
    single = load_file(one / "cirkd-0")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name in counts:
            assert torch.equal(tensor, single[name])
