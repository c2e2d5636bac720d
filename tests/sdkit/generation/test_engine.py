"""Calls by recorded graphs are the eager calls, to the bit; what is recorded is pure, and anew when it must be.

On a CPU the recorded functions run again at each replay (`sdkit.graphs`), so all but the capture itself shows here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import sdkernels
from sdkit.generation import engine
from sdkit.generation.engine import RecordedCalls
from sdkit.generation.noise import Noise
from sdkit.generation.output import Output
from sdkit.graphs import Graph, Graphs, state_of
from sdkit.networks.attention import GEGLU
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.sampling.samplers import SAMPLERS
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import mask, model, picture

pytestmark = pytest.mark.filterwarnings("ignore:.* the model was made for:UserWarning")  # small pictures, for speed
EMBEDS = torch.randn(2, 1, 77, 32, generator=torch.Generator().manual_seed(1))
QUICK: dict[str, Any] = {
    "prompt_embeds": EMBEDS[0],
    "negative_prompt_embeds": EMBEDS[1],
    "num_inference_steps": 3,
    "seed": 3,
    "output_type": "latent",
    "progress": False,
}


def redder(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))], 1)


GUIDANCE: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 4.0},
    "conditional": {"guidance_scale": 1.0, "negative_prompt_embeds": None},
    "unconditional": {"guidance_scale": 0.0, "prompt_embeds": None, "prompt": ""},
    "interval": {"guidance_interval": (0.3, 5.0)},
    "rescale": {"guidance_rescale": 0.7},
    "rescale in an interval": {"guidance_rescale": 0.7, "guidance_interval": (0.3, 5.0)},
    "threshold": {"dynamic_threshold": 0.9, "clip_sample_range": 2.0},
    "classifier": {"classifier": redder, "class_labels": [1], "classifier_scale": 20.0},
}


@pytest.fixture(scope="module")
def models() -> dict[int, StableDiffusion]:
    """By the UNet's channels."""
    return {channels: model(channels=channels) for channels in (4, 5, 9)}


TASKS: dict[str, tuple[int, Callable[..., Any]]] = {
    "text": (4, lambda sd, **options: sd.text_to_image(width=16, height=24, **options)),
    "image": (4, lambda sd, **options: sd.image_to_image(image=picture(16, 24), strength=0.7, **options)),
    "blend": (4, lambda sd, **options: sd.inpaint(image=picture(16, 24), mask_image=mask(16, 24), **options)),
    "inpaint": (9, lambda sd, **options: sd.inpaint(image=picture(16, 24), mask_image=mask(16, 24), **options)),
    "depth": (
        5,
        lambda sd, **options: sd.depth_to_image(**{"image": picture(16, 24), "depth_map": torch.eye(8)} | options),
    ),
    "hires": (4, lambda sd, **options: sd.text_to_image(width=16, height=16, hires_scale=1.5, **options)),
}


def draw(models: dict[int, StableDiffusion], task: str, graphs: bool, **options: Any) -> Any:
    channels, make = TASKS[task]
    sd = models[channels]
    sd.graphs = graphs
    options = QUICK | options
    if options["prompt_embeds"] is None and "prompt" not in options:
        options["prompt"] = "a cat"
    if "prompt" not in options:
        options["prompt"] = None
    return make(sd, **options)


def compare(models: dict[int, StableDiffusion], task: str, **options: Any) -> None:
    """The same latents, and where steps are shown the same frames."""
    eager, ours = (draw(models, task, graphs, **options) for graphs in (False, True))
    assert torch.equal(ours.latents, eager.latents) and frames_of(ours) == frames_of(eager)


