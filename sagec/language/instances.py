"""Instances: which engine and model, on which devices, split how."""

from __future__ import annotations

from dataclasses import dataclass

from sagec.diagnostics import there_are
from sagec.language import syntax
from sagec.language.devices import Device
from sagec.language.errors import Errors
from sagec.language.known import engines
from sagec.language.models import Model, Scalars, divisors, scalars_of
from sagec.language.syntax import Word


@dataclass(frozen=True)
class Instance:
    """An instance on its devices."""

    at: Word
    statement: syntax.Instance
    devices: tuple[str, ...]
    engine: str
    role: str
    model: str
    scalars: Scalars

    def runs(self, phase: str) -> bool:
        """Whether its role covers `prefill` or `decode`."""
        return self.role in (phase, "both")


class Placement:
    """Puts the instances of a cluster on its devices."""

    def __init__(
        self, models: dict[str, Model], devices: dict[str, Device], errors: Errors
    ) -> None:
        self.models = models
        self.devices = devices
        self.errors = errors

    def instances(self, statement: syntax.Instance) -> list[Instance]:
        """The instances of a statement; none where it is wrong, which the errors then say."""
        settings, known = statement.settings, len(self.errors.found)
        model, engine = self._model(statement), self._engine(statement)
        self._check_devices(statement)
        if len(self.errors.found) > known or model is None:
            return []
        each = len(statement.devices) // len(statement.names)
        scalars = scalars_of(settings, ("role", "engine", "model", "kv", "kv_blocks"))
        if not self._ranks(statement, each, scalars):
            return []
        self._check_split(statement, model, scalars)
        role = settings.get("role")
        names = [device.text for device in statement.devices]
        return [
            Instance(
                word,
                statement,
                tuple(names[index * each : (index + 1) * each]),
                engine,
                str(role.value) if role else "both",
                model.at.text,
                dict(scalars),
            )
            for index, word in enumerate(statement.names)
        ]

    def _engine(self, statement: syntax.Instance) -> str:
        engine, known = statement.settings.get("engine"), engines()
        if engine is None:
            name = statement.names[0]
            hint = there_are("", known)
            self.errors.at(name, f"instance '{name.text}' has no engine", hint)
            return ""
        if engine.value not in known:
            hint = there_are(str(engine.value), known)
            self.errors.at(engine, f"no engine '{engine.value}'", hint)
        return str(engine.value)

    def _model(self, statement: syntax.Instance) -> Model | None:
        named = statement.settings.get("model")
        if named is not None:
            if (model := self.models.get(str(named.value))) is None:
                hint = there_are(str(named.value), self.models)
                self.errors.at(named, f"no model '{named.value}'", hint)
            return model
        if len(self.models) == 1:
            return next(iter(self.models.values()))
        name = statement.names[0]
        hint = (
            f"there are: {', '.join(self.models)}"
            if self.models
            else 'as in: model tiny from "folder"'
        )
        self.errors.at(name, f"instance '{name.text}' names no model", hint)
        return None

    def _check_devices(self, statement: syntax.Instance) -> None:
        """The devices are there, each once, and shared evenly by the instances."""
        devices = self.devices
        name, seen = statement.names[0], set[str]()
        for device in statement.devices:
            if device.text not in devices:
                self.errors.at(
                    device, f"no device '{device.text}'", there_are(device.text, devices)
                )
            elif device.text in seen:
                self.errors.at(
                    device, f"device '{device.text}' is named twice", "one rank a device"
                )
            seen.add(device.text)
        if not statement.devices:
            self.errors.at(name, f"instance '{name.text}' is on no device", there_are("", devices))
        elif len(statement.devices) % len(statement.names):
            message = f"{len(statement.names)} instances on {len(statement.devices)} devices"
            self.errors.at(statement.devices[0], message, "each gets as many as the others")

    def _ranks(self, statement: syntax.Instance, each: int, scalars: Scalars) -> bool:
        """Fill in tp where the program does not say; whether there is a device a rank."""
        pp = int(scalars.get("pp", 1))
        if "tp" not in scalars and each % pp == 0:
            scalars["tp"] = each // pp
        tp = int(scalars.get("tp", 1))
        if tp * pp == each:
            return True
        at = statement.settings.get("tp") or statement.settings.get("pp") or statement.devices[0]
        message = f"tp {tp} and pp {pp} are {tp * pp} ranks, on {each} device{'s' * (each > 1)}"
        self.errors.at(at, message, f"one device a rank: name {tp * pp}")
        return False

    def _check_split(self, statement: syntax.Instance, model: Model, scalars: Scalars) -> None:
        """Heads split over tensor parallel ranks, layers over pipeline stages."""
        shape, tp, pp = model.shape, int(scalars.get("tp", 1)), int(scalars.get("pp", 1))
        if shape.kv_heads % tp:
            at = statement.settings.get("tp") or statement.devices[0]
            message = f"{shape.kv_heads} KV heads do not split over tensor_parallel={tp}"
            self.errors.at(at, message, f"what does: {divisors(shape.kv_heads)}")
        if pp > shape.layers:
            at = statement.settings["pp"]
            self.errors.at(
                at, f"{shape.layers} layers make no {pp} stages", f"at most {shape.layers}"
            )
        if "switch_us" in scalars and "pool" not in scalars:
            at = statement.settings["switch_time"]
            self.errors.at(
                at, "'switch_time' stands alone", "it is for instances of a pool: name it"
            )
        for name in ("draft_layers", "draft_tokens"):
            if name in scalars and not all(map(scalars.get, ("draft_layers", "draft_tokens"))):
                hint = "draft_layers and draft_tokens belong together"
                self.errors.at(statement.settings[name], f"'{name}' stands alone", hint)
