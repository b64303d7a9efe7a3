"""`dvc.yaml` tells the truth: each stage declares the modules, params and paths that its script uses, and no others."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from mnist_pipeline.common import paths
from mnist_pipeline.common.params import Params

PACKAGE = Path("src/mnist_pipeline")
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
SCRIPTS = sorted((ROOT / "stages").glob("*.py"))
SECTIONS = set(Params.model_fields)
ARTIFACTS = {name: str(path) for name, path in vars(paths).items() if isinstance(path, Path)}
del ARTIFACTS["PARAMS"], ARTIFACTS["REPORTS"]  # the one is declared by section, the other is but a directory


def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(file: Path) -> set[str]:
    """Return the full names of what a file imports, anywhere in it."""
    names = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [PACKAGE.name if node.level else "", node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def file_of(root: Path, module: str) -> Path:
    """Return the file of a module, which is named as within the package."""
    path = root / PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def name_of(root: Path, file: Path) -> str:
    """Return the name within the package of a module's file."""
    return ".".join(file.relative_to(root / PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(root: Path, file: Path) -> set[str]:
    """Return the package's modules among what a file imports itself."""
    found = set()
    for name in imports(file):
        package, *parts = name.split(".")
        if package == PACKAGE.name:
            modules = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]  # the last part may be a name
            found.add(next(module for module in modules if file_of(root, module).is_file()))
    return found


def closure(root: Path, script: Path) -> set[str]:
    """Return the package's modules that a script imports, itself or through others, and the packages they are in."""
    found, waiting = set(), {"__init__"} | imported_modules(root, script)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= ({name.rpartition(".")[0]} - {""} | imported_modules(root, file_of(root, name))) - found
    return found


def templates(file: Path) -> set[str]:
    """Return the names of the templates that a module renders."""
    texts = [node.value for node in nodes_of(file) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text for text in texts if text.endswith(".j2")}


def used_files(root: Path, script: Path) -> set[str]:
    """Return the script, the modules that it imports, their templates, and the paths that it names."""
    modules = closure(root, script)
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes_of(script)}
    return {
        str(script.relative_to(root)),
        *(str(file_of(root, module).relative_to(root)) for module in modules),
        *(str(PACKAGE / "templates" / name) for module in modules for name in templates(file_of(root, module))),
        *(path for name, path in ARTIFACTS.items() if name in names),
    }


def used_sections(script: Path) -> set[str]:
    """Return the sections of the params that a script reads; to pass the params on whole is to read all.

    But for `trace`, which takes those that the stage declares.
    """
    nodes = nodes_of(script)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    traced = [argument for call in calls if ast.unparse(call.func) == "trace" for argument in call.args]
    uses = [node for node in nodes if isinstance(node, ast.Name | ast.Attribute)]
    bare = [node for node in uses if isinstance(node, ast.Name) and node.id == "params"]
    read = [node for node in uses if isinstance(node, ast.Attribute) and node.value in bare]
    passed_on = [
        node for node in bare if isinstance(node.ctx, ast.Load) and node not in [*traced, *(use.value for use in read)]
    ]
    return SECTIONS if passed_on else {node.attr for node in read}