def frames_of(out: Output) -> list[list[bytes]]:
    return [[image.tobytes() for image in preview.images] for preview in out.previews]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call by graphs whether it was whole."""
    calls: list[bool] = []
    make = RecordedCalls.make

    def counted(self: RecordedCalls, k: int) -> Any:
        calls.append(self.kinds[k].is_whole)
        return make(self, k)

    monkeypatch.setattr(RecordedCalls, "make", counted)
    return calls


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_sampler_in_every_task(models: dict[int, StableDiffusion], made: list[bool], task: str) -> None:
    """The first picture of a size and a number of registers is recorded, the others are replays of it."""
    for sampler in SAMPLERS:
        compare(models, task, sampler=sampler, eta=0.5 if SAMPLERS[sampler].takes_eta else 0.0)
    assert len(made) >= 2 * len(SAMPLERS) and all(made)


@pytest.mark.parametrize("form", ["conditional", "interval", "rescale in an interval"])
def test_guidance_with_every_sampler(models: dict[int, StableDiffusion], made: list[bool], form: str) -> None:
    for sampler in SAMPLERS:
        compare(models, "text", sampler=sampler, **GUIDANCE[form])
    assert any(made) and all(made) == (form != "rescale in an interval")


@pytest.mark.parametrize("form", GUIDANCE)
def test_every_guidance_in_every_task(models: dict[int, StableDiffusion], made: list[bool], form: str) -> None:
    """Shown at every step, by estimates that the next replay overwrites."""
    for task in TASKS:
        compare(models, task, sampler="dpmpp_2s_a", preview_every=1, preview_mode="fast", **GUIDANCE[form])
    linear = form in ("guided", "conditional", "unconditional", "interval")
    assert all(made) == linear and any(made) == (linear or form == "rescale in an interval")


PROMPTS: dict[str, dict[str, Any]] = {
    "several, of several pictures": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2},
    "edited on the way": {"prompt": "a [cat:dog:0.5]", "negative_prompt": "[red::2] blue"},
    "joined by AND": {"prompt": ["a cat AND a dog :0.5", "a tree"], "negative_prompt": "red"},
    "joined and edited": {"prompt": "a [cat:bird:0.5] AND a dog :0.7"},
    "joined, weights of sum 1": {"prompt": "a cat :0.5 AND a dog :0.5", "guidance_scale": 1.0},
    "of three chunks": {"prompt": "a cat " * 90},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_prompt(models: dict[int, StableDiffusion], made: list[bool], name: str) -> None:
    for _ in range(2):  # the text encoder's calls are recorded at the second
        compare(models, "text", **{"prompt_embeds": None, "negative_prompt_embeds": None} | PROMPTS[name])
    assert all(made) == ("joined" not in name) and len(made) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, made: list[bool]) -> None:
    ours = {4: model().to(dtype)}
    for sampler in ("ddpm", "heun"):
        compare(ours, "text", sampler=sampler, guidance_scale=4.3)
    assert len(made) == 3 + 5


def test_pixels_too(models: dict[int, StableDiffusion]) -> None:
    """The decoder's calls are recorded at the second, between the steps that it shows."""
    for preview_every in (0, 1, 1):
        options: dict[str, Any] = {"output_type": "pt", "preview_every": preview_every}
        eager, ours = (draw(models, "inpaint", graphs, **options) for graphs in (False, True))
        assert torch.equal(ours.images, eager.images)
        assert frames_of(ours) == frames_of(eager) and len(ours.previews) == 3 * preview_every


