"""What the names of a program mean: models, devices, and where the instances run.

Everything that can be wrong with one cluster is found and reported together.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sagec.diagnostics import Diagnostic, combined, there_are
from sagec.dialects.cluster import INSTANCE_SCALARS, MODEL_SCALARS
from sagec.dialects.scalars import Scalar
from sagec.language import syntax
from sagec.language.syntax import Program, Settings, Word
from sagec.passes import topology
from sagec.runtime.engines import EngineError
from sagec.runtime.engines.torch.config import read_config

Scalars = dict[str, int | float | str]

GRAPH = "serve"
"""The symbol of the graph that a program lowers to."""

KV_SHARE = 0.9
"""Of a device's memory, what weights and KV may fill where the program does not say."""

MOST_LINKS = 65536
"""That one statement may stand for."""

# Class figures of the makers' data sheets: memory in GiB, dense bf16 arithmetic, memory bandwidth.
DEVICE_KINDS: dict[str, tuple[int, float, float]] = {
    "cpu": (16, 1e12, 2e10),
    "a10": (24, 1.25e14, 6e11),
    "a100": (80, 3.12e14, 2.04e12),
    "b200": (180, 2.25e15, 8e12),
    "h100": (80, 9.9e14, 3.35e12),
    "h200": (141, 9.9e14, 4.8e12),
    "l4": (24, 1.21e14, 3e11),
    "l40s": (48, 3.62e14, 8.64e11),
    "mi300x": (192, 1.3e15, 5.3e12),
}

_SCALAR_OF = {
    "memory": "memory_bytes",
    "flops": "flops_per_s",
    "bandwidth": "bytes_per_s",
    "latency": "latency_us",
    "block": "block_tokens",
    "budget": "max_step_tokens",
}
"""Settings whose scalar is called otherwise in the IR."""

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Model:
    """A model with its shape; folder is its checkpoint, where it has one."""

    at: Word
    begin: int
    scalars: Scalars
    folder: Path | None
    end_tokens: tuple[int, ...]

    @property
    def shape(self) -> topology.Model:
        """The shape with all defaults, which knows the bytes of weights and KV."""
        return topology.Model(name=self.at.text, **_filled(MODEL_SCALARS, self.scalars))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Device:
    """A device; like: the first of its statement, whose scalars it shares."""

    at: Word
    begin: int
    scalars: Scalars
    like: str | None

    @property
    def memory_bytes(self) -> int:
        return int(self.scalars["memory_bytes"])


@dataclass(frozen=True)
class Instance:
    """An instance on its devices."""

    at: Word
    begin: int
    devices: tuple[str, ...]
    engine: str
    role: str
    model: str
    scalars: Scalars

    def runs(self, phase: str) -> bool:
        """Whether its role covers `prefill` or `decode`."""
        return self.role in (phase, "both")


@dataclass(frozen=True, eq=False)
class Scene:
    """A program whose names mean something."""

    program: Program
    models: dict[str, Model]
    cluster: syntax.Cluster
    devices: dict[str, Device]
    switches: dict[str, int]
    links: tuple[tuple[str, str, int, Scalars], ...]
    instances: dict[str, Instance]


def strategies() -> list[str]:
    """The strategies there are, by name; loads none."""
    return [name.replace("_", "-") for name in _modules("sagec.runtime.strategies")]


def engines() -> list[str]:
    """The engines that can run here or that plans can be compiled for."""
    return sorted({*_modules("sagec.runtime.engines"), *_modules("sagec.lowering.targets")})


def _modules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    names = (module.name for module in pkgutil.iter_modules(places))
    return sorted(name for name in names if not name.startswith("_"))


def resolve(program: Program) -> Scene:
    """The models, devices and instances of the cluster to serve on. Raises Diagnostic."""
    return _Resolver(program).scene()


def _filled(table: Iterable[Scalar], said: Scalars) -> Scalars:
    return {scalar.name: said.get(scalar.name, scalar.default) for scalar in table}


def _scalars(settings: Settings, leave_out: tuple[str, ...] = ()) -> Scalars:
    """Settings as scalars of the IR."""
    given = {name: value.value for name, value in settings.items() if name not in leave_out}
    return {_SCALAR_OF.get(n, n): v for n, v in given.items() if not isinstance(v, tuple)}


