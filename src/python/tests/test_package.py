"""What a user of the package sees: docstrings, stubs, README."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sparse24
from conftest import ROOT
from sparse24 import _native

PACKAGE = Path(sparse24.__file__).parent
MODULES = [
    "sparse24",
    *(f"sparse24.{name}" for name in ("_arrays", "_bench", "_device", "_files", "_linear", "_sparse", "_text")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"np": importlib.import_module("numpy")})
    assert failed == 0


def test_everything_public_has_a_docstring():
    for name in sparse24.__all__:
        item = getattr(sparse24, name)
        if name.startswith("__"):
            continue
        assert item.__doc__ and item.__module__.startswith("sparse24"), name
        if inspect.isclass(item):
            own = {
                n: m
                for n, m in vars(item).items()
                if not n.startswith("_") and (callable(m) or isinstance(m, property))
            }
            assert all(m.__doc__ for m in own.values()), (name, own)
        elif len(inspect.signature(item).parameters) > 1:
            assert "Parameters\n" in item.__doc__ and "Returns\n" in item.__doc__ or name == "save_file", name


def test_the_stub_is_of_this_native_module():
    stub = ast.parse((PACKAGE / "_native.pyi").read_text())
    said = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            said[node.name] = node
        elif isinstance(node, ast.ClassDef):
            said |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    there = {}
    for name, item in vars(_native).items():
        if inspect.isclass(item):
            there |= {f"{name}.{n}": m for n, m in vars(item).items() if not n.startswith("__")}
            there[f"{name}.__init__"] = item
        elif callable(item):
            there[name] = item
    assert set(said) == set(there) - ({f"{c}.__init__" for c in ("Sparse24",)})
    for name, node in said.items():
        if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
            assert inspect.isgetsetdescriptor(there[name]), name
            continue
        arguments = [a.arg for a in node.args.args if a.arg != "self"]
        own = [p for p in inspect.signature(there[name]).parameters if p != "self"]
        assert arguments == own, name


def test_it_is_typed_and_of_the_version_of_the_crate():
    assert (PACKAGE / "py.typed").exists()
    manifest = (ROOT / "Cargo.toml").read_text()
    assert sparse24.__version__ == re.search(r'^version = "(.*)"', manifest, re.M).group(1)
    own = (ROOT / "src" / "python" / "Cargo.toml").read_text()
    assert f'version = "{sparse24.__version__}"' in own


def test_python_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks, "README has no Python"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    for block in blocks:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        for expected in re.findall(r"#> (.*)$", block, re.M):
            assert expected in run.stdout, (expected, run.stdout)


def test_the_example_prunes_checks_and_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="the example plots")
    example = ROOT / "src" / "python" / "examples" / "prune_layer.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(example), "--out", str(tmp_path / "plot.svg"), "--size", "64", "--quick"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "<svg" in (tmp_path / "plot.svg").read_text() and "V=32" in run.stdout
