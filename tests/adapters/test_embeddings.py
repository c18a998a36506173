"""Textual inversion: every layout is read, and a token of a prompt stands for its vectors, pooled text included."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from builders import as_sd2, as_sdxl, random_pipeline, small
from closeness import close
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from sdinpaint.errors import AdapterError, CheckpointError, SdInpaintWarning
from sdinpaint.models.offloading import Offloading
from sdinpaint.text.conditioning import PictureSize
from sdinpaint.text.embeddings import Embedding, pieces_of, without_embeddings

FAMILIES = ("sd1", "sd2", "sdxl")
COLOURED = "a fox of {}, by itself"


@pytest.fixture(scope="module")
def families(tiny):
    """Small UNets and VAEs, which take no part, behind the text encoders of the small family."""
    sized = dataclasses.replace(small(tiny), text=tiny.text)
    return {"sd1": sized, "sd2": as_sd2(sized), "sdxl": as_sdxl(sized)}


@pytest.fixture(scope="module")
def models(families, vocabulary):
    return {name: random_pipeline(family, vocabulary, seed=2) for name, family in families.items()}


@pytest.fixture
def model(models):
    """model(name) -> a pipeline, whose embeddings are taken off at the end of the test."""
    yield models.__getitem__
    for pipe in models.values():
        pipe.clear_loras()
        for token in list(pipe.embeddings):
            pipe.remove_embedding(token)


def vectors(pipe, count=3, seed=0):
    """For each text encoder of a pipeline as many vectors, about as large as the rows of its table."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, text.width, generator=generator) for text in pipe.family.texts]


def write(path, *by_encoder):
    names = ["emb_params"] if len(by_encoder) == 1 else ["clip_l", "clip_g"]
    save_file({name: rows.contiguous() for name, rows in zip(names, by_encoder, strict=True)}, path)
    return path


@pytest.fixture
def added(model, tmp_path):
    """added(name, token, count) -> a pipeline to which an embedding of random vectors was added."""

    def add(name, token="<cat>", count=3, seed=0):
        pipe = model(name)
        pipe.add_embedding(write(tmp_path / f"{seed}.safetensors", *vectors(pipe, count, seed)), token)
        return pipe

    return add


def encoded(pipe, *prompts):
    return pipe.encode_prompts(list(prompts), (64, 64))


# files


def a1111(rows, token=265):
    about = {"name": "cat", "step": 500, "sd_checkpoint": "a1b2", "sd_checkpoint_name": None}
    return {"string_to_token": {"*": token}, "string_to_param": rows, **about}


def parameters(rows, *, as_old_torch=False):
    table = nn.ParameterDict({"*": nn.Parameter(rows)})
    if as_old_torch:  # of before 1.12, which had no order of its own
        table.__dict__["_parameters"] = dict(table._parameters)
        del table._keys
    return table


PICKLES = {
    "a1111": lambda rows: a1111({"*": rows}),
    "a1111, ParameterDict": lambda rows: a1111(parameters(rows)),
    "a1111, ParameterDict of old": lambda rows: a1111(parameters(rows, as_old_torch=True), torch.tensor(265)),
    "textual inversion's own": lambda rows: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": parameters(rows, as_old_torch=True),
    },
    "tokens as a tensor": lambda rows: {"string_to_token": torch.tensor([265]), "string_to_param": {"*": rows}},
    "a tensor": lambda rows: rows,
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", PICKLES.values(), ids=list(PICKLES))
def test_pickled_layouts_go_by_the_name_of_their_file(content, legacy, model, tmp_path):
    pipe, path = model("sd1"), tmp_path / "My Cat.pt"
    (rows,) = vectors(pipe)
    torch.save(content(rows), path, _use_new_zipfile_serialization=not legacy)
    embedding = pipe.add_embedding(path)
    assert (embedding.token, embedding.source, len(embedding)) == ("My Cat", str(path), 3)
    assert torch.equal(embedding.vectors, rows)
    assert pipe.embeddings["My Cat"] is embedding


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("one", [True, False])
def test_a_diffusers_file_names_its_token(suffix, one, model, tmp_path):
    pipe, path = model("sd2"), tmp_path / f"learned_embeds.{suffix}"
    (rows,) = vectors(pipe)
    tensors = {"<my.cat>": rows[0].clone() if one else rows}
    (torch.save if suffix == "bin" else save_file)(tensors, path)
    embedding = pipe.add_embedding(path)
    assert embedding.token == "<my.cat>"
    assert torch.equal(embedding.vectors, rows[:1] if one else rows)
    assert pipe.add_embedding(path, "dog").token == "dog"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_pairs_are_of_both_encoders(suffix, half, model, tmp_path):
    pipe = model("sdxl")
    rows = [one.half() if half else one for one in vectors(pipe)]
    tensors = dict(zip(("clip_g", "clip_l"), reversed(rows), strict=True))
    (torch.save if suffix == "pt" else save_file)(tensors, tmp_path / f"cat.{suffix}")
    embedding = pipe.add_embedding(tmp_path)  # a folder with one file
    assert embedding.token == "cat"
    assert len(embedding.vectors) == 2
    assert all(torch.equal(mine, one.float()) for mine, one in zip(embedding.vectors, rows, strict=True))