@pytest.mark.parametrize(
    ("task", "sampler", "form"),
    [("text", "heun", "guided"), ("text", "ddpm", "interval"), ("depth", "euler", "rescale in an interval")],
)
def test_the_steps_kernels_too(
    models: dict[int, StableDiffusion],
    made: list[bool],
    task: str,
    sampler: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the interpreter where there is no GPU, beside a network that is quick there."""

    def forward(self: nn.Module, x: Tensor, t: Any, hidden: Any, context: Any, times: Any) -> Tensor:
        keys = context[0][0][0].mean((1, 2, 3))[:, None, None, None]
        return (0.3 * x[:, :4] + x[:, -1:] + times[0][:, :4, None, None] + keys).tanh()

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with sdkernels.backend("triton"):
        compare(models, task, sampler=sampler, **GUIDANCE[form] | ({"strength": 1.0} if task == "depth" else {}))
    assert any(made)


# ---- between the calls -----------------------------------------------------------------------------------------------


def test_callbacks_see_replace_and_stop(models: dict[int, StableDiffusion]) -> None:
    """What a callback keeps is its own, though the next call writes over its register."""
    kept: dict[bool, list[Tensor]] = {False: [], True: []}

    def make(graphs: bool) -> Tensor:
        def callback(sd: Any, k: int, t: float, tensors: dict[str, Tensor]) -> Any:
            kept[graphs].append(tensors["latents"])
            return {0: {"latents": tensors["latents"] * 0.9}, 3: "stop"}.get(k)

        options: dict[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": 6, "callback_on_step_end": callback}
        return draw(models, "text", graphs, **options).latents

    assert torch.equal(make(True), make(False)) and len(kept[True]) == 4
    assert all(torch.equal(a, b) for a, b in zip(kept[True], kept[False], strict=True))


def test_a_callback_that_changes_the_network_is_heard(models: dict[int, StableDiffusion]) -> None:
    """A plain value of a module, which a graph would hold fast: the calls after it are eager."""
    norm = models[4].unet.conv_norm_out
    before = norm.eps

    def make(graphs: bool) -> Tensor:
        def callback(sd: Any, k: int, t: float, tensors: Any) -> None:
            norm.eps = 0.5 if k == 1 else norm.eps

        try:
            return draw(models, "text", graphs, num_inference_steps=4, callback_on_step_end=callback).latents
        finally:
            norm.eps = before

    changed = make(False)
    assert torch.equal(make(True), changed)
    assert not torch.equal(draw(models, "text", True, num_inference_steps=4).latents, changed)


def test_a_call_inside_another_and_one_beside_it_are_eager(
    models: dict[int, StableDiffusion], made: list[bool]
) -> None:
    expected, inner = (draw(models, "text", False, seed=seed).latents for seed in (3, 9))
    seen: list[Tensor] = []

    def again() -> None:
        seen.append(draw(models, "text", True, seed=9).latents)

    def callback(sd: Any, k: int, t: float, tensors: Any) -> None:
        if k == 1:
            again()
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    ours = draw(models, "text", True, callback_on_step_end=callback).latents
    assert torch.equal(ours, expected) and torch.equal(seen[0], inner) and torch.equal(seen[1], inner)
    assert len(made) == 3


def test_in_and_out_of_inference_mode(models: dict[int, StableDiffusion]) -> None:
    sd = model()
    expected = draw(models, "text", False).latents
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(draw({4: sd}, "text", True).latents, expected)


def test_eager_where_it_must_be(models: dict[int, StableDiffusion], made: list[bool]) -> None:
    seen: list[int] = []
    handle = models[4].unet.conv_in.register_forward_hook(lambda *_: seen.append(1))
    compare(models, "text")
    handle.remove()
    assert len(seen) == 6

    compare(models, "text", num_images_per_prompt=3, max_batch_size=2)
    compare(models, "text", attention_maps=True)
    assert made == []


def test_where_memory_does_not_suffice_it_goes_on_eagerly(
    models: dict[int, StableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(self: Graphs, *_: Any) -> Graph:
        raise torch.OutOfMemoryError("no room")

    expected = draw(models, "text", False).latents
    models[4].free_graphs()
    monkeypatch.setattr(Graphs, "record", record)
    with pytest.warns(UserWarning, match="out of memory while a graph was recorded"):
        assert torch.equal(draw(models, "text", True).latents, expected)


# ---- what is recorded anew -------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each graph."""
    found: list[int] = []
    record = Graphs.record

    def counted(self: Graphs, *arguments: Any) -> Graph:
        found.append(len(found))
        return record(self, *arguments)

    monkeypatch.setattr(Graphs, "record", counted)
    return found


DATA: dict[str, dict[str, Any]] = {
    "steps": {"num_inference_steps": 7},
    "sampler": {"sampler": "euler"},
    "spacing": {"timestep_spacing": "leading"},
    "guidance scale": {"guidance_scale": 2.5},
    "prompt": {"prompt_embeds": EMBEDS[1], "negative_prompt_embeds": EMBEDS[0]},
    "edited prompt": {"prompt_embeds": None, "negative_prompt_embeds": None, "prompt": "a [cat:dog:0.5]"},
    "seed": {"seed": 77},
    "previews": {"preview_every": 1, "preview_mode": "fast"},
    "an interval without end": {"guidance_interval": (0, float("inf"))},
}


@pytest.mark.parametrize("name", DATA)
def test_data_shares_a_graph(models: dict[int, StableDiffusion], recorded: list[int], name: str) -> None:
    models[4].free_graphs()
    draw(models, "text", True, sampler="ddim")
    draw(models, "text", True, **{"sampler": "ddim"} | DATA[name])
    assert len(recorded) == 1


KEY: dict[str, dict[str, Any]] = {
    "batch": {"num_images_per_prompt": 2},
    "tokens": {"prompt_embeds": EMBEDS[0].repeat(1, 2, 1), "negative_prompt_embeds": EMBEDS[1].repeat(1, 2, 1)},
    "branches": GUIDANCE["conditional"],
    "the other branch": GUIDANCE["unconditional"],
    "registers": {"sampler": "dpmpp_2m"},
    "noise": {"sampler": "ddpm"},
    "more steps than the tables have rows": {"num_inference_steps": 65},
    "guidance that is not linear": {"guidance_rescale": 0.5},
}


@pytest.mark.parametrize("name", KEY)
def test_each_field_of_the_key_misses(models: dict[int, StableDiffusion], recorded: list[int], name: str) -> None:
    models[4].free_graphs()
    for options in ({}, KEY[name], KEY[name]):
        draw(models, "text", True, **{"sampler": "ddim"} | options)
    assert len(recorded) == 2


@pytest.mark.parametrize("size", [{"height": 16}, {"width": 24}])
def test_a_size_misses(models: dict[int, StableDiffusion], recorded: list[int], size: dict[str, int]) -> None:
    models[4].graphs = True
    models[4].free_graphs()
    for options in ({}, size, size):
        models[4].text_to_image(**QUICK | {"width": 16, "height": 24} | options)
    assert len(recorded) == 2


CHANGES: dict[str, Callable[[StableDiffusion], object]] = {
    "an adapter": lambda sd: finetune.add_lora(sd, rank=2),
    "dtype": lambda sd: sd.to(torch.float64),
    "backend": lambda sd: setattr(sd, "backend", "eager"),
    "weights elsewhere": lambda sd: setattr(sd.unet.conv_out, "weight", nn.Parameter(sd.unet.conv_out.weight.clone())),
    "another unet": lambda sd: setattr(sd, "unet", model().unet),
    "graphs freed": lambda sd: sd.free_graphs(),
}


def by_graphs_and_eagerly(sd: StableDiffusion) -> tuple[Tensor, Tensor]:
    drawn: list[Tensor] = []
    for graphs in (True, False):
        sd.graphs = graphs
        drawn.append(sd.text_to_image(**QUICK).latents)
    return drawn[0], drawn[1]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_misses(recorded: list[int], name: str) -> None:
    """And draws what it draws eagerly."""
    sd = model()
    sd.graphs = True
    sd.text_to_image(**QUICK)
    CHANGES[name](sd)
    assert torch.equal(*by_graphs_and_eagerly(sd))
    assert len(recorded) == 2


def test_the_scale_of_an_adapter_is_followed() -> None:
    sd = model()
    finetune.add_lora(sd, rank=2)
    for name, parameter in sd.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))

    drawn: list[Tensor] = []
    for scale in (1.0, 0.5, -0.5):
        finetune.set_scale(sd, scale)
        ours, eager = by_graphs_and_eagerly(sd)
        assert torch.equal(ours, eager)
        drawn.append(ours)
    assert not torch.equal(drawn[0], drawn[1])


