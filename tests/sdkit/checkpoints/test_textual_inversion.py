"""Textual inversion against diffusers, A1111's restricted unpickler, and embedding tables widened by hand."""

from __future__ import annotations

import collections
import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.textual_inversion import TextualInversion, load_textual_inversion, save_textual_inversion
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.conftest import draw, draw_weights

WIDTH = 32
CONFIG = {
    "hidden_act": "quick_gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


@cache
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return draw_weights(build_text_encoder(CONFIG).double()).requires_grad_(False)


def drawn(count: int, width: int = WIDTH) -> Tensor:
    return draw(f"vectors {count}", (count, width)).float()


def encode(encoder: CLIPTextModel, *prompts: str, **options: Any) -> Tensor:
    return encode_prompts(tokenizer(), encoder, prompts, None, **options)[0]


def write(form: str, folder: Path, vectors: Tensor) -> Path:
    """A file as each program writes it, its trigger "<toy>"; A1111's safetensors are named after it."""
    a1111 = {"string_to_token": {"*": 265}, "name": "<toy>", "step": 7, "sd_checkpoint": None}
    if form == "diffusers safetensors":
        save_file({"<toy>": vectors}, path := folder / "learned_embeds.safetensors")
    elif form == "diffusers bin":
        torch.save({"<toy>": vectors}, path := folder / "learned_embeds.bin")
    elif form == "one vector without rows":
        torch.save({"<toy>": vectors[0]}, path := folder / "learned_embeds.bin")
    elif form == "A1111 pt":
        torch.save(a1111 | {"string_to_param": {"*": nn.Parameter(vectors)}}, path := folder / "x.pt")
    elif form == "A1111 safetensors":
        save_file({"emb_params": vectors}, path := folder / "<toy>.safetensors")
    else:
        entries = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": vectors})}
        torch.save(entries, path := folder / "<toy>.pt")
    return path


FORMS = ["diffusers safetensors", "diffusers bin", "A1111 pt", "A1111 safetensors", "the first program's pt"]


# In prompts


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_equals_diffusers(encoder: CLIPTextModel, count: int, suffix: str, tmp_path: Path) -> None:
    """diffusers loads the file that we wrote, into a vocabulary that it widens: the same context."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    path = tmp_path / f"toy{suffix}"
    save_textual_inversion(TextualInversion("<toy>", drawn(count)), path)
    pipe: Any = StableDiffusionPipeline(
        vae=None,
        text_encoder=copy.deepcopy(encoder),
        tokenizer=clip_tokenizer(),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_textual_inversion(str(tmp_path), weight_name=path.name)
    found = load_textual_inversion(path)
    prompts = ["A photo of <toy>, on a table", "<toy> <toy>", "no trigger here"]
    expected = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
    actual = encode(encoder, *prompts, embeddings={found.token: found.vectors})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(actual[0], encode(encoder, prompts[0])[0])


def test_every_prompt_and_chunk_has_its_own(encoder: CLIPTextModel) -> None:
    """Prompts of a batch, negative ones and two chunks, one by one and together; a weight is on all of a trigger."""
    embeddings = {"toy": drawn(3), "ink": drawn(2)}
    long = "cube " * 73 + "(toy:1.5) ink"
    prompts, negatives = ["ink by a toy", long], ["toy", "blurry"]
    cond, uncond = encode_prompts(tokenizer(), encoder, prompts, negatives, embeddings=embeddings)
    assert cond.shape == (2, 154, WIDTH) and uncond is not None
    for row, prompt in ((cond[0], prompts[0]), (uncond[0], negatives[0]), (uncond[1], negatives[1])):
        alone = encode(encoder, prompt, embeddings=embeddings)[0]
        torch.testing.assert_close(row[:77], alone, rtol=0, atol=1e-12)
    parts = [encode(encoder, part, embeddings=embeddings)[0] for part in ("cube " * 73, "toy ink")]
    plain = torch.cat(parts)
    weights = torch.ones(154, 1, dtype=torch.float64)
    weights[78:81] = 1.5  # the second chunk's first three tokens
    expected = plain * weights
    torch.testing.assert_close(cond[1], expected * (plain.mean() / expected.mean()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_words_own_vectors_change_nothing(encoder: CLIPTextModel, clip_skip: int) -> None:
    table: Any = encoder.get_input_embeddings().weight
    ids: Any = tokenizer()("hyperrealistic", add_special_tokens=False).input_ids
    assert len(ids) > 1
    prompt = "a hyperrealistic cat"
    actual = encode(encoder, prompt, embeddings={"hyperrealistic": table[ids]}, clip_skip=clip_skip)
    assert torch.equal(actual, encode(encoder, prompt, clip_skip=clip_skip))


def test_gradients_reach_the_vectors(encoder: CLIPTextModel) -> None:
    vectors = drawn(2).double().requires_grad_()
    direction = draw("direction", (2, WIDTH))
    reader = draw("reader", (1, 77, WIDTH))

    def loss(shift: float) -> Tensor:
        return (encode(encoder, "a (toy:1.2), a toy", embeddings={"toy": vectors + shift * direction}) * reader).sum()

    (gradient,) = torch.autograd.grad(loss(0.0), vectors)
    with torch.no_grad():
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)
    assert bool((gradient.norm(dim=1) > 0).all())
    assert not encode(encoder, "a box", embeddings={"toy": vectors}).requires_grad


def test_tokenizer_and_encoder_stay_as_they_are(encoder: CLIPTextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = encoder.get_input_embeddings()
    before = embedding.weight.clone()
    options = {"embeddings": {"toy": drawn(2)}}
    first = encode(encoder, "a toy", **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(nn.LayerNorm, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        encode(encoder, "a toy", **options)
    assert len(tokenizer()) == 49408 and torch.equal(embedding.weight, before)
    assert not embedding._forward_hooks
    assert torch.equal(encode(encoder, "a toy", **options), first)


def test_half_precision_encoder() -> None:
    model = build_text_encoder(CONFIG).bfloat16()
    with torch.no_grad():
        context = encode(model, "a toy", embeddings={"toy": drawn(2)})
    assert context.dtype == torch.bfloat16 and bool(context.isfinite().all())


def test_a_compiled_encoder_takes_them_too() -> None:
    model = draw_weights(build_text_encoder(CONFIG | {"num_hidden_layers": 1}).double()).requires_grad_(False)
    expected = encode(model, "a toy", embeddings={"toy": drawn(2)})
    model.compile(backend="eager")
    encode(model, "a toy")
    assert torch.equal(encode(model, "a toy", embeddings={"toy": drawn(2)}), expected)


def test_a_wrong_width_is_named(encoder: CLIPTextModel) -> None:
    with pytest.raises(ConfigError, match="embeddings: 'toy' is 1024 wide, the text encoder takes 32"):
        encode(encoder, "a cat", embeddings={"toy": drawn(1, 1024)})


# Files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 4])
def test_every_form_is_read(form: str, count: int, tmp_path: Path) -> None:
    path = write(form, tmp_path, drawn(count))
    found = load_textual_inversion(path, width=WIDTH)
    assert found.token == "<toy>" and torch.equal(found.vectors, drawn(count))
    assert not found.vectors.requires_grad and type(found.vectors) is Tensor
    assert load_textual_inversion(path, " My Toy ").token == "My Toy"


def test_one_vector_may_lie_without_rows(tmp_path: Path) -> None:
    found = load_textual_inversion(write("one vector without rows", tmp_path, drawn(1)))
    assert torch.equal(found.vectors, drawn(1))


def test_a_file_without_a_name_is_called_by_its_own(tmp_path: Path) -> None:
    for name in (None, "", 3):
        torch.save({"string_to_param": {"*": drawn(1)}, "name": name}, tmp_path / "ink style.v2.pt")
        assert load_textual_inversion(tmp_path / "ink style.v2.pt").token == "ink style.v2"


@pytest.mark.parametrize("name", ["*", "<*>", "emb_params", "string_to_token", "Placeholder", " * "])
@pytest.mark.parametrize("form", ["diffusers", "A1111"])
def test_a_generic_name_is_no_trigger(name: str, form: str, tmp_path: Path) -> None:
    """The file's own name is the only one, as it always is in A1111."""
    content = {name: drawn(1)} if form == "diffusers" else {"string_to_param": {"*": drawn(1)}, "name": name}
    torch.save(content, tmp_path / "ink.pt")
    assert load_textual_inversion(tmp_path / "ink.pt").triggers == ("ink",)


@pytest.mark.parametrize(
    ("name", "file", "triggers"),
    [
        ("<toy>", "my toy.v2.pt", ("<toy>", "my toy.v2")),
        ("Ink  Style", "ink style.pt", ("Ink  Style",)),
        ("a.pt", "a.pt", ("a.pt", "a")),
    ],
)
def test_the_files_name_triggers_beside_its_own(
    name: str, file: str, triggers: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save({name: drawn(1)}, tmp_path / file)
    assert load_textual_inversion(tmp_path / file).triggers == triggers
    assert load_textual_inversion(tmp_path / file, "mine").triggers == ("mine",)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = nn.Parameter(drawn(3).to(dtype))
    save_textual_inversion(TextualInversion(" my-style ", trained), tmp_path / f"a{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"a{suffix}"]
    found = load_textual_inversion(tmp_path / f"a{suffix}")
    assert found.token == "my-style" and torch.equal(found.vectors, trained.detach().to(found.vectors.dtype))
    assert found.vectors.dtype == (torch.float32 if suffix == ".pt" else dtype)


def test_the_forms_are_the_programs_own(tmp_path: Path) -> None:
    save_textual_inversion(TextualInversion("<toy>", drawn(2)), tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    assert list(state) == ["<toy>"] and torch.equal(state["<toy>"], drawn(2))
    trained = nn.Parameter(drawn(4))[:2]  # a view of a larger storage, and of the graph
    save_textual_inversion(TextualInversion("toy", trained), tmp_path / "a.pt")
    storages: list[tuple[str, int]] = []

    class Restricted(pickle.Unpickler):
        """What A1111 lets through: these names, a storage by name and size, and no zip file."""

        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, grad, hooks: (size, grad),
            ("torch", "FloatStorage"): "float32",
        }

        def find_class(self, module: str, name: str) -> Any:
            return self.allowed[module, name]

        def persistent_load(self, pid: Any) -> Any:
            _, dtype, _, _, count, *_ = pid
            storages.append((dtype, count))
            return "storage"

    with (tmp_path / "a.pt").open("rb") as file:
        _, _, _, content, _ = (Restricted(file).load() for _ in range(5))
    assert content == {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": ((2, WIDTH), False)},
        "name": "toy",
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    assert storages == [("float32", 2 * WIDTH)]


class Code:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_g": drawn(1), "clip_l": drawn(1)}, "found clip_g, clip_l, an embedding for SDXL"),
        ({"clip_l": drawn(1)}, "found clip_l"),
        ({"a": drawn(1), "b": drawn(1)}, r"expected the vectors of one word, found 2 entries \(a, b\)"),
        ({"string_to_param": {"*": drawn(1), "x": drawn(1)}}, r"found 2 entries \(\*, x\)"),
        ({"string_to_param": drawn(1)}, "expected the vectors of one word, found Tensor"),
        ({}, "expected the vectors of one word, found dict"),
        ({"string_to_param": {"*": drawn(1)}, "optimizer": {}, "b": 1}, "not understood: b, optimizer"),
        ({"a": torch.zeros(2, 3, 4)}, r"expected vectors \[n, D\], found torch.float32 \[2, 3, 4\]"),
        ({"a": torch.zeros(2, 32, dtype=torch.long)}, "found torch.int64"),
        ({"a": torch.zeros(0, 32)}, r"found torch.float32 \[0, 32\]"),
        ({"a": "text"}, "found str"),
        ({"a": drawn(1, 768)}, r"768 wide, the text encoder takes 32 \(SD1 768, SD2 1024\)"),
        ({"a": drawn(1) / 0}, "the vectors are not finite"),
        ({"a": drawn(1) * float("nan")}, "the vectors are not finite"),
        ({"a": drawn(1), "b": Code()}, "the pickle holds code or objects"),
        (drawn(1), "expected a dict of tensors, found Tensor"),
    ],
)
def test_a_wrong_file_is_one_clear_line(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_textual_inversion(tmp_path / "x.pt", width=WIDTH)
    assert str(caught.value).startswith(str(tmp_path / "x.pt")) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is none"):
        load_textual_inversion(tmp_path / "no.pt")
    path = write("diffusers safetensors", tmp_path, drawn(1))
    with pytest.raises(ConfigError, match="token: expected a word as trigger, found '  '"):
        load_textual_inversion(path, "  ")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load_textual_inversion(path)
    good = TextualInversion("a", drawn(1))
    with pytest.raises(ConfigError, match="expected the suffix"):
        save_textual_inversion(good, tmp_path / "a.bin")
    for suffix in (".pt", ".safetensors"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_textual_inversion(good, tmp_path / "none" / f"a{suffix}")
        with pytest.raises(NumericalError, match="'a': the vectors are not finite"):
            save_textual_inversion(TextualInversion("a", drawn(1) / 0), tmp_path / f"bad{suffix}")
        assert not (tmp_path / f"bad{suffix}").exists()
    with pytest.raises(ConfigError, match=r"expected vectors \[n, D\], found \[32\]"):
        save_textual_inversion(TextualInversion("a", drawn(1)[0]), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="token"):
        save_textual_inversion(TextualInversion("", drawn(1)), tmp_path / "a.pt")


@pytest.mark.parametrize("form", FORMS)
def test_inspection_knows_it(form: str, tmp_path: Path) -> None:
    path = write(form, tmp_path, drawn(2, 768))
    facts = inspect_file(path)
    assert (facts["kind"], facts["version"]) == ("textual inversion", "SD1")
    assert [(name[:9], shape) for name, shape in facts["shapes"].items()] == [("vectors: ", (2, 768))]
    assert facts["metadata"].get("name") == ("<toy>" if form == "A1111 pt" else None)


def test_inspection_of_others(tmp_path: Path) -> None:
    torch.save({"my-style": torch.zeros(1024)}, tmp_path / "a.bin")
    facts = inspect_file(tmp_path / "a.bin")
    assert (facts["kind"], facts["version"]) == ("textual inversion", "SD2")
    save_file({"clip_g": torch.zeros(2, 1280), "clip_l": torch.zeros(2, 768)}, tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors")["kind"] == "textual inversion (SDXL)"
    save_file({"weight": torch.zeros(2, 3, 4)}, tmp_path / "w.safetensors")
    assert inspect_file(tmp_path / "w.safetensors")["kind"] == "unknown"
