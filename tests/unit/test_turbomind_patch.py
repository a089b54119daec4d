"""`sagec patch`: TurboMind of the installed wheel is patched, or stays stock, and a line says why.

Each test has a process of its own, for a library is loaded once and for all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.turbomind import patching, wheel
from sagec.runtime.engines.turbomind.opening import open_instance
from sagec.runtime.engines.turbomind.options import Options
from sagec.third_party.lmdeploy import check_wheel

INSTALLED = importlib.util.find_spec("lmdeploy") is not None
needs_lmdeploy = pytest.mark.skipif(
    not INSTALLED or shutil.which("c++") is None, reason="no lmdeploy or no C++ compiler here"
)

Done = subprocess.CompletedProcess[str]


def sagec(*argv: str, **environment: str) -> Done:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sagec.cli", *argv],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TM_LOG_LEVEL": "ERROR"} | environment,
    )


def shown(*argv: str, **environment: str) -> dict[str, object]:
    """What an action finds out, of its JSON."""
    done = sagec("patch", *argv, "--json", **environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def refusal(*argv: str, **environment: str) -> str:
    """The one line that an action ends with."""
    done = sagec("patch", *argv, **environment)
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def other_lmdeploy(folder: Path, version: str, library: str | None = None) -> dict[str, str]:
    """An environment with another lmdeploy: `library` is what its _turbomind holds."""
    package, metadata = folder / "lmdeploy", folder / f"lmdeploy-{version}.dist-info"
    (package / "lib").mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nobody may import it')\n")
    (metadata / "METADATA").write_text(f"Name: lmdeploy\nVersion: {version}\n")
    if library is not None:
        (package / "lib" / "_turbomind.cpython-311-x86_64-linux-gnu.so").write_text(library)
    return {"PYTHONPATH": str(folder)}


def test_the_version_that_the_patches_are_made_for_is_written_down() -> None:
    known = wheel.known()
    assert known.package == "lmdeploy"
    assert known.tag == f"v{known.version}"
    assert len(known.commit) == 40
    assert wheel.python_tag() in known.wheels
    for tag, each in known.wheels.items():
        assert each.file.startswith(f"lmdeploy-{known.version}-{tag}-{tag}-")
        assert f"cpython-{tag.removeprefix('cp')}-" in each.library
        assert len(each.sha256) == 64


def test_another_version_is_refused_with_the_command_that_installs_the_right_one(
    tmp_path: Path,
) -> None:
    said = refusal("verify", **other_lmdeploy(tmp_path, "0.12.1", "something"))
    assert "lmdeploy 0.12.1 is installed; the patches are for 0.11.0" in said
    assert "pip install --no-deps lmdeploy==0.11.0" in said


def test_a_changed_library_is_refused(tmp_path: Path) -> None:
    said = refusal("apply", **other_lmdeploy(tmp_path, "0.11.0", "something"))
    assert "it was changed, or built anew" in said
    assert "--force-reinstall" in said


def test_an_lmdeploy_without_turbomind_is_refused(tmp_path: Path) -> None:
    said = refusal("build", **other_lmdeploy(tmp_path, "0.11.0"))
    assert "no _turbomind*.so in" in said


def test_a_python_without_lmdeploy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lmdeploy.py").write_text("")
    said = refusal("selftest", PYTHONPATH=str(tmp_path))
    assert "no lmdeploy in" in said
    assert "pip install --no-deps lmdeploy==0.11.0" in said


def test_status_says_what_is_refused_and_why(tmp_path: Path) -> None:
    found = shown("status", **other_lmdeploy(tmp_path, "0.12.1", "something"))
    assert found["lmdeploy"] == "0.12.1"
    assert found["known"] is False
    assert "the patches are for 0.11.0" in str(found["refusal"])
    assert found["patches"] is None


def test_a_library_is_hashed_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path / "cache"))
    library = tmp_path / "library.so"
    library.write_bytes(b"one")
    first = wheel.remembered_hash_of(library)
    assert wheel.remembered_hash_of(library) == first == wheel.hash_of(library)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    library.write_bytes(b"other")
    assert wheel.remembered_hash_of(library) == wheel.hash_of(library) != first


@pytest.mark.parametrize("damaged", ["", "ab12", "x" * 64])
def test_a_remembered_checksum_that_is_none_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path / "cache"))
    library = tmp_path / "library.so"
    library.write_bytes(b"one")
    wheel.remembered_hash_of(library)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(damaged)
    assert wheel.remembered_hash_of(library) == wheel.hash_of(library) == kept.read_text()


@needs_lmdeploy
def test_status_knows_the_installed_wheel() -> None:
    found = shown("status")
    assert found["known"] is True
    assert found["lmdeploy"] == "0.11.0"
    assert found["sha256"] == wheel.known().wheels[wheel.python_tag()].sha256


@needs_lmdeploy
def test_a_second_build_finds_the_first() -> None:
    first = shown("build")
    second = shown("build")
    assert second["patches"] == first["patches"]
    assert second["built now"] is False
    assert shown("status")["patches"] == first["patches"]


@needs_lmdeploy
def test_without_a_compiler_the_refusal_names_the_remedy(tmp_path: Path) -> None:
    said = refusal("build", SAGEC_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert "no C++ compiler" in said
    assert "apt-get install g++" in said


@needs_lmdeploy
def test_the_installed_library_is_verified() -> None:
    found = shown("verify")
    assert found["seams"] == "all there"
    assert found["self-test"] == "passed"
    assert shown("selftest")["self-test"] == "passed"


@needs_lmdeploy
def test_all_slots_are_patched_and_all_put_back() -> None:
    found = shown("apply")
    assert int(str(found["slots patched"])) > 10
    assert found["left patched"] == 0


PROGRAM = """
import sys
from sagec.runtime.engines.turbomind import patching, wheel
{before}
sys.path.append(str(wheel.find().library.parent))
import _turbomind
print("slots", patching.patched().num_slots() if patching.patched() else 0)
print("arguments", sys.argv[1:])
sys.exit(7)
"""
STAND_INS = """
from sagec.runtime.engines.turbomind.toy.harness import load_stand_ins
load_stand_ins()
"""


@needs_lmdeploy
def test_a_program_runs_with_turbomind_patched_as_it_imports_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(before=STAND_INS))
    done = sagec("patch", "apply", "--", str(program), "--port", "1", "--", "x")
    assert done.returncode == 7, done.stderr
    slots, arguments = done.stdout.splitlines()
    assert int(slots.removeprefix("slots ")) > 10
    assert arguments == "arguments ['--port', '1', '--', 'x']"
    assert done.stderr == ""


@needs_lmdeploy
def test_a_program_whose_turbomind_cannot_be_patched_runs_with_it_stock(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(before=STAND_INS))
    unbuilt = {"SAGEC_CACHE": str(tmp_path / "empty"), "CXX": "no-such-compiler"}
    done = sagec("patch", "apply", "--", str(program), **unbuilt)
    assert done.returncode == 7, done.stderr
    assert "slots 0" in done.stdout
    assert done.stderr.startswith(
        "sagec: TurboMind runs unpatched: the patches of TurboMind cannot"
    )
    assert done.stderr.count("\n") == 1


def test_a_module_is_run_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("import sys; print(__name__, sys.argv[1:])")
    done = sagec("patch", "apply", "--", "-m", "hello", "a", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "__main__ ['a']\n")


@pytest.mark.parametrize("way", [["main.py"], ["-m", "main"]])
def test_a_program_finds_what_lies_beside_it(tmp_path: Path, way: list[str]) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'found'")
    (tmp_path / "main.py").write_text("import beside; print(beside.NAME)")
    command = [sys.executable, "-m", "sagec.cli", "patch", "apply", "--", *way]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_a_console_script_is_run_by_its_name() -> None:
    done = sagec("patch", "apply", "--", "sagec", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("sagec ")


def test_a_program_that_fails_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('its own fault')")
    done = sagec("patch", "apply", "--", str(tmp_path / "fails.py"))
    assert done.returncode == 1
    assert "ValueError: its own fault" in done.stderr
    assert "internal error" not in done.stderr
    (tmp_path / "says.py").write_text("import sys; sys.exit('no more')")
    done = sagec("patch", "apply", "--", str(tmp_path / "says.py"))
    assert (done.returncode, done.stderr) == (1, "no more\n")


@pytest.mark.parametrize(
    "program, said",
    [
        (["no-such-program"], "no program 'no-such-program'"),
        (["-m"], "-m wants the name of a module"),
        (["-m", "no.such.module"], "no module named 'no.such.module'"),
        (["-m", ""], "no module named ''"),
        (["/bin/true"], "/bin/true is no Python program"),
    ],
)
def test_what_cannot_be_run_is_refused(program: list[str], said: str) -> None:
    assert said in refusal("apply", "--", *program)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["patch", "aply"], "no action 'aply'; did you mean 'apply'?"),
        (["patch"], "are required: ACTION ("),
        (["patch", "build", "x"], "'x' is one argument too many for build"),
        (["patch", "apply", "--json", "--", "x.py"], "--json is for what sagec prints"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], said: str) -> None:
    done = sagec(*argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


TOOLS = ("g++", "gdb", "nm", "readelf")


@needs_lmdeploy
@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")
def test_the_debug_information_of_the_installed_library_agrees_with_abi_h() -> None:
    command = [sys.executable, "-m", "sagec.third_party.lmdeploy.check_wheel"]
    command.append(str(wheel.find().library))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are as VERSION and abi.h have them" in done.stdout


def test_a_field_that_lies_elsewhere_is_named() -> None:
    there = [check_wheel.Field(0, 8, "id", 1), check_wheel.Field(8, 4, "status", 1)]
    assert check_wheel.differences(there, there, "Sequence") == []
    moved = [check_wheel.Field(4, 4, "status", 1), check_wheel.Field(8, 8, "blocks", 1)]
    assert check_wheel.differences(there, moved, "Sequence") == [
        "Sequence.status: 4 bytes at 4, and no such field there",
        "Sequence.blocks: 8 bytes at 8, and no such field there",
    ]


def python(code: str, *argv: str) -> list[str]:
    """Lines that this code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_lmdeploy
