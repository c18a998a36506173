"""Refuse docstrings that cannot be read alone, and public functions that do not explain their arguments.

    python tools/check_docstrings.py

1. No docstring begins with "Of", "As", "Those", "Whose" or "What", on whatever it stands, in tests and tools too.
2. A function of a public import path that takes arguments has an `Args:` section that names all of them and no other.
   So has every public method of a public class. `forward` is what its class says.

Whether a public function has a docstring at all is the part of ruff's rules D1.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from source_tree import ROOT, Definition, Function, Module, read_modules, resolve

FRAGMENT = re.compile(r"(Of|As|Those|Whose|What)\b")
PUBLIC = (
    "sdinpaint",
    "sdinpaint.sampling",
    "sdinpaint.models",
    "sdinpaint.masks",
    "sdinpaint.metrics",
    "sdinpaint.training",
    "sdinpaint.errors",
)
"""The public import paths. One without `__all__` stands for all its modules."""
ENTRY = re.compile(r"(?P<names>\*{0,2}\w+(?:(?:, | and | / )\*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")


def fragments(module: Module) -> Iterator[str]:
    """Yield a line for every docstring of a module that begins like the second half of a sentence."""
    for node in ast.walk(module.tree):
        for text in _docstrings(node):
            if FRAGMENT.match(text.value.lstrip()):
                yield f"{module.path}:{text.lineno}: a docstring begins with {text.value.split()[0]!r}"


def unexplained(modules: dict[str, Module]) -> Iterator[str]:
    """Yield a line for every public function whose `Args:` section is missing or names other arguments."""
    seen = set()
    for module, function, owner in public_functions(modules):
        if function in seen:
            continue
        seen.add(function)
        taken, told = arguments(function, method=owner is not None), explained(ast.get_docstring(function) or "")
        where = f"{module.path}:{function.lineno}: {f'{owner.name}.' if owner else ''}{function.name}"
        if taken and told is None:
            yield f"{where} takes {', '.join(taken)}, and its docstring has no Args:"
        elif told is not None and set(told) != set(taken):
            missing, other = [name for name in taken if name not in told], [name for name in told if name not in taken]
            yield f"{where}: Args: misses {', '.join(missing) or 'nothing'}, and names {', '.join(other) or 'no other'}"


def public_functions(modules: dict[str, Module]) -> Iterator[tuple[Module, Function, ast.ClassDef | None]]:
    """Yield each function and method of the public import paths with its module, and its class for a method."""
    for path in PUBLIC:
        names = modules[path].exported() if path in modules else []
        if path in modules and not names:
            parts = (name.rpartition(".") for name in modules)
            names = [name for folder, _, name in parts if folder == path and not name.startswith("_")]
        for name in names:
            found = resolve(modules, path, name)
            if found is not None:
                yield from _functions_of(modules, *found)


def arguments(function: Function, *, method: bool) -> list[str]:
    """Return the names of the arguments that a caller gives, without `self` and `cls`."""
    given = [*function.args.posonlyargs, *function.args.args]
    if method and "staticmethod" not in map(ast.unparse, function.decorator_list):
        given = given[1:]
    given += [*function.args.kwonlyargs, *filter(None, (function.args.vararg, function.args.kwarg))]
    return [argument.arg for argument in given if not argument.arg.startswith("_")]


def explained(docstring: str) -> list[str] | None:
    """Return the arguments that the `Args:` section of a docstring names, or None where there is no such section."""
    lines = iter(docstring.splitlines())
    if "Args:" not in lines:  # leaves the iterator behind that line
        return None
    names: list[str] = []
    indent = None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if line and not depth:
            break
        indent = depth if indent is None and line else indent
        entry = ENTRY.match(line.strip())
        if depth == indent and entry:
            names += [name.lstrip("*") for name in re.split(", | and | / ", entry["names"])]
    return names


def _docstrings(node: ast.AST) -> Iterator[ast.Constant]:
    """Yield the strings that stand first in a definition, and those below an assignment: docstrings of attributes."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    before = [None, *body]
    for previous, statement in zip(before, body, strict=False):
        value = statement.value if isinstance(statement, ast.Expr) else None
        first = previous is None and isinstance(node, Definition | ast.Module)
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        if is_text and (first or isinstance(previous, ast.Assign | ast.AnnAssign)):
            yield value


def _functions_of(
    modules: dict[str, Module], module: Module, found: Definition | None
) -> Iterator[tuple[Module, Function, ast.ClassDef | None]]:
    if isinstance(found, Function):
        yield module, found, None
    elif isinstance(found, ast.ClassDef):
        for one in found.body:
            setter = isinstance(one, Function) and any(map(_is_setter, one.decorator_list))
            if isinstance(one, Function) and not one.name.startswith("_") and one.name != "forward" and not setter:
                yield module, one, found
        for base in found.bases:
            inherited = resolve(modules, module.name, base.id) if isinstance(base, ast.Name) else None
            if inherited is not None:
                yield from _functions_of(modules, *inherited)
    else:
        exported = module.exported()
        for one in module.tree.body:
            if isinstance(one, Definition) and (one.name in exported if exported else not one.name.startswith("_")):
                yield from _functions_of(modules, module, one)


def _is_setter(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Attribute) and decorator.attr == "setter"


def main() -> int:
    """Print what is refused. Return 1 where there is any, else 0."""
    modules = read_modules()
    paths = [path for folder in ("tests", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    beside = [Module(path.stem, path.relative_to(ROOT), ast.parse(path.read_text("utf-8")), {}) for path in paths]
    found = [line for module in (*modules.values(), *beside) for line in fragments(module)]
    found += unexplained(modules)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
