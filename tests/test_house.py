"""The rules of the house: what may import what, what is found by its name, what must be tested."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dialects", "passes", "lowering", "runtime", "third_party")
PAGES = sorted(
    path for path in (ROOT / "tests" / "filecheck").rglob("*") if path.suffix in (".mlir", ".sage")
)

SEAM = tuple(
    f"sagec.runtime.{name}"
    for name in (
        "plan",
        "plan_text",
        "clock",
        "request",
        "cost",
        "profile",
        "roofline",
        "direct.columns",
        "direct.chunking",
        "direct.topology",
        "direct.work",
        "direct.packing",
        "direct.placement",
    )
)
"""What the compiler may know of the runtime: data, and how long things take."""

FLOORS = {
    "third_party": (),
    "runtime": ("sagec.runtime", "sagec.third_party"),
    "dialects": ("sagec.dialects", *SEAM),
    "passes": ("sagec.passes", "sagec.dialects", *SEAM),
    "lowering": ("sagec.lowering", "sagec.passes", "sagec.dialects", *SEAM),
}
"""What each folder may import of sagec; the roof, sagec itself, may import everything."""

LAZY = ("torch", "safetensors", "tokenizers", "transformers", "highspy")
"""What the core install does not have."""


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder; links are not followed."""
    found = []
    for path, folders, files in os.walk(ROOT / folder, followlinks=False):
        folders[:] = [name for name in folders if not Path(path, name).is_symlink()]
        found += [Path(path, name) for name in files if name.endswith(".py")]
    return sorted(found)


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line and name of every module that a file imports, and whether it does so at its top."""
    tree = ast.parse(path.read_text("utf-8"), str(path))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by its whole name"
            module = node.module or ""
            for alias in node.names:
                below = f"{module}.{alias.name}"
                yield node.lineno, below if _is_module(below) else module, node not in inside


def _is_module(name: str) -> bool:
    if not name.startswith("sagec."):
        return False
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def in_python(code: str) -> str:
    """What a fresh Python prints for this code."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after this code."""
    shown = (
        "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    return set(json.loads(in_python(f"{code}\n{shown}").splitlines()[-1]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_imports_upward(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(folder)
        for line, name, _ in imports(path)
        if name == "sagec" or name.startswith("sagec.")
        if not any(name == floor or name.startswith(f"{floor}.") for floor in FLOORS[folder])
    ]
    assert not wrong, (
        f"{folder} may import {', '.join(FLOORS[folder])} of sagec; not:\n" + "\n".join(wrong)
    )


def test_the_seam_to_the_runtime_stands_on_nothing_but_itself() -> None:
    for module in SEAM:
        path = ROOT / module.removeprefix("sagec.").replace(".", "/")
        for line, name, _ in imports(path.with_suffix(".py")):
            assert not name.startswith("sagec.") or name in SEAM, f"{module}:{line}: {name}"


def test_the_runtime_imports_no_xdsl() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("runtime")
        for line, name, _ in imports(path)
        if name.partition(".")[0] == "xdsl"
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ("sagec", *FOLDERS, "tests", "benchmarks", "examples"))
def test_everything_is_imported_as_sagec(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}; import sagec.{name}"
        for path in sources(folder)
        for line, name, _ in imports(path)
        if name.partition(".")[0] in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ("sagec", *FOLDERS))
def test_what_the_core_install_lacks_is_imported_where_it_is_used(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(folder)
        if "engines/torch" not in path.as_posix()
        for line, name, at_top in imports(path)
        if at_top and name.partition(".")[0] in LAZY
    ]
    assert not wrong, "\n".join(wrong)


