"""An engine with its own step function, driven by sagec: what an engine author writes.

python examples/embed.py
"""

from sagec.compiler import Compiler
from sagec.runtime.embedding import Session, Step
from sagec.runtime.loop import Finished, Token
from sagec.runtime.request import Request
from sagec.runtime.strategies import create

CLUSTER = """
model toy { layers 2 hidden 64 heads 4 ffn 128 vocab 100 max_context 256 }
cluster here {
  device cpu kind cpu
  instance engine role both on cpu engine embedded model toy block 16 kv_blocks 24
}
serve on here mode hybrid chunk 32 horizon 8 { request "any" tokens 1 generate 1 }
"""


class Mine:
    """A toy model: the next token is the sum of all before it; its KV is that sum."""

    def __init__(self) -> None:
        self.kv: dict[str, int] = {}

    def compute(self, step: Step) -> dict[str, int]:
        for request_id in step.dropped:
            self.kv.pop(request_id, None)
        for chunk in step.chunks:
            before = self.kv[chunk.request_id] if chunk.begin else 0
            self.kv[chunk.request_id] = before + sum(chunk.tokens)
        return {c.request_id: self.kv[c.request_id] % 100 for c in step.chunks if c.samples}


def main() -> None:
    compiler = Compiler()
    planner = compiler.planner(compiler.parse(CLUSTER, "embed.sage").module)
    session = Session(create("fifo"), planner, kv_blocks=24, block_tokens=16, model="toy")
    engine, outputs = Mine(), {f"request {i}": [] for i in range(6)}
    for i, name in enumerate(outputs):
        session.add(Request(id=name, prompt=tuple(range(40 + 9 * i)), max_output_tokens=12))
    while session.num_requests:
        if step := session.next_step():
            session.settle(step, engine.compute(step))
        for output in session.outputs():
            if isinstance(output, Token):
                outputs[output.request_id].append(output.token)
            elif isinstance(output, Finished):
                engine.kv.pop(output.request_id, None)
                print(output.request_id, output.reason, outputs[output.request_id])


if __name__ == "__main__":
    main()
