"""The order of the modules: each imports only modules above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the highest to the lowest. A folder stands for all its modules.
LAYERS = (
    "errors",
    "files",
    "locks",
    "machine_code",
    "processes",
    "structures",
    "pipes",
    "ranks",
    "graphs",
    "store",
    "workers",
    "sources",
    "overlap",
    "splits",
    "corpus",
    "layers",
    "kernels",
    "encoders",
    "transfer",
    "teachers",
    "objectives",
    "schema",
    "configs",
    "training",
    "studies",
    "demo",
    "terminal",
    "command",
    "arguments",
    "configured",
    "cli",
    "__main__",
)
# Apart from the order: the only modules that may import these.
ONLY_FOR = {
    "lightning": ("training",),
    "crysdistill.configs": ("configured", "studies"),
}
NEVER = ("pretrain", "finetune", "tests", "benchmarks")
LONGEST = 450  # lines


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for path in sorted((ROOT / "crysdistill").rglob("*.py"))
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            source = node.module or ""
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else source


def layer(module: str) -> str:
    """Return the layer of a module of the package; "" for the package itself."""
    return ".".join(module.split(".")[1:2])


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_module_has_its_layer():
    assert {layer(name) for name in MODULES} - {""} == set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_above_it(name):
    for line, found in imports(MODULES[name]):
        where = f"{name}, line {line}"
        assert not any(is_in(found, other) for other in NEVER), (
            f"{where}: imports {found}, which is no part of the package"
        )
        if not is_in(found, "crysdistill") or not layer(found):
            continue
        assert layer(name), f"{where}: the package itself imports {found}"
        assert LAYERS.index(layer(found)) <= LAYERS.index(layer(name)), (
            f"{where}: `{layer(name)}` imports {found}, which stands below it"
        )


@pytest.mark.parametrize("package", ONLY_FOR)
def test_some_things_are_for_few(package):
    allowed = (*ONLY_FOR[package], package.rpartition(".")[2])
    for name, path in MODULES.items():
        for line, found in imports(path):
            assert not is_in(found, package) or layer(name) in allowed, (
                f"{name}, line {line}: {package} is for {', '.join(allowed)} only"
            )


def children(folder: str) -> dict[str, set[str]]:
    """Return, for each entry of a folder, the entries there that it imports."""
    found: dict[str, set[str]] = {}
    depth = folder.count(".") + 1
    for name, path in MODULES.items():
        if not name.startswith(f"{folder}."):
            continue
        child = name.split(".")[depth]
        others = {
            other.split(".")[depth]
            for _, other in imports(path)
            if other.startswith(f"{folder}.")
        }
        found[child] = found.get(child, set()) | others - {child}
    return found


FOLDERS = sorted(
    {name.rpartition(".")[0] for name in MODULES if name.count(".")} - {""}
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_stands_in_a_folder_imports_in_one_direction(folder):
    try:
        TopologicalSorter(children(folder)).prepare()
    except CycleError as error:
        pytest.fail(f"in {folder}: {' -> '.join(error.args[1])}")


def test_a_loop_between_folders_would_be_found(tmp_path, monkeypatch):
    for name, text in (
        ("a.one", "import crysdistill.b.two"),
        ("b.two", "import crysdistill.a.three"),
        ("a.three", ""),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        monkeypatch.setitem(MODULES, f"crysdistill.{name}", path)
    with pytest.raises(
        pytest.fail.Exception, match=r"in crysdistill: (a -> b -> a|b -> a -> b)"
    ):
        test_what_stands_in_a_folder_imports_in_one_direction("crysdistill")


@pytest.mark.parametrize(
    ("kept_out", "layers"),
    [
        ("lightning", LAYERS[: LAYERS.index("training")]),
        ("torch", LAYERS[: LAYERS.index("ranks")]),
        ("torch", ("workers",)),
        ("torch", ("command", "arguments", "cli")),
    ],
)
def test_what_a_fresh_process_does_not_load(kept_out, layers):
    wanted = [name for name in MODULES if layer(name) in layers]
    assert wanted
    code = f"""
import importlib, sys
for name in {wanted}:
    importlib.import_module(name)
    assert {kept_out!r} not in sys.modules, name + " loads {kept_out}"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["crysdistill", "pretrain", "finetune"])
def test_files_are_short_enough_to_read(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST}
    assert not too_long, f"more than {LONGEST} lines: {too_long}"


def test_a_build_does_not_load_torch():
    """In every worker, torch would take 200 MB and seconds to start."""
    code = "import crysdistill.corpus.build, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
