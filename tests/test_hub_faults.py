"""A hub that breaks off, refuses, or is not there: what is kept, what is fetched again, and what is said."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
from builders import UNET_FILE, VAE_FILE, random_pipeline, small
from click.testing import CliRunner
from hub_server import Handler, read_tree
from huggingface_hub import constants

import sdinpaint
from sdinpaint import SdInpaintWarning, cli
from sdinpaint import hub as module
from sdinpaint.checkpoints.sources import COMPONENTS
from sdinpaint.cli import common
from sdinpaint.errors import CheckpointError, TokenizerError
from sdinpaint.hub import fetch
from sdinpaint.text import finding
from sdinpaint.text.finding import find_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

MODEL = "owner/small"


@pytest.fixture(scope="module")
def files(tiny, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    sdinpaint.save_diffusers(folder, random_pipeline(small(tiny), vocabulary))
    return read_tree(folder)


@pytest.fixture
def hasty(monkeypatch, substitute):
    """Transfers in small pieces, and no pause before they are tried again."""
    substitute(constants, DOWNLOAD_CHUNK_SIZE=10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def nowhere(environment):
    """The address of a hub that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment(HF_ENDPOINT=url)
    return url


def fetched(source=MODEL, **options):
    return read_tree(fetch(source, COMPONENTS, progress=False, **options))


def refusal(source=MODEL, **options):
    with pytest.raises(CheckpointError) as caught:
        fetch(source, COMPONENTS, progress=False, **options)
    assert source in str(caught.value)
    assert caught.value.hint
    return caught.value


def ranges(hub, name):
    return [asked for method, path, asked in hub.log if method == "GET" and path.endswith(f"blobs/{MODEL}/{name}")]


# Interruptions


@pytest.mark.usefixtures("hasty")
def test_a_broken_transfer_goes_on_where_it_stopped(hub, files):
    hub.add(MODEL, files)
    hub.breaks[UNET_FILE] = [500_000, 123_456, 0]
    assert fetched() == files
    first, *later = ranges(hub, UNET_FILE)
    assert first is None
    assert later == ["bytes=500000-", "bytes=620000-", "bytes=620000-"]


@pytest.mark.usefixtures("hasty")
def test_an_abandoned_download_is_not_taken_for_whole(hub, files, own_cache):
    hub.add(MODEL, files)
    hub.breaks[UNET_FILE] = [70_000, *[0] * 10]
    error = refusal()
    assert error.code == "HUB_UNREACHABLE"
    assert "closed connection" in error.found
    assert not any(path.name.endswith(".incomplete") for path in own_cache.rglob("*"))
    kept = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in own_cache.rglob("blobs/" + 64 * "?")}
    assert kept == {name: name for name in kept}
    assert hashlib.sha256(files[UNET_FILE]).hexdigest() not in kept
    assert refusal(local_files_only=True).code == "HUB_NOT_CACHED"
    hub.breaks.clear()
    hub.log.clear()
    assert fetched() == files
    assert UNET_FILE in hub.transferred()
    assert not any(name.endswith((".json", ".txt")) for name in hub.transferred())
    assert fetched(local_files_only=True) == files


KILLED = "import sys; from sdinpaint.hub import fetch; fetch(sys.argv[1], ('unet', 'vae', 'text_encoder'))"


def test_a_killed_download_is_not_taken_for_whole(hub, files, own_cache, environment):
    hub.add(MODEL, files)
    environment(HF_HUB_CACHE=own_cache, HF_HUB_DISABLE_TELEMETRY=1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, MODEL])
    hub.breaks[VAE_FILE], hub.on_break = [1_000], process.kill
    assert process.wait(60) == -signal.SIGKILL
    assert refusal(local_files_only=True).code == "HUB_NOT_CACHED"
    assert fetched() == files


def test_weights_come_last(hub, files):
    """So that a copy with all weights has all settings; values that are missing would be guessed."""
    hub.add(MODEL, files)
    fetched()
    order = [path for method, path, _ in hub.log if method == "GET" and ("/resolve/" in path or "/blobs/" in path)]
    assert ["/blobs/" in path for path in order] == [False] * 9 + [True] * 3


# Refusals


