"""What options of strategies may be."""

from sagec.runtime.strategies import StrategyError, choosers


def check_chooser(chooser: str) -> None:
    """Raise StrategyError where a chooser is named that does not exist; "" names none."""
    if chooser:
        choosers.named(chooser)


def check_at_least(strategy: str, least: float, **options: float) -> None:
    """Raise StrategyError for the first of these options that is smaller."""
    for option, value in options.items():
        if value < least:
            raise StrategyError(f"strategy {strategy}: {_named(option)}: {value}; {least} or more")


def check_share(strategy: str, **options: float) -> None:
    """Raise StrategyError for the first of these options that is no share in (0, 1)."""
    for option, value in options.items():
        if not 0 < value < 1:
            wanted = "more than 0 and less than 1"
            raise StrategyError(f"strategy {strategy}: {_named(option)}: {value}; {wanted}")


def _named(option: str) -> str:
    return f"option {option.replace('_', '-')}"
