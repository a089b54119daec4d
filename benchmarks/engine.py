"""Output tokens/s of the torch engine, its generated code and its hand-written layers, and of
transformers' generate, side by side in one run.

    taskset -c 0 python benchmarks/engine.py --out out/engine

One model of 28 M parameters, made on the spot; prompts of one length, so that generate pads
nothing; greedy; prefill included. The sides take turns, and each figure is the median of its
turns; ratios are medians of the ratios of neighbouring turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch

from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.lowering.torch_source import program_of
from sagec.passes.topology import Model
from sagec.runtime.engines import Engine, InstanceSpec, StepReport, create
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, Rows
from sagec.runtime.request import Request
from sagec.runtime.roofline import Device, Link

BATCHES = (1, 8, 32)
DTYPES = ("float32", "bfloat16")
VOCAB, BLOCK_TOKENS = 8192, 16


@dataclass(frozen=True)
class Result:
    """Medians of one batch size and dtype; ratio is ours over theirs, handwritten_ratio generated
    code over hand-written layers."""

    dtype: str
    batch: int
    sagec_tokens_per_s: float
    handwritten_tokens_per_s: float
    handwritten_ratio: float
    transformers_tokens_per_s: float
    ratio: float
    least_ratio: float
    sagec_first_token_ms: float
    turns: int
    same_tokens: float


def make_model(folder: Path) -> None:
    """Save the model that both sides load: 8 layers, hidden 512, 8 heads on 4 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def builder_of(folder: Path) -> ExecutionGraphBuilder:
    """What builds the graphs of the model's steps, on one rank."""
    model = Model(
        name="m",
        layers=8,
        hidden=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        ffn=1408,
        vocab=VOCAB,
        dtype="f32",
        max_context=2048,
        experts=0,
        experts_per_token=0,
        tied=1,
        path=str(folder),
    )
    parallel = Parallel()
    hardware = Hardware.uniform(parallel, Device(2e10, 1e10), Link(1e10, 10.0))
    return ExecutionGraphBuilder(model, parallel, hardware)


def make_program(folder: Path) -> Path:
    """Generate the code for the model; the file lies beside it."""
    builder = builder_of(folder)
    graphs = [
        builder.build_prefill_graph([(0, 64)]),
        builder.build_decode_graph([64]),
        builder.build_hybrid_graph([(0, 64)], [64]),
    ]
    path = folder / "program.py"
    path.write_text(program_of([graph.op for graph in graphs]), encoding="utf-8")
    return path