def test_a_second_patching_finds_what_the_first_did_and_an_open_instance_keeps_it() -> None:
    code = (
        f"{STAND_INS}"
        "from sagec.runtime.engines.turbomind import abi, native, patching\n"
        "first = patching.ensure_patched()\n"
        "slots = first.num_slots()\n"
        "print(patching.ensure_patched() is first, first.num_slots() == slots > 10)\n"
        "instance = first.open(7, decider=abi.STOCK)\n"
        "for refused in (first.revert, lambda: first.open(7, decider=abi.STOCK)):\n"
        "    try:\n"
        "        refused()\n"
        "    except native.NativeError as error:\n"
        "        print(error)\n"
        "print(first.num_slots() == slots)\n"
        "instance.close()\n"
        "first.revert()\n"
        "print(first.num_slots())\n"
    )
    found, still_open, taken, kept, left = python(code)
    assert (found, kept, left) == ("True True", "True", "0")
    assert "open" in still_open
    assert "7" in taken


@needs_lmdeploy
def test_a_library_without_the_seams_is_not_touched(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    library = tmp_path / "_turbomind.other.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    code = (
        "import ctypes, sys\n"
        "from sagec.runtime.engines.turbomind import build, native, wheel\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "patches = native.Native(build.build(wheel.find().sha256))\n"
        "for refused in (patches.seams, patches.selftest, patches.apply):\n"
        "    try:\n"
        "        refused()\n"
        "    except native.NativeError as error:\n"
        "        print(error)\n"
        "print(patches.num_slots())\n"
    )
    seams, selftest, apply, slots = python(code, str(library))
    assert "Materialize" in seams
    assert "self-test" in selftest
    assert apply == seams
    assert slots == "0"