L, G = 28, 40
"""Widths of the text encoders."""
BAD = {
    "a LoRA": ("sd1", {"a.lora_up.weight": (L, 2), "a.lora_down.weight": (2, L)}, "EMBEDDING_KIND"),
    "three dimensions": ("sd1", {"emb_params": (1, 3, L)}, "EMBEDDING_KIND"),
    "no vector": ("sd1", {"emb_params": (0, L)}, "EMBEDDING_KIND"),
    "two tokens": ("sd1", {"<a>": (L,), "<b>": (L,)}, "EMBEDDING_KIND"),
    "more than a pair": ("sdxl", {"clip_l": (2, L), "clip_g": (2, G), "more": (2, L)}, "EMBEDDING_KIND"),
    "other width": ("sd1", {"emb_params": (2, L + 1)}, "EMBEDDING_SHAPE"),
    "of SDXL": ("sd1", {"clip_l": (2, L), "clip_g": (2, G)}, "EMBEDDING_SHAPE"),
    "of one encoder": ("sdxl", {"emb_params": (2, L)}, "EMBEDDING_SHAPE"),
    "clip_l alone": ("sdxl", {"clip_l": (2, L)}, "EMBEDDING_SHAPE"),
    "clip_g alone": ("sdxl", {"clip_g": (2, G)}, "EMBEDDING_SHAPE"),
    "unequal length": ("sdxl", {"clip_l": (2, L), "clip_g": (3, G)}, "EMBEDDING_SHAPE"),
    "the wrong way round": ("sdxl", {"clip_l": (2, G), "clip_g": (2, L)}, "EMBEDDING_SHAPE"),
    "too long": ("sd1", {"emb_params": (76, L)}, "EMBEDDING_LENGTH"),
}


@pytest.mark.parametrize(("name", "shapes", "code"), BAD.values(), ids=list(BAD))
def test_other_files_are_refused(name, shapes, code, model, tmp_path):
    pipe, path = model(name), tmp_path / "cat.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    before = encoded(pipe, "a cat")[0].context
    refused(AdapterError, code, lambda: pipe.add_embedding(path))
    assert not pipe.embeddings
    assert torch.equal(encoded(pipe, "a cat")[0].context, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_values_must_be_finite(bad, model, tmp_path):
    rows = torch.ones(2, L, dtype=torch.float64)
    rows[1, 3] = bad
    path = write(tmp_path / "cat.safetensors", rows)
    refused(AdapterError, "EMBEDDING_VALUES", lambda: model("sd1").add_embedding(path))


def test_numbers_must_be_of_a_vector(model, tmp_path):
    torch.save(torch.ones(2, L, dtype=torch.int64), tmp_path / "cat.pt")
    refused(AdapterError, "EMBEDDING_KIND", lambda: model("sd1").add_embedding(tmp_path / "cat.pt"), "int64")


def test_files_that_are_none(model, tmp_path):
    pipe = model("sd1")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cat.png")
    error = refused(CheckpointError, "CKPT_UNKNOWN_FORMAT", lambda: pipe.add_embedding(tmp_path / "cat.png"))
    assert "inside of an image is not read" in error.hint
    refused(CheckpointError, "CKPT_NOT_FOUND", lambda: pipe.add_embedding(tmp_path / "none.pt"))


@pytest.mark.parametrize("token", ["", "  ", "a\nb", 5, b"cat"])
def test_a_token_is_a_word(token, model, tmp_path):
    path = write(tmp_path / "cat.safetensors", *vectors(model("sd1")))
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: model("sd1").add_embedding(path, token))


