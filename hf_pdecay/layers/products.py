"""How the code of a module multiplies by a parameter of three dimensions: as a stack of matrices, as one, or not.

Such a parameter may be a stack of experts, one matrix for all heads, or a table of positions. No type tells them
apart, and a run of the module would need its inputs. So its methods are read: a parameter counts if it, or an index or
transpose of it, is an operand of a product.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn


class Product(NamedTuple):
    """How a module multiplies by a parameter of three dimensions.

    Attributes:
        stacked: Whether dimension 0 counts matrices; otherwise all of it is one matrix.
        transposed: Whether the outputs of a stack are in its last dimension; None for one matrix.
    """

    stacked: bool
    transposed: bool | None


class _View(NamedTuple):
    """What an expression has of a parameter: the dimensions that are left, in order; None for a new one."""

    name: str
    dims: tuple[int | None, ...]


_Views = Mapping[str, tuple[_View, ...]]

# Calls that return the same values in the same order of dimensions.
_SAME = {
    "bfloat16",
    "clone",
    "contiguous",
    "detach",
    "double",
    "float",
    "half",
    "index_select",
    "to",
    "type",
    "type_as",
}
# Where the operands of a function stand, as the left and the right one.
_OPERANDS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "grouped_mm": (0, 1),
    "_grouped_mm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
_DEEPEST_CALL = 3


@cache
def products_of(cls: Any) -> Mapping[str, Product]:
    """Return how a class of modules multiplies by its parameters of three dimensions, by their names in the module.

    Empty where its source is not at hand. A product with ``one_hot`` looks up rows of a table, so it does not count.
    """
    methods: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            methods.setdefault(name, value)
    found: dict[str, Product] = {}
    for name, method in methods.items():
        function = inspect.unwrap(method) if callable(method) else None
        if isinstance(function, FunctionType) and name != "__init__":
            _Reader(methods, function, {}, found, 0).read()
    return found


@cache
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Reader:
    """Reads one function from top to bottom and follows the parameters through its variables."""

    def __init__(
        self, methods: Mapping[str, Any], function: FunctionType, given: _Views, found: dict[str, Product], depth: int
    ) -> None:
        self._methods = methods
        self._function = function
        self._views = dict(given)
        self._found = found
        self._depth = depth
        self._lookups: set[str] = set()
        self._tree = _tree(function)

    def read(self) -> None:
        for statement in self._tree.body if self._tree else ():
            self._visit(statement)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            self._visit(node.value)
            for target in node.targets:
                self._assign(target, node.value)
            return
        if isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._visit(node.value)
            self._assign(node.target, node.value)
            return
        if isinstance(node, (ast.For, ast.comprehension)):
            self._loop(node.target, node.iter)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            for generator in node.generators:
                self._visit(generator)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            self._multiply(node.left, node.right)
        if isinstance(node, ast.Call):
            self._call(node)
        for child in ast.iter_child_nodes(node):
            self._visit(child)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, given in zip(target.elts, value.elts, strict=True):
                self._assign(part, given)
        elif isinstance(target, ast.Name):
            self._views[target.id] = self._views_of(value)
            (self._lookups.add if self._looks_up(value) else self._lookups.discard)(target.id)

    def _loop(self, target: ast.expr, source: ast.expr) -> None:
        """Bind the variable of a loop over the first dimension."""
        if (
            isinstance(source, ast.Call)
            and _last(source.func) in ("zip", "enumerate")
            and isinstance(target, ast.Tuple)
        ):
            given = source.args if _last(source.func) == "zip" else [ast.Constant(0), *source.args]
            for part, values in zip(target.elts, given, strict=False):
                self._loop(part, values)
        elif isinstance(target, ast.Name):
            self._views[target.id] = tuple(_View(view.name, view.dims[1:]) for view in self._views_of(source))

    def _views_of(self, node: ast.expr) -> tuple[_View, ...]:
        """What an expression has of parameters; empty if nothing, or its dimensions are not known."""
        if isinstance(node, ast.Name):
            return self._views.get(node.id, ())
        if isinstance(node, ast.IfExp):
            return self._views_of(node.body) + self._views_of(node.orelse)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return (_View(node.attr, (0, 1, 2)),)
            change = {"T": (-1, -2), "mT": (-1, -2), "data": ()}.get(node.attr)
            return () if change is None else _swapped(self._views_of(node.value), change)
        if isinstance(node, ast.Subscript):
            return _indexed(self._views_of(node.value), node.slice)
        if not isinstance(node, ast.Call):
            return ()
        name, inner = _last(node.func), node.func.value if isinstance(node.func, ast.Attribute) else None
        views, args = (() if inner is None else self._views_of(inner)), node.args
        if args and (not views or inner is None):
            views, args = self._views_of(args[0]), args[1:]
        if name in _SAME:
            return views
        if name in ("t", "transpose", "swapaxes"):
            dims = [_number(arg) for arg in args] or [-1, -2]
            return _swapped(views, tuple(dim for dim in dims if dim is not None))
        if name == "permute":
            order = [_number(arg) for arg in args]
            fits = [
                view for view in views if sorted(dim for dim in order if dim is not None) == [*range(len(view.dims))]
            ]
            return tuple(_View(view.name, tuple(view.dims[dim] for dim in order if dim is not None)) for view in fits)
        return ()

    def _looks_up(self, node: ast.expr) -> bool:
        """Whether an expression is ``one_hot(...)`` or made from it by methods and indices."""
        if isinstance(node, ast.Name):
            return node.id in self._lookups
        if isinstance(node, ast.Call):
            inner = node.func.value if isinstance(node.func, ast.Attribute) else None
            return _last(node.func) == "one_hot" or (inner is not None and self._looks_up(inner))
        return isinstance(node, (ast.Subscript, ast.Attribute)) and self._looks_up(node.value)

    def _call(self, node: ast.Call) -> None:
        name = _last(node.func)
        args = list(node.args)
        if isinstance(node.func, ast.Attribute) and name in ("matmul", "mm", "bmm") and len(args) == 1:
            args.insert(0, node.func.value)
        keys = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if name == "linear":
            args += [keys[key] for key in ("input", "weight")[len(args) :] if key in keys]
        if name == "einsum" and args and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str):
            self._einsum(args[0].value.replace(" ", ""), args[1:])
        elif name in _OPERANDS and len(args) > max(_OPERANDS[name]):
            left, right = (args[place] for place in _OPERANDS[name])
            self._multiply(left, right, rows=name == "linear")
        else:
            self._follow(node.func, args, keys)

    def _multiply(self, left: ast.expr, right: ast.expr, *, rows: bool = False) -> None:
        if self._looks_up(left) or self._looks_up(right):
            return
        for node, outputs in ((left, -2), (right, -2 if rows else -1)):
            for view in self._views_of(node):
                if len(view.dims) > 1 and {*view.dims[-2:]} == {1, 2}:
                    self._found.setdefault(view.name, Product(True, view.dims[outputs] == 2))

    def _einsum(self, equation: str, operands: list[ast.expr]) -> None:
        inputs, _, output = equation.partition("->")
        for letters, node in zip(inputs.split(","), operands, strict=False):
            for view in self._views_of(node):
                if len(letters) != len(view.dims) or any(self._looks_up(other) for other in operands):
                    continue
                others = "".join(inputs.split(",")).replace(letters, "", 1)
                summed = {dim for dim, letter in zip(view.dims, letters, strict=True) if letter not in output}
                shared = {
                    dim for dim, letter in zip(view.dims, letters, strict=True) if letter in others and letter in output
                }
                if summed and shared == {0} and len(summed) == 1:
                    self._found.setdefault(view.name, Product(True, summed == {1}))
                elif summed and not shared and len(summed) < len(view.dims) == 3:
                    self._found.setdefault(view.name, Product(False, None))

    def _follow(self, func: ast.expr, args: list[ast.expr], keys: Mapping[str, ast.expr]) -> None:
        """Read a function of the module or its file that is called with a parameter."""
        given = [self._views_of(arg) for arg in args], {key: self._views_of(arg) for key, arg in keys.items()}
        if self._depth == _DEEPEST_CALL or not (any(given[0]) or any(given[1].values())):
            return
        target: Callable[..., Any] | None = None
        own = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self"
        if own:
            target = self._methods.get(_last(func))
        elif isinstance(func, ast.Name):
            target = self._function.__globals__.get(func.id)
        target = inspect.unwrap(target.__func__ if isinstance(target, staticmethod) else target) if target else None
        if not isinstance(target, FunctionType) or target.__module__.partition(".")[0] == "torch":
            return
        names = list(inspect.signature(target).parameters)
        names = names[1:] if own and names[:1] == ["self"] else names
        bound = {**dict(zip(names, given[0], strict=False)), **given[1]}
        _Reader(self._methods, target, bound, self._found, self._depth + 1).read()


def _last(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _number(node: ast.expr) -> int | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int) else None


def _swapped(views: tuple[_View, ...], pair: tuple[int, ...]) -> tuple[_View, ...]:
    swapped = []
    for view in views:
        dims = list(view.dims)
        if len(pair) == 2 and all(-len(dims) <= place < len(dims) for place in pair):
            dims[pair[0]], dims[pair[1]] = dims[pair[1]], dims[pair[0]]
        elif pair:
            continue
        swapped.append(_View(view.name, tuple(dims)))
    return tuple(swapped)


def _indexed(views: tuple[_View, ...], index: ast.expr) -> tuple[_View, ...]:
    places: list[ast.expr] = index.elts if isinstance(index, ast.Tuple) else [index]
    indexed = []
    for view in views:
        dims: list[int | None] = []
        left: Iterator[int | None] = iter(view.dims)
        for place in places:
            if isinstance(place, ast.Constant) and place.value is None:
                dims.append(None)
            elif isinstance(place, ast.Slice):
                dims.append(next(left, None))
            elif not (isinstance(place, ast.Constant) and place.value is ...):
                next(left, None)
        indexed.append(_View(view.name, (*dims, *left)))
    return tuple(indexed)
