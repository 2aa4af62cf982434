"""`python -m bench.large`: networks of billions of parameters, planned without weights.

Each line of the page is a process of its own with one thread; seconds are those of its processor,
whatever else the machine does, and its peak memory is what the system reports for it (`getrusage`),
Python and PyTorch included. This process imports nothing large, since a child starts with its
parent's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

# Sizes as published; the weights are never made.
LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip
MIXTRAL_8X7B = LLAMA_2_7B | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip
HUNDRED_MILLION = LLAMA_2_7B | {
    "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
LARGE = {
    "Llama-2-7B": ("Llama", LLAMA_2_7B),
    "Llama-3-8B": ("Llama", LLAMA_3_8B),
    "Mixtral-8x7B": ("Mixtral", MIXTRAL_8X7B),
}
DEPTHS = (4, 8, 16, 32)
SMALL = ("timm:resnext50_32x4d", "timm:densenet121")
EXPERTS = "batched_mm"  # the default, grouped_mm, is defined in bfloat16 alone without values
LIMITS = {"seconds": 60, "peak": 2 * 2**30}


# In the child processes


def peak() -> int:
    """Return the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def language_model(kind: str, sizes: dict[str, int], device: str) -> Any:
    """Return a network with random weights, or on the meta device without any."""
    import torch

    from cpd import _torchvision

    _torchvision.ensure()
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    options = {"experts_implementation": EXPERTS} if "num_local_experts" in sizes else {}
    with torch.device(device):
        return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, **options).eval()


def planned(model: Any, inputs: Any, target: str) -> tuple[dict[str, Any], Any]:
    """Return seconds of each step with what was found, and the plan."""
    import cpd

    module: Any = sys.modules["cpd.comb"]  # the name `cpd.comb` is the function
    trace, seconds = module.trace, {}

    def clock(step: str, function: Any, *args: Any) -> Any:
        start = process_time()
        result = function(*args)
        seconds[step] = process_time() - start
        return result

    module.trace = lambda *args: clock("trace", trace, *args)
    try:
        groups = clock("comb", cpd.comb, model, inputs)
    finally:
        module.trace = trace
    seconds["comb"] -= seconds["trace"]
    scores = cpd.importance.score("random", model, groups)
    plan = clock("choose", cpd.choose, groups, scores, target)
    units: dict[str, int] = {}
    for family in (family for group in groups for family in group.families):
        units[family.kind] = units.get(family.kind, 0) + family.width
    found = {
        **seconds,
        "nodes": len(groups.trace.graph.nodes),
        "groups": len(groups),
        "units": units,
        "params": plan.costs["params"],
        "macs": plan.costs["macs"],
    }
    return found, plan


def large(name: str, depth: str = "") -> dict[str, Any]:
    """Plan a network on the meta device."""
    import torch

    kind, sizes = LARGE[name]
    sizes = sizes | ({"num_hidden_layers": int(depth)} if depth else {})
    start = process_time()
    model = language_model(kind, sizes, "meta")
    ids = torch.zeros(1, 16, dtype=torch.long, device="meta")
    built = process_time()
    found, plan = planned(model, {"input_ids": ids, "use_cache": False}, "params=0.7")
    text = plan.to_json()
    ended = process_time()
    return {**found, "json": len(text), "seconds": ended - built, "build": built - start}


def small(name: str) -> dict[str, Any]:
    """Comb, choose and cut a network of images; the second round counts, the first warms up."""
    import cpd

    from .networks import make

    model, inputs = make(name)
    for _ in range(2):
        found, plan = planned(model, inputs, "macs=0.5")
        start = process_time()
        cpd.cut(model, plan, verify=False)
        found["cut"] = process_time() - start
    return found