def test_an_adapter_in_a_slot_is_data(recorded: list[int], tmp_path: Path) -> None:
    """Its scale, and another file in its place."""
    sd = model()
    for name in ("a", "b"):
        finetune.add_lora(sd, rank=2)
        for key, parameter in sd.unet.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(ord(name)))
        finetune.save_lora(sd, tmp_path / f"{name}.safetensors", format="kohya")
        finetune.remove(sd)

    finetune.load_lora(sd, tmp_path / "a.safetensors", slot_rank=4, name="slot")
    for change in (
        lambda: None,
        lambda: finetune.set_scale(sd, 0.5),
        lambda: finetune.swap_lora(sd, tmp_path / "b.safetensors", "slot"),
    ):
        change()
        assert torch.equal(*by_graphs_and_eagerly(sd))
    assert len(recorded) == 1


def test_graphs_are_for_a_gpu_unless_asked_for(recorded: list[int]) -> None:
    for graphs, expected in ((None, 0), (False, 0), (True, 1)):
        StableDiffusion(model().components, graphs=graphs).text_to_image(**QUICK)
        assert len(recorded) == expected


# ---- purity ----------------------------------------------------------------------------------------------------------


class Impure(AssertionError):
    """A recorded function does what no graph can replay."""


class Reads(TorchDispatchMode):
    """Notes the memory that comes from outside; host reads, random numbers and literals are an error."""

    FORBIDDEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self.made: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Tagged for masks, which are no numbers, and for dropout, which attention has none of here.
        spared = func is torch.ops.aten.index.Tensor and all(i.dtype == torch.int64 for i in tensors_in(args[1]))
        spared |= "scaled_dot_product" in str(func)
        tagged = any(tag in func.tags for tag in self.FORBIDDEN)
        if (tagged and not spared) or func is torch.ops.aten.lift_fresh.default:
            raise Impure(str(func))
        self.outside |= {address(tensor) for tensor in tensors_in((args, kwargs or {}))} - self.made.keys()

        result = func(*args, **kwargs or {})
        self.made |= {address(t): t for t in tensors_in(result) if address(t) not in self.outside}
        return result


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in containers and in the engine's static objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, engine.StaticRun | engine.StaticNetwork):
        yield from tensors_in(vars(value))
    elif isinstance(value, dict | list | tuple):
        for own in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(own)


