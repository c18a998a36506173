"""Sentences of the library in the words of the command line: options in place of Python's keywords."""

from __future__ import annotations

import re

import click

from sdinpaint.errors import SdInpaintError

__all__ = ["Wording", "as_typed"]

ALONE, AT_END = r"(?<![\w./\\'\"-])", r"(?![\w/\\'\"-]|\.\w)"
"""The signs before and after a word that is no part of a path, which messages quote."""
KEYWORD = re.compile(ALONE + r"(?P<name>[a-z_]+)=(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;()]*)")
"""Matches a keyword argument in a sentence, such as controlnet=PATH."""
NAME = re.compile(ALONE + r"[a-z]+(?:_[a-z]+)+" + AT_END)
"""Matches a name of several words, which only a program uses."""
VERB = re.compile(r"\bMask\.(?P<verb>[a-z_]+)\((?P<value>[^()]*)\)")
"""Matches a call that changes a mask, such as Mask.grow(4)."""
METHOD = re.compile(r"Mask\.(?P<name>[a-z_]+)(?:: (?P<argument>[a-z_]+))?$")
"""Matches the subject of an error that a method of a mask raises."""


class Wording:
    """The options of one command, by the names that sentences of the library have for them.

    Args:
        command: the command that was typed.
    """

    def __init__(self, command: click.Command) -> None:
        typable = [one for one in command.params if isinstance(one, click.Option)]
        self._options = {
            name.strip("-").replace("-", "_"): one for one in typable for name in [*one.opts, one.name or ""]
        }

    def sentence(self, text: str) -> str:
        """Write options in place of keywords.

        Args:
            text: a sentence of the library.

        Returns:
            The sentence as a person reads it who types commands.
        """
        return NAME.sub(self._named, KEYWORD.sub(self._assigned, VERB.sub(self._called, text)))

    def error(self, error: SdInpaintError) -> SdInpaintError:
        """Write options in place of keywords in all parts of an error.

        Args:
            error: the error of the library.

        Returns:
            An error with the same code.
        """
        found, expected, hint = map(self.sentence, (error.found, error.expected, error.hint))
        return SdInpaintError(error.code, self._subject(error.subject), found, expected=expected, hint=hint)

    def _subject(self, subject: str) -> str:
        if verb := METHOD.match(subject):  # Mask.grow: pixels is --grow, and Mask.region: scale is --scale
            names = [name for name in (verb["argument"], verb["name"]) if name in self._options][:1]
        else:
            names = subject.split(", ")
        if not names or not all(name in self._options for name in names):
            return NAME.sub(self._named, subject)
        return ", ".join(self._options[name].opts[0] for name in names)

    def _assigned(self, match: re.Match[str]) -> str:
        option, value = self._options.get(match["name"]), match["value"].strip("'\"")
        if option is None:
            return match[0]
        if option.is_flag:
            if value == "True":
                return option.opts[-1]
            return option.secondary_opts[-1] if option.secondary_opts else f"leave out {option.opts[-1]}"
        return f"{option.opts[0]} {value}".rstrip()

    def _named(self, match: re.Match[str]) -> str:
        option = self._options.get(match[0])
        return match[0] if option is None else option.opts[0]

    def _called(self, match: re.Match[str]) -> str:
        return f"sdinpaint mask edit --{match['verb'].replace('_', '-')} {match['value']}".rstrip()


def as_typed(text: str) -> str:
    """Write a sentence of the library in the words of the command that runs.

    Args:
        text: the sentence.

    Returns:
        The sentence, with options in place of keywords.
    """
    return Wording(click.get_current_context().command).sentence(text)