def test_a_token_has_one_embedding(added, tmp_path):
    pipe = added("sd1", "Cat")
    path = tmp_path / "0.safetensors"
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: pipe.add_embedding(path, " cAT "), "Cat")
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: pipe.remove_embedding("dog"), "Cat")
    pipe.remove_embedding("cAT")
    assert not pipe.embeddings
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: pipe.remove_embedding("Cat"))
    with pytest.raises(TypeError):
        pipe.embeddings["Cat"] = None


# what prompts become


def derived(pipe, index, parts):
    """Encode by rows at the end of a larger table, in float64: context (77, D), and the text at the end token's place.

    Parts are texts, and embeddings in place of their tokens.
    """
    encoder, tokenizer = copy.deepcopy(pipe.condition.encoders[index]).double(), pipe.condition.tokenizers[index]
    ids, rows, table = [], [], encoder.text_model.embeddings.token_embedding
    for part in parts:
        if isinstance(part, str):
            ids += [place.id for place in tokenizer.places(part)]
        else:
            ids += [len(table.weight) + len(rows) + at for at in range(len(part))]
            rows += part.by_encoder[index].double()
    encoder.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(
        torch.cat([table.weight, torch.stack(rows)])
    )
    text, config = encoder.text_model, encoder.config
    states = [text.embeddings(torch.tensor([tokenizer.framed(ids)]))]
    for layer in text.encoder.layers:
        states.append(layer(states[-1]))
    context = states[config.num_layers - config.skip_last]
    context = text.final_layer_norm(context) if config.final_norm else context
    pooled = text.final_layer_norm(states[-1][:, len(ids) + 1])
    return context, encoder.text_projection(pooled) if config.projection_dim else None


def in_float64(pipe, prompts):
    exact = copy.deepcopy(pipe.condition)
    exact.encoders.double()
    return exact(prompts, PictureSize((64, 64)))


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_stand_in_for_rows_of_the_table(name, added):
    added(name, "<cat>", 4, seed=1)
    pipe = added(name, "fox", 1, seed=2)
    table = pipe.condition.encoders[0].text_model.embeddings.token_embedding.weight
    before = table.clone()
    cat, fox = pipe.embeddings.values()
    prompts = {"a red <CAT>, by Fox": ["a red", cat, ", by", fox], "fox,<cat>": [fox, ",", cat]}
    prompts["embedding:fox! a foxtrot"] = [fox, "! a foxtrot"]
    (cond,) = encoded(pipe, list(prompts))
    exact = in_float64(pipe, list(prompts))
    for item, parts in enumerate(prompts.values()):
        expected = [derived(pipe, index, parts) for index in range(len(pipe.condition.encoders))]
        context = torch.cat([states for states, _ in expected], dim=-1)
        assert close(exact.context[item : item + 1], context, 1e-13)
        assert close(cond.context[item : item + 1].double(), context)
        if name == "sdxl":
            pooled = expected[1][1]
            assert close(cond.vector[item : item + 1, : pooled.shape[1]].double(), pooled)
    assert torch.equal(table, before)


@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_has_the_same_states(name, added, tmp_path):
    """With a larger table and ids of added tokens; its pooled text is that of the highest id, so it is left out."""
    import transformers

    pipe = added(name)
    (cat,) = pipe.embeddings.values()
    (cond,) = encoded(pipe, "a red <cat> fox")
    found = []
    for index, (encoder, tokenizer) in enumerate(zip(pipe.condition.encoders, pipe.condition.tokenizers, strict=True)):
        own = encoder.config
        config = transformers.CLIPTextConfig(
            vocab_size=own.vocab_size,
            hidden_size=own.width,
            intermediate_size=own.mlp_width,
            num_hidden_layers=own.num_layers,
            num_attention_heads=own.num_heads,
            max_position_embeddings=own.context_length,
            hidden_act=own.activation,
        )
        twin = transformers.CLIPTextModel(config).eval()
        state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
        state.pop("text_projection.weight", None)
        inner = getattr(twin, "text_model", twin)  # in transformers 5 they are one
        inner.load_state_dict(state)
        twin.resize_token_embeddings(own.vocab_size + 3, mean_resizing=False)
        with torch.no_grad():
            twin.get_input_embeddings().weight[own.vocab_size :] = cat.by_encoder[index]
        words = [[place.id for place in tokenizer.places(text)] for text in ("a red", "fox")]
        ids = tokenizer.framed([*words[0], *range(own.vocab_size, own.vocab_size + 3), *words[1]])
        with torch.no_grad():
            states = twin(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1 - own.skip_last]
            found.append(inner.final_layer_norm(states) if own.final_norm else states)
    assert close(cond.context, torch.cat(found, dim=-1))