class _Resolver:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.errors: list[Diagnostic] = []

    def error(self, at: Word | syntax.Value, message: str, hint: str = "") -> None:
        self.errors.append(self.program.error(at, message, hint))

    def stop_if_wrong(self) -> None:
        """Raise what is wrong so far, before anything that would follow from it."""
        if self.errors:
            raise combined(self.errors)

    def scene(self) -> Scene:
        program = self.program
        cluster = self.the_cluster()
        self.check_strategy()
        self.unique(program.models, cluster)
        models = {
            model.name.text: found for model in program.models if (found := self.model(model))
        }
        devices = {device.at.text: device for d in cluster.devices for device in self.devices(d)}
        switches = {w.text: switch.begin for switch in cluster.switches for w in switch.names}
        links = [link for statement in cluster.links for link in self.links(statement, cluster)]
        self.stop_if_wrong()
        placed = [i for s in cluster.instances for i in self.instances(s, models, devices)]
        self.stop_if_wrong()
        instances = {instance.at.text: instance for instance in placed}
        sized = Sizes(self, models, devices, placed)
        for instance in placed:
            instance.scalars["kv_blocks"] = sized.kv_blocks(instance)
        self.stop_if_wrong()
        return Scene(program, models, cluster, devices, switches, tuple(links), instances)

    # Names

    def the_cluster(self) -> syntax.Cluster:
        """The cluster that `serve` names, or the only one."""
        program = self.program
        named = program.serve.settings.get("on") if program.serve else None
        by_name = {cluster.name.text: cluster for cluster in program.clusters}
        if named is not None:
            if (found := by_name.get(str(named.value))) is None:
                raise program.error(
                    named, f"no cluster '{named.value}'", there_are(str(named.value), by_name)
                )
            return found
        if len(program.clusters) == 1:
            return program.clusters[0]
        begin, end = (program.serve.begin, program.serve.end) if program.serve else (0, 0)
        if not program.clusters:
            hint = "as in: cluster here { device cpu kind cpu ... }"
            raise program.source.error(begin, end, "there is no cluster", hint)
        hint = f"serve on {' or serve on '.join(sorted(by_name))}"
        message = f"there are {len(program.clusters)} clusters and none is named"
        raise program.source.error(begin, end, message, hint)

    def check_strategy(self) -> None:
        serve = self.program.serve
        named = serve.settings.get("with") if serve else None
        if named is not None and named.value not in (known := strategies()):
            self.error(named, f"no strategy '{named.value}'", there_are(str(named.value), known))

    def unique(self, models: tuple[syntax.Model, ...], cluster: syntax.Cluster) -> None:
        """Models, devices, switches and instances share one space of names: the IR's symbols."""
        seen = {GRAPH: "the graph"}
        clusters: set[str] = set()
        for other in self.program.clusters:
            if other.name.text in clusters:
                self.error(other.name, f"a second cluster '{other.name.text}'", "rename one")
            clusters.add(other.name.text)
        statements: list[tuple[str, Iterable[Word]]] = [("a model", [m.name for m in models])]
        statements += [("a device", device.names) for device in cluster.devices]
        statements += [("a switch", switch.names) for switch in cluster.switches]
        statements += [("an instance", instance.names) for instance in cluster.instances]
        for kind, names in statements:
            for name in names:
                if (before := seen.get(name.text)) is not None:
                    what = f"the name '{name.text}' is taken by {before}"
                    self.error(name, what, "models, devices, switches, instances: a name each")
                seen.setdefault(name.text, kind)

    # Models

    def model(self, model: syntax.Model) -> Model | None:
        scalars = _scalars(model.settings)
        if "tied" in scalars:
            scalars["tied"] = int(scalars["tied"] == "yes")
        if model.path is None:
            return self.described(model, scalars)
        folder = Path(
            os.path.normpath(Path(self.program.source.name).parent / str(model.path.value))
        )
        try:
            config = read_config(folder)
        except (EngineError, ValueError) as error:
            self.error(model.path, *_checkpoint_complaint(str(error), folder, self.program))
            return None
        read: Scalars = {
            "layers": config.layers,
            "hidden": config.hidden,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "ffn": config.ffn,
            "vocab": config.vocab,
            "dtype": _DTYPES[config.dtype],
            "max_context": config.max_context_tokens,
            "tied": int(config.tied),
            "path": str(folder),
        }
        return Model(model.name, model.begin, read | scalars, folder, config.eos_tokens)

    def described(self, model: syntax.Model, scalars: Scalars) -> Model | None:
        """A model whose shape the program says."""
        heads, hidden = scalars.get("heads"), scalars.get("hidden")
        if isinstance(heads, int):
            scalars.setdefault("kv_heads", heads)
            if isinstance(hidden, int) and hidden % heads == 0:
                scalars.setdefault("head_dim", hidden // heads)
        missing = [s.name for s in MODEL_SCALARS if s.required and s.name not in scalars]
        if missing:
            message = f"model '{model.name.text}' lacks {', '.join(missing)}"
            self.error(model.name, message, "a shape needs them all")
            return None
        kv_heads = scalars["kv_heads"]
        assert isinstance(heads, int) and isinstance(kv_heads, int)
        if heads % kv_heads:
            at = model.settings.get("kv_heads", model.name)
            fits = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            message = f"{heads} heads do not share {kv_heads} KV heads evenly"
            self.error(at, message, f"what does: {', '.join(fits[:12])}")
        return Model(model.name, model.begin, scalars, None, ())

    # Places

    def devices(self, device: syntax.Device) -> list[Device]:
        said = _scalars(device.settings)
        kind = str(said.get("kind", "cpu"))
        needed = ("memory_bytes", "flops_per_s", "bytes_per_s")
        scalars: Scalars = {"kind": kind}
        if (known := DEVICE_KINDS.get(kind)) is not None:
            scalars |= {needed[0]: known[0] << 30, needed[1]: known[1], needed[2]: known[2]}
        elif not all(name in said for name in needed):
            hint = f"{there_are(kind, DEVICE_KINDS)}; or say memory, flops and bandwidth"
            self.error(device.settings["kind"], f"no device kind '{kind}'", hint)
        scalars |= said
        first = device.names[0].text
        return [
            Device(name, device.begin, scalars, first if name.text != first else None)
            for name in device.names
        ]

    def links(
        self, link: syntax.Link, cluster: syntax.Cluster
    ) -> list[tuple[str, str, int, Scalars]]:
        places = [w.text for d in cluster.devices for w in d.names]
        places += [w.text for s in cluster.switches for w in s.names]
        known = set(places)
        for end in (*link.sources, *link.targets):
            if end.text not in known:
                self.error(end, f"no device or switch '{end.text}'", there_are(end.text, places))
        if (double := {w.text for w in link.sources} & {w.text for w in link.targets}) and (
            name := next(w for w in link.targets if w.text in double)
        ):
            self.error(name, f"'{name.text}' is on both ends of the link", "name two places")
        if (count := len(link.sources) * len(link.targets)) > MOST_LINKS:
            self.error(link.sources[0], f"{count} links", f"at most {MOST_LINKS}: use a switch")
            return []
        scalars = _scalars(link.settings)
        ends = [(a.text, b.text) for a in link.sources for b in link.targets]
        return [(source, target, link.begin, scalars) for source, target in ends]

    # Instances

    def instances(
        self, statement: syntax.Instance, models: dict[str, Model], devices: dict[str, Device]
    ) -> list[Instance]:
        name, settings = statement.names[0], statement.settings
        model = self.model_of(statement, models)
        engine = settings.get("engine")
        known = engines()
        if engine is None:
            self.error(name, f"instance '{name.text}' has no engine", there_are("", known))
        elif engine.value not in known:
            self.error(engine, f"no engine '{engine.value}'", there_are(str(engine.value), known))
        if not self.places_exist(statement, devices) or model is None or engine is None:
            return []
        each = len(statement.devices) // len(statement.names)
        scalars = _scalars(settings, ("role", "engine", "model", "kv", "kv_blocks"))
        if not self.ranks(statement, each, scalars):
            return []
        self.check_split(statement, model, scalars)
        role = settings.get("role")
        return [
            Instance(
                word,
                statement.begin,
                tuple(d.text for d in statement.devices[index * each : (index + 1) * each]),
                str(engine.value),
                str(role.value) if role else "both",
                model.at.text,
                dict(scalars),
            )
            for index, word in enumerate(statement.names)
        ]

    def model_of(self, statement: syntax.Instance, models: dict[str, Model]) -> Model | None:
        named = statement.settings.get("model")
        if named is not None:
            if (model := models.get(str(named.value))) is None:
                hint = there_are(str(named.value), models)
                self.error(named, f"no model '{named.value}'", hint)
            return model
        if len(models) == 1:
            return next(iter(models.values()))
        name = statement.names[0]
        hint = f"there are: {', '.join(models)}" if models else 'as in: model tiny from "folder"'
        self.error(name, f"instance '{name.text}' names no model", hint)
        return None

    def places_exist(self, statement: syntax.Instance, devices: dict[str, Device]) -> bool:
        """Whether the devices are there, each once, and shared evenly by the instances."""
        known = len(self.errors)
        name, seen = statement.names[0], set[str]()
        for device in statement.devices:
            if device.text not in devices:
                self.error(device, f"no device '{device.text}'", there_are(device.text, devices))
            elif device.text in seen:
                self.error(device, f"device '{device.text}' is named twice", "one rank a device")
            seen.add(device.text)
        if not statement.devices:
            self.error(name, f"instance '{name.text}' is on no device", there_are("", devices))
        elif len(statement.devices) % len(statement.names):
            message = f"{len(statement.names)} instances on {len(statement.devices)} devices"
            self.error(statement.devices[0], message, "each gets as many as the others")
        return len(self.errors) == known

    def ranks(self, statement: syntax.Instance, each: int, scalars: Scalars) -> bool:
        """Fill in tp where the program does not say; whether there is a device a rank."""
        pp = int(scalars.get("pp", 1))
        if "tp" not in scalars and each % pp == 0:
            scalars["tp"] = each // pp
        tp = int(scalars.get("tp", 1))
        if tp * pp == each:
            return True
        at = statement.settings.get("tp") or statement.settings.get("pp") or statement.devices[0]
        message = f"tp {tp} and pp {pp} are {tp * pp} ranks, on {each} device{'s' * (each > 1)}"
        self.error(at, message, f"one device a rank: name {tp * pp}")
        return False

    def check_split(self, statement: syntax.Instance, model: Model, scalars: Scalars) -> None:
        """Heads split over tensor parallel ranks, layers over pipeline stages."""
        shape, tp, pp = model.shape, int(scalars.get("tp", 1)), int(scalars.get("pp", 1))
        if shape.kv_heads % tp:
            at = statement.settings.get("tp") or statement.devices[0]
            fits = [str(n) for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]
            message = f"{shape.kv_heads} KV heads do not split over tensor_parallel={tp}"
            self.error(at, message, f"what does: {', '.join(fits[:12])}")
        if pp > shape.layers:
            at = statement.settings["pp"]
            self.error(at, f"{shape.layers} layers make no {pp} stages", f"at most {shape.layers}")
        for name in ("draft_layers", "draft_tokens"):
            if name in scalars and not all(map(scalars.get, ("draft_layers", "draft_tokens"))):
                hint = "draft_layers and draft_tokens belong together"
                self.error(statement.settings[name], f"'{name}' stands alone", hint)


class Sizes:
    """How many blocks of KV instances have, for those that say it as a size or not at all."""

    def __init__(
        self,
        resolver: _Resolver,
        models: dict[str, Model],
        devices: dict[str, Device],
        instances: list[Instance],
    ) -> None:
        self.resolver = resolver
        self.models = models
        self.devices = devices
        self.said = {i.at.text: i for i in instances}
        self.statements = {
            word.text: statement
            for cluster in resolver.program.clusters
            for statement in cluster.instances
            for word in statement.names
        }
        self.weights: dict[str, float] = {}
        self.sharers: dict[str, int] = {}
        for instance in instances:
            each = models[instance.model].shape.weight_bytes / len(instance.devices)
            for device in instance.devices:
                self.weights[device] = self.weights.get(device, 0) + each
                self.sharers[device] = self.sharers.get(device, 0) + 1

    def kv_blocks(self, instance: Instance) -> int:
        """The blocks of an instance; 1 where that is an error, which the resolver then has."""
        settings = self.statements[instance.at.text].settings
        blocks, kv = settings.get("kv_blocks"), settings.get("kv")
        if blocks is not None:
            if kv is not None:
                self.resolver.error(kv, "'kv' and 'kv_blocks' say the same", "leave one out")
            return int(str(blocks.value))
        scalars = _filled(INSTANCE_SCALARS, instance.scalars)
        shape, block_tokens = self.models[instance.model].shape, int(scalars["block_tokens"])
        block_bytes = shape.kv_bytes_per_token(str(scalars["kv_dtype"])) * block_tokens
        if kv is not None:
            size = int(str(kv.value))
            if size < block_bytes:
                message = f"{size} bytes hold no block"
                hint = f"a block of {block_tokens} tokens is {block_bytes:.0f} bytes"
                self.resolver.error(kv, message, hint)
            return max(1, int(size // block_bytes))
        free = sum(map(self._free_bytes, instance.devices))
        if free < block_bytes:
            message = f"instance '{instance.at.text}' has no memory left for KV"
            hint = self._weights_text(instance)
            self.resolver.error(instance.at, message, hint)
        most = int(scalars["max_batch"]) * -(-shape.max_context // block_tokens)
        return max(1, min(int(free // block_bytes), most))

    def _free_bytes(self, device: str) -> float:
        """What one instance may take of a device's memory for KV."""
        memory = self.devices[device].memory_bytes
        return (memory * KV_SHARE - self.weights[device]) / self.sharers[device]

    def _weights_text(self, instance: Instance) -> str:
        weights = max(self.weights[device] for device in instance.devices)
        memory = min(self.devices[device].memory_bytes for device in instance.devices)
        return f"the weights are {weights / 2**20:.1f} MiB of a device's {memory / 2**20:.1f} MiB"


def _checkpoint_complaint(error: str, folder: Path, program: Program) -> tuple[str, str]:
    """Message and hint for a checkpoint that cannot be read."""
    message, _, hint = error.partition("; ")
    if not folder.is_dir():
        parent = Path(program.source.name).parent
        hint = f"a folder with config.json; the path counts from {parent or '.'}"
        message = f"no checkpoint {folder}"
    return " ".join(message.split()), " ".join(hint.split())