def make_checkpoint(folder: str) -> dict[str, Any]:
    """Write a checkpoint of a hundred million random parameters in shards of 100 MB."""
    model = language_model("Llama", HUNDRED_MILLION, "cpu")
    model.save_pretrained(Path(folder) / "whole", max_shard_size="100MB")
    files = sorted((Path(folder) / "whole").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    return {"params": model.num_parameters(), "files": sizes}


def plan_checkpoint(folder: str) -> dict[str, Any]:
    """Plan it on the meta device."""
    import torch

    model = language_model("Llama", HUNDRED_MILLION, "meta")
    ids = torch.zeros(1, 16, dtype=torch.long, device="meta")
    found, plan = planned(model, {"input_ids": ids, "use_cache": False}, "params=0.7")
    (Path(folder) / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    return found


def cut_checkpoint(folder: str) -> dict[str, Any]:
    """Cut it shard by shard; memory counts from the moment when only the plan is there."""
    from cpd.plan import Plan
    from cpd.shards import cut_shards

    model = language_model("Llama", HUNDRED_MILLION, "meta")
    plan = Plan.from_json((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    before, start = peak(), process_time()
    cut_shards(Path(folder) / "whole", plan, Path(folder) / "cut", model=model)
    seconds = process_time() - start
    sizes = [file.stat().st_size for file in sorted((Path(folder) / "cut").glob("*.safetensors"))]
    return {"seconds": seconds, "grown": peak() - before, "files": sizes}


def check_checkpoint(folder: str) -> dict[str, Any]:
    """Compare the shards with the network cut in memory, value by value, and the logits."""
    import torch
    from safetensors.torch import load_file

    import cpd
    from cpd.plan import Plan

    model = language_model("Llama", HUNDRED_MILLION, "cpu")
    plan = Plan.from_json((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    state: dict[str, torch.Tensor] = {}
    for path in sorted((Path(folder) / "cut").glob("*.safetensors")):
        state |= load_file(path)
    whole = cpd.cut(model, plan, verify=False)
    fresh = cpd.cut(language_model("Llama", HUNDRED_MILLION, "cpu"), plan, verify=False)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(state)
    ids = torch.arange(32).reshape(2, 16)
    wanted = whole.state_dict()
    with torch.no_grad():
        logits = torch.equal(fresh(ids).logits, whole(ids).logits)
    values = state.keys() == wanted.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in wanted.items()
    )
    return {"equal": bool(values and logits)}


TASKS = {
    task.__name__: task
    for task in (large, small, make_checkpoint, plan_checkpoint, cut_checkpoint, check_checkpoint)
}


# In the process that starts them


def ask(task: str, *arguments: str) -> dict[str, Any]:
    """Run one task in a process of its own, and return what it says."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.large", "--task", task, *arguments],
        env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{' '.join((task, *arguments))}: {answer}\n")
    return answer


def measure() -> dict[str, Any]:
    """Run all tasks, one after the other."""
    report: dict[str, Any] = {"date": date.today().isoformat()}
    report["large"] = {name: ask("large", name) for name in LARGE}
    report["depths"] = {depth: ask("large", "Llama-2-7B", str(depth)) for depth in DEPTHS}
    report["small"] = {name: ask("small", name) for name in SMALL}
    with tempfile.TemporaryDirectory() as folder:
        steps = ("make_checkpoint", "plan_checkpoint", "cut_checkpoint", "check_checkpoint")
        report["shards"] = {step: ask(step, folder) for step in steps}
    return report


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f}"


def _large_table(report: dict[str, Any]) -> list[str]:
    columns = ["config", "parameters", "planned", "trace", "comb", "choose", "all", "peak MiB"]
    lines = [_row(columns), "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, found in report["large"].items():
        before, after = found["params"]
        cells = [name, f"{before:,}", f"{after / before:.1%}"]
        cells += [f"{found[step]:.1f}" for step in ("trace", "comb", "choose", "seconds")]
        lines.append(_row([*cells, _mib(found["peak"])]))
    lines.append("")
    for name, found in report["large"].items():
        units = ", ".join(f"{count:,} {kind}" for kind, count in found["units"].items())
        lines.append(
            f"- {name}: {units} in {found['groups']} groups; plan of {found['json']:,} bytes"
        )
    return lines


def _depth_table(report: dict[str, Any]) -> list[str]:
    columns = ["layers", "nodes", "trace", "comb", "choose", "comb µs per node"]
    lines = [_row(columns), "|---:" * len(columns) + "|"]
    for depth, found in report["depths"].items():
        seconds = [f"{found[step]:.2f}" for step in ("trace", "comb", "choose")]
        each = f"{found['comb'] / found['nodes'] * 1e6:.0f}"
        lines.append(_row([str(depth), f"{found['nodes']:,}", *seconds, each]))
    return lines


def _growth(report: dict[str, Any]) -> str:
    """Say by how much comb's seconds grow, and by how much the nodes do."""
    depths = [report["depths"][key] for key in sorted(report["depths"], key=int)]
    first, last = depths[0], depths[-1]
    nodes, seconds = (last[key] / first[key] for key in ("nodes", "comb"))
    return f"{nodes:.1f} times the nodes take comb {seconds:.1f} times the seconds"


def _small_table(report: dict[str, Any]) -> list[str]:
    columns = ["network", "comb", "choose", "cut", "together", "trace"]
    lines = [_row(columns), "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, found in report["small"].items():
        seconds = [found[step] for step in ("comb", "choose", "cut")]
        cells = [f"{value:.2f}" for value in (*seconds, sum(seconds), found["trace"])]
        lines.append(_row([name.partition(":")[2], *cells]))
    return lines


def _shards_text(report: dict[str, Any]) -> str:
    made, planned_, cut, checked = report["shards"].values()
    share = planned_["params"][1] / planned_["params"][0]
    equal = "equals" if checked["equal"] else "DOES NOT EQUAL"
    return (
        f"A checkpoint of {made['params']:,} parameters in {len(made['files'])} files of at most "
        f"{_mib(max(made['files']))} MiB ({_mib(sum(made['files']))} MiB) became one of "
        f"{share:.1%} in {len(cut['files'])} files ({_mib(sum(cut['files']))} MiB) in "
        f"{cut['seconds']:.1f} s. Memory grew by {_mib(cut['grown'])} MiB while it was cut. "
        f"The result {equal} the network cut in memory, every tensor and the logits, bit for bit."
    )


def page(report: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    from .__main__ import machine, versions
    from .table import _listed

    met = all(
        found[key] <= limit for found in report["large"].values() for key, limit in LIMITS.items()
    )
    lines = [
        "# Measured: large networks",
        "",
        f"Made by `make bench-large` on {report['date']}; not written by hand.",
        "",
        f"Machine: {_listed(machine())}. A process with one thread for each "
        "line; seconds of processor time.",
        f"Versions: {_listed(versions() | report['versions'])}.",
        "",
        "## Planned without weights",
        "",
        "Configurations of transformers on the meta device, 16 tokens, random scores, "
        "`params=0.7`. Seconds; **all** is from the network to the plan's JSON. **peak** is that "
        "of the whole process, Python and PyTorch included. Experts are computed by "
        f"`{EXPERTS}`. Within "
        f"{LIMITS['seconds']} s and {LIMITS['peak'] // 2**30} GiB: {'yes' if met else 'NO'}.",
        "",
        *_large_table(report),
        "",
        "## Seconds by the depth of the network",
        "",
        f"Llama-2-7B with fewer layers: {_growth(report)}.",
        "",
        *_depth_table(report),
        "",
        "## A checkpoint cut file by file",
        "",
        _shards_text(report),
        "",
        "```python",
        "from cpd.shards import cut_shards",
        "",
        'cut_shards("checkpoint", plan, "checkpoint-cut", model=model_on_meta)',
        "```",
        "",
        "## Networks of images",
        "",
        "Half of the MACs, random scores, seconds.",
        "",
        *_small_table(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure and write the page, or do one task as a child."""
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=__doc__)
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scale.md")
    options = parser.parse_args()
    if options.task:
        task, *arguments = options.task
        answer = TASKS[task](*arguments)
        print(json.dumps({**answer, "peak": peak()}))
        return
    report = measure()
    from importlib.metadata import version

    report["versions"] = {name: version(name) for name in ("transformers", "safetensors")}
    options.output.write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
