"""Instances that die under compiled plans: the others go on, whatever the strategy."""

import pytest

from sagec.compiler import Compiler
from sagec.runtime.clock import VirtualClock
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create, known
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, serve
from tests.unit.test_executor import Mortal

TWINS = {"x0": "both", "x1": "both"}

CLUSTER = """\
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112,
                  vocab = 97, dtype = "f32", max_context = 256}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
cluster.link @c0 to @c1
"""

ASKED = [
    Request(
        id=f"r{i}",
        prompt=tuple(range(i, i + 7 + i * 13 % 90)),
        max_output_tokens=12,
        arrival_us=i * 700,
        model="m",
    )
    for i in range(8)
]

DYING = [
    (roles, killed, restarts)
    for roles in (ONE, SPLIT, WIDE, TWINS)
    for killed in roles
    for restarts in (False, True)
    if restarts or len(set(roles.values())) < len(roles)
]
"""Clusters, who dies in them, and whether it is made again: it must be where it is the only one."""


def module_of(roles: dict[str, str]) -> str:
    instances = (
        f'cluster.instance @{name} on [@{"c1" if role == "decode" else "c0"}] engine "echo" '
        f"role {role} model @m {{kv_blocks = 40, block_tokens = 16, max_step_tokens = 64}}\n"
        for name, role in roles.items()
    )
    return CLUSTER + "".join(instances)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[int]]:
    alone = [Request(id=r.id, prompt=r.prompt, max_output_tokens=12) for r in ASKED]
    return serve(ONE, alone, kv_blocks=400).tokens


@pytest.mark.parametrize("strategy", known())
@pytest.mark.parametrize(
    ("roles", "killed", "restarts"),
    DYING,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_compiled_plans_go_around_an_instance_that_died(
    strategy, roles, killed, restarts, undisturbed
):
    for steps in (0, 5, 11):
        compiler, clock, lives = Compiler(), VirtualClock(), [10**9, 3, 1]

        def restart(name, clock=clock, lives=lives):
            return Mortal(name, clock, lives.pop())

        engines = {n: Mortal(n, clock, steps if n == killed else 10**9) for n in roles}
        instances = [
            Instance(id=n, role=r, engine="echo", capability=engines[n].capability(), model="m")
            for n, r in roles.items()
        ]
        again = restart if restarts else None
        api = ExecutorAPI(engines, instances, clock, restart=again, max_attempts=50)
        planner = compiler.planner(compiler.parse(module_of(roles), "x.mlir").module, horizon=8)
        served = Served().take(api.serve(ASKED, create(strategy), planner))
        assert served.tokens == undisturbed
        assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
        api.check_integrity()
