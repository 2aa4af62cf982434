"""The laws of the house: arrows, names, sizes, imports, the public face."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cpd
import house

FILES = sorted(house.SOURCE.rglob("*.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(house.SOURCE.parent)}
Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def name(path: Path) -> str:
    return path.relative_to(house.SOURCE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def modules() -> Iterator[str]:
    for path in FILES:
        parts = path.relative_to(house.SOURCE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# sizes -------------------------------------------------------------------------------------------


def functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            here = f"{inside}{child.name}"
            if isinstance(child, Function):
                yield here, child
            yield from functions(child, here + ".")
        else:
            yield from functions(child, inside)


def length(function: Function) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    doc = function.body[0]
    return lines - ((doc.end_lineno or doc.lineno) - doc.lineno + 1)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Blocks inside blocks; `elif` and `else` stay on the level of their `if`."""
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, Function | ast.ClassDef):
                continue
            elif_branch = (
                field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            )
            step = isinstance(child, BLOCKS) and not elif_branch
            deepest = max(deepest, nesting(child, depth + step))
    return deepest


def parameters(function: Function) -> int:
    args = function.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return sum(arg is not None and arg.arg not in ("self", "cls") for arg in found)


def oversize(path: Path) -> Iterator[tuple[str, int, int]]:
    """(what, measured, allowed) for everything in a file that is over a measure."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    measured = [(f"{name(path)}::lines", lines, house.LINES_OF_FILE)]
    for inside, function in functions(tree(path)):
        here = f"{name(path)}:{inside}"
        measured += [
            (f"{here}:lines", length(function), house.LINES_OF_FUNCTION),
            (f"{here}:nesting", nesting(function), house.NESTING),
            (f"{here}:parameters", parameters(function), house.PARAMETERS),
        ]
    return ((what, found, most) for what, found, most in measured if found > most)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    over = [
        f"{what}: {found}, allowed {most}"
        for what, found, most in oversize(path)
        if what not in house.EXCEPTIONS
    ]
    assert not over


def test_exceptions_are_needed_and_explained() -> None:
    needed = {what for path in FILES for what, *_ in oversize(path)}
    present = {name(path) for path in FILES}
    stale = [
        what
        for what in house.EXCEPTIONS
        if what.partition(":")[0] in present and what not in needed
    ]
    assert not stale
    assert all(house.EXCEPTIONS.values())


def test_the_measures_measure() -> None:
    source = '''
def f(self, a, /, b, *args, c=1, **kw):
    """One line
    and another."""
    if a:
        for b in c:
            pass
    elif b:
        with c:
            while kw:
                pass
    def g():
        return 1
'''
    (outer, f), (inner, g) = functions(ast.parse(source))
    assert (outer, inner) == ("f", "f.g")
    assert (length(f), nesting(f), parameters(f)) == (10, 3, 5)
    assert (length(g), nesting(g), parameters(g)) == (2, 0, 0)


# names -------------------------------------------------------------------------------------------


def model_words(text: str) -> set[str]:
    """Architectures and model libraries named in a text, as words or as parts of identifiers."""
    long = re.findall("|".join(house.LONG_WORDS), text, flags=re.IGNORECASE)
    words = "|".join(house.SHORT_WORDS)
    apart = re.findall(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])", text, flags=re.IGNORECASE)
    humps = "|".join({word.capitalize() for word in house.SHORT_WORDS} | {"ViT", "DeiT", "GPT"})
    camel = re.findall(rf"(?<![A-Z])(?:{humps})(?![a-z])", text)
    return {word.lower() for word in (*long, *apart, *camel)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_border_names_models(path: Path) -> None:
    if name(path).partition("/")[0] in house.KNOWS_MODELS:
        return
    assert not model_words(name(path) + "\n" + path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("resnet50 ResNetBlock", {"resnet"}),
        ("ViTBlock my_vit vit_b_16", {"vit"}),
        ("class GPT2: DeiT", {"gpt", "deit"}),
        ("import timm.models", {"timm"}),
        ("invite activity Swing swinging Bertha transformer's TransformerEncoder", set()),
    ],
)
def test_model_words(text: str, found: set[str]) -> None:
    assert model_words(text) == found


# imports -----------------------------------------------------------------------------------------


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at any depth; relative imports are resolved."""
    package = ["cpd", *path.relative_to(house.SOURCE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def test_arrows_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"],
        cwd=house.ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("shelf", house.SHELVES)
def test_members_of_a_shelf_do_not_know_each_other(shelf: str) -> None:
    for path in (house.SOURCE / shelf).rglob("*.py"):
        members = {
            module.split(".")[2]
            for module in imported(path)
            if module.startswith(f"cpd.{shelf}.") and (house.SOURCE / shelf).is_dir()
        } & {other.stem for other in (house.SOURCE / shelf).glob("*.py")}
        shared = {m for m in members if m.startswith("_") or m in house.SHARED_IN_SHELF}
        assert path.name == "__init__.py" or members <= shared, (name(path), members - shared)


@pytest.mark.parametrize(
    ("where", "refused"),
    [
        ("channels.py", ("torch",)),
        ("labels.py", ("torch",)),
        ("rules", ("cpd.trace", "cpd.comb", "cpd.groups", "cpd.plan")),
    ],
)
def test_what_the_lowest_floors_do_not_see(where: str, refused: tuple[str, ...]) -> None:
    for path in (p for p in FILES if name(p).split("/")[0] == where):
        seen = [
            module
            for module in imported(path)
            if any(module == word or module.startswith(word + ".") for word in refused)
        ]
        assert not seen, name(path)


BLOCKED = """
import importlib, sys

class Blocker:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"blocked: {{fullname}}", name=fullname)

sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
import cpd
for name in cpd.__all__:
    getattr(cpd, name)
assert not set({extras!r}) & set(sys.modules)
"""


def test_the_core_needs_no_extra() -> None:
    core = [m for m in modules() if m not in house.NEEDS_EXTRAS and not m.endswith("__main__")]
    code = BLOCKED.format(extras=house.EXTRAS, modules=core)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# habits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_shell_prints(path: Path) -> None:
    if name(path) == "cli.py":
        return
    prints = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]
    assert not prints, f"{name(path)} prints in lines {prints}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_left_undone_or_swallowed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", text)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name(path)}:{node.lineno}: bare except"
            assert not all(isinstance(line, ast.Pass) for line in node.body), (
                f"{name(path)}:{node.lineno}: exception swallowed"
            )


# the public face ---------------------------------------------------------------------------------


def test_the_public_face_is_sorted_and_closed() -> None:
    names = list(cpd.__all__)
    assert names == sorted(set(names))
    assert set(names) == house.PUBLIC
    submodules = {module.split(".")[1] for module in modules() if "." in module}
    offered = {n for n in vars(cpd) if not n.startswith("_")} - submodules - {"annotations"}
    assert offered <= set(names), "public names that __all__ does not list"
    for each in names:
        assert getattr(cpd, each) is not None


def test_every_error_is_public() -> None:
    from cpd import errors

    assert errors.__all__ == sorted(errors.__all__)
    assert set(errors.__all__) <= house.PUBLIC
    assert set(errors.__all__) & set(cpd.__all__) in (set(), set(errors.__all__))
