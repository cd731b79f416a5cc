"""One call of a torch function in a forward, as every observer of the function mode gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FunctionCall", "Observer"]


@dataclass(slots=True, eq=False)
class FunctionCall:
    """One call of a torch function, after it has run.

    Attributes:
        name: The function's plain name: that of ``add_`` is ``add``.
        func: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        output: Its output.
    """

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that was given by its position or by its name."""
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def arguments(self) -> list[Any]:
        """Return all arguments; of ``cat`` the tensors that it joins."""
        return list(self.argument(0, "tensors")) if self.name == "cat" else [*self.args, *self.kwargs.values()]


Observer = Callable[[FunctionCall], None]
