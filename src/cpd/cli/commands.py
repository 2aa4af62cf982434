"""One function for each command. Their parameters are the flags."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cpd.cli.models import Source, named
from cpd.cli.origins import made, restored, settled
from cpd.cli.show import Bars, coverage, group_table, kept_table
from cpd.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["COMMANDS", "Shell"]


class Shell:
    """The commands, on one console."""

    def __init__(self, console: Console) -> None:
        """``console``: where results go."""
        self.console = console

    def comb(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        input_shape: str | list[int] | None = None,
        ignore: list[str] | None = None,
        exact: bool = False,
        unknown: str = "freeze",
        keep_class: str = "loose",
        depth: bool = False,
        dot: str | None = None,
        html: str | None = None,
    ) -> None:
        """Show which channels of a network must go together, and which cannot go, and why.

        Args:
            model: timm:NAME, torchvision:NAME, hf:CONFIG, cpd:NAME or package.module:callable.
            model_args: arguments for making it, such as --model_args.num_classes 10.
            input_shape: shape of an input without the batch axis, such as 3,224,224.
            ignore: modules or names whose width stays.
            exact: also keep what feeds statistics across channels.
            unknown: what to do at an operation without a rule: freeze or error.
            keep_class: strict keeps what needs a forward other than that of its class.
            depth: also find residual branches that may go whole.
            dot: file for the coupling graph in the language of Graphviz.
            html: file for the coupling graph as an interactive page.
        """
        from cpd.comb import comb
        from cpd.explain import explain

        source = Source(model, model_args or {})
        network = made(source)
        inputs = source.inputs(network, input_shape)
        kept = ignore or ()
        begun = perf_counter()
        options: dict[str, Any] = {
            "exact": exact,
            "unknown": unknown,
            "keep_class": keep_class,
            "depth": depth,
        }
        groups = comb(network, inputs, ignore=kept, **options)
        seconds = perf_counter() - begun
        self.console.print(group_table(groups))
        self.console.print(kept_table(groups.kept))
        for line in groups.held_lines():
            self.console.print(line.strip(), markup=False, highlight=False, soft_wrap=True)
        for line in groups.branch_lines():
            self.console.print(line.strip(), markup=False, highlight=False, soft_wrap=True)
        self.console.print(coverage(groups, seconds))
        if dot is not None:
            explain(groups).dot(dot)
            self.console.print(f"graph: {dot}")
        if html is not None:
            self.console.print(f"page: {explain(groups).html(html)}")

    def export(
        self,
        folder: str,
        to: str | None = None,
        model: str | None = None,
        model_args: dict[str, Any] | None = None,
        dynamic_batch: bool = True,
        kind: str = "onnx",
        data: str | dict[str, Any] | None = None,
        batches: int = 8,
        batch_size: int = 64,
    ) -> None:
        """Export the network of an artefact, checked against PyTorch; or quantize it to int8.

        Args:
            folder: what compress or prune wrote.
            to: the file; model.onnx, model.pt2, model.xml or model.int8.onnx in the folder by
                default.
            model: where the unpruned network comes from, if the folder does not say.
            model_args: arguments for making it.
            dynamic_batch: leave the batch size open.
            kind: onnx, pt2, openvino or int8.
            data: for int8, a name of the data shelf; ranges are taken from its training samples.
            batches: for int8, batches to take ranges from.
            batch_size: for int8, samples of each.
        """
        from cpd.cli.formats import FORMATS, calibration, written
        from cpd.verify import inputs_like

        network, plan = restored(Path(folder), model, model_args)
        path = Path(to) if to is not None else Path(folder) / FORMATS.get(kind, "model")
        args, kwargs = inputs_like(plan)

        def calibrate() -> list[Any]:
            return calibration(data, batches, batch_size)

        call = kwargs or args
        written(network, call, path, kind, dynamic_batch=dynamic_batch, calibrate=calibrate)
        checked = f"ranges of {batches} batches" if kind == "int8" else "checked against PyTorch"
        self.console.print(f"{path}: {path.stat().st_size:,} bytes, {checked}")

    def bench(
        self,
        folder: str,
        runs: int = 1000,
        warmup: int = 50,
        batch: int = 1,
        threads: int | None = None,
        data: str | dict[str, Any] | None = None,
        task: str | dict[str, Any] = "classification",
    ) -> None:
        """Measure the ONNX files of an artefact again, before, after and int8 in turns.

        Args:
            folder: what compress wrote, with base.onnx and model.onnx, and what export --kind
                int8 wrote, where it did.
            runs: timed runs of each.
            warmup: untimed runs before.
            batch: samples of a run.
            threads: threads within an operator; every core by default.
            data: a name of the data shelf, to measure the accuracy of the files on its test part.
            task: what the accuracy is of.
        """
        from cpd.cli.formats import INT8, measured
        from cpd.report import Report, environment

        paths = [Path(folder) / name for name in ("base.onnx", "model.onnx")]
        paths += [path for path in (Path(folder) / INT8,) if path.exists()]
        how = {"runs": runs, "warmup": warmup, "batch": batch, "threads": threads}
        with Bars(self.console) as bars:

            def told(done: int, total: int) -> None:
                bars.on_event("bench", {"done": done, "of": total})

            before, after, *quantized = measured(paths, data, task, told, **how)
        title = f"{folder}: {runs} runs of batch {batch} on {environment()['machine']}"
        self.console.print(Report(before, after, title=title).table())
        for found in quantized:
            self.console.print(Report(after, found, title="then quantized to int8").table())

    def report(self, folder: str) -> None:
        """Show the report of a run and write its page again.

        Args:
            folder: what compress wrote.
        """
        from cpd.reading import LONGEST, contents
        from cpd.report import Report

        path = Path(folder) / "report.json"
        text = contents(path, LONGEST, "Give the folder that compress wrote.")
        report = Report.from_json(text.decode(errors="replace"))
        self.console.print(report.table())
        if report.proof:
            self.console.print(report.proof, markup=False, highlight=False)
        self.console.print(f"page: {report.html(path.with_suffix('.html'))}")

    def prune(
        self,
        model: str,
        target: str = "macs=0.5",
        model_args: dict[str, Any] | None = None,
        input_shape: str | list[int] | None = None,
        weights: str | None = None,
        importance: str | dict[str, Any] = "magnitude",
        strategy: str | dict[str, Any] = "oneshot",
        ranking: str = "isomorphic",
        multiple_of: int | str = 1,
        measure: str | dict[str, Any] = "onnx",
        min_keep: float = 0.1,
        limits: dict[str, float] | None = None,
        keep: dict[str, Any] | None = None,
        uniform: bool = False,
        depth: bool = False,
        exact: bool = False,
        ignore: list[str] | None = None,
        unreachable: str = "error",
        data: str | dict[str, Any] | None = None,
        task: str | dict[str, Any] = "classification",
        repair: int | str = 0,
        batches: int = 4,
        batch_size: int = 64,
        seed: int = 0,
        output: str | None = None,
    ) -> None:
        """Prune a network in one shot, without training; prove it; show and save the plan.

        Args:
            model: timm:NAME, torchvision:NAME, hf:CONFIG, cpd:NAME or package.module:callable.
            target: costs to reach, such as macs=0.5 or macs=0.5,params=0.6,memory=0.7.
            model_args: arguments for making it, such as --model_args.pretrained true.
            input_shape: shape of an input without the batch axis, such as 3,224,224.
            weights: a safetensors file with its weights.
            importance: a name of the shelf, or one with options; most need data.
            strategy: oneshot, greedy, knapsack or uniform, or one with options.
            ranking: isomorphic, global or uniform.
            multiple_of: widths are cut to multiples of it; auto measures which pays.
            measure: what measures latency, for targets of latency (a share) or latency_ms: onnx,
                eager, or one of them with options.
            min_keep: share of each group that stays.
            limits: largest share that may go of groups or modules, such as '{"layer4.*": 0.3}'.
            keep: channels of modules that stay, such as '{"conv1": [0, 3]}' or '{"conv1": all}'.
            uniform: layers that are alike keep the same number; shows the configuration of that.
            depth: residual branches may go whole, too.
            exact: also keep what feeds statistics across channels.
            ignore: modules or names whose width stays.
            unreachable: error, or closest.
            data: a name of the data shelf; its training samples score and repair.
            task: what the loss is of.
            repair: batches by which what stays makes good for what goes; auto: if that helps.
            batches: batches to score on.
            batch_size: samples of each.
            seed: of everything random.
            output: folder for the artefact.
        """
        import cpd
        from cpd.cli.pruning import described, pruned

        source = Source(model, model_args or {})
        network = made(source, weights, seed)
        options: dict[str, Any] = {
            "strategy": strategy, "ranking": ranking, "multiple_of": multiple_of,
            "min_keep": min_keep, "limits": limits, "keep": keep, "uniform": uniform,
            "depth": depth, "exact": exact, "ignore": ignore or (), "unreachable": unreachable,
        }  # fmt: skip
        samples = {"data": data, "task": task, "batches": batches, "batch_size": batch_size}
        small, plan = pruned(
            network, source.inputs(network, input_shape), importance, repair, samples,
            target=target, measure=named("measure", measure), seed=seed, **options,
        )  # fmt: skip
        self.console.print(str(plan), markup=False, highlight=False)
        said, config = described(network, small, plan, model_args)
        self.console.print(said, markup=False, soft_wrap=True, end="\n" if said else "")
        if output is not None:
            note = {"model": model, "model_args": model_args or {}, **config}
            cpd.save(small, plan, output, extra=note)
            self.console.print(f"saved in {output}")

    def sensitivity(
        self,
        model: str,
        data: str | dict[str, Any] = "digits",
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        task: str | dict[str, Any] = "classification",
        importance: str | dict[str, Any] = "magnitude",
        ratios: list[float] | None = None,
        depth: bool = False,
        rise: float | None = None,
        batches: int = 4,
        batch_size: int = 64,
        output: str | None = None,
        limits: str | None = None,
        plot: str | None = None,
    ) -> None:
        """Show the loss when one family of units alone loses a share of them, without training.

        Args:
            model: timm:NAME, torchvision:NAME, hf:CONFIG, cpd:NAME or package.module:callable.
            data: a name of the data shelf; its validation samples are used.
            model_args: arguments for making it.
            weights: a safetensors file with its weights.
            task: what the loss is of.
            importance: which units go first, scored on the same samples where it needs data.
            ratios: shares that go, such as [0.1,0.5]; by default 0.1, 0.25, 0.5, 0.75 and 0.9.
            depth: also the loss without each residual branch.
            rise: also show limits for prune and recipes, the share of each group up to which the
                loss rises by at most so much of the whole network's, such as 0.1.
            batches: batches to take the loss over.
            batch_size: samples of each.
            output: file for JSON.
            limits: file for the limits, YAML that goes behind a recipe; needs rise.
            plot: file for a plot, such as a.svg.
        """
        from cpd.cli.sensitive import limited, measured
        from cpd.files import write_text

        if limits is not None and rise is None:
            raise InputError("limits are those of a rise: also give --rise, such as --rise 0.1")
        network = made(Source(model, model_args or {}), weights)
        sizes = batches, batch_size
        found = measured(network, data, task, importance, sizes, ratios, depth)
        self.console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        if output is not None:
            write_text(output, found.to_json())
        if rise is not None:
            line = limited(found, rise)
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            if limits is not None:
                write_text(limits, f"{line}\n")
        if plot is not None:
            found.plot(plot)

    def compress(self, values: dict[str, Any]) -> None:
        """Run a recipe; ``values`` are the keywords of ``cpd.compress``."""
        from accelerate import PartialState

        from cpd.compress import compress

        source, values = settled(values)
        import torch

        main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
        if not main:
            compress(source, **values)
            return
        with Bars(self.console) as bars:
            result = compress(source, callbacks=(bars,), **values)
        self.console.print(result.report.table())
        self.console.print(result.report.proof, markup=False, highlight=False)
        if values.get("output") is not None:
            self.console.print(f"in {values['output']}: the network, its plan, ONNX, the report")

    def study(
        self,
        file: str,
        cost_only: bool = False,
        minutes: float | None = None,
        only: dict[str, Any] | None = None,
        seconds: float = 600.0,
        threads: int | None = None,
        output: str | None = None,
    ) -> None:
        """Run a grid of recipes, each once; write its table and figures. Go on by running it again.

        Args:
            file: a YAML file with axes of changes to a recipe, see docs/study.md.
            cost_only: measure parameters, MACs and latency alone, with random weights, no data.
            minutes: begin no further run after so many.
            only: levels of axes to run, such as --only.seed 0; by default all.
            seconds: with cost_only, the longest that a pair of networks is timed.
            threads: with cost_only, threads within an operator; by default as the recipe says.
            output: folder for the table and the figures, by default as the file says.
        """
        from cpd import study as grid
        from cpd.cli.flags import checked, read

        place = Path(file)
        study = grid.Study.of(read(place), lambda name: read(place.parent / name))
        folder = Path(output or study.output) / ("costs" if cost_only else "")

        def told(found: list[grid.Outcome], name: str) -> None:
            grid.write(study, found, folder)
            done = sum(outcome.report is not None for outcome in found)
            if name:
                self.console.print(f"{done} of {len(found)} done; next: {name}", markup=False)

        found = grid.run(
            study,
            lambda values: settled(checked(values)),
            minutes=minutes,
            only=only,
            costs=grid.Costs(seconds, threads) if cost_only else None,
            told=told,
        )
        done = sum(outcome.report is not None for outcome in found)
        shown = grid.table(study, grid.records(study, found))
        self.console.print(shown, markup=False, highlight=False, soft_wrap=True)
        self.console.print(f"{done} of {len(found)} runs are done; in {folder}")


COMMANDS = ("comb", "prune", "export", "bench", "report", "sensitivity", "study")
