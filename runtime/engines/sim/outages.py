"""When simulated instances fail, and when they are back."""

from collections.abc import Collection, Sequence

import msgspec


class OutageError(ValueError):
    """A schedule of failures that makes no sense; says which entry, and what would be right."""


class Outage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An instance fails at a time of the run's clock and is back at another; None: never."""

    instance: str
    fail_at_us: int
    back_at_us: int | None = None

    def __str__(self) -> str:
        back = "for good" if self.back_at_us is None else f"until {self.back_at_us} us"
        return f"instance {self.instance!r} fails at {self.fail_at_us} us, {back}"


def check(outages: Sequence[Outage], instances: Collection[str]) -> None:
    """Raise OutageError for an unknown instance, or one that fails while it is away."""
    back_us: dict[str, int | None] = {}
    for outage in sorted(outages, key=lambda one: one.fail_at_us):
        if outage.instance not in instances:
            there = ", ".join(instances)
            raise OutageError(f"no instance {outage.instance!r} to fail; there are: {there}")
        if outage.fail_at_us < 0:
            raise OutageError(f"{outage}: times are 0 or more")
        if outage.back_at_us is not None and outage.back_at_us <= outage.fail_at_us:
            raise OutageError(f"{outage}: it must be back later than it fails")
        if outage.instance in back_us:
            before = back_us[outage.instance]
            if before is None or before >= outage.fail_at_us:
                raise OutageError(f"{outage}: it is away then already")
        back_us[outage.instance] = outage.back_at_us