class WatchedGraphs(Graphs):
    """Graphs whose functions are watched each time they run. reads: of each function, of each of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[list[set[int]]] = []

    def record(self, function: Callable[[], Any], device: torch.device) -> Graph:
        runs: list[set[int]] = []
        self.reads.append(runs)

        def watched() -> Any:
            with Reads() as reads:
                result = function()
            runs.append(reads.outside)
            return result

        return super().record(watched, device)

    def check(self, *networks: nn.Module) -> None:
        """Every run of a function read the same memory: static tensors, and weights that the state tells of."""
        marks: list[Any] = [mark for network in networks for mark in state_of(network).held]  # type: ignore[attr-defined]
        held = {mark[0] for mark in marks if isinstance(mark, tuple) and mark}
        weights = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        known = {address(weight) for weight in weights if weight.data_ptr() in held}
        known |= {address(tensor) for _, made in self._made.values() for tensor in tensors_in(made)}

        for first, *others in self.reads:
            assert first <= known, "reads what is neither static nor a weight"
            assert all(other == first for other in others), "reads other memory than it was recorded with"


WATCHED: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "noise, latents replaced": (1, {"sampler": "ddpm", "callback_on_step_end": lambda sd, k, t, tensors: tensors}),
    "the network alone": (1, {"guidance_rescale": 0.5}),
    "two graphs": (2, {"guidance_interval": (0.3, 5.0), "preview_every": 1, "preview_mode": "fast"}),
    "text and pixels": (
        3,
        PROMPTS["edited on the way"] | {"prompt_embeds": None, "negative_prompt_embeds": None} | {"output_type": "pt"},
    ),
}


def check_purity(name: str = "plain") -> None:
    """A picture twice, and once more where the text encoder and the decoder are recorded at the second."""
    sd = model()
    count, options = WATCHED[name]
    sd.graphs, sd._recorded = True, WatchedGraphs()
    for _ in range(2 if count < 3 else 3):
        sd.text_to_image(**QUICK | options)

    assert len(sd._recorded.reads) == count and all(len(runs) > 1 for runs in sd._recorded.reads)
    with torch.no_grad():
        sd._recorded.check(sd.unet, sd.vae, sd.text_encoder)


@pytest.mark.parametrize("name", WATCHED)
def test_what_is_recorded_is_pure(name: str) -> None:
    check_purity(name)


STRAY = torch.zeros(1)
FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a host read": ("_local_scalar_dense", lambda y: y + 0 * float(y.sum())),
    "a shape that depends on values": ("nonzero", lambda y: y + 0 * len(y.nonzero())),
    "a random number": ("rand", lambda y: y + 0 * torch.rand_like(y)),
    "a literal": ("lift_fresh", lambda y: y + torch.tensor([0.0])),
    "an untracked weight": ("neither static nor a weight", lambda y: y + STRAY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_impure_network_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message, spoil = FAULTS[fault]
    forward = GEGLU.forward
    monkeypatch.setattr(GEGLU, "forward", lambda self, x: spoil(forward(self, x)))
    with pytest.raises(AssertionError, match=message):
        check_purity()


def test_a_fresh_address_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that a callback gives, put in the register's place where they have to be copied into it."""

    def replace(self: RecordedCalls, latents: Tensor) -> None:
        self.static.registers = self.registers = torch.cat([latents[None], self.registers[1:]])

    monkeypatch.setattr(RecordedCalls, "replace", replace)
    with pytest.raises(AssertionError, match=r"other memory|neither static"):
        check_purity("noise, latents replaced")


