"""The registry of samplers: names, the names that other programs have for them, and what is said of unknown ones."""

from __future__ import annotations

import diffusers
import pytest

from sdinpaint.errors import SettingError
from sdinpaint.sampling import SAMPLERS, find_sampler, find_spacing, resolve


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_name_and_all_its_aliases_are_one_sampler(name):
    for alias in (name, *SAMPLERS[name].aliases):
        for spelling in (alias, alias.upper(), f" {alias.lower()} ", alias.replace("_", " "), alias.replace(" ", "-")):
            assert resolve(spelling) == (name, SAMPLERS[name].spacing)
            assert find_sampler(spelling) is SAMPLERS[name]


def test_no_alias_is_of_two_samplers():
    spelled = [alias.lower() for one in SAMPLERS.values() for alias in one.aliases]
    assert len(spelled) == len(set(spelled))


@pytest.mark.peer
@pytest.mark.parametrize("name", SAMPLERS)
def test_classes_of_diffusers_are_named_as_they_are(name):
    (scheduler,) = (alias for alias in SAMPLERS[name].aliases if alias.endswith("Scheduler"))
    assert hasattr(diffusers, scheduler)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Euler a", ("euler_ancestral", "leading")),
        ("Euler a Karras", ("euler_ancestral", "karras")),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_k", ("dpmpp_2m", "karras")),
        ("euler_k", ("euler", "karras")),
        ("sample_dpmpp_2m", ("dpmpp_2m", "linspace")),
    ],
)
def test_names_of_other_programs(said, meant):
    assert resolve(said) == meant
    assert find_spacing(said) is SAMPLERS[meant[0]].spacings[meant[1]]
    assert resolve(said, meant[1]) == meant


@pytest.mark.parametrize(("said", "meant"), [("eulr", "euler"), ("Eular a", "Euler a"), ("DPM++ 2N", "dpmpp_2m")])
def test_a_near_miss_is_suggested(said, meant):
    with pytest.raises(SettingError) as caught:
        resolve(said)
    assert caught.value.code == "SETTING_SAMPLER"
    assert caught.value.hint == f"did you mean {meant!r}?"


@pytest.mark.parametrize("said", ["", "karras", "Karras", "k", None, 3, "DDIM a"])
def test_what_is_no_name_is_refused(said):
    with pytest.raises(SettingError) as caught:
        resolve(said)
    assert all(name in caught.value.expected for name in SAMPLERS)


def test_a_name_and_an_option_that_contradict_each_other_are_refused():
    with pytest.raises(SettingError) as caught:
        resolve("DPM++ 2M Karras", "trailing")
    assert caught.value.code == "SETTING_SPACING"
    assert "'karras'" in caught.value.expected