class Sagec:
    """Our side: a plan for all requests, polled to its end. program: "off" is hand-written."""

    def __init__(
        self, folder: Path, dtype: str, tokens: int, threads: int, native: str, program: str
    ) -> None:
        self._blocks = -(-tokens // BLOCK_TOKENS)
        spec = InstanceSpec(
            id="i0",
            engine="torch",
            model=str(folder),
            kv_blocks=self._blocks * max(BATCHES),
            block_tokens=BLOCK_TOKENS,
            options={
                "dtype": dtype,
                "threads": str(threads),
                "native": native,
                "program": program,
            },
        )
        self._engine: Engine = create(spec)
        self.first_token_s = 0.0

    def generate(self, prompts: torch.Tensor, num_tokens: int) -> list[list[int]]:
        """The output of each prompt."""
        batch, length = prompts.shape
        ids = [f"r{row}" for row in range(batch)]
        requests = [
            Request(id=id, prompt=tuple(prompt), max_output_tokens=num_tokens)
            for id, prompt in zip(ids, prompts.tolist(), strict=True)
        ]
        found: dict[str, list[int]] = {id: [] for id in ids}
        begin_s = time.perf_counter()
        self._engine.submit(plan_of(ids, length, num_tokens, self._blocks), requests)
        while events := self._engine.poll():
            for event in events:
                if isinstance(event, StepReport):
                    for id, _, token in event.tokens:
                        found[id].append(token)
                    if event.step == 0:
                        self.first_token_s = time.perf_counter() - begin_s
        return list(found.values())


def plan_of(ids: Sequence[str], length: int, num_tokens: int, blocks: int) -> ExecutionPlan:
    """All prompts in one step, then decodes until each request has `num_tokens`.

    length: tokens of each prompt; blocks: of KV that each request holds.
    """
    rows, ones = np.arange(len(ids)), np.ones(len(ids), np.int64)
    return ExecutionPlan(
        plan_id="all",
        round=0,
        target_instance_id="i0",
        mode="hybrid",
        num_steps=num_tokens,
        max_step_tokens=length * len(ids),
        request_ids=tuple(ids),
        rows=Rows(
            prompt_tokens=ones * length,
            computed_tokens=ones * 0,
            kv_blocks=ones * blocks,
            deadline_us=ones * 0,
        ),
        chunks=Chunks(step=ones * 0, row=rows, begin=ones * 0, end=ones * length, samples=ones),
        decodes=Decodes(row=rows, begin_step=ones, until_tokens=ones * (length + num_tokens)),
    )


class Transformers:
    """Their side: generate with its defaults, which are sdpa and a growing cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def generate(self, prompts: torch.Tensor, num_tokens: int) -> list[list[int]]:
        """The output of each prompt."""
        with torch.inference_mode():
            out = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        tokens: list[list[int]] = out[:, prompts.shape[1] :].tolist()
        return tokens


def measure(
    ours: Sagec, handwritten: Sagec, theirs: Transformers, dtype: str, batch: int, args: Any
) -> Result:
    """Take turns `args.turns` times, after one turn each to warm up."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(VOCAB, (batch, args.prompt), generator=generator)
    left, right = ours.generate(prompts, args.output), theirs.generate(prompts, args.output)
    if handwritten.generate(prompts, args.output) != left:
        raise SystemExit(f"{dtype}, batch {batch}: generated code gives other tokens")
    same = sum(a == b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))
    sides = (theirs, ours, handwritten)
    seconds: dict[Any, list[float]] = {side: [] for side in sides}
    first_s = []
    for turn in range(args.turns):
        for side in sides[::-1] if turn % 2 else sides:
            begin_s = time.perf_counter()
            side.generate(prompts, args.output)
            seconds[side].append(time.perf_counter() - begin_s)
        first_s.append(ours.first_token_s)
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    own = [b / a for a, b in zip(seconds[ours], seconds[handwritten], strict=True)]
    tokens = batch * args.output
    return Result(
        dtype=dtype,
        batch=batch,
        sagec_tokens_per_s=round(tokens / statistics.median(seconds[ours]), 1),
        handwritten_tokens_per_s=round(tokens / statistics.median(seconds[handwritten]), 1),
        handwritten_ratio=round(statistics.median(own), 3),
        transformers_tokens_per_s=round(tokens / statistics.median(seconds[theirs]), 1),
        ratio=round(statistics.median(ratios), 2),
        least_ratio=round(min(ratios), 2),
        sagec_first_token_ms=round(statistics.median(first_s) * 1e3, 1),
        turns=args.turns,
        same_tokens=round(same / tokens, 4),
    )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    import transformers

    return {
        **tables.machine(),
        "threads": args.threads,
        "native": args.native,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": args.prompt,
        "output_tokens": args.output,
    }


HEADS = (
    "dtype",
    "batch",
    "sagec tokens/s",
    "hand-written tokens/s",
    "ratio to it",
    "transformers tokens/s",
    "ratio",
    "least ratio",
    "first token ms",
    "same tokens",
)


def markdown(where: dict[str, Any], results: Sequence[Result]) -> str:
    """The results as a table, with a line that says where they were taken."""
    rows = [
        (
            r.dtype,
            r.batch,
            r.sagec_tokens_per_s,
            r.handwritten_tokens_per_s,
            r.handwritten_ratio,
            r.transformers_tokens_per_s,
            r.ratio,
            r.least_ratio,
            r.sagec_first_token_ms,
            f"{r.same_tokens:.1%}",
        )
        for r in results
    ]
    parts = [
        "# Torch engine against transformers' generate",
        tables.machine_line(where),
        "Same tokens: in bfloat16 the two round differently, and with random weights a choice that "
        "rounding tips changes all that follow.",
        tables.table_of(HEADS, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write engine.json and engine.md where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for engine.json and engine.md")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--native", choices=("auto", "off"), default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        program = str(make_program(folder))
        for dtype in args.dtypes:
            told = (folder, dtype, args.prompt + args.output, args.threads, args.native)
            ours, handwritten = Sagec(*told, program), Sagec(*told, "off")
            theirs = Transformers(folder, dtype)
            for batch in args.batches:
                results.append(measure(ours, handwritten, theirs, dtype, batch, args))
                print(results[-1], flush=True)
    where = machine(args)
    text = markdown(where, results)
    print(text)
    if args.out:
        answer = {**where, "results": [asdict(result) for result in results]}
        tables.write(args.out, "engine", answer, text, {})


if __name__ == "__main__":
    main()
