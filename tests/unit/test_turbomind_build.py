"""Libraries built from C and C++: once, whole, and with a line that says why where it fails."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sagec.runtime.compiled import Recipe, Unbuilt, cache_folder, compiled
from sagec.runtime.engines.turbomind import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")

C = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAGEC_CACHE", str(folder))
    for name in ("CC", "CXX", "SAGEC_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.c"
    path.write_text(C)
    return path


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def test_a_library_in_c_is_built_and_loads(source: Path) -> None:
    assert ctypes.CDLL(str(compiled("answer", [source]))).answer() == 42


def test_a_library_in_c_and_c_plus_plus_is_built(source: Path) -> None:
    more = source.with_name("more.cc")
    more.write_text(
        '#include <vector>\nextern "C" int more() { return std::vector<int>(7).size(); }'
    )
    path = compiled("answer", [source, more], ["-fpermissive"])
    assert ctypes.CDLL(str(path)).more() == 7


def test_a_build_is_found_again(source: Path, cache: Path) -> None:
    first = compiled("answer", [source])
    written = first.stat().st_mtime_ns
    assert compiled("answer", [source]) == first
    assert first.stat().st_mtime_ns == written
    assert built(cache) == [first]


def test_nothing_else_is_left_in_the_cache_but_objects(source: Path, cache: Path) -> None:
    path = compiled("answer", [source])
    assert sorted(cache.iterdir()) == sorted([path, cache / "objects"])
    assert [each.suffix for each in (cache / "objects").iterdir()] == [".o"]


def test_a_change_of_one_source_compiles_one(source: Path, cache: Path) -> None:
    other = source.with_name("other.c")
    other.write_text("int other(void) { return 1; }")
    compiled("answer", [source, other])
    other.write_text("int other(void) { return 2; }")
    path = compiled("answer", [source, other])
    assert ctypes.CDLL(str(path)).other() == 2
    assert len(list((cache / "objects").glob("answer-*.o"))) == 1
    assert len(list((cache / "objects").glob("other-*.o"))) == 2


def test_another_header_flag_or_key_is_another_build(source: Path, cache: Path) -> None:
    compiled("answer", [source])
    compiled("answer", [source], ["-O1"])
    compiled("answer", [source], key=["another library"])
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    path = compiled("answer", [source])
    assert len(built(cache)) == 4
    assert ctypes.CDLL(str(path)).answer() == 43


def test_a_header_of_an_included_folder_is_part_of_the_build(tmp_path: Path, source: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    source.with_name("answer.h").rename(apart / "answer.h")
    recipe = Recipe(name="answer", sources=[source], includes=[apart])
    first = recipe.build()
    (apart / "answer.h").write_text("#define ANSWER 44\n")
    second = Recipe(name="answer", sources=[source], includes=[apart])
    assert second.built() is None
    assert ctypes.CDLL(str(second.build())).answer() == 44
    assert first.exists()


def test_another_compiler_is_another_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled("answer", [source])
    other = tmp_path / "my-cc"
    other.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo my 1.0 && exit\nexec {shutil.which("cc")} "$@"\n'
    )
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    assert compiled("answer", [source]) != first


def test_without_a_compiler_an_earlier_build_will_do(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled("answer", [source])
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled("answer", [source]) == first


def test_without_a_compiler_or_a_build_the_remedy_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        Unbuilt, match=r"no C compiler \(no-such-compiler, .* apt-get install g\+\+"
    ):
        compiled("answer", [source])


def test_an_error_of_the_compiler_is_one_line_and_the_rest_is_kept(
    source: Path, cache: Path
) -> None:
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(
        Unbuilt, match=r"failed: answer\.c:1:\d+: error: .nothing. undeclared"
    ) as told:
        compiled("answer", [source])
    assert "\n" not in str(told.value)
    (log,) = cache.glob("objects/*.log")
    assert f"(all that it said: {log})" in str(told.value)
    assert log.read_text().startswith(str(shutil.which("cc")))
    source.write_text("int answer(void) { return 1; }\n")
    compiled("answer", [source])


def test_a_cache_that_cannot_be_written_is_named(source: Path, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(Unbuilt, match=r"cache cannot keep .*: it is no folder; SAGEC_CACHE names"):
        compiled("answer", [source])


@pytest.mark.parametrize("size", [0, 20, 5000])
def test_what_was_cut_in_the_cache_is_built_again(source: Path, cache: Path, size: int) -> None:
    path = compiled("answer", [source])
    whole = path.read_bytes()
    for damaged in (path, *cache.glob("objects/*.o")):
        damaged.write_bytes(damaged.read_bytes()[:size])
    assert compiled("answer", [source]) == path
    assert path.read_bytes() == whole
    assert ctypes.CDLL(str(path)).answer() == 42


def test_what_a_killed_process_left_is_removed_by_the_next_build(source: Path, cache: Path) -> None:
    left = cache / "objects" / "building-x"
    left.mkdir(parents=True)
    (left / "half.o").touch()
    compiled("answer", [source])
    assert not left.exists()


def test_a_byte_that_changed_in_the_cache_is_noticed(source: Path) -> None:
    path = compiled("answer", [source])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert Recipe(name="answer", sources=[source]).built() is None


def test_two_processes_at_once_leave_one_whole_library(source: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sagec.runtime.compiled import compiled\n"
        "import ctypes; print(ctypes.CDLL(str(compiled('answer', [Path(sys.argv[1])]))).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate()[0] for each in both] == ["42\n", "42\n"]
    assert len(built(cache)) == 1
    assert len(list((cache / "objects").iterdir())) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["SAGEC_CACHE"])
    monkeypatch.delenv("SAGEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/sagec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sagec"


def test_the_patches_are_built_for_one_library_and_one_set_of_sanitizers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = build.recipe("abc")
    assert [path.suffix for path in plain.sources] == [".cc"] * len(plain.sources)
    assert plain.key != build.recipe("abd").key
    monkeypatch.setenv("SAGEC_SANITIZE", "address,undefined")
    assert "-fsanitize=address,undefined" in build.recipe("abc").flags
    assert "-O2" not in build.recipe("abc").flags


def test_the_four_patches_are_there() -> None:
    names = {path.name for path in build.PATCHES.glob("000*.cc")}
    assert names == {
        "0001-extend-kv-manager-api.cc",
        "0002-add-prefix-reuse-hooks.cc",
        "0003-scheduler-ir-integration.cc",
        "0004-comm-backend-hooks.cc",
    }
