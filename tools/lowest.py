"""Print the lowest version that pyproject.toml declares of every package, as pip's constraints: `name==version`.

    python tools/lowest.py >constraints.txt

`make test-lowest` installs these and runs the tests with them. It leaves out the extras whose packages the tests
compare with, and the lowest versions of the tools that run the tests.
"""

from __future__ import annotations

import re
import tomllib

from source_tree import ROOT

EXTRAS = ("mask", "train")
"""The extras that are tested at their lowest versions."""


def lowest(project: dict) -> list[str]:
    """Return `name==version` for each requirement with a lower bound, in the table `project` of pyproject.toml."""
    found = list(project["dependencies"])
    for extra in EXTRAS:
        found += project["optional-dependencies"][extra]
    bounds = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", requirement) for requirement in found)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    print(*lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]), sep="\n")
