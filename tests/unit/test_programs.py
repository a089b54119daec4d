"""Which generated code an instance gets, where it is kept, and how a user sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagec import programs
from sagec.cli import main, serving
from sagec.cli.failure import InputError
from sagec.compiler import Compiler
from sagec.lowering.torch_source import MAGIC
from sagec.passes.errors import PassError
from sagec.passes.topology import Instance, topology_of

CLUSTER = """\
cluster.model @m {layers = 3, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112,
                  vocab = 97, dtype = "f32"}
cluster.model @wide like @m {hidden = 128}
cluster.model @moe like @m {experts = 4, experts_per_token = 2}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
"""
ONE = 'cluster.instance @a on [@c0] engine "torch" role both model @m {kv_blocks = 8}\n'
OTHER = 'cluster.instance @b on [@c1] engine "torch" role both model @m {kv_blocks = 99}\n'
TWO_RANKS = (
    'cluster.instance @t on [@c0, @c1] engine "torch" role both model @m {kv_blocks = 8, tp = 2}\n'
)
WIDE = 'cluster.instance @w on [@c0] engine "torch" role both model @wide {kv_blocks = 8}\n'
GRAPH = """\
pd.graph @serve {
  %new = pd.requests ["a": prompt 33 generate 9, "b": prompt 5 generate 4]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def instances(*lines: str) -> tuple[Instance, ...]:
    module = Compiler().parse(CLUSTER + "".join(lines), "cluster.mlir").module
    return topology_of(module).instances


def compiled(tmp_path: Path, *arguments: str, lines: tuple[str, ...] = (ONE, GRAPH)) -> int:
    file = tmp_path / "serve.mlir"
    file.write_text(CLUSTER + "".join(lines), encoding="utf-8")
    return main(["compile", str(file), "--emit", "torch", *arguments])


def test_one_file_does_for_all_instances_of_a_model_and_layout():
    files = [programs.kept(programs.program_for(i)) for i in instances(ONE, OTHER, TWO_RANKS, WIDE)]
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_a_program_has_a_function_for_each_phase():
    (one,) = instances(ONE)
    program = programs.program_for(one)
    assert [line.split("(")[0] for line in program.splitlines() if line.startswith("def ")] == [
        "def prefill",
        "def decode",
        "def hybrid",
    ]
    assert program.count("for layer, cache in zip(weights.layers, kv, strict=True):") == 3


def test_a_damaged_file_is_written_again():
    (one,) = instances(ONE)
    program = programs.program_for(one)
    path = programs.kept(program)
    path.write_bytes(b"\xff" + program.encode()[:100])
    assert programs.kept(program) == path
    assert path.read_text() == program
    assert list(path.parent.iterdir()) == [path]


def test_experts_compute_the_rows_that_are_routed_to_them():
    (one,) = instances(ONE.replace("@m", "@moe"))
    program = programs.program_for(one)
    assert program.count("for expert, rows, share in layer.ffn.routed(normed):") == 3
    assert '    "experts": 4,\n    "experts_per_token": 2,\n' in program


def test_a_layout_that_does_not_fit_is_refused():
    (one,) = instances(TWO_RANKS.replace("@m ", "@odd "), "cluster.model @odd like @m {ffn = 111}")
    with pytest.raises(PassError, match=r"instance @t: .*ffn 111 does not split over tp=2"):
        programs.program_for(one)


def test_instances_run_generated_code_unless_the_file_says_otherwise(cache: Path):
    one, two = instances(ONE, TWO_RANKS)
    spec = serving.spec_of(one, one_process=True)
    assert Path(spec.options["program"]).parent == cache / "programs"
    assert spec.options["tp"] == "1"
    assert serving.spec_of(two, one_process=True).options["tp"] == "2"
    (off,) = instances(ONE.replace("kv_blocks", 'options = "program=off", kv_blocks'))
    assert serving.spec_of(off, one_process=True).options["program"] == "off"


def test_hand_written_layers_run_where_no_file_can_be_kept(
    cache: Path, capsys: pytest.CaptureFixture[str]
):
    cache.write_text("in the way")
    (one,) = instances(ONE)
    assert serving.spec_of(one, one_process=True).options["program"] == "off"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("instance @a: no generated code: ")
    assert line.endswith("(SAGEC_CACHE names another folder)")


def test_ranks_have_no_hand_written_layers(cache: Path):
    cache.write_text("in the way")
    (two,) = instances(TWO_RANKS)
    with pytest.raises(InputError, match=r"instance @t: no generated code.*SAGEC_CACHE"):
        serving.spec_of(two, one_process=True)


def test_compile_prints_what_run_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compiled(tmp_path) == 0
    (one,) = instances(ONE)
    assert capsys.readouterr().out == programs.program_for(one)


def test_compile_prints_the_steps_of_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compiled(tmp_path, "--pipeline", "serve,convert-pd-to-exec") == 0
    text = capsys.readouterr().out
    assert text.count(MAGIC) == 1
    assert "from exec.graph @serve_a_0 of 38 tokens." in text
    assert "def hybrid" not in text


def test_a_program_can_be_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "steps.py"
    assert compiled(tmp_path, "-o", str(out)) == 0
    (one,) = instances(ONE)
    assert out.read_text() == programs.program_for(one)


def test_two_programs_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "steps.py"
    assert compiled(tmp_path, "-o", str(out), lines=(ONE, TWO_RANKS, GRAPH)) == 1
    said = capsys.readouterr().err
    assert said == (f"error: {out}: a file holds one program, and there are 2, for models or "
                    "layouts differ\n")  # fmt: skip
    assert not out.exists()
    assert compiled(tmp_path, lines=(ONE, TWO_RANKS, GRAPH)) == 0
    assert capsys.readouterr().out.count(MAGIC) == 2


def test_code_without_a_torch_instance_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert compiled(tmp_path, lines=(ONE.replace('"torch"', '"echo"'), GRAPH)) == 1
    assert "the file has no instance of engine torch, and no exec graph" in capsys.readouterr().err
