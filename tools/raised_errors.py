"""Find every error that the packages raise, with its code and texts, in their syntax trees.

An error is a call of a class derived from `SdInpaintError`: class(code, subject, found, expected=, hint=). Its
arguments are followed through local variables, constants, loops over tables, and from a helper's parameters to the
calls of that helper. So a code built as f"SETTING_{name.upper()}" is found for every name that is given. A code that
cannot be followed is refused. Values that are known only in a run become words in braces.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from source_tree import Function, Module, resolve

BASE = "SdInpaintError"
FAULT = "PickleFault"
"""Carries a code and what was found from the pickle reader to a CheckpointError."""
UNSAID = ("self", "str", "repr", "int", "math", "np", "torch")
"""Names that say nothing in a placeholder."""
MAX_DEPTH = 8
"""How many names are followed, one behind the other, within one text."""


@dataclass(frozen=True, eq=False)
class Scope:
    """Where an expression is evaluated: a module, the functions around it, and what their names stand for."""

    module: Module
    functions: tuple[Function, ...] = ()
    given: dict[str, Value] = field(default_factory=dict)
    at: ast.AST | None = None
    """The line that is evaluated: of several assignments to a name those before it count."""

    @property
    def parameters(self) -> list[str]:
        """The names of the innermost function's arguments."""
        return _parameters(self.functions[-1]) if self.functions else []


@dataclass(frozen=True)
class Value:
    """An expression and where it is to be evaluated."""

    node: ast.expr
    scope: Scope


@dataclass(frozen=True, order=True)
class Error:
    """One way in which a code is raised."""

    kind: str
    code: str
    module: str
    found: str
    expected: str
    hint: str


