"""TurboMind patched and planned against TurboMind as it comes, on one GPU.

    python benchmarks/turbomind_gpu.py --out out

It needs lmdeploy 0.11.0, torch with CUDA, and a GPU with 20 GiB free. A Llama with random weights
(about half a gigabyte in bf16) is made on the spot, the same one every time. Stock, patched and
planned TurboMind are processes of their own (turbomind_sides.py), which take turns:

- tokens: are they those of stock, under a mixed load? Stock against itself shows what is noise,
  for TurboMind's own tokens may depend on who else is in a step;
- tokens/s: what the hooks cost, and what plans do;
- latency: long prompts come while others decode; stock against chunks of several sizes;
- hand-over: from an instance that prefills to one that decodes on the same card, GB/s;
- conformance: of the planned steps, how many computed just what was planned.

`--maths toy` does all of it on a CPU, with lmdeploy's own scheduler over stand-ins for CUDA and a
toy in place of the model: it proves the script, and its times are made up.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tables
from turbomind_sides import Answer, Ask, Said, Setup, Workload

ROOT = Path(__file__).parent.parent
SIDES = Path(__file__).with_name("turbomind_sides.py")
NEEDED_BYTES = 20 * 2**30


@dataclass(frozen=True)
class Shape:
    """Of the model: a Llama with heads of 128."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    max_context: int


@dataclass(frozen=True)
class Sizes:
    """How much is asked: (requests, least and most prompt tokens, tokens to generate).

    gap_us: between long prompts, which come while the short ones decode.
    """

    shape: Shape
    kv_blocks: int
    block_tokens: int
    max_batch: int
    burst: tuple[int, int, int, int]
    short: tuple[int, int, int, int]
    long: tuple[int, int, int, int]
    moved: tuple[int, int, int, int]
    gap_us: int
    chunks: tuple[int, ...]


GPU = Sizes(
    shape=Shape(layers=20, hidden=1024, ffn=2816, vocab=32000, max_context=8192),
    kv_blocks=1024,
    block_tokens=64,
    max_batch=64,
    burst=(64, 64, 512, 256),
    short=(24, 64, 128, 512),
    long=(8, 5000, 6000, 16),
    moved=(16, 512, 4096, 32),
    gap_us=300_000,
    chunks=(256, 512, 1024, 2048),
)
TOY = Sizes(
    shape=Shape(layers=1, hidden=256, ffn=256, vocab=1024, max_context=1024),
    kv_blocks=400,
    block_tokens=64,
    max_batch=16,
    burst=(12, 16, 64, 24),
    short=(6, 16, 32, 150),
    long=(3, 500, 600, 4),
    moved=(6, 64, 300, 8),
    gap_us=60_000,
    chunks=(64, 256),
)
TOY_TIMES = {"step_us": "1000", "token_us": "50"}
"""What the toy takes for a step and for each of its tokens, so that there is something to see."""


# The model


def make_model(folder: Path, shape: Shape) -> None:
    """Save a Llama with random weights, always the same, with the small model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(11)
    weights = {
        name: torch.randn(size, generator=draw).mul_(0.04).to(torch.bfloat16)
        if len(size) == 2
        else torch.ones(size, dtype=torch.bfloat16)
        for name, size in weights_of(shape)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "models" / "tiny" / name, folder)


def weights_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every weight."""
    hidden, kv = shape.hidden, shape.hidden // 2
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{at}.self_attn.{name}_proj.weight", (out, hidden)
        for name in ("gate", "up"):
            yield f"{at}.mlp.{name}_proj.weight", (shape.ffn, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, shape.ffn)
        for name in ("input", "post_attention"):
            yield f"{at}.{name}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json in the Hugging Face layout; no token ends a text."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 128,
        "num_key_value_heads": shape.hidden // 256,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.max_context,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }


# What is asked