def declared_files(stage: dict[str, Any]) -> set[str]:
    """Return what a stage depends on and makes; DVC writes an entry with options as a mapping of its path."""
    entries = [entry for kind in ("deps", "outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def script_of(stage: dict[str, Any]) -> Path:
    return ROOT / next(word for word in stage["cmd"].split() if word.endswith(".py"))


def named_paths(file: Path) -> Iterator[str]:
    """Find the text outside docstrings that names a file under data/, models/ or reports/."""
    nodes = nodes_of(file)
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {ast.get_docstring(node, clean=False) for node in documented}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            yield from re.findall(r"(?<![\w/])(?:data|models|reports)/\S*", node.value)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_just_the_files_that_its_script_uses(name: str) -> None:
    assert declared_files(STAGES[name]) == used_files(ROOT, script_of(STAGES[name]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_just_the_params_that_its_script_reads(name: str) -> None:
    assert set(STAGES[name].get("params", [])) == used_sections(script_of(STAGES[name]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_is_for(name: str) -> None:
    assert len(STAGES[name]["desc"].split()) > 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_thin(script: Path) -> None:
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 35


def test_every_script_is_a_stage() -> None:
    assert sorted(script_of(stage) for stage in STAGES.values()) == SCRIPTS


def test_one_package_alone_imports_mlflow() -> None:
    using = {
        file.parent.name for file in MODULES + SCRIPTS if any(re.match(r"mlflow\b", name) for name in imports(file))
    }
    assert using == {"tracking"}


def test_one_module_alone_imports_ray() -> None:
    assert {file.stem for file in MODULES if any(re.match(r"ray\b", name) for name in imports(file))} == {"cluster"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_no_stage_knows_of_promotion(script: Path) -> None:
    assert not {"gate", "promotion", "tracking.registry"} & closure(ROOT, script)


@pytest.mark.parametrize("file", MODULES + SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_one_module_alone_names_paths(file: Path) -> None:
    assert bool(list(named_paths(file))) == (file.name == "paths.py")


def test_imports_run_one_way() -> None:
    graph = {name_of(ROOT, file): imported_modules(ROOT, file) for file in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # refuses a cycle
    assert order.index("params") < order.index("data") < order.index("reporting")
    assert order.index("params") < order.index("model") < order.index("reporting")


# The checks themselves, on scripts made up to break the rules


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """Lay out a package in which `a` imports `b` within a function, and `b` imports `c`; none imports `unused`.

    In it is another, `d`, which imports its own `e`, which imports `c`.
    """
    modules = {
        "__init__": "",
        "a": "def f():\n    from mnist_pipeline.b import g\n    return g",
        "b": "import mnist_pipeline.c as c\ng = c.h",
        "c": "import json\nh = json",
        "d/__init__": "from mnist_pipeline.d.e import h",
        "d/e": "from mnist_pipeline.c import h",
        "d/unused": "",
        "paths": "RAW = METRICS = 1",
        "reporting": "from .c import h\nrender('a.md.j2')",
        "unused": "",
    }
    (tmp_path / PACKAGE / "d").mkdir(parents=True)
    (tmp_path / "stages").mkdir()
    for name, source in modules.items():
        (tmp_path / PACKAGE / f"{name}.py").write_text(source)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "modules", "others"),
    [
        ("print(1)", [], []),
        ("import mnist_pipeline.c", ["c"], []),
        ("from mnist_pipeline import c", ["c"], []),
        ("def f():\n    from mnist_pipeline.a import f", ["a", "b", "c"], []),
        ("from mnist_pipeline.d import h", ["c", "d/__init__", "d/e"], []),
        ("from mnist_pipeline.d.unused import h", ["c", "d/__init__", "d/e", "d/unused"], []),
        ("import mnist_pipeline.d.e", ["c", "d/__init__", "d/e"], []),
        ("from mnist_pipeline.reporting import h", ["c", "reporting"], ["src/mnist_pipeline/templates/a.md.j2"]),
        ("from mnist_pipeline.paths import RAW, METRICS\nf(RAW, g(METRICS))", ["paths"], ["data/raw", paths.METRICS]),
        ("from mnist_pipeline import paths\npaths.MODEL.stat()", ["paths"], ["models/model.safetensors"]),
        ("from mnist_pipeline.paths import PARAMS\nPARAMS.stat()", ["paths"], []),
    ],
)
def test_all_files_that_a_script_uses_are_found(
    made_up: Path, source: str, modules: list[str], others: list[object]
) -> None:
    script = made_up / "stages/made_up.py"
    script.write_text(source)
    package = [str(PACKAGE / f"{module}.py") for module in ["__init__", *modules]]
    assert used_files(made_up, script) == {"stages/made_up.py", *package, *map(str, others)}


@pytest.mark.parametrize(
    ("source", "sections"),
    [
        ("params = load_params()", set()),
        ("params = load_params()\nf(params.train.epochs)\ng(params.seed)", {"train", "seed"}),
        ("params = load_params()\nf(params.train, params)", SECTIONS),
        ("params = load_params()\nf({'all': params})", SECTIONS),
    ],
)
def test_all_params_that_a_script_reads_are_found(tmp_path: Path, source: str, sections: set[str]) -> None:
    script = tmp_path / "made_up.py"
    script.write_text(source)
    assert used_sections(script) == sections


def test_all_files_that_a_stage_declares_are_found() -> None:
    stage = {
        "deps": ["data/raw"],
        "params": ["seed"],
        "outs": ["models/m"],
        "metrics": [{"reports/m.json": {"cache": False}}],
        "plots": ["reports/p.csv"],
    }
    assert declared_files(stage) == {"data/raw", "models/m", "reports/m.json", "reports/p.csv"}


def test_paths_are_found_in_text_but_not_in_docstrings(tmp_path: Path) -> None:
    module = tmp_path / "made_up.py"
    module.write_text(
        '"""Write reports/a."""\nb = "data/b"\ndef f(x):\n    """Read data/c."""\n    g(f"{x} models/d")\n'
    )
    assert sorted(named_paths(module)) == ["data/b", "models/d"]