PLACES = {
    "a fox": ["a ", "fox"],
    "FOX, Fox. (fox) fox's": ["FOX", ", ", "Fox", ". (", "fox", ") ", "fox", "'s"],
    "foxes my-fox fox-y fox_1 1fox éfox fox2": ["foxes my-fox fox-y fox_1 1fox éfox fox2"],
    "a fox red": ["a ", "fox red"],
    "a fox  red, fox red-ish": ["a ", "fox  red", ", ", "fox", " red-ish"],
    "embedding:fox, xembedding:fox": ["embedding:fox", ", xembedding:", "fox"],
    "<Cat> (<cat>:1.2)<cat>": ["<Cat>", " (", "<cat>", ":1.2)", "<cat>"],
    "a.b axb A.B": ["a.b", " axb ", "A.B"],
    "fox<cat> <cat>s": ["fox", "<cat> <cat>s"],
    "a+b* (x)|[y]": ["a+b*", " ", "(x)|[y]"],
    "\u017ftar star": ["\u017ftar", " ", "star"],  # a long s is another case of s
    "": [],
}


@pytest.mark.parametrize(("prompt", "pieces"), PLACES.items())
def test_where_tokens_are_found(prompt, pieces):
    tokens = ("fox", "fox red", "<cat>", "a.b", "a+b*", "(x)|[y]", "Star")
    there = [Embedding(token, (), "", "") for token in tokens]
    found = list(pieces_of(prompt, there))
    starts = [start for start, _ in found]
    ends = [*starts, len(prompt)][1:]
    assert [prompt[start:end] for start, end in zip(starts, ends, strict=True)] == pieces
    for text, (_, piece) in zip(pieces, found, strict=True):
        word = " ".join(text.casefold().removeprefix("embedding:").split())
        assert isinstance(piece, Embedding) == (word in map(str.casefold, tokens))
        assert (piece if isinstance(piece, str) else piece.token.casefold()) == (text if piece == text else word)


def test_what_no_token_touches_keeps_its_bits(model, added):
    prompts = ["a red fox on the side", "", None, "foxes, " * 60, "<|endoftext|> cube"]
    for name in FAMILIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdInpaintWarning)
            before = [encoded(model(name), prompt)[0] for prompt in prompts]
            pipe = added(name, "cat", seed=FAMILIES.index(name))
            after = [encoded(pipe, prompt)[0] for prompt in prompts]
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.context, other.context)
            assert one.vector is None or torch.equal(one.vector, other.vector)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_item_of_a_batch_is_its_single_run(name, added):
    pipe = added(name)
    prompts = ["a red <cat>", "a blue cube", "<cat> <cat> on the side", "", None]
    (together,) = encoded(pipe, prompts)
    for item, prompt in enumerate(prompts):
        (alone,) = encoded(pipe, prompt)
        row = slice(item, item + 1)
        assert close(together.context[row], alone.context)
        assert alone.vector is None or close(together.vector[row], alone.vector)


def test_removed_again_it_is_a_word(added, model):
    (before,) = encoded(model("sd1"), "a <cat>")
    pipe = added("sd1")
    (during,) = encoded(pipe, "a <cat>")
    pipe.remove_embedding("<CAT>")
    (after,) = encoded(pipe, "a <cat>")
    assert not close(during.context, before.context, 0.01)
    assert torch.equal(after.context, before.context)


WORD = "a "
"""One token."""


def test_an_embedding_fits_as_a_whole_or_not_at_all(added):
    pipe = added("sdxl")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        (fits,) = encoded(pipe, WORD * 72 + "<cat>")
        (short,) = encoded(pipe, WORD * 73)
    assert not close(fits.context, encoded(pipe, WORD * 72)[0].context, 0.01)
    with pytest.warns(SdInpaintWarning, match=r"has 77 tokens, 73 used; cut: '<cat> a'"):
        (cut,) = encoded(pipe, WORD * 73 + "<cat> a")
    assert torch.equal(cut.context, short.context)
    assert torch.equal(cut.vector, short.vector)
    assert pipe.condition.doubt(WORD * 72 + "<cat>") is None
    assert pipe.condition.doubt(WORD * 73 + "<cat>").endswith("has 76 tokens, 73 used; cut: '<cat>'")


