"""Tests of what `tools/` refuses and writes, on small made-up trees of source files, and on the real one."""

from __future__ import annotations

import textwrap

import check_docstrings
import error_codes
import house
import pytest
import raised_errors
from places import ROOT
from source_tree import read_modules

ROOMS = """
[[tool.importlinter.contracts]]
name = "rooms"
type = "layers"
layers = ["sdinpaint.top", "sdinpaint.left | sdinpaint.right", "sdinpaint.ground"]
"""


@pytest.fixture
def tree(tmp_path):
    """tree(**sources) -> a checkout whose modules of `sdinpaint` hold these texts; `a__b` is the file a/b.py."""

    def write(**sources):
        for name, text in {"__init__": "", **sources}.items():
            parts = [name] if name == "__init__" else name.replace("____init__", "__@").split("__")
            path = (tmp_path / "sdinpaint").joinpath(*parts[:-1], parts[-1].replace("@", "__init__"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(textwrap.dedent(text))
        (tmp_path / "pyproject.toml").write_text(ROOMS)
        return tmp_path

    return write


# Docstrings


def refused(root):
    modules = read_modules(root)
    told = [line for module in modules.values() for line in check_docstrings.fragments(module)]
    return told + list(check_docstrings.unexplained(modules))


@pytest.mark.parametrize("word", ["Of", "As", "Those", "Whose", "What"])
def test_a_docstring_that_begins_in_mid_sentence_is_refused_wherever_it_stands(tree, word):
    root = tree(
        one=f'''
        """{word} a module."""
        class Inner:
            """{word} a class."""
            size: int
            """{word} an attribute."""
            def method(self):
                """{word} a method."""
                def nested():
                    """{word} a nested function."""
        '''
    )
    told = refused(root)
    assert [line.split(":")[1] for line in told] == ["2", "4", "6", "8", "10"]
    assert all(f"begins with '{word}'" in line for line in told)


def test_whole_sentences_and_other_strings_pass(tree):
    root = tree(
        one='''
        """Official names, assigned to whatever asks."""
        TEXT = "What is not a docstring."
        def one():
            """Assign whatever is offered."""
            return "As it is."
        '''
    )
    assert refused(root) == []


PUBLIC = """
from sdinpaint.inner import {name}
__all__ = ["{name}"]
"""


def test_a_public_function_explains_every_argument_and_no_other(tree):
    explained = '''
    def paint(image, mask=None, *more, seed: int = 0, **options):
        """Paint.

        Args:
            image: the image, as
                mask: is not an entry, since it is a continuation
            mask, more: two at a time.
            seed (int): a number.
            **options: the rest.

        Returns:
            steps: no argument.
        """
    '''
    public = PUBLIC.format(name="paint")
    assert refused(tree(__init__=public, inner=explained)) == []
    (told,) = refused(tree(__init__=public, inner=explained.replace("seed (int)", "seeds")))
    assert "paint: Args: misses seed, and names seeds" in told
    (told,) = refused(tree(__init__=public, inner=explained.replace("Args:", "Arguments:")))
    assert "paint takes image, mask, seed, more, options, and its docstring has no Args:" in told


def test_methods_of_public_classes_and_of_their_bases_explain_theirs(tree):
    inner = '''
    from sdinpaint.base import Base
    class Thing(Base):
        """A thing."""
        def change(self, size):
            """Change it."""
        @staticmethod
        def make(size):
            """Make one."""
        @property
        def size(self):
            """The size."""
        @size.setter
        def size(self, value):
            """Set it."""
        def forward(self, x):
            """Run."""
        def bare(self):
            """Need nothing."""
        def _private(self, size):
            """Help."""
    class Other:
        """Not public."""
        def change(self, size):
            """Change it."""
    '''
    base = '''
    class Base:
        """A base."""
        def inherited(self, size):
            """Inherit."""
    '''
    told = refused(tree(__init__=PUBLIC.format(name="Thing"), inner=inner, base=base))
    assert [line.split(" takes ")[0].split(": ")[1] for line in told] == [
        "Thing.change",
        "Thing.make",
        "Base.inherited",
    ]


def test_a_public_path_without_names_stands_for_its_modules(tree):
    text = '''
    def public(x):
        """Do."""
    def _private(x):
        """Help."""
    '''
    (told,) = refused(tree(training____init__="", training__loop=text, other__loop=text))
    assert "sdinpaint/training/loop.py" in told


# The house


def test_a_tree_that_keeps_the_order_passes(tree):
    root = tree(
        top="from sdinpaint import left\nfrom sdinpaint.right.one import x",
        left="def later():\n    import sdinpaint.ground",
        right____init__="",
        right__one="from sdinpaint.right import two",
        right__two="from sdinpaint.ground import y",
        ground="from __future__ import annotations",
    )
    found = house.read_house(root)
    assert found.rooms["sdinpaint.top"] == {"sdinpaint.left", "sdinpaint.right"}
    assert found.floors == {"sdinpaint.top": 3, "sdinpaint.left": 2, "sdinpaint.right": 2, "sdinpaint.ground": 1}
    assert (found.back_up, found.circles) == ([], [])
    assert found.numbers["rooms"] == found.numbers["arrows"] == 4
    assert "  3  sdinpaint.top     left right" in list(house.drawing(found))


@pytest.mark.parametrize(
    ("sources", "arrow"),
    [
        ({"ground": "import sdinpaint.top", "top": ""}, ("sdinpaint.ground", "sdinpaint.top")),
        ({"left": "import sdinpaint.right", "right": ""}, ("sdinpaint.left", "sdinpaint.right")),
        ({"top": "import sdinpaint.unnamed", "unnamed": ""}, ("sdinpaint.top", "sdinpaint.unnamed")),
    ],
    ids=["upward", "beside", "to a room that the contract does not name"],
)
def test_an_arrow_that_does_not_lead_down_is_told(tree, sources, arrow):
    assert house.read_house(tree(**sources)).back_up == [arrow]


def test_a_circle_of_files_within_a_room_is_told(tree):
    root = tree(left____init__="", left__a="import sdinpaint.left.b", left__b="import sdinpaint.left.a")
    assert house.read_house(root).circles == [["sdinpaint.left.a", "sdinpaint.left.b"]]


def test_imports_for_type_checkers_are_counted_apart(tree):
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sdinpaint.top"
    found = house.read_house(tree(top="import sdinpaint.ground", ground=lazy))
    assert (found.back_up, found.circles) == ([], [])
    assert found.numbers["imports for type checkers only"] == found.numbers["circles with those"] == 1


# Error codes

ERRORS = '''
class SdInpaintError(Exception):
    """A base."""
class SettingError(SdInpaintError):
    """A setting."""
'''


def errors(root):
    return {(one.code, one.module.removeprefix("sdinpaint."), one.found, one.expected, one.hint): one.kind
            for one in raised_errors.Reader(read_modules(root)).errors()}  # fmt: skip


def test_codes_and_texts_are_read_with_words_for_what_a_run_decides(tree):
    found = errors(tree(errors=ERRORS, one='''
    from sdinpaint.errors import SettingError
    MOST = 7
    def check(value, rows):
        hint = "old"
        if rows:
            found, hint = f"{value!r} of {len(rows)}", "fewer"
            raise SettingError("SETTING_ROWS", "rows", found, expected=f"at most {MOST}", hint=hint)
        hint = "new"
        code = "SETTING_A" if value else "SETTING_B"
        raise SettingError(code, "value", f"a {type(value).__name__}" + ", too", hint=hint)
    '''))  # fmt: skip
    assert found == {
        ("SETTING_ROWS", "one", "{value} of {number of rows}", "at most 7", "fewer"): "SettingError",
        ("SETTING_A", "one", "a {type of value}, too", "", "new"): "SettingError",
        ("SETTING_B", "one", "a {type of value}, too", "", "new"): "SettingError",
    }


def test_codes_made_of_names_are_found_for_every_name_that_callers_give(tree):
    found = errors(tree(
        errors=ERRORS,
        checks='''
        from sdinpaint.errors import SettingError
        def whole(name, value, low):
            number(name, value, low)
        def number(name, value, low):
            raise SettingError(f"SETTING_{name.upper()}", name, f"{value!r}", expected=f"from {low}")
        ''',
        one='''
        from sdinpaint.checks import number, whole as whole_number
        BOUNDS = {"eta": 0, "strength": 1}
        def run(self):
            whole_number("steps", self.steps, 5)
            for name, low in BOUNDS.items():
                number(name, getattr(self, name), low)
        ''',
    ))  # fmt: skip
    assert {(code, module, expected) for code, module, _, expected, _ in found} == {
        ("SETTING_STEPS", "one", "from 5"),
        ("SETTING_ETA", "one", "from 0"),
        ("SETTING_STRENGTH", "one", "from 1"),
    }


def test_a_default_beside_a_code_is_found_where_no_code_is_given(tree):
    found = errors(tree(errors=ERRORS, one='''
    from sdinpaint.errors import SettingError
    def choice(name, value, *, code=""):
        code = code or f"SETTING_{name.upper()}"
        raise SettingError(code, name, "odd")
    def run(value):
        choice("fill", value)
        choice("peer", value, code="BENCH_PEER")
    '''))  # fmt: skip
    assert {code for code, *_ in found} == {"SETTING_FILL", "BENCH_PEER"}


def test_a_code_that_cannot_be_followed_is_refused(tree):
    root = tree(errors=ERRORS, one='''
    from sdinpaint.errors import SettingError
    def fail(table):
        raise SettingError(table["code"], "x", "y")
    ''')  # fmt: skip
    with pytest.raises(SystemExit, match=r"one.py:4: write the code"):
        errors(root)


def test_the_real_codes_are_all_there():
    codes = {error.code for error in raised_errors.Reader(read_modules(ROOT)).errors()}
    assert {"SETTING_GUIDANCE", "SETTING_TILE", "SETTING_BLEND", "NUMERIC_ENCODE", "CKPT_GGUF", "HUB_ACCESS"} <= codes
    assert {"CKPT_UNSAFE_PICKLE", "OUT_OF_MEMORY", "MASK_COLOURED", "IMAGE_TRUNCATED", "BENCH_PEER"} <= codes
    assert all(code.replace("_", "").isupper() for code in codes)


def test_a_page_that_is_not_what_the_source_says_is_told(tree, tmp_path, monkeypatch, capsys):
    modules = read_modules(
        tree(errors=ERRORS, one="from sdinpaint.errors import SettingError\nSettingError('A', 'b', 'c')")
    )
    monkeypatch.setattr(error_codes, "read_modules", lambda: modules)
    monkeypatch.setattr(error_codes, "PAGE", tmp_path / "errors.md")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["error_codes.py", *arguments])
        return error_codes.main()

    assert [run("--check"), run(), run("--check")] == [1, 0, 0]
    assert "- `A` (`sdinpaint.one`)\n  - c\n" in (tmp_path / "errors.md").read_text()
    (tmp_path / "errors.md").write_text("# Error codes\n")
    capsys.readouterr()
    assert run("--check") == 1
    assert "python tools/error_codes.py" in capsys.readouterr().out


def test_a_class_of_errors_that_the_page_does_not_introduce_is_refused():
    with pytest.raises(SystemExit, match="NewError"):
        error_codes.page({raised_errors.Error("NewError", "A", "b", "c", "", "")})
