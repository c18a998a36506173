"""Write bench.md, the pictures beside it and the README's table anew, from the rows in benchmarks/results.

python docs/benchmarks/make_pages.py

`sdinpaint bench` does so after it has measured.
"""

from __future__ import annotations

from pathlib import Path

from sdinpaint.bench.report.pages import Places, write_pages

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    write_pages(Places(ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks", ROOT / "README.md"))
