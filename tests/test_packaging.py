"""The built wheel holds all three packages and works away from the tree; importing them has no side effects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from places import ROOT

PACKAGES = {
    "sdinpaint": ROOT / "sdinpaint",
    "sdinpaint_kernels": ROOT / "kernels" / "sdinpaint_kernels",
    "sdinpaint_weights": ROOT / "weights_conversion" / "sdinpaint_weights",
}
DEMO_FILE = "sdinpaint/demo/unet/config.json"


def files_of(package):
    """Names in a wheel of a package's files in the tree."""
    folder = PACKAGES[package]
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in found}


def python(program, *, cwd, path):
    """Run a program with `path` first on the path, before what is installed. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree, in which the demo folder is never empty."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("sdinpaint", "kernels", "weights_conversion"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    (copy / DEMO_FILE).parent.mkdir(parents=True, exist_ok=True)
    (copy / DEMO_FILE).touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_and_no_other(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set().union(*map(files_of, PACKAGES))
    assert held == expected | {DEMO_FILE}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_the_wheel_brings_its_licence_and_its_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "sdinpaint = sdinpaint.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_packages_import_from_the_wheel_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import sdinpaint, sdinpaint.cli, sdinpaint.pipeline, sdinpaint.training.scenes, sdinpaint_kernels, sdinpaint_weights
for package in (sdinpaint, sdinpaint_kernels, sdinpaint_weights):
    print(package.__file__)
"""
    for line in python(program, cwd=tmp_path, path=tmp_path / "site").splitlines():
        assert line.startswith(str(tmp_path / "site"))


# importing

EVERYTHING = "import sdinpaint; [getattr(sdinpaint, name) for name in sdinpaint.__all__]"


def test_importing_is_quiet_and_leaves_torch_as_it_is(tmp_path):
    program = f"""
import builtins, sys
sys.modules["triton"] = None
import huggingface_hub, numpy, PIL.ImageCms, PIL.ImageOps, PIL.PngImagePlugin, safetensors.torch, tokenizers, tqdm
import torch

def refuse(*_, **__):
    raise AssertionError("a GPU was asked for")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_init = refuse
flags = lambda: (
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
    torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.initial_seed(),
)
before, opened = flags(), []
sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" else None)
{EVERYTHING}
assert flags() == before
others = [name for name in opened if not str(name).endswith((".py", ".pyc", ".so")) and "__pycache__" not in str(name)]
assert not others, others
"""
    assert python(program, cwd=tmp_path, path=os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())) == ""
