"""Which implementation runs, that a kernel's failure is survived, and that compilers keep the operations whole."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import uuid
import warnings
from types import SimpleNamespace

import interpreter
import pytest
import torch
from sdinpaint_kernels import add_layer_norm, backend, geglu, group_norm
from torch.library import opcheck

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def tensor(device=GPU, *, requires_grad=False):
    """A stand-in for a tensor, with what `choose` looks at."""
    return SimpleNamespace(device=device, requires_grad=requires_grad)


@pytest.fixture
def ampere(monkeypatch, kernel_setting):
    """Pretend that there is a GPU of compute capability 8.0."""
    kernel_setting("auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    return monkeypatch


@pytest.fixture(autouse=True)
def nothing_remembered(substitute):
    substitute(backend, _failures={}, _warned=set())
    backend._device_obstacle.cache_clear()
    yield
    backend._device_obstacle.cache_clear()


def choose(*tensors, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return backend.choose("group_norm", *tensors, **options)


@pytest.mark.usefixtures("ampere")
def test_a_gpu_runs_the_kernel_unless_something_is_in_the_way():
    with torch.no_grad():
        assert choose(tensor()).name == "triton"
        assert choose(tensor(), None, tensor(requires_grad=True)).name == "triton"
        assert choose(tensor(), requested="torch") == ("torch", "requested")
        assert choose(tensor(), obstacle="it is odd") == ("torch", "it is odd")
    assert choose(tensor(), None, tensor(requires_grad=True)) == ("torch", "gradients are needed")
    assert choose(tensor(CPU)) == ("torch", "the tensors are on the cpu")


def test_autocast_runs_torch(ampere):
    ampere.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert choose(tensor()) == ("torch", "autocast chooses the dtypes")


def test_an_old_gpu_runs_torch(ampere):
    ampere.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert choose(tensor()) == ("torch", "compute capability 7.5 is below 8.0")


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(("module", "words"), [(None, "import"), ("broken", "no libcuda")])
def test_without_a_usable_triton_torch_runs(module, words, monkeypatch, tmp_path, without):
    if module is None:
        without("triton")
    else:
        (tmp_path / "triton.py").write_text("raise RuntimeError('no libcuda')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "triton", raising=False)
    choice = choose(tensor())
    assert choice.name == "torch"
    assert words in choice.why


@pytest.mark.usefixtures("ampere")
def test_the_variable_decides_for_a_process_and_the_argument_for_a_call(kernel_setting):
    kernel_setting("torch")
    assert choose(tensor()).name == "torch"
    assert choose(tensor(), requested="auto").name == "triton"
    kernel_setting("fast")
    with pytest.raises(ValueError, match=r"SDINPAINT_KERNELS is 'fast'; expected one of auto, torch, triton"):
        choose(tensor())


@pytest.mark.parametrize(("setting", "expected"), [("torch", "torch"), ("auto", "auto"), (None, "auto")])
def test_the_variable_is_read(setting, expected, environment):
    """A second copy of the module is what another process would import."""
    environment(SDINPAINT_KERNELS=setting)
    spec = importlib.util.spec_from_file_location("another_backend", backend.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert expected == copied.SETTING


def test_asking_for_triton_in_vain_warns_once():
    x = torch.ones(2, 8)
    with pytest.warns(
        UserWarning, match="geglu runs in torch although Triton was requested: the tensors are on the cpu"
    ):
        assert geglu(x, kernels="triton").shape == (2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        geglu(x, kernels="triton")


# a kernel that fails


def operation(kernel, substitute):
    """An operation of one argument, whose kernel may run on the CPU; its name."""
    substitute(backend, INTERPRETED=True, _operations=[])
    name = f"test_{uuid.uuid4().hex}"
    return name, backend.define(f"{name}(Tensor x) -> Tensor", kernel, torch.neg, torch.empty_like)


def test_a_kernel_that_fails_is_not_tried_again(substitute):
    calls = []

    def kernel(x):
        calls.append(x)
        raise RuntimeError("PassManager::run failed\nmore")

    name, call = operation(kernel, substitute)
    assert backend.choose(name, torch.ones(2)).name == "triton"
    with pytest.warns(UserWarning, match=f"{name} runs in torch from now on: .*PassManager::run failed$"):
        assert torch.equal(call(torch.ones(2)), -torch.ones(2))
    assert torch.equal(call(torch.ones(2)), -torch.ones(2))
    assert len(calls) == 1
    assert "PassManager" in backend.choose(name, torch.ones(2)).why
    assert "PassManager" in backend._failures[name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyError("a mistake of ours")])
def test_want_of_memory_and_mistakes_of_ours_are_not_hidden(error, substitute):
    def kernel(x):
        raise error

    name, call = operation(kernel, substitute)
    with pytest.raises(type(error)):
        call(torch.ones(2))
    assert name not in backend._failures


def test_the_report_names_every_operation():
    rows = backend.report()
    assert {"add_layer_norm", "geglu", "group_norm"} <= set(rows)
    assert all(row == "triton" or row.startswith("torch: ") for row in rows.values())


# registered operations


def arguments(name, device="cpu"):
    x = torch.randn(2, 64, 3, 5, device=device).contiguous(memory_format=torch.channels_last)
    rows, weight = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    kernel = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    return {
        "group_norm": (x, 8, weight, weight, 1e-5, True, torch.randn(2, 64, device=device)),
        "geglu": (rows,),
        "add_layer_norm": (rows, rows + 1, weight, weight, 1e-5),
        "conv3_add": (x, kernel, weight, rows[:1], x, [x, x], torch.randn(64, 128, device=device)),
        "linear_geglu": (rows, torch.randn(32, 64, device=device), torch.randn(32, device=device)),
    }[name]


OPERATIONS = ("group_norm", "geglu", "add_layer_norm")


@pytest.mark.parametrize("name", [*OPERATIONS, "conv3_add", "linear_geglu"])
def test_the_operations_are_well_registered(name):
    assert set(opcheck(getattr(torch.ops.sdinpaint, name).default, arguments(name)).values()) == {"SUCCESS"}


def block(x, weight, bias, addend):
    """A bit of a UNet."""
    h = group_norm(x, 8, weight, bias, eps=1e-5, silu=True, addend=addend)
    tokens = h.permute(0, 2, 3, 1).flatten(1, 2)
    total, normed = add_layer_norm(tokens, 2 * tokens, weight, bias, 1e-5)
    return total[..., :32] + geglu(normed)


def interpreted():
    """Return what opcheck says of the kernels, and what a compiler makes of them."""
    torch.use_deterministic_algorithms(False)  # NaN in what the fake outputs hold is no difference
    interpreter.fresh_seed()
    checked = {name: opcheck(getattr(torch.ops.sdinpaint, name).default, arguments(name)) for name in OPERATIONS}
    x, _, weight, bias, _, _, addend = arguments("group_norm")
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with torch.no_grad():
        chosen = backend.choose("group_norm", x).name
        expected = block(x, weight, bias, addend)
        kept = torch.compile(block, fullgraph=True, backend=keep)(x, weight, bias, addend)
        traced = torch.compile(block, fullgraph=True, backend="aot_eager")(x, weight, bias, addend)
    os.environ["SDINPAINT_KERNELS"] = "torch"
    backend.SETTING = "torch"
    plain = block(x, weight, bias, addend)
    return {
        "opcheck": checked,
        "chosen": chosen,
        "graph": graphs[0],
        "differences": [interpreter.relative(each, expected) for each in (kept, traced)],
        "from torch": interpreter.relative(plain, expected),
    }


@pytest.fixture(scope="module")
def found():
    return interpreter.run("test_backend")["test_backend"]


def test_the_kernels_are_well_registered(found):
    assert all(set(each.values()) == {"SUCCESS"} for each in found["opcheck"].values()), found["opcheck"]


def test_a_compiler_keeps_the_operations_whole(found):
    assert found["chosen"] == "triton"
    for name in OPERATIONS:
        assert f"sdinpaint.{name}.default" in found["graph"]
    assert found["differences"] == [0.0, 0.0]
    assert found["from torch"] < 1e-5


def test_on_the_cpu_a_compiler_sees_through_them():
    x, _, weight, bias, _, _, addend = arguments("group_norm")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, addend), block(x, weight, bias, addend))


def test_gradients_pass():
    x, _, weight, bias, _, _, addend = (
        item.double() if isinstance(item, torch.Tensor) else item for item in arguments("group_norm")
    )
    assert torch.autograd.gradcheck(block, [item.requires_grad_() for item in (x, weight, bias, addend)])


def test_importing_imports_no_triton():
    program = "import sys, sdinpaint_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_kernels_are_well_registered_on_the_gpu(name):
    call = getattr(torch.ops.sdinpaint, name).default
    with torch.no_grad():
        assert set(opcheck(call, arguments(name, "cuda")).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_the_gpu_runs_the_kernels():
    assert all(row == "triton" for row in backend.report().values())
    x, _, weight, bias, _, _, addend = arguments("group_norm", "cuda")
    with torch.no_grad():
        eager = block(x, weight, bias, addend)
        assert torch.equal(torch.compile(block, fullgraph=True)(x, weight, bias, addend), eager)