def test_running_a_plan_loads_no_compiler() -> None:
    loaded = modules_after(
        "import sagec.runtime.executor, sagec.runtime.process, sagec.runtime.report\n"
        "from sagec.runtime import engines, plan, strategies\n"
        "spec = engines.InstanceSpec(id='i', engine='echo', model='',\n"
        "    kv_blocks=8, block_tokens=4)\n"
        "engine = engines.create(spec)\n"
        "engine.submit(plan.decode(plan.encode(plan.ExecutionPlan(\n"
        "    plan_id='p', round=0, target_instance_id='i', mode='strict', num_steps=1,\n"
        "    max_step_tokens=1))))\n"
        "engine.poll()\n"
        "strategies.create('fifo')\n"
    )
    assert not loaded & {"xdsl", "lark", "rich", *LAZY}
    assert "msgspec" in loaded


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    assert not modules_after("import sagec.runtime") & {"numpy", "xdsl", "lark", "rich", *LAZY}


def test_importing_sagec_loads_nothing_heavy() -> None:
    assert not modules_after("import sagec") & {"numpy", "msgspec", "xdsl", "lark", "rich", *LAZY}


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after("from sagec.cli import main\nassert main(['--help']) == 0")
    assert not loaded & {"numpy", "msgspec", "xdsl", "lark", "rich", "tempfile", *LAZY}


def test_compiling_loads_no_engine() -> None:
    loaded = modules_after("import sagec.compiler, sagec.universe, sagec.pipelines")
    assert "xdsl" in loaded
    assert not loaded & {"rich", *LAZY}


@pytest.mark.parametrize(
    "name",
    (
        "IRBuilder",
        "IRGraph",
        "IRNode",
        "IROptimizer",
        "PDSeparator",
        "ExecutionGraph",
        "ExecutionGraphBuilder",
        "ExecutionPlan",
        "ExecutorAPI",
        "OpType",
        "TensorRef",
    ),
)
def test_the_public_api_is_exported(name: str) -> None:
    import sagec

    assert name in sagec.__all__
    assert name in dir(sagec)
    assert getattr(sagec, name).__doc__


def test_a_name_that_sagec_lacks_is_an_attribute_error() -> None:
    import sagec

    with pytest.raises(AttributeError, match="no attribute 'Sheduler'"):
        sagec.Sheduler  # noqa: B018


def test_there_are_pages() -> None:
    assert len(PAGES) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_run_line_checks_something(page: Path) -> None:
    text = page.read_text("utf-8")
    commands = re.sub(r"\\\s*\n[^\n]*?RUN:", " ", text)
    runs = re.findall(r"RUN:\s*(.*)", commands)
    assert runs, "a page has a RUN line"
    for run in runs:
        assert re.search(r"\|\s*filecheck\b|\bdiff\b|\bcmp\b", run), f"checks nothing: {run}"
        if "filecheck" in run:
            prefixes = re.findall(r"--check-prefix(?:es)?[= ](\S+)", run) or ["CHECK"]
            for prefix in ",".join(prefixes).split(","):
                check = rf"(?<!RUN: ){re.escape(prefix)}(-LABEL|-SAME|-NEXT|-DAG|-NOT|-COUNT-\d+)?:"
                assert re.search(check, text), f"no line {prefix}: in the page"


