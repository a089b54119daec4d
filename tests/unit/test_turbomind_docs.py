"""docs/turbomind.md names what there is: tests, options, patches, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sagec.runtime.engines.turbomind.options import Options

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "turbomind.md").read_text("utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title!r}"
    return found[1]


def defined() -> set[str]:
    """Functions of the tests that run TurboMind."""
    files = [*ROOT.glob("tests/turbomind*.py"), *ROOT.glob("tests/*/test_turbomind*.py")]
    texts = [path.read_text("utf-8") for path in files]
    return {name for text in texts for name in re.findall(r"^def (\w+)", text, re.MULTILINE)}


def test_every_proof_of_a_guarantee_is_a_test() -> None:
    proofs = [row.split("|")[3] for row in section("What is guaranteed").splitlines() if "|" in row]
    names = {name for proof in proofs for name in re.findall(r"`(\w+)`", proof)}
    assert len(names) > 20
    assert names <= defined(), f"no such test: {', '.join(sorted(names - defined()))}"


def test_every_option_is_told_with_its_default() -> None:
    rows = [line.split("|") for line in section("Options").splitlines() if line.startswith("| `")]
    told = {
        name: default.strip().strip("`")
        for _, names, default, *_ in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    fields = zip(Options.__struct_fields__, Options.__struct_defaults__, strict=True)
    assert told == {name: str(default) for name, default in fields}


@pytest.mark.parametrize("folder", ["third_party/patches/lmdeploy", "benchmarks", "examples"])
def test_files_that_are_named_are_there(folder: str) -> None:
    names = re.findall(rf"\b{folder}/([\w.-]+\w)", PAGE)
    assert names
    assert all((ROOT / folder / name).is_file() for name in names), names


def test_the_four_patches_are_told() -> None:
    folder = ROOT / "third_party" / "patches" / "lmdeploy"
    patches = {path.stem for path in folder.glob("000*.cc")}
    assert patches == set(re.findall(r"^\| `(\d{4}-[\w-]+)`", PAGE, re.MULTILINE))
