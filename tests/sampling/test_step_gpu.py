"""The recorded step on a GPU: the numbers of the plain one, and everything that can change between two calls."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from builders import fill
from torch import nn

from sdinpaint.errors import SdInpaintWarning
from sdinpaint.families import SD15_INPAINT
from sdinpaint.models import VAE, ControlNet, ControlNetConfig, UNet
from sdinpaint.models.prepared_unet import PreparedUNet
from sdinpaint.models.unet import SelfAttention
from sdinpaint.models.weights import joined
from sdinpaint.pipeline.control import Control
from sdinpaint.sampling import Conditioning, Denoiser, schedules
from sdinpaint.sampling.graphs import Graphs

pytestmark = pytest.mark.gpu

TRAINED = schedules.train_sigmas(SD15_INPAINT.schedule)
SIGMA = 1.7
SD1 = replace(
    SD15_INPAINT.unet,
    model_channels=64,
    channel_mult=(1, 2, 4),
    transformer_depth=(1, 1, 0),
    context_dim=48,
    num_heads=8,
)
SDXL = replace(
    SD1,
    model_channels=160,
    channel_mult=(1, 2),
    transformer_depth=(0, 2),
    num_heads=None,
    head_dim=40,
    linear_projection=True,
    vector_dim=24,
)
CONFIGS = {"SD1": SD1, "SDXL": SDXL}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.fixture(scope="module")
def unets():
    """A random UNet of each kind, float32 on the GPU."""
    return {name: fill(UNet(config), 3).eval().requires_grad_(False).cuda() for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def unet(request, unets):
    return unets[request.param]


class Case:
    """One step: the images, the texts, the ControlNet."""

    def __init__(self, unet, seed=10, batch=1, size=(16, 16), tokens=77, controlled=False):
        self.x = SIGMA * draw(seed, batch, 4, *size)
        self.extra = [(draw(seed + 1, batch, 1, *size) > 0).float(), draw(seed + 2, batch, 4, *size)]
        width = unet.config.vector_dim
        self.texts = [
            Conditioning(draw(each, batch, tokens, 48), None if width is None else draw(each + 50, batch, width))
            for each in (seed + 3, seed + 4)
        ]
        self.controlled = controlled

    def denoiser(self, unet, dtype, found=None):
        def control(x, t, context, vector, sigma):
            return [0.3 * torch.ones_like(part) for part in shapes_of(unet, x, t, context, vector)]

        texts = [
            Conditioning(text.context.to(dtype), None if text.vector is None else text.vector.to(dtype))
            for text in self.texts
        ]
        return Denoiser(
            unet,
            TRAINED,
            "eps",
            *texts,
            extra=self.extra,
            control=control if self.controlled else None,
            dtype=dtype,
            graphs=found,
        )

    def step(self, unet, dtype, found=None, sigma=SIGMA):
        return self.denoiser(unet, dtype, found)(self.x.to(torch.promote_types(dtype, torch.float32)), sigma)


def shapes_of(unet, x, t, context, vector):
    """Return what every input block and the middle put out."""
    model = unet if isinstance(unet, UNet) else unet.__self__
    emb, parts = model.embed(t, vector), []
    h = torch.cat([x, x[:, :1], x], dim=1)
    for stage in (*model.input_blocks, model.middle_block):
        h = stage(h, emb, context)
        parts.append(h)
    return parts


HALF = 5e-3
"""Between two ways to compute a step in float16, whose rounding is 5e-4: other kernels, other orders of sums."""


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(1, (16, 16)), (2, (24, 16)), (1, (15, 9))])
def test_the_captured_step_is_as_exact_as_plain_torch(unet, batch, size, controlled, dtype, kernel_setting):
    case = Case(unet, batch=batch, size=size, controlled=controlled)
    exact = case.step(copy.deepcopy(unet).double().forward, torch.float64)
    half = copy.deepcopy(unet).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an operation that fell back, or a step that could not be recorded
        kernel_setting("triton")
        found = Graphs(True)
        recorded = [case.step(half, dtype, found) for _ in range(2)]  # each a replay of one recording
        eager = case.step(half, dtype)
    kernel_setting("torch")
    allowed = 2 * relative(case.step(half.forward, dtype), exact)
    assert relative(recorded[0], exact) <= allowed
    assert relative(eager, exact) <= allowed
    assert torch.equal(*recorded)
    assert len(found._captured) == 1


def test_one_recording_serves_other_texts_images_and_sigmas(unet):
    half, found = copy.deepcopy(unet).half(), Graphs(True)
    cases = [Case(unet, seed=seed) for seed in (10, 30)]
    recorded = [case.denoiser(half, torch.float16, found) for case in cases]
    eager = [case.denoiser(half, torch.float16) for case in cases]
    for which, sigma in ((0, 9.0), (1, 9.0), (0, 9.0), (1, 0.4), (0, 0.4)):
        out, expected = (denoisers[which](cases[which].x, sigma) for denoisers in (recorded, eager))
        assert relative(out, expected.double()) < HALF
    assert len(found._captured) == 1
    assert relative(eager[0](cases[0].x, 9.0), eager[1](cases[1].x, 9.0).double()) > 0.1


def test_another_shape_is_recorded_anew_and_the_first_one_stays(unet):
    half, found = copy.deepcopy(unet).half(), Graphs(True)
    cases = [
        Case(unet),
        Case(unet, size=(16, 24)),
        Case(unet, batch=2),
        Case(unet, tokens=154),
        Case(unet, controlled=True),
    ]
    for case in [*cases, *cases]:
        assert relative(case.step(half, torch.float16, found), case.step(half, torch.float16).double()) < HALF
    assert len(found._captured) == 4


def test_recordings_serve_inside_and_outside_of_inference_mode(unets):
    half, found, case = copy.deepcopy(unets["SD1"]).half(), Graphs(True), Case(unets["SD1"])
    outs = []
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            outs.append(case.step(half, torch.float16, found))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert len(found._captured) == 1
    case.x.requires_grad_()
    case.step(half, torch.float16, found).sum().backward()
    assert case.x.grad.isfinite().all()


def test_threads_on_streams_of_their_own(unets):
    half, found = copy.deepcopy(unets["SD1"]).half(), Graphs(True)
    cases = [Case(half, seed=seed) for seed in (10, 30, 50)]
    expected = [case.step(half, torch.float16, found) for case in cases]
    wrong = []

    def work(which):
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            denoise = cases[which].denoiser(half, torch.float16, found)
            for _ in range(20):
                if relative(denoise(cases[which].x, SIGMA), expected[which].double()) > HALF:
                    wrong.append(which)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Waits(PreparedUNet):
    """Looks at a value on the GPU, which no recording can."""

    def __call__(self, x, emb, conditioning_cache, control):
        assert float(x.sum()) != 0
        return super().__call__(x, emb, conditioning_cache, control)


def test_a_step_that_cannot_be_recorded_is_launched_piece_by_piece(unets):
    half, case, found = copy.deepcopy(unets["SD1"]).half(), Case(unets["SD1"]), Graphs(True)
    expected = case.step(half, torch.float16)
    prepare = half.prepare
    half.prepare = lambda *given: Waits(**vars(prepare(*given)))
    with pytest.warns(SdInpaintWarning, match="launched one by one"):
        out = case.step(half, torch.float16, found)
    assert relative(out, expected.double()) < HALF
    assert relative(case.step(half, torch.float16, found), expected.double()) < HALF
    half.prepare = prepare
    # each recording chooses kernels of its own
    one, other = (case.step(half, torch.float16, Graphs(True)) for _ in range(2))
    assert relative(one, other.double()) < HALF


def test_memory_is_given_back(unets):
    half, case = copy.deepcopy(unets["SD1"]).half(), Case(unets["SD1"], size=(64, 64))
    case.step(half, torch.float16, Graphs(True))

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before, found = reserved(), Graphs(True)
    case.step(half, torch.float16, found)
    during = reserved()
    del found
    assert reserved() <= before < during


# What lies how in memory


def test_weights_are_laid_out_when_they_come_to_the_gpu(unet):
    for model in (copy.deepcopy(unet).cpu().cuda(), copy.deepcopy(unet).half()):
        convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
        attentions = [layer for layer in model.modules() if isinstance(layer, SelfAttention)]
        assert all(joined([one.weight for one in layer.packed()]) is not None for layer in attentions)


def memory_formats(model, run):
    """Whether every convolution and norm gets channels-last input."""
    seen = set()

    def look(module, args):
        seen.add(args[0].is_contiguous(memory_format=torch.channels_last))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.GroupNorm)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers[1:]]  # the first one gets what the caller has
    with torch.inference_mode():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def test_feature_maps_are_channels_last_throughout(unet):
    half = copy.deepcopy(unet).half()
    assert memory_formats(half, lambda: Case(unet, batch=2).step(half, torch.float16)) == {True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_autoencoder_is_as_exact_as_plain_torch(dtype, kernel_setting):
    config = replace(SD15_INPAINT.vae, channels=64)
    vae = fill(VAE(config), 5).eval().requires_grad_(False).cuda()
    given = {"decode": draw(1, 1, 4, 16, 24), "encode": draw(2, 1, 3, 128, 192).tanh()}
    half = copy.deepcopy(vae).to(dtype)
    exact = copy.deepcopy(vae).double()
    for what, x in given.items():
        expected = getattr(exact, what)(x.double())
        kernel_setting("torch")
        plain = relative(getattr(half, what)(x.to(dtype)), expected)
        kernel_setting("auto")
        assert relative(getattr(half, what)(x.to(dtype)), expected) <= 2 * plain
        assert memory_formats(half, lambda x=x, what=what: getattr(half, what)(x.to(dtype))) == {True}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_recorded_controlnet_is_the_one_launched_piece_by_piece(config):
    net = ControlNet(ControlNetConfig(unet=replace(config, in_channels=4), hint_widths=(8, 8, 16, 16)))
    net = fill(net, 5).eval().requires_grad_(False).half().cuda()
    sigmas, found = torch.linspace(9, 0, 4, dtype=torch.float64), Graphs(True)
    vector = None if config.vector_dim is None else draw(3, 2, config.vector_dim).half()
    inputs = draw(1, 2, 4, 16, 16).half(), torch.full((2,), 500.0).cuda(), draw(2, 2, 77, 48).half(), vector
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (10, 20):
            hint = draw(seed, 1, 3, 128, 128)
            recorded, eager = (Control(net, hint, sigmas, scale=0.7, graphs=graphs) for graphs in (found, None))
            for sigma in (9.0, 6.0):
                both = zip(recorded(*inputs, sigma), eager(*inputs, sigma), strict=True)
                assert all(relative(one, other.double()) < HALF for one, other in both)
    assert len(found._captured) == 1
