"""Losing a place on the torch engine, by recomputation or by swapping, changes no token."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sagec.compiler import Compiler  # noqa: E402
from sagec.planner import CompilingPlanner  # noqa: E402
from sagec.runtime.engines import Preempted, StepReport  # noqa: E402
from sagec.runtime.executor import ExecutorAPI  # noqa: E402
from sagec.runtime.loop import Instance  # noqa: E402
from sagec.runtime.plan import RECOMPUTE, SWAP  # noqa: E402
from sagec.runtime.request import Request  # noqa: E402
from tests.checkpoints import checkpoint, decided  # noqa: E402
from tests.echo_cluster import ONE, SPLIT, Served  # noqa: E402
from tests.serving_graphs import Place, Scene  # noqa: E402
from tests.taking_turns import TakesTurns  # noqa: E402
from tests.torch_engines import engine  # noqa: E402

KV_BLOCKS, BLOCK_TOKENS, TOKENS = 24, 8, 14


def served_with(roles, strategy, asked, **options) -> Served:
    """Serve compiled plans on torch engines of this process."""
    folder = checkpoint("llama")
    engines = {
        name: engine(name, folder, KV_BLOCKS, BLOCK_TOKENS, channel="local", **options)
        for name in roles
    }
    members = [
        Instance(id=name, role=role, engine="torch", capability=engines[name].capability())
        for name, role in roles.items()
    ]
    places = [
        Place(name, role, "torch", kv_blocks=KV_BLOCKS, block_tokens=BLOCK_TOKENS)
        for name, role in roles.items()
    ]
    module = Compiler().parse(Scene(tuple(places)).cluster(), "cluster.mlir").module
    mode = "hybrid" if "both" in roles.values() else "strict"
    planner = CompilingPlanner(module, mode=mode, horizon=4)
    served = Served()
    with ExecutorAPI(engines, members, watch=[served.hear]) as executor:
        served.take(executor.serve(asked, strategy, planner))
        executor.check_integrity()
    return served


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("how", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
def test_who_loses_a_place_gets_all_tokens_that_it_gets_undisturbed(roles, how, cache):
    prompts = {
        f"r{i}": decided("llama", length, TOKENS) for i, length in enumerate((5, 12, 30, 41))
    }
    asked = [
        Request(id=name, prompt=prompt, max_output_tokens=TOKENS)
        for name, (prompt, _) in prompts.items()
    ]
    served = served_with(roles, TakesTurns(how), asked, prefix_cache=cache)
    preempted = [event for event in served.events if isinstance(event, Preempted)]
    assert len(preempted) >= 4
    assert {name: tuple(tokens) for name, tokens in served.tokens.items()} == {
        name: expected for name, (_, expected) in prompts.items()
    }
    if how == SWAP:
        assert any(event.kept_tokens for event in preempted)
        reports = [event for event in served.events if isinstance(event, StepReport)]
        computed = sum(end - begin for report in reports for _, begin, end in report.chunks)
        assert computed < sum(len(prompt) for prompt, _ in prompts.values()) + 40