@needs_lmdeploy
@pytest.mark.skipif(patching.has_driver(), reason="there is an NVIDIA driver here")
def test_without_a_gpu_the_remedy_is_the_toy() -> None:
    code = (
        "from sagec.runtime.engines.turbomind import patching\n"
        "try:\n"
        "    patching.ensure_patched()\n"
        "except patching.PatchError as error:\n"
        "    print(error)\n"
        "print(patching.patched())\n"
    )
    said, patched = python(code)
    assert "TurboMind does not load: lib" in said
    assert "maths=toy" in said
    assert patched == "None"


@needs_lmdeploy
@pytest.mark.skipif(patching.has_driver(), reason="there is an NVIDIA driver here")
def test_an_instance_without_a_gpu_is_refused_before_anything_is_loaded() -> None:
    spec = InstanceSpec(id="i0", engine="turbomind", model="", kv_blocks=4, block_tokens=64)
    before = patching.patched()  # perhaps by another test of this process
    with pytest.raises(EngineError, match=r"^instance 'i0': no CUDA GPU here; option maths"):
        open_instance(spec, Options())
    assert patching.patched() is before


@needs_lmdeploy
def test_another_turbomind_than_the_one_checked_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = types.ModuleType("_turbomind")
    other.__file__ = __file__
    monkeypatch.setitem(sys.modules, "_turbomind", other)
    with pytest.raises(patching.PatchError, match="is loaded, and not the"):
        patching.import_turbomind(wheel.find())


@needs_lmdeploy
def test_the_doctor_calls_turbomind_usable_only_where_it_can_be_patched(tmp_path: Path) -> None:
    def turbomind(**environment: str) -> list[dict[str, object]]:
        found = json.loads(sagec("doctor", "--json", **environment).stdout)
        return [each for each in found if each["name"].startswith("turbomind")]

    assert [each["here"] for each in turbomind()] == [True, True]
    for engine, patches in (
        turbomind(**other_lmdeploy(tmp_path, "0.12.1", "something")),
        turbomind(SAGEC_CACHE=str(tmp_path / "empty"), CXX="no-such-compiler"),
    ):
        assert (engine["here"], patches["here"]) == (False, False)
        assert engine["detail"] == "not usable without its patches"


def test_help_tells_the_actions_and_shows_examples() -> None:
    done = sagec("patch", "--help")
    assert done.returncode == 0
    for action in ("status", "build", "verify", "selftest", "apply"):
        assert f"\n  {action} " in done.stdout
    assert "sagec patch apply -- lmdeploy serve" in done.stdout