@pytest.mark.parametrize(
    ("status", "error", "code", "says"),
    [
        (401, "RepoNotFound", "HUB_NOT_FOUND", ["no such model on the hub, or a private one", "hf auth login"]),
        (404, "RepoNotFound", "HUB_NOT_FOUND", ["check the name at"]),
        (401, "GatedRepo", "HUB_ACCESS", ["terms to be accepted", f"/{MODEL}, then log in", "HF_TOKEN"]),
        (403, "GatedRepo", "HUB_ACCESS", ["terms to be accepted", "hf auth login"]),
        (403, "", "HUB_ACCESS", ["the hub refuses access (403)", "hf auth login"]),
        (500, "", "HUB_UNREACHABLE", ["cannot be downloaded", "500", "try again"]),
        (429, "", "HUB_UNREACHABLE", ["cannot be downloaded", "429", "try again"]),
    ],
)
def test_refusals_say_what_to_do(hub, files, status, error, code, says):
    hub.add(MODEL, files, refusal=(status, error))
    refused = refusal()
    assert refused.code == code
    assert all(text in str(refused) for text in says)


def test_log_in_opens_a_private_model(hub, files, environment):
    hub.add(MODEL, files, refusal=(401, "RepoNotFound"), token="hf_secret")
    environment(HF_TOKEN="hf_wrong")
    assert refusal().code == "HUB_NOT_FOUND"
    environment(HF_TOKEN="hf_secret")
    assert fetched() == files


def test_what_answers_is_no_hub(hub, sabotage):
    def page(self):
        self._answer(200, {"Content-Type": "text/html"}, b"<html>Please sign in to this network</html>")

    sabotage(Handler, "do_GET", page)
    assert refusal().code == "HUB_UNREACHABLE"


# No network


def test_without_the_hub_the_cache_is_used_with_a_warning(hub, files, nowhere, environment):
    assert refusal().code == "HUB_UNREACHABLE"
    environment(HF_ENDPOINT=hub.url)
    hub.add(MODEL, files)
    fetched()
    environment(HF_ENDPOINT=nowhere)
    with pytest.warns(SdInpaintWarning, match=r"cannot be downloaded .*; the copy in the cache is used"):
        assert fetched() == files


def test_an_unreachable_hub_is_reported_at_once(nowhere):
    started = time.monotonic()
    error = refusal()
    assert time.monotonic() - started < 3
    assert error.code == "HUB_UNREACHABLE"
    assert nowhere in error.found
    assert "refused" in error.found


def test_a_silent_hub_is_given_up(hub, sabotage, substitute):
    substitute(module, SECONDS=0.2)
    sabotage(Handler, "do_GET", lambda self: time.sleep(1))
    error = refusal()
    assert error.code == "HUB_UNREACHABLE"
    assert "Timeout" in error.found


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_offline_asks_nobody(hub, files, way, environment):
    hub.add(MODEL, files)
    offline = {"local_files_only": True} if way == "argument" else {}
    if way == "variable":
        environment(HF_HUB_OFFLINE=1)
    for source, command in ((MODEL, f"hf download {MODEL}"), (f"{MODEL}:a.ckpt", f"hf download {MODEL} a.ckpt")):
        error = refusal(source, revision="v1", **offline)
        assert error.code == "HUB_NOT_CACHED"
        assert f"{command} --revision v1" in error.hint
    assert hub.log == []


def test_a_missing_vocabulary_is_reported_at_once(nowhere, environment, substitute):
    environment(SDINPAINT_TOKENIZER=None)
    substitute(finding, PACKAGE_FILES={})
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=r"the download from openai/.* failed: .*refused"):
        find_tokenizer()
    assert time.monotonic() - started < 3


# The disk


def test_no_room(hub, files, failing):
    hub.add(MODEL, files)
    failing(huggingface_hub, "snapshot_download", OSError(28, "No space left on device", "/cache/blob"))
    assert refusal().code == "DISK_FULL"


def test_a_cache_that_cannot_be_written(hub, files, own_cache):
    hub.add(MODEL, files)
    own_cache.write_text("a file, where the cache should be")
    error = refusal()
    assert error.code == "HUB_CACHE"
    assert "HF_HOME" in error.hint


# The command line


def test_command_line(hub, files, nowhere, environment):
    def inspected(*options):
        done = CliRunner().invoke(cli.main, ["inspect", MODEL, "--json", *options])
        return done.exit_code, json.loads(done.stdout)

    code, said = inspected()
    assert (code, said["error"]["code"]) == (common.ENVIRONMENT, "HUB_UNREACHABLE")
    code, said = inspected("--offline")
    assert (code, said["error"]["code"]) == (common.BAD_INPUT, "HUB_NOT_CACHED")
    environment(HF_ENDPOINT=hub.url)
    hub.add(MODEL, files)
    assert inspected("--revision", "v9")[1]["error"]["code"] == "HUB_REVISION"
    code, said = inspected()
    assert (code, said["problem"]) == (0, "")