def pass_files() -> list[Path]:
    return [path for path in sources("passes") if "(ModulePass)" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", pass_files(), ids=lambda path: path.stem)
def test_a_pass_is_named_after_its_file_and_has_a_page(path: Path) -> None:
    from sagec.universe import UNIVERSE

    name = path.stem.replace("_", "-")
    assert name in UNIVERSE.all_passes
    made = UNIVERSE.all_passes[name]()
    assert made.name == name
    assert made.__name__.lower() == path.stem.replace("_", "") + "pass"
    assert made.__module__ == f"sagec.passes.{path.stem}"
    assert (ROOT / "tests" / "filecheck" / "passes" / f"{name}.mlir").is_file()


def test_every_pass_of_the_universe_has_its_own_file() -> None:
    from sagec.universe import UNIVERSE

    files = {path.stem.replace("_", "-") for path in pass_files()}
    ours = {
        name
        for name, made in UNIVERSE.all_passes.items()
        if made().__module__.startswith("sagec.passes.")
    }
    assert ours == files


def test_every_named_pipeline_runs_passes_that_exist_and_says_why() -> None:
    from sagec.cli import spec
    from sagec.pipelines import PIPELINES
    from sagec.universe import UNIVERSE

    assert PIPELINES
    for name, pipeline in PIPELINES.items():
        assert spec.passes(pipeline.text, UNIVERSE.all_passes), name
        assert pipeline.reason, name


def test_every_engine_is_found_by_its_file() -> None:
    from sagec.runtime import engines

    assert {"echo", "torch"} <= set(engines.known())
    for name in engines.known():
        module = importlib.import_module(f"sagec.runtime.engines.{name}")
        assert callable(module.create), name
        assert module.__doc__, name


def test_every_strategy_is_found_by_its_file() -> None:
    from sagec.runtime import strategies

    assert "fifo" in strategies.known()
    for name in strategies.known():
        made = strategies.create(name)
        assert made.name == name
        assert type(made).__doc__, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_are_tracked_and_lead_home(folder: str) -> None:
    link = ROOT / "sagec" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    done = subprocess.run(
        ["git", "ls-files", "--stage", f"sagec/{folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.startswith("120000 "), "git must keep it as a link"


def packages_of_the_tree() -> dict[str, Path]:
    """Every folder with Python files under the roof and the floors, as the package it must be."""
    found = {}
    for folder in ("sagec", *FOLDERS):
        for path in sources(folder):
            relative = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            name = relative if folder == "sagec" else f"sagec.{relative}"
            found[name] = path.parent
    return found


def test_every_package_of_the_tree_is_declared() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(packages_of_the_tree())


def test_every_package_has_an_init_file() -> None:
    for name, folder in packages_of_the_tree().items():
        assert (folder / "__init__.py").is_file(), name


def test_the_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    # From a copy, for setuptools leaves files behind that the next wheel would hold too.
    copy = tmp_path / "copy"
    for name in ("sagec", *FOLDERS):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in packages_of_the_tree().items():
        for path in folder.iterdir():
            if path.suffix in (".py", ".lark", ".c", ".cc", ".h", ".map", ".typed"):
                assert f"{name.replace('.', '/')}/{path.name}" in held
    for path in (ROOT / "third_party").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".clang-format":
            assert f"sagec/{path.relative_to(ROOT)}" in held
    assert not any(path.startswith("tests/") for path in held)


def tracked() -> list[Path]:
    """Text files of the checkout, whether git knows them already or not."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    suffixes = (".py", ".md", ".mlir", ".sage", ".toml", ".json", ".lark", ".yml", "")
    suffixes += (".c", ".cc", ".h", ".map")
    return [ROOT / name for name in done.stdout.splitlines() if Path(name).suffix in suffixes]


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    pattern = re.compile(r"/(?:work|home|root|Users)/\w")
    wrong = []
    for path in tracked():
        if path == Path(__file__) or not path.is_file() or path.is_symlink():
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_no_test_sleeps() -> None:
    pattern = re.compile(r"\btime\.sleep\(")
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources("tests")
        if path != Path(__file__) and pattern.search(path.read_text("utf-8"))
    ]
    assert not wrong


def test_no_code_is_left_to_be_written() -> None:
    pattern = re.compile(r"\braise NotImplementedError\b|\b(?:TODO|FIXME|XXX)\b")
    wrong = [
        f"{path.relative_to(ROOT)}"
        for folder in ("sagec", *FOLDERS)
        for path in sources(folder)
        if pattern.search(path.read_text("utf-8"))
    ]
    assert not wrong


def test_functions_stay_short() -> None:
    wrong = []
    for folder in ("sagec", *FOLDERS):
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef) and _code_lines(node) > 40:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not wrong, "longer than 40 lines:\n" + "\n".join(wrong)


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    end = function.end_lineno or function.lineno
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    words = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return end - function.lineno + 1 - words
