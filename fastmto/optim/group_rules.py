"""What a param group says of its rule: hyperparameters, and the moments that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ..ops.rules import Rule


class GroupRules:
    """The rule with a param group's hyperparameters, built anew only when they change."""

    def __init__(self, rule: Rule) -> None:
        self._type = type(rule)
        self.names = [field.name for field in dataclasses.fields(rule)]
        self._known: dict[tuple[Any, ...], Rule] = {}

    def __call__(self, group: Mapping[str, Any]) -> Rule:
        """The rule of `group`.

        Raises:
            ValueError: a hyperparameter is out of its range.
        """
        values = tuple(tuple(v) if isinstance(v := group[n], list) else v for n in self.names)
        rule = self._known.get(values)
        if rule is None:
            if len(self._known) > 64:  # a schedule makes a new one every step
                self._known.clear()
            rule = self._known[values] = self._type(*values)
        return rule


def check_state_names(rule: Rule, names: Collection[str]) -> None:
    """Refuse a rule that needs other moments than those it has been kept with.

    Raises:
        RuntimeError: a hyperparameter that decides which moments exist has been changed.
    """
    if tuple(names) != rule.state_names:
        raise RuntimeError(
            f"{rule} needs the moments {', '.join(rule.state_names)}, but the optimizer was built "
            f"with {', '.join(names)}: momentum and centered cannot be switched on or off later"
        )
