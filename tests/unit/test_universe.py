"""What the stock drivers of xDSL find of sagec."""

from __future__ import annotations

import pytest
from xdsl.context import Context
from xdsl.dialects.builtin import Builtin
from xdsl.parser import Parser
from xdsl.universe import Universe

from sagec.universe import DIALECTS, PASSES, TARGETS, UNIVERSE, sagec_context


def test_xdsl_finds_the_universe_by_its_entry_point() -> None:
    multiverse = Universe.get_multiverse()
    for name in DIALECTS:
        assert multiverse.all_dialects[name] is UNIVERSE.all_dialects[name]


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_has_the_name_it_is_listed_by(name: str) -> None:
    assert DIALECTS[name]().name == name


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_the_name_it_is_listed_by(name: str) -> None:
    assert PASSES[name]().name == name


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_the_name_it_is_listed_by(name: str) -> None:
    assert TARGETS[name]().name == name


def test_dialects_load_when_a_text_names_them() -> None:
    context = sagec_context()
    assert "pd" not in {dialect.name for dialect in context.loaded_dialects}
    Parser(context, "pd.leave []").parse_module()
    assert "pd" in {dialect.name for dialect in context.loaded_dialects}


def test_xdsls_own_parser_reads_the_dialects_too() -> None:
    context = Context()
    context.load_dialect(Builtin)
    for name, dialect in DIALECTS.items():
        context.register_dialect(name, dialect)
    module = Parser(context, "pd.graph @g {\n  %n = pd.join none\n}").parse_module()
    module.verify()
    assert "pd.join none" in str(module)
