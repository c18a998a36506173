"""Print which parts of sdinpaint import which, and how many floors that makes.

    python tools/house.py                 # this checkout; ends with 1 on a circle or an import that runs back up
    python tools/house.py --against REV   # with the numbers of another git revision beside it

A room is a folder or a module of `sdinpaint`, or one of the two other packages. An arrow is a pair of rooms of which
one imports the other. `sdinpaint/__init__.py` and `__main__.py` are the door to all rooms and count as none. Imports
within functions count. Imports for type checkers only never run and are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from source_tree import ROOT, Module, read_modules

DOOR = ("sdinpaint", "sdinpaint.__main__")


@dataclass(frozen=True)
class House:
    """The imports of one checkout, and the order of its rooms."""

    files: dict[str, set[str]]
    """Module -> the modules that it imports when it runs."""
    typing: dict[str, set[str]]
    """Module -> the modules that it imports for type checkers only."""
    order: dict[str, int]
    """Room -> its line in the contract of pyproject.toml, 0 at the top; empty without such a contract."""

    @cached_property
    def rooms(self) -> dict[str, set[str]]:
        """Room -> the rooms that it imports."""
        return _by_room(self.files)

    @cached_property
    def floors(self) -> dict[str, int]:
        """Room -> how many rooms the longest chain of imports below it has, itself included."""
        heights: dict[str, int] = {}

        def height(room: str, above: tuple[str, ...] = ()) -> int:
            if room not in heights:
                below = [height(one, (*above, room)) for one in self.rooms[room] if one not in (*above, room)]
                heights[room] = 1 + max(below, default=0)
            return heights[room]

        for room in self.rooms:
            height(room)
        return heights

    @property
    def back_up(self) -> list[tuple[str, str]]:
        """The arrows to a room that stands above or beside the one that imports it, or in no line of the contract."""
        arrows = [(room, one) for room, others in self.rooms.items() for one in others]
        return [(a, b) for a, b in arrows if not self.order.get(a, -1) < self.order.get(b, -1)] if self.order else []

    @property
    def circles(self) -> list[list[str]]:
        """The groups of modules of which each imports the others, directly or through others of the group."""
        return _circles(self.files)

    @property
    def numbers(self) -> dict[str, int | None]:
        """The figures that can be compared between two revisions; None where the revision has no contract."""
        both = {name: others | self.typing[name] for name, others in self.files.items()}
        return {
            "files": len(self.files),
            "rooms": len(self.rooms),
            "arrows": sum(map(len, self.rooms.values())),
            "floors": max(self.floors.values()),
            "arrows that run back up": len(self.back_up) if self.order else None,
            "circles among files": len(self.circles),
            "imports for type checkers only": sum(map(len, self.typing.values())),
            "circles with those": len(_circles(both)),
        }


def read_house(root: Path) -> House:
    """Read the imports of the checkout at `root` and its import-linter contract."""
    modules = read_modules(root)
    runs, typing = {}, {}
    for name, module in modules.items():
        apart = [node for node in ast.walk(module.tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in _test(node)]
        hidden = {id(inner) for node in apart for statement in node.body for inner in ast.walk(statement)}
        nodes = list(ast.walk(module.tree))
        runs[name] = set(_imports(modules, module, [node for node in nodes if id(node) not in hidden]))
        typing[name] = set(_imports(modules, module, [node for node in nodes if id(node) in hidden])) - runs[name]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project.get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers = next((one["layers"] for one in contracts if one["type"] == "layers"), [])
    order = {room.strip(): line for line, rooms in enumerate(layers) for room in rooms.split("|")}
    return House(runs, typing, order)


def read_revision(revision: str) -> House:
    """Read the imports of a git revision of this repository."""
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
        return read_house(Path(folder))


def drawing(house: House) -> Iterator[str]:
    """Yield a line for each room, from the top floor to the ground, with the rooms that it imports."""
    width = max(map(len, house.rooms))
    for room in sorted(house.rooms, key=lambda one: (-house.floors[one], one)):
        below = sorted(house.rooms[room], key=lambda one: (-house.floors[one], one))
        yield f"{house.floors[room]:>3}  {room:<{width}}  {' '.join(one.removeprefix('sdinpaint.') for one in below)}"


def _imports(modules: dict[str, Module], module: Module, nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name in modules and name != module.name)


def _test(node: ast.If) -> str:
    return ast.unparse(node.test)


def _by_room(files: dict[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for name, others in files.items():
        if name not in DOOR:
            room = _room(name)
            rooms.setdefault(room, set()).update(_room(one) for one in others if one not in DOOR)
            rooms[room].discard(room)
    return rooms


def _room(module: str) -> str:
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if package == "sdinpaint" else package


def _circles(files: dict[str, set[str]]) -> list[list[str]]:
    reached = {name: _reachable(files, name) for name in files}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in files}
    return sorted(sorted(group) for group in groups if group)


def _reachable(files: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(files[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += files[name]
    return found


def main() -> int:
    """Print the house and its numbers. Return 1 where it has a circle or an arrow that runs back up, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="REV", help="print the numbers of this git revision beside")
    parser.add_argument("--quiet", action="store_true", help="print what is refused, and nothing else")
    options = parser.parse_args()
    house = read_house(ROOT)
    if not options.quiet:
        print(*drawing(house), "", sep="\n")
        columns = [house.numbers] + ([read_revision(options.against).numbers] if options.against else [])
        for what in house.numbers:
            cells = "".join(f"{'-' if column[what] is None else column[what]:>10}" for column in columns)
            print(f"{what:<32}{cells}")
    refused = [f"{a} imports {b}, which is not below it" for a, b in house.back_up]
    refused += [f"a circle: {' '.join(group)}" for group in house.circles]
    print(*refused, sep="\n", end="\n" if refused else "")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
