"""Strategies made of expressions: `order by`, `admit while`, `prefill on`, `preempt ... when`.

What each file holds: units (what may be added to what), tree (an expression as data), values (the
names that it may use, per place), closures (a tree into numpy), wording (a condition as a reason);
rules (what a strategy statement says), compiled (its keys and conditions), ranked_chooser (where
its requests go), ruled_strategy (its decisions). The .sage language makes and checks the trees.
"""

from sagec.runtime.expressions.ruled_strategy import RuledStrategy
from sagec.runtime.expressions.rules import Key, Rules

__all__ = ["Key", "RuledStrategy", "Rules"]
