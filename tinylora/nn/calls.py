"""What a module's own code does with its children: read from its source, nothing is run.

Which of them it calls with one tensor (siblings), and which it passes over to multiply by their weight itself.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import wraps
from weakref import WeakKeyDictionary

from torch import nn


def _once_a_class(find: Callable) -> Callable:
    """`find`, remembered for as long as the class lives: one made in a function may hold whole models."""
    found: WeakKeyDictionary[type, object] = WeakKeyDictionary()

    @wraps(find)
    def remembered(parent: type[nn.Module]):
        if parent not in found:
            found[parent] = find(parent)
        return found[parent]

    return remembered


def _source(method: Callable) -> tuple[ast.AST, str] | None:
    """(the function's own tree, its first argument's name or ""); None without source (made by exec, or not Python)."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    function = next((node for node in ast.walk(tree) if isinstance(node, kinds)), None)
    if function is None:
        return None
    own = [*function.args.posonlyargs, *function.args.args]
    return function, own[0].arg if own else ""


# --- whose weight is read ----------------------------------------------------------------------------------

_NO_NUMBERS = {"dtype", "device", "shape", "size", "dim", "is_meta", "requires_grad"}


@_once_a_class
def only_read(parent: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight this class's methods read, and which none of them calls or hands on."""
    read, otherwise = set(), set()
    own = [cls for cls in parent.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    for name, f in [attribute for cls in own for attribute in vars(cls).items()]:
        method = inspect.unwrap(f) if callable(f) and not isinstance(f, staticmethod) else None
        if not inspect.isfunction(method) or name == "__init__":
            continue
        if (source := _source(method)) is None:
            return frozenset()
        function, self_name = source
        nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        around = {id(node.value): node for node in nodes}
        for node in nodes:
            if isinstance(node.value, ast.Name) and node.value.id == self_name:
                weight = around.get(id(node))
                if weight is None:
                    otherwise.add(node.attr)
                elif weight.attr == "weight" and getattr(around.get(id(weight)), "attr", None) not in _NO_NUMBERS:
                    read.add(node.attr)
    return frozenset(read - otherwise)


# --- which receive one tensor ------------------------------------------------------------------------------


@_once_a_class
def called_together(parent: type[nn.Module]) -> list[list[str]]:
    """Names of the children that the forward of this class calls with one variable, side by side; [] if unknown."""
    source = _source(inspect.unwrap(parent.forward))
    if source is None or not isinstance(source[0], ast.FunctionDef):
        return []
    function, self_name = source
    return list(_together(function.body, self_name))


def _together(block: list[ast.stmt], self_name: str) -> Iterator[list[str]]:
    """The groups of one straight run of statements, and of every block within it."""
    called: dict[str, list[str]] = {}
    done: list[list[str]] = []
    views: dict[str, str] = {}  # variable -> the one whose numbers it may have
    for statement in block:
        inner = [b for field in ("body", "orelse", "finalbody") for b in [getattr(statement, field, None)] if b]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        for b in inner:
            yield from _together(b, self_name)
        if not inner:
            for name, variable in _calls(statement, self_name):
                called.setdefault(variable, []).append(name)
        for variable, in_place in _changed(statement):
            whole = views.get(variable, variable)
            for v in [v for v in called if v == variable or (in_place and views.get(v, v) == whole)]:
                done.append(called.pop(v))
            if not in_place:
                views.pop(variable, None)
        if isinstance(statement, ast.Assign):
            origin = _root(statement.value)
            views |= {t.id: views.get(origin, origin) for t in statement.targets if isinstance(t, ast.Name) and origin}
    yield from (names for names in (*done, *called.values()) if len(names) > 1)


def _changed(statement: ast.stmt) -> Iterator[tuple[str, bool]]:
    """Variables that it assigns, or changes in place (True): x[0] = 1, x += y, x.add_(y), neg_(x), relu(x,
    inplace=True), out=x."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name | ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            name = _root(node)
            if name is not None:
                yield name, not isinstance(node, ast.Name) or isinstance(statement, ast.AugAssign)
        elif isinstance(node, ast.Call):
            named = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if named.endswith("_") or any(k.arg in ("inplace", "out") for k in node.keywords):
                yield from ((n.id, True) for n in ast.walk(node) if isinstance(n, ast.Name))


def _root(node: ast.AST) -> str | None:
    """x of x, x[0], x.T and x.view(-1)."""
    while isinstance(node, ast.Subscript | ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _calls(node: ast.AST, self_name: str) -> Iterator[tuple[str, str]]:
    """(child, variable) for every `self.child(variable, ..)` that runs whenever the statement does."""
    if isinstance(node, ast.IfExp | ast.BoolOp | ast.Lambda | ast.comprehension | ast.FunctionDef | ast.ClassDef):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, self_name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        owner, given = node.func.value, node.args[0]
        if isinstance(owner, ast.Name) and owner.id == self_name and isinstance(given, ast.Name):
            yield node.func.attr, given.id