def drawn(sizes: tuple[int, int, int, int], vocab: int, seed: int, gap_us: int = 0) -> list[Ask]:
    """Requests with random prompts, one every `gap_us`."""
    count, least, most, generate = sizes
    draw = random.Random(seed)
    return [
        Ask(
            tuple(draw.randrange(10, vocab) for _ in range(draw.randint(least, most))),
            generate,
            i * gap_us,
        )
        for i in range(count)
    ]


def mixed(sizes: Sizes) -> tuple[list[Ask], list[Ask]]:
    """Short requests that come at once and decode for long, and long prompts in between."""
    vocab = sizes.shape.vocab
    late = drawn(sizes.long, vocab, 3, sizes.gap_us)
    late = [Ask(ask.prompt, ask.generate, ask.arrival_us + sizes.gap_us) for ask in late]
    return drawn(sizes.short, vocab, 2), late


# Sides


class SideError(RuntimeError):
    """A side that cannot be made, or that died; a line."""


class SideProcess:
    """A side of turbomind_sides.py."""

    def __init__(self, setup: Setup) -> None:
        self.name = setup.side
        self._process = subprocess.Popen(
            [sys.executable, str(SIDES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._tell(setup)
        self._hear()

    def serve(self, asks: Sequence[Ask], **more: Any) -> Answer:
        """Serve these. Raises SideError where that fails."""
        self._tell(Workload(asks=tuple(asks), **more))
        answer = self._hear().answer
        assert answer is not None
        return answer

    def _tell(self, what: Setup | Workload) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(what) + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> Said:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"{self.name} died with status {self._process.wait()}")
        said = msgspec.json.decode(line, type=Said)
        if said.error:
            self.close()
            raise SideError(f"{self.name}: {said.error}")
        return said

    def close(self) -> None:
        """End it, and wait until it has."""
        self._process.communicate()


# Figures


@dataclass(frozen=True)
class Parity:
    """Tokens of a side against stock's, under the mixed load.

    same: requests with all tokens equal. until: share of tokens before a request's first wrong one.
    """

    side: str
    requests: int
    same: int
    until: float


@dataclass(frozen=True)
class Speed:
    """Output tokens/s of requests that come all at once; ratios to stock in the same turn."""

    side: str
    tokens_per_s: float
    ratio: float
    least_ratio: float
    turns: int


@dataclass(frozen=True)
class Latency:
    """Under the mixed load, all turns together; ms.

    ttft: of the long prompts. tpot: of the short requests, mean of a request. stall: the longest
    wait between two tokens of a short request.
    """

    side: str
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float
    stall_p95_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class HandOver:
    """KV from one instance to the other on the same card."""

    moves: int
    megabytes: float
    export_gb_per_s: float
    whole_gb_per_s: float
    whole_p50_ms: float
    same: int
    requests: int


@dataclass(frozen=True)
class SideConformance:
    """Steps that sagec was to decide, the share of them that computed just what was planned, and
    those for which no decision came in time."""

    side: str
    steps: int
    as_planned: float
    at_deadline: int


def parity(side: str, theirs: Answer, stock: Answer) -> Parity:
    """Compare request by request."""
    equal = total = same = 0
    for ours, right in zip(theirs.tokens, stock.tokens, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(ours, right, strict=False)) if a != b]
        equal += differ[0] if differ else min(len(ours), len(right))
        total += len(right)
        same += ours == right
    return Parity(side, len(stock.tokens), same, round(equal / total, 4))


def tokens_per_s(answer: Answer) -> float:
    """Output tokens over the time until the last one was there."""
    last_us = max(times[-1] for times in answer.times_us)
    return sum(map(len, answer.tokens)) / last_us * 1e6


def speeds(answers: Mapping[str, Sequence[Answer]]) -> list[Speed]:
    """Medians over turns; a turn's ratio is to stock's run of that turn."""
    rates = {side: [tokens_per_s(a) for a in of_side] for side, of_side in answers.items()}
    found = []
    for side, of_side in rates.items():
        ratios = [rate / stock for rate, stock in zip(of_side, rates["stock"], strict=True)]
        found.append(
            Speed(
                side,
                round(statistics.median(of_side), 1),
                round(statistics.median(ratios), 4),
                round(min(ratios), 4),
                len(of_side),
            )
        )
    return found


def latency(side: str, answers: Sequence[Answer], asks: Sequence[Ask], num_short: int) -> Latency:
    """Of the mixed load, whose first `num_short` requests are the short ones."""
    ttft: list[float] = []
    tpot: list[float] = []
    stalls: list[float] = []
    for answer in answers:
        for times in answer.times_us[:num_short]:
            tpot.append((times[-1] - times[0]) / (len(times) - 1))
            stalls.append(float(np.diff(times).max()))
        for ask, times in zip(asks[num_short:], answer.times_us[num_short:], strict=True):
            ttft.append(times[0] - ask.arrival_us)
    return Latency(
        side=side,
        ttft_p50_ms=percentile_ms(ttft, 50),
        ttft_p95_ms=percentile_ms(ttft, 95),
        tpot_p50_ms=percentile_ms(tpot, 50),
        tpot_p95_ms=percentile_ms(tpot, 95),
        stall_p95_ms=percentile_ms(stalls, 95),
        tokens_per_s=round(statistics.median(map(tokens_per_s, answers)), 1),
    )


def percentile_ms(values_us: Sequence[float], percent: float) -> float:
    """Of microseconds, in milliseconds."""
    return round(float(np.percentile(values_us, percent)) / 1e3, 2)


def hand_over(pair: Answer, stock: Answer) -> HandOver:
    """Rates are of all bytes over the sum of the times that their moves took."""
    num_bytes = sum(move.num_bytes for move in pair.moves)
    return HandOver(
        moves=len(pair.moves),
        megabytes=round(num_bytes / 1e6, 1),
        export_gb_per_s=round(num_bytes / sum(m.export_us for m in pair.moves) / 1e3, 3),
        whole_gb_per_s=round(num_bytes / sum(m.whole_us for m in pair.moves) / 1e3, 3),
        whole_p50_ms=round(statistics.median(m.whole_us for m in pair.moves) / 1e3, 2),
        same=sum(a == b for a, b in zip(pair.tokens, stock.tokens, strict=True)),
        requests=len(pair.tokens),
    )


def conformance(side: str, answers: Sequence[Answer]) -> SideConformance:
    """Summed over runs."""
    obeyed = sum(answer.obeyed for answer in answers)
    late = sum(answer.at_deadline for answer in answers)
    steps = obeyed + late + sum(answer.deviated for answer in answers)
    return SideConformance(side, steps, round(obeyed / max(1, steps), 4), late)


# Runs


@dataclass(frozen=True)
class Runs:
    """Answers by side, or by chunk size where sagec plans.

    again: stock's first run of the mixed load once more. alone: stock's answer to what `handed`
    moved from one instance to the other, or why it did not: the other figures are not lost by it.
    """

    bursts: dict[str, list[Answer]]
    loads: dict[str, list[Answer]]
    again: Answer
    alone: Answer
    handed: Answer | SideError


@dataclass(frozen=True)
class Figures:
    """All that was measured; hand_over may be why it was not."""

    parity: list[Parity]
    speed: list[Speed]
    latency: list[Latency]
    hand_over: HandOver | str
    conformance: list[SideConformance]


def serve_all(setups: Mapping[str, Setup], sizes: Sizes, turns: int) -> Runs:
    """Start the sides, let them take turns, and end them. Raises SideError."""
    moved = drawn(sizes.moved, sizes.shape.vocab, 4)
    with ExitStack() as stack:
        sides = {}
        for name in ("stock", "patched", "planned"):
            sides[name] = say(f"starting {name}", SideProcess, setups[name])
            stack.callback(sides[name].close)
        bursts = say("tokens/s", take_turns, sides, sizes, turns)
        loads = say("latency", mixed_load, sides, sizes, turns)
        again = sides["stock"].serve([ask for part in mixed(sizes) for ask in part])
        alone = sides["stock"].serve(moved)
    return Runs(bursts, loads, again, alone, handed_over(setups["pair"], moved, sizes.chunks[-1]))


def handed_over(setup: Setup, asks: Sequence[Ask], chunk: int) -> Answer | SideError:
    """What a pair makes of these, or why it made nothing of them."""
    try:
        with closing(say("starting a pair", SideProcess, setup)) as pair:
            served: Answer = say("hand-over", pair.serve, asks, strategy="fifo", chunk=chunk)
            return served
    except SideError as error:
        print(f"turbomind_gpu.py: {error}", file=sys.stderr)
        return error


def figures_of(runs: Runs, sizes: Sizes) -> Figures:
    """What the answers come to."""
    short, late = mixed(sizes)
    others = {name: answers[0] for name, answers in runs.loads.items() if name != "stock"}
    chunked = {name: answers for name, answers in runs.loads.items() if name.startswith("chunk")}
    planned = {**chunked, "all at once": runs.bursts["planned"]}
    moved: HandOver | str = str(runs.handed)
    if isinstance(runs.handed, Answer):
        planned["pair"] = [runs.handed]
        moved = hand_over(runs.handed, runs.alone)
    first = runs.loads["stock"][0]
    return Figures(
        parity=[parity(n, a, first) for n, a in {"stock again": runs.again, **others}.items()],
        speed=speeds(runs.bursts),
        latency=[latency(n, a, short + late, len(short)) for n, a in runs.loads.items()],
        hand_over=moved,
        conformance=[conformance(name, answers) for name, answers in planned.items()],
    )


def say(what: str, function: Any, *arguments: Any, **more: Any) -> Any:
    """Call it, after a word on the terminal that it is being done."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    return function(*arguments, **more)


def take_turns(
    sides: Mapping[str, SideProcess], sizes: Sizes, turns: int
) -> dict[str, list[Answer]]:
    """Requests all at once, after one turn to warm up; who begins changes with the turn."""
    asks = drawn(sizes.burst, sizes.shape.vocab, 1)
    for side in sides.values():
        side.serve(asks, chunk=sizes.chunks[-1])
    answers: dict[str, list[Answer]] = {name: [] for name in sides}
    for turn in range(turns):
        order = list(sides) if turn % 2 else list(sides)[::-1]
        for name in order:
            answers[name].append(sides[name].serve(asks, chunk=sizes.chunks[-1]))
    return answers


def mixed_load(
    sides: Mapping[str, SideProcess], sizes: Sizes, turns: int
) -> dict[str, list[Answer]]:
    """Stock, patched, and planned at each chunk size."""
    short, late = mixed(sizes)
    answers: dict[str, list[Answer]] = {}
    for _ in range(turns):
        for name in ("stock", "patched"):
            answers.setdefault(name, []).append(sides[name].serve(short + late))
        for chunk in sizes.chunks:
            answer = sides["planned"].serve(short + late, chunk=chunk)
            answers.setdefault(f"chunk {chunk}", []).append(answer)
    return answers


# What is said of it


def markdown(where: Mapping[str, Any], figures: Figures) -> str:
    """The report."""
    toy = "**Toy maths on a CPU: this proves the script; the times say nothing.**"
    parts = [
        "# TurboMind, patched and planned, against stock",
        tables.machine_line(where),
        *([toy] if where["maths"] == "toy" else []),
        "## Tokens, under the mixed load",
        table(Parity, figures.parity),
        "Where stock does not repeat its own tokens, the others need not either.",
        "## Tokens/s, all requests at once",
        table(Speed, figures.speed),
        "The goal: patched at 0.99 of stock or more.",
        "## Latency, long prompts while others decode",
        table(Latency, figures.latency),
        "## Hand-over, two instances on one card",
        figures.hand_over
        if isinstance(figures.hand_over, str)
        else table(HandOver, [figures.hand_over]),
        "## Conformance",
        table(SideConformance, figures.conformance),
    ]
    return "\n\n".join(parts) + "\n"


def table(kind: Any, rows: Sequence[Any]) -> str:
    """A column a field."""
    heads = [field.name for field in fields(kind)]
    spelled = {"_per_s": "/s", "gb": "GB", "tpot": "TPOT", "ttft": "TTFT", "_": " "}
    for word, said in spelled.items():
        heads = [head.replace(word, said) for head in heads]
    return tables.table_of(heads, [list(map(cell, asdict(row).values())) for row in rows])


def cell(value: Any) -> Any:
    """Shares and ratios keep four digits, larger figures one behind the point."""
    if not isinstance(value, float):
        return value
    return f"{value:.4g}" if value < 100 else f"{value:.1f}"


def refusal(maths: str) -> str:
    """Why it cannot run here; "" where it can."""
    if maths == "toy":
        return ""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU here; `--maths toy` proves the script on a CPU"
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED_BYTES:
        return f"{free / 2**30:.1f} GiB of GPU memory are free; {NEEDED_BYTES >> 30} are needed"
    return ""


def device_of(maths: str) -> str:
    """The card, as a .sage file says it."""
    if maths == "toy":
        return "kind cpu memory 4GiB"
    import torch

    card = torch.cuda.get_device_properties(0)
    return device_named(card.name, card.total_memory)


def device_named(card: str, memory_bytes: int) -> str:
    """A card that sagec has no figures for gets rough ones: they matter until steps are measured.

    >>> device_named("NVIDIA H100 80GB HBM3", 80 << 30)
    'kind h100 memory 80GiB'
    """
    from sagec.dialects.cluster import DEVICE_KINDS

    memory = f"memory {memory_bytes >> 30}GiB"
    words = card.lower().replace("-", " ").split()
    kind = next((word for word in words if word in DEVICE_KINDS), None)
    if kind is not None:
        return f"kind {kind} {memory}"
    return f"kind gpu {memory} flops 100Tflop/s bandwidth 1TB/s"


def machine(maths: str, turns: int) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    import importlib.metadata

    where = {**tables.machine(), "lmdeploy": importlib.metadata.version("lmdeploy")}
    if maths == "model":
        import torch

        where |= {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    return {**where, "maths": maths, "turns": turns}


def setups_of(folder: Path, sizes: Sizes, maths: str) -> dict[str, Setup]:
    """How each side is made."""
    options = {"maths": maths, "session_len": str(sizes.shape.max_context), "prefix_cache": "off"}
    options |= TOY_TIMES if maths == "toy" else {}
    device = device_of(maths)
    return {
        side: Setup(
            side=side,
            model=str(folder),
            device=device,
            kv_blocks=sizes.kv_blocks,
            block_tokens=sizes.block_tokens,
            max_batch=sizes.max_batch,
            options=options,
        )
        for side in ("stock", "patched", "planned", "pair")
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write turbomind_gpu.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the files")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--maths", choices=("model", "toy"), default="model")
    args = parser.parse_args(argv)
    if why := refusal(args.maths):
        print(f"turbomind_gpu.py: {why}", file=sys.stderr)
        return 1
    sizes = GPU if args.maths == "model" else TOY
    try:
        with tempfile.TemporaryDirectory() as name:
            make_model(Path(name), sizes.shape)
            runs = serve_all(setups_of(Path(name), sizes, args.maths), sizes, args.turns)
    except SideError as error:
        print(f"turbomind_gpu.py: {error}", file=sys.stderr)
        return 1
    figures = figures_of(runs, sizes)
    where = machine(args.maths, args.turns)
    text = markdown(where, figures)
    tables.show(text)
    tables.write(args.out, "turbomind_gpu", {**where, **asdict(figures)}, text, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