def test_a_prediction_that_outlives_its_replay_is_seen(
    models: dict[int, StableDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's estimate, asked for after the decoder's replay: it is not a number."""
    make, late = RecordedCalls.make, list[Callable[[], Tensor]]()

    def kept(self: RecordedCalls, k: int) -> Callable[[], Tensor]:
        late.append(make(self, k))
        return late[-1]

    monkeypatch.setattr(RecordedCalls, "make", kept)
    for _ in range(3):
        draw(models, "text", True, output_type="pt", preview_every=1, preview_mode="fast")
    assert late[-1]().isnan().all()

    draw(models, "text", True)
    with pytest.raises(RuntimeError, match="nobody was said to ask"):
        late[-1]()


# ---- every launch accounted for --------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Notes the operations that would launch something, but of what `one` wraps its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.is_inside or func.is_view):
            self.found.append(str(func))
        return func(*args, **kwargs or {})

    def one(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            self.found.append(name)
            self.is_inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_inside = False

        return named


BESIDE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "noise": ({"sampler": "ddpm"}, ["noise", "aten.copy_.default"]),
    "the latents before, for a preview": ({"preview_every": 1, "preview_mode": "fast"}, ["aten.clone.default"]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_every_launch_of_a_call_is_accounted_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, network, step and counter in the graph; beside it what is drawn or shown, and nothing else."""
    models, launches, calls, make = {4: model()}, Launches(), list[list[str]](), RecordedCalls.make
    draw(models, "text", True, **BESIDE[name][0])  # recorded

    def watched(self: RecordedCalls, k: int) -> Any:
        launches.found = []
        with launches:
            estimate = make(self, k)
        calls.append(launches.found)
        return estimate

    monkeypatch.setattr(RecordedCalls, "make", watched)
    for owner, attribute, said in (
        (sdkernels, "prepare_step", "input"),
        (UNet2DConditionModel, "forward", "network"),
        (sdkernels, "sampler_step", "step"),
        (Noise, "draw", "noise"),
    ):
        monkeypatch.setattr(owner, attribute, launches.one(said, getattr(owner, attribute)))
    draw(models, "text", True, **BESIDE[name][0])

    copied_out = "aten.copy_.default"  # the prediction into its place, by the stand-in for a graph
    whole = [*BESIDE[name][1], "input", "network", "step", "aten.add_.Tensor", copied_out]
    assert calls[1:] == [whole, whole]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_captured_calls_are_the_eager_calls(dtype: torch.dtype) -> None:
    """Sizes, kinds and samplers in turn, each twice: graphs of one pool leave each other's numbers alone."""
    ours = {channels: model(channels=channels).to("cuda", dtype) for channels in (4, 5, 9)}
    for _ in range(2):
        for task in TASKS:
            for sampler, form in (("dpmpp_2m", "guided"), ("ddpm", "interval"), ("heun", "rescale in an interval")):
                options = {"sampler": sampler} | GUIDANCE[form]
                eager, captured = (draw(ours, task, graphs, **options).latents for graphs in (False, True))
                assert relative_error(captured, eager) < (1e-3 if dtype == torch.float32 else 5e-2), (task, sampler)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_the_host_never_waits_between_the_steps(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = RecordedCalls.make

    def watched(self: RecordedCalls, k: int) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return make(self, k)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(RecordedCalls, "make", watched)
    ours = {4: model().to("cuda", torch.float16)}
    for _ in range(2):
        assert draw(ours, "text", True, sampler=sampler).latents.isfinite().all()


@pytest.mark.gpu
def test_pixels_and_text_on_a_gpu() -> None:
    sd = model().to("cuda")
    options = QUICK | {"prompt_embeds": None, "negative_prompt_embeds": None, "output_type": "pt"}
    sd.graphs = False
    expected = sd.text_to_image("a cat", **options).images
    sd.graphs = True
    for _ in range(3):
        assert relative_error(sd.text_to_image("a cat", **options).images, expected) < 1e-3