class Reader:
    """Finds every error in the modules."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self.modules = modules
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = defaultdict(list)
        self.parents: dict[ast.AST, ast.AST] = {}
        for module in modules.values():
            self._collect(module.tree, Scope(module))
        self.kinds = {BASE}
        classes = [node for module in modules.values() for node in module.tree.body if isinstance(node, ast.ClassDef)]
        for node in itertools.chain(classes, classes):  # twice: a class may stand before its base
            self.kinds |= {node.name} & {node.name for base in node.bases if ast.unparse(base) in self.kinds}

    def errors(self) -> Iterator[Error]:
        """Yield every error of the packages. Raises: SystemExit naming a code that cannot be followed."""
        for kind in (*self.kinds, FAULT):
            for call, scope in self.calls[kind]:
                yield from self._errors_of("CheckpointError" if kind == FAULT else kind, call, scope)

    def _errors_of(self, kind: str, call: ast.Call, scope: Scope) -> Iterator[Error]:
        names = ("code", "found") if ast.unparse(call.func) == FAULT else ("code", "subject", "found")
        given = dict(zip(names, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        texts = [given.get(name, ast.Constant("")) for name in ("found", "expected", "hint")]
        names = self._names(given["code"], scope) | {text.id for text in texts if isinstance(text, ast.Name)}
        for one in self._expanded(scope, names):
            codes = self.strings(Value(given["code"], one))
            if not codes:
                literal = self._literal(Value(given["code"], one))
                if literal and isinstance(literal.node, ast.Attribute) and literal.node.attr == "code":
                    continue  # the code of another error, which is found where that is raised
                sys.exit(f"{scope.module.path}:{call.lineno}: write the code so that its values can be followed")
            outer = _outermost(one).module.name
            for code in filter(None, codes):  # an empty one stands for the default beside it
                yield Error(kind, code, outer, *(self.words(Value(text, one)) for text in texts))

    # Following names

    def _expanded(self, scope: Scope, names: set[str]) -> list[Scope]:
        """Return the scope once for each call of its function, and each turn of its loops, that gives these names."""
        wanted = [name for name in scope.parameters if name in names and name not in scope.given]
        scopes = [scope]
        if wanted:
            scopes = list(self._callers(scope, wanted)) or [scope]
        rows = [self._rows(loop, scope, names) for loop in self._loops(scope)]
        tables = [table for table in rows if table]
        choices = [_merged(choice) for choice in itertools.product(*tables)]
        return [replace(one, given=one.given | choice) for one in scopes for choice in choices]

    def _callers(self, scope: Scope, wanted: list[str]) -> Iterator[Scope]:
        """Yield the scope once for each call of its function, with what that call gives for the parameters."""
        function = scope.functions[-1]
        for call, caller in self.calls[function.name]:
            target = resolve(self.modules, caller.module.name, _called(call))
            is_own = caller.module is scope.module and function not in caller.functions
            if (target is not None and target[1] is function) or (is_own and target is None):
                given = self._arguments(scope, call)
                passed = set().union(*(_passed_on(given[name]) for name in wanted if name in given))
                for one in self._expanded(caller, passed):
                    values = {name: Value(node, one) for name, node in given.items()}
                    yield replace(scope, given=scope.given | values)

    def _arguments(self, scope: Scope, call: ast.Call) -> dict[str, ast.expr]:
        """Return what a call gives for each parameter of the innermost function, defaults included."""
        arguments = scope.functions[-1].args
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        defaults |= {one.arg: value for one, value in keywords if value}
        taken = names[1:] if names[:1] in (["self"], ["cls"]) else names
        given = dict(zip(taken, call.args, strict=False))
        return defaults | given | {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}

    def _loops(self, scope: Scope) -> list[tuple[ast.expr, ast.expr]]:
        around = self._around(scope.at)
        loops = [node for node in around if isinstance(node, ast.For)]
        loops += [loop for node in around for loop in getattr(node, "generators", ())]
        return [(loop.target, loop.iter) for loop in loops]

    def _rows(self, loop: tuple[ast.expr, ast.expr], scope: Scope, names: set[str]) -> list[dict[str, Value]]:
        """Return what a loop over a table binds in each turn; nothing where no name of it is asked for."""
        target, table = loop
        bound = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
        if not names & set(bound):
            return []
        items = isinstance(table, ast.Call) and isinstance(table.func, ast.Attribute) and table.func.attr == "items"
        found = self._literal(Value(table.func.value if items else table, scope))
        rows: list[dict[str, Value]] = []
        for row in _elements(found.node, items=items) if found else ():
            cells = row.elts if isinstance(target, ast.Tuple) and isinstance(row, ast.Tuple) else [row]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            rows.append(
                {
                    part.id: Value(cell, found.scope)
                    for part, cell in zip(parts, cells, strict=False)
                    if isinstance(part, ast.Name)
                }
            )
        return rows

    def _names(self, expression: ast.expr, scope: Scope) -> set[str]:
        """Return the names that an expression depends on, through local variables."""
        found: set[str] = set()
        waiting = [node.id for node in ast.walk(expression) if isinstance(node, ast.Name)]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                local = [value for value in self._assigned(name, scope) if isinstance(value, ast.expr)]
                waiting += [node.id for value in local for node in ast.walk(value) if isinstance(node, ast.Name)]
        return found

    def _assigned(self, name: str, scope: Scope) -> list[ast.expr]:
        """Return what a local variable may be: its nearest assignment that always ran, and those in later branches."""
        values: list[ast.expr] = []
        around = self._around(scope.at)
        nodes = sorted(_statements(scope.functions[-1]), key=lambda one: one.lineno) if scope.functions else []
        for node in nodes:
            here = [value for target, value in _assignments(node) if target == name]
            if here and (scope.at is None or node.lineno < scope.at.lineno):
                values = here if self._block(node) in map(self._block, around) else [*values, *here]
        return values

    def _around(self, node: ast.AST | None) -> list[ast.AST]:
        """Return a node and all nodes that it is part of, up to its function."""
        found = []
        while node is not None and not isinstance(node, Function | ast.Module):
            found.append(node)
            node = self.parents.get(node)
        return found

    def _block(self, node: ast.AST) -> int:
        """Return what is the same for all statements of one block."""
        parent = self.parents.get(node)
        blocks = (getattr(parent, name, None) for name in ("body", "orelse", "handlers", "finalbody"))
        return next((id(block) for block in blocks if isinstance(block, list) and node in block), 0)

    def lookup(self, name: str, scope: Scope) -> list[Value]:
        """Return what a name may stand for, as far as it is written in the source."""
        local = self._assigned(name, scope)
        if local:  # also of a parameter, as in code = code or "DEFAULT"
            return [Value(value, replace(scope, at=value)) for value in local]
        if name in scope.given:
            return [scope.given[name]]
        if name in scope.parameters:
            return []
        if scope.functions:
            return self.lookup(name, replace(scope, functions=scope.functions[:-1], at=None))
        module, seen = scope.module, name
        if name in module.names and module.names[name][0] in self.modules:
            module, seen = self.modules[module.names[name][0]], module.names[name][1]
        pairs = itertools.chain.from_iterable(map(_assignments, module.tree.body))
        return [Value(value, Scope(module)) for target, value in pairs if target == seen]

    def _literal(self, value: Value) -> Value | None:
        """Return the expression that a name stands for, without `list(...)` and the like around it."""
        if isinstance(value.node, ast.Call) and ast.unparse(value.node.func) in ("list", "tuple") and value.node.args:
            return self._literal(Value(value.node.args[0], value.scope))
        if not isinstance(value.node, ast.Name):
            return value
        found = self.lookup(value.node.id, value.scope)
        return self._literal(found[0]) if found else None

    # Evaluating

    def strings(self, value: Value) -> list[str]:
        """Return every string that an expression may be; nothing where that is not written in the source."""
        node, scope = value.node, value.scope
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.IfExp(body=body, orelse=orelse):
                return self.strings(Value(body, scope)) + self.strings(Value(orelse, scope))
            case ast.BoolOp(op=ast.Or(), values=parts):
                given = (self.strings(Value(part, scope)) for part in parts)
                return next(([text for text in texts if text] for texts in given if any(texts)), [])
            case ast.Name(id=name):
                return [text for one in self.lookup(name, scope) for text in self.strings(one)]
            case ast.Call(func=ast.Attribute(value=inner, attr="upper")):
                return [text.upper() for text in self.strings(Value(inner, scope))]
            case ast.JoinedStr(values=parts):
                inner = [part.value if isinstance(part, ast.FormattedValue) else part for part in parts]
                return ["".join(row) for row in itertools.product(*(self.strings(Value(one, scope)) for one in inner))]
        return []

    def words(self, value: Value, depth: int = 0) -> str:
        """Return a text as it is written, with words in braces for what is known only in a run."""
        node, scope = value.node, value.scope
        inner = lambda one: self.words(Value(one, scope), depth + 1)  # noqa: E731
        match node:
            case ast.Constant(value=text):
                return str(text)
            case ast.JoinedStr(values=parts):
                return "".join(inner(part.value if isinstance(part, ast.FormattedValue) else part) for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return inner(left) + inner(right)
            case ast.IfExp(body=body, orelse=orelse):
                return _either([inner(body), inner(orelse)])
            case ast.Call(func=ast.Attribute(value=text, attr="format")):
                return inner(text)
            case ast.Call(func=ast.Attribute(value=table, attr="get"), args=[key, default]):
                rows = self._literal(Value(table, scope))
                keys = self.strings(Value(key, scope))
                found = _elements(rows.node, items=True) if rows and keys else []
                told = [self.words(Value(row.elts[1], rows.scope)) for row in found if inner(row.elts[0]) in keys]
                return told[0] if told else inner(default)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[ast.Name(id=name)]):
                table = self._literal(Value(ast.Name(name), scope))
                elements = [inner(one) for one in _elements(table.node, items=False)] if table else []
                return ", ".join(elements) or _placeholder(node)
            case ast.Name(id=name) if depth < MAX_DEPTH:
                found = [self.words(one, depth + 1) for one in self.lookup(name, scope) if _is_text(one.node)]
                return _either(found) if found else _placeholder(node)
        return _placeholder(node)

    # The tree

    def _collect(self, node: ast.AST, scope: Scope) -> None:
        """Note every call by the name of the function where that is defined, with its scope."""
        for child in ast.iter_child_nodes(node):
            self.parents[child] = node
            inner = replace(scope, functions=(*scope.functions, child)) if isinstance(child, Function) else scope
            if isinstance(child, ast.Call):
                _, name = scope.module.names.get(_called(child), ("", _called(child)))
                self.calls[name].append((child, replace(scope, at=child)))
            self._collect(child, inner)


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that a statement assigns an expression to, tuples taken apart."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) else None
    for target in targets if value is not None else ():
        if isinstance(target, ast.Name):
            yield target.id, value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = zip(target.elts, value.elts, strict=False)
            yield from ((one.id, part) for one, part in pairs if isinstance(one, ast.Name))


def _elements(node: ast.expr, *, items: bool) -> list[ast.expr]:
    """Return the elements of a literal: of a dict its keys, or with `items` its pairs."""
    if isinstance(node, ast.Dict):
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        return [ast.Tuple([key, value]) if items else key for key, value in pairs]
    return list(node.elts) if isinstance(node, ast.Tuple | ast.List) else []


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _outermost(scope: Scope) -> Scope:
    """Return the scope that gives the first of a scope's values, or gives the values of that one, and so on."""
    given = next(iter(scope.given.values()), None)
    return _outermost(given.scope) if given is not None else scope


