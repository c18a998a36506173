"""Fixtures that change the surroundings of one test: modules, variables, constants, functions, the disk."""

from __future__ import annotations

import functools
import inspect
import io
import shutil
import sys

import pytest
from sdinpaint_kernels import backend


@pytest.fixture
def without(monkeypatch):
    """Give without(*modules): importing one of them fails, as if it were not installed."""

    def hide(*modules):
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.fixture
def installed(monkeypatch):
    """Give installed(name, module): importing the name gives that module."""
    return lambda name, module: monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def environment(monkeypatch):
    """Give environment(NAME=value, ...): set environment variables, or remove those that are None."""

    def change(**variables):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return change


@pytest.fixture
def substitute(monkeypatch):
    """Give substitute(owner, NAME=value, ...): other sizes, paths, limits or functions of a module or class."""

    def change(owner, **values):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)

    return change


@pytest.fixture
def kernel_setting(substitute):
    """Give kernel_setting(value): the value of SDINPAINT_KERNELS with which the process was started."""
    return lambda value: substitute(backend, SETTING=value)


@pytest.fixture
def spy(monkeypatch):
    """Give spy(owner, name): a list of the positional arguments of every call of a function, which still runs."""

    def watch(owner, name):
        calls, function = [], getattr(owner, name)

        @functools.wraps(function)
        def call(*given, **options):
            calls.append(given)
            return function(*given, **options)

        monkeypatch.setattr(owner, name, call)
        return calls

    return watch


@pytest.fixture
def failing(monkeypatch):
    """Give failing(owner, name, error): calls of a function raise the error."""

    def change(owner, name, error):
        def call(*_, **__):
            raise error

        monkeypatch.setattr(owner, name, call)

    return change


@pytest.fixture
def forbid(failing):
    """Give forbid(owner, *names): a call of one of the functions fails the test, whatever errors are caught."""

    def change(owner, *names):
        for name in names:
            failing(owner, name, pytest.fail.Exception(f"{name} was called"))

    return change


@pytest.fixture
def sabotage(monkeypatch):
    """Give sabotage(owner, name, wrong): put something broken on purpose in the place of what is right.

    A function that was replaced must be called before the test ends: otherwise the test says nothing about it.
    """
    unused = {}

    def change(owner, name, wrong):
        replacement = wrong
        if callable(wrong) and not inspect.isclass(wrong):
            unused[owner, name] = wrong

            @functools.wraps(wrong)
            def replacement(*given, **options):
                unused.pop((owner, name), None)
                return wrong(*given, **options)

        monkeypatch.setattr(owner, name, replacement)

    yield change
    assert not unused, f"was replaced, but never called: {[name for _, name in unused]}"


class Stream(io.StringIO):
    """A stderr that is a terminal, or is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """Give stderr(terminal=...): a stream in the place of sys.stderr.

    Call it in the test itself: pytest replaces sys.stderr once the fixtures are set up.
    """

    def change(*, terminal):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return change


@pytest.fixture
def free_space(monkeypatch):
    """Give free_space(size): so many bytes are free on every disk."""

    def change(size):
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    return change


@pytest.fixture
def loads(monkeypatch):
    """Give loads(outcome): `sdinpaint.load` as commands call it returns, raises or calls that instead."""

    def change(outcome):
        def load(*_, **__):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome() if inspect.isfunction(outcome) else outcome

        monkeypatch.setattr("sdinpaint.loading.load", load)

    return change
