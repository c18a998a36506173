"""Libraries that are installed as extras: what is said without them, and that their noise is put back as it was."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from sdinpaint.checks import need, quietly
from sdinpaint.errors import SettingError


def test_what_is_missing_is_named_with_the_extra_to_install():
    assert need("json", extra="mask", what="Mask.grow").loads("1") == 1
    with pytest.raises(SettingError) as caught:
        need("no_such_library.part", extra="mask", what="Mask.grow")
    assert caught.value.code == "SETTING_EXTRA"
    assert (caught.value.subject, caught.value.hint) == ("Mask.grow", "pip install 'sdinpaint[mask]'")
    assert "no_such_library" in caught.value.found


@pytest.mark.peer
@pytest.mark.parametrize("fails", [False, True])
def test_libraries_are_quiet_meanwhile_and_as_before_after_that(fails):
    import diffusers
    import transformers

    def state():
        logs = [library.utils.logging for library in (diffusers, transformers)]
        return [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs], are_progress_bars_disabled()

    before = state()
    try:
        with quietly(diffusers, transformers):
            assert are_progress_bars_disabled()
            assert state()[0] == [(50, False)] * 2
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert state() == before