def _statements(function: Function) -> Iterator[ast.stmt]:
    return (node for node in ast.walk(function) if isinstance(node, ast.stmt))


def _passed_on(argument: ast.expr) -> set[str]:
    """Return the names whose values an argument passes on as they are or, for a code, in capitals."""
    capitals = (node.value for node in ast.walk(argument) if isinstance(node, ast.Attribute) and node.attr == "upper")
    return {node.id for node in (argument, *capitals) if isinstance(node, ast.Name)}


def _merged(rows: tuple[dict[str, Value], ...]) -> dict[str, Value]:
    return {name: value for row in rows for name, value in row.items()}


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp | ast.Name | ast.Call)


def _either(texts: list[str]) -> str:
    return " / ".join(dict.fromkeys(text for text in texts if text))


def _placeholder(node: ast.expr) -> str:
    return "{" + (_in_words(node) or "value") + "}"


def _in_words(node: ast.AST) -> str:
    """Return words for an expression, from the names in it; for a call, from what is given to it."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) if not name.startswith("__"):
            return "" if name in UNSAID else name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Name(id="type"), args=[inner]):
            return f"type of {_in_words(inner)}"
        case ast.Call(func=ast.Name(id="len"), args=[inner]):
            return f"number of {_in_words(inner)}"
        case ast.Call(func=ast.Attribute(value=inner)) if not isinstance(inner, ast.Constant) and _in_words(inner):
            return _in_words(inner)
        case ast.Call(args=[_, *_] as arguments):
            return next(filter(None, map(_in_words, arguments)), "")
    return next(filter(None, map(_in_words, ast.iter_child_nodes(node))), "")