def test_75_vectors_are_a_whole_prompt(added):
    pipe = added("sd1", count=75)
    (cat,) = pipe.embeddings.values()
    assert close(encoded(pipe, "<cat>")[0].context.double(), derived(pipe, 0, [cat])[0])
    with pytest.warns(SdInpaintWarning, match="76 tokens, 1 used"):
        assert torch.equal(encoded(pipe, "a <cat>")[0].context, encoded(pipe, "a")[0].context)


def test_offloaded_or_not(added, families, vocabulary, tmp_path):
    pipe = added("sdxl")
    away = random_pipeline(families["sdxl"], vocabulary, seed=2)
    away.offloading = Offloading(torch.device("cpu"), torch.float32, [away.unet, away.vae, *away.condition.encoders])
    away.add_embedding(tmp_path / "0.safetensors", "<cat>")
    for here, there in zip(encoded(pipe, "a <cat>"), encoded(away, "a <cat>"), strict=True):
        assert torch.equal(here.context, there.context)
        assert torch.equal(here.vector, there.vector)


def test_a_run_takes_them_in_both_prompts(added):
    pipe = added("sd1")
    image, mask = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool)
    short = {"steps": 1, "seed": 3, "progress": False}
    runs = [("a fox", ""), ("a <cat>", ""), ("a fox", "<cat>")]
    images = [pipe.inpaint(image, mask, *prompts, **short).image.tobytes() for prompts in runs]
    assert len(set(images)) == 3


def test_a_known_token_is_no_syntax_of_other_programs(added):
    pipe = added("sd1", "<cat>")
    pipe = added("sd1", "[sky]", seed=1)
    prompt = "embedding:<cat>, [sky], ([sky]:1.3)"
    assert without_embeddings(prompt, pipe.embeddings.values()) == "cat, sky, (sky:1.3)"
    image, mask = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdInpaintWarning)
        pipe.inpaint(image, mask, "embedding:<cat>, [sky]", steps=1, progress=False)


# within the file of a LoRA


def lora_with(pipe, path, **embeddings):
    """A LoRA of one module, with embeddings."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    width = pipe.family.unet.model_channels * pipe.family.unet.channel_mult[-1]
    tensors = {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(width, 1)}
    save_file(tensors | {f"bundle_emb.{key}": value for key, value in embeddings.items()}, path)
    return path


def test_an_embedding_in_a_lora_comes_and_goes_with_it(model, tmp_path):
    pipe = model("sd1")
    (rows,) = vectors(pipe)
    inside = {"Cat.string_to_param.*": rows, "dog.emb_params": rows + 1}
    lora = pipe.add_lora(lora_with(pipe, tmp_path / "style.safetensors", **inside))
    assert list(pipe.embeddings) == ["Cat", "dog"]
    assert torch.equal(pipe.embeddings["Cat"].vectors, rows)
    own = write(tmp_path / "own.safetensors", rows)
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: pipe.add_embedding(own, "cat"))
    refused(AdapterError, "EMBEDDING_TOKEN", lambda: pipe.remove_embedding("cat"), "remove_lora('style')")
    pipe.add_embedding(own)
    assert [one["name"] for one in pipe.recorded_adapters()] == ["style", "own"]
    pipe.remove_lora(lora.name)
    assert list(pipe.embeddings) == ["own"]


def test_a_lora_whose_embedding_cannot_be_added_is_not_added(added, tmp_path):
    pipe = added("sd1", "cat")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    (rows,) = vectors(pipe)
    wrong = {
        "EMBEDDING_TOKEN": {"CAT.emb_params": rows},
        "EMBEDDING_SHAPE": {"dog.emb_params": rows[:, :9].contiguous()},
        "EMBEDDING_VALUES": {"dog.emb_params": rows / 0},
    }
    for code, inside in wrong.items():
        path = lora_with(pipe, tmp_path / "style.safetensors", **inside)
        refused(AdapterError, code, lambda path=path: pipe.add_lora(path))
    assert not pipe.loras
    assert list(pipe.embeddings) == ["cat"]
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
