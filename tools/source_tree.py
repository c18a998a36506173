"""Read the modules of the three packages as syntax trees, without importing them."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "sdinpaint": Path("sdinpaint"),
    "sdinpaint_kernels": Path("kernels/sdinpaint_kernels"),
    "sdinpaint_weights": Path("weights_conversion/sdinpaint_weights"),
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Module:
    """One source file: its dotted name, its path from the root of the checkout, and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The names that its `from ... import ...` lines bring in: local name -> (module, name there)."""

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__.py` of a folder."""
        return self.path.name == "__init__.py"

    def exported(self) -> list[str]:
        """Return the names in its `__all__`, or an empty list."""
        found: list[str] = []
        for statement in self.tree.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                found += [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
        return found

    def definition(self, name: str) -> Definition | None:
        """Return the function or class of that name at the top of the module, or None."""
        found = (one for one in self.tree.body if isinstance(one, Definition) and one.name == name)
        return next(found, None)


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """Return every module of the packages below `root`, by dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found[name] = Module(name, path.relative_to(root), tree, _imported_names(tree))
    return found


def resolve(modules: dict[str, Module], module: str, name: str) -> tuple[Module, Definition | None] | None:
    """Follow imports to where `name`, as seen in `module`, is defined.

    Returns the module and the definition in it; a module and None where `name` is a module; None for anything else.
    """
    while module in modules:
        definition = modules[module].definition(name)
        if definition is not None:
            return modules[module], definition
        if f"{module}.{name}" in modules:
            return modules[f"{module}.{name}"], None
        if name in modules[module].names:
            module, name = modules[module].names[name]
        else:
            return None
    return None


def _imported_names(tree: ast.Module) -> dict[str, tuple[str, str]]:
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found
