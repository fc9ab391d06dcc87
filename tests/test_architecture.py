"""The layout is a promise: floors, no cycles, frameworks only in integrations, small files, a pinned public surface."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trainer_attrib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainer_attrib"
SHELLS = ROOT / "integrations" / "trainer_attrib_integrations"
FLOORS = {
    "version": 0, "errors": 0, "types": 0, "progress": 0, "lazy": 0,
    "numerics": 1, "execution": 1,
    "ledger": 2, "tap": 2, "report": 2,
    "capture": 3, "analysis": 3, "evaluation": 3,
    "testing": 4, "integrations": 4, "explorer": 4,
    "command_line": 5,
    "cli": 5, "__main__": 6, "__init__": 6,
}  # fmt: skip
FRAMEWORKS = {"transformers", "trl", "accelerate", "peft", "lightning", "pytorch_lightning", "datasets"}
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [*FILES, *sorted(SHELLS.rglob("*.py"))]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions and for the type checker too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_its_own_floor_or_below(path):
    own = "__init__" if path.parent == PACKAGE and path.stem == "__init__" else room(module_of(path))
    for imported in imports_of(path):
        if imported.startswith("trainer_attrib.") and own not in ("cli", "__main__", "__init__"):
            assert FLOORS[room(imported)] <= FLOORS[own], f"{path} imports {imported} from a floor above"


def test_every_room_has_a_floor():
    rooms = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(FLOORS)


def test_capture_and_analysis_meet_on_disk_only():
    for path in FILES:
        own = room(module_of(path))
        other = {"capture": "analysis", "analysis": "capture"}.get(own)
        assert not other or not any(i.startswith(f"trainer_attrib.{other}") for i in imports_of(path)), path


def test_no_import_cycles():
    modules = {module_of(path): path for path in ALL_FILES}
    modules |= {
        name.replace("integrations.trainer_attrib", "trainer_attrib", 1): path for name, path in modules.items()
    }
    edges = {name: imports_of(path) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for imported in edges[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_frameworks_are_imported_in_integrations_only():
    for path in FILES:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & FRAMEWORKS, f"{path} imports {roots & FRAMEWORKS}"


def test_importing_the_package_loads_no_framework():
    code = "import sys, trainer_attrib, trainer_attrib.cli; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "trainer_attrib" in loaded
    assert not loaded & (FRAMEWORKS | {"torch", "pyarrow"})


def test_recording_and_analysing_load_no_framework():
    names = "trainer_attrib.Recorder, trainer_attrib.Analyzer, trainer_attrib.Behavior"
    code = f"import sys, trainer_attrib; {names}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "torch" in loaded
    assert not loaded & FRAMEWORKS


def test_recording_and_analysing_load_little_beside_torch():
    """What is loaded is what importing costs; benchmarks/import_cost.py measures it."""
    code = (
        "import sys, torch; before = set(sys.modules); import trainer_attrib as ta; "
        "ta.Recorder, ta.Analyzer, ta.Behavior, ta.Ledger; print(*(set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    packages = {name for name in packages if "cython" not in name}  # the runtime that compiled modules share
    assert packages <= {"trainer_attrib", "numpy", "pyarrow", "safetensors", "fsspec", "tqdm"}
    assert not loaded & {
        "pyarrow.dataset",
        "pyarrow.compute",
        "pyarrow.flight",
        "pyarrow.csv",
        "pyarrow.json",
        "asyncio",
    }
    stores = {name for name in loaded if name.startswith("fsspec.implementations.")}
    assert stores <= {"fsspec.implementations.local"}  # others when a URL asks for them


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{path}:{node.lineno} {node.name}"


UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NETWORK = {
    "socket",
    "ssl",
    "http.client",
    "ftplib",
    "smtplib",
    "urllib.request",
    "urllib3",
    "requests",
    "httpx",
    "aiohttp",
}
SERVERS = {
    "trainer_attrib/explorer/serving.py": {"socket"},  # listens on 127.0.0.1
}


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_from_data_and_nothing_goes_out(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "compile", "__import__"}
    owned = {(ast.unparse(call.value), call.attr) for call in calls if isinstance(call, ast.Attribute)}
    assert not owned & {("torch", "load"), ("np", "load"), ("os", "system"), ("yaml", "load")}
    imported = imports_of(path)
    assert not imported & UNSAFE
    assert imported & NETWORK <= SERVERS.get(str(path.relative_to(ROOT)), set())


def test_the_public_surface():
    assert trainer_attrib.__all__ == [
        "Analyzer", "Behavior", "Examples", "Generations", "Influence", "Ledger", "Recorder", "Shadow", "SketchConfig",
        "StageEffects", "TrainerAttribError", "__version__", "explore", "keep",
    ]  # fmt: skip
    for name in trainer_attrib.__all__:
        assert getattr(trainer_attrib, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Anlyzer'"):
        trainer_attrib.Anlyzer  # noqa: B018


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == trainer_attrib.__version__
    assert f"## {trainer_attrib.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_whoever_records_with_a_callback_loads_no_analysis():
    code = (
        "import sys; from trainer_attrib.integrations.huggingface import AttributionCallback; "
        "from trainer_attrib.integrations.lightning import AttributionCallback; "
        "print([name for name in sys.modules if name.startswith('trainer_attrib.analysis')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("framework", ["huggingface", "lightning"])
def test_names_imported_on_first_use_are_all_there(framework):
    module = importlib.import_module(f"trainer_attrib.integrations.{framework}")
    assert all(callable(getattr(module, name)) for name in module.__all__)
    assert dir(module) == module.__all__
    with pytest.raises(AttributeError, match="has no attribute 'forecasts'"):
        _ = module.forecasts
