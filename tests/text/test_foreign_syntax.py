"""Prompt syntax of other programs is told; what people write in plain language is not."""

import time

import pytest

from sdinpaint.text.foreign import foreign_syntax

FOREIGN = {
    "a red ball <lora:clay:0.8>": "'<lora:clay:0.8>', which other programs read as a LoRA",
    "a ball <lyco:style:1:0.5>": "LoRA",
    "a ball <clay:0.8>": "LoRA",
    "<hypernet:anime:1> a ball": "adapter",
    "a ball, embedding:EasyNegative": "textual inversion",
    "a (red:1.4) ball": "'(red:1.4)', which other programs read as a weight",
    "a (red, shiny:1.2) ball": "weight",
    "a (red : .5) ball": "weight",
    "a [red:blue:0.5] ball": "change during the run",
    "a [red:5] ball": "change during the run",
    "a ((red)) ball": "'((red))', which other programs read as a weight",
    "a (((red shiny))) ball": "weight",
    "a {{red}} ball": "weight",
    "a red++ ball": "'d++', which other programs read as a weight",
    "a (red ball)+ on grass": "weight",
    "a (red ball)-- on grass": "weight",
    "a [red|blue] ball": "choice",
    "a {red|blue} ball": "choice",
    "a [red] ball": "lower weight",
    "a __colour__ ball": "wildcard",
    "a red ball BREAK a blue ball": "'BREAK', which other programs read as a division",
    "a red ball AND a blue ball": "division",
    '("a red ball", "a blue ball").blend(0.7, 0.3)': "blend",
}
PLAIN = [
    "",
    "a red ball",
    "a dog (a poodle), sitting",
    "a clock at 10:30, the ratio is 16:9",
    "50mm f/1.8, 4k, ultra-realistic - oil on canvas",
    'she said: "hello" <3',
    "snake_case text",
    "A RED BALL AND A BLUE BALL",
    "and break",
    "x < y > z",
    "a well-lit room -- with a sofa",
    "e-mail: someone@example.org",
    "{}",
    "[]",
]


@pytest.mark.parametrize("prompt", FOREIGN)
def test_syntax_of_other_programs_is_told(prompt):
    told = [*foreign_syntax(prompt)]
    assert any(FOREIGN[prompt] in sentence for sentence in told), told
    assert all(sentence.endswith("here it is plain text") for sentence in told)
    assert len(told) == 1


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_language_is_not(prompt):
    assert [*foreign_syntax(prompt)] == []


@pytest.mark.parametrize(
    "text", ["(", "((", "[", "{", "<a:", "<lora:", "+", "a-", "__a", "(a:", "(a)", "[a|", " AND", "'", "a:1"]
)
def test_the_time_grows_with_the_length_alone(text):
    start = time.monotonic()
    list(foreign_syntax(text * 1_000_000))
    assert time.monotonic() - start < 1
