"""What the project reads, each as good files and as how they are read and used: the subjects of `trying`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import finetune
from finetune.data.config import DataConfig
from finetune.data.folders import read_pictures
from finetune.lora.targets import match_targets, targets_of
from finetune.lora.writing import write_lora
from finetune.training.states import load_state, save_state
from sdkit.checkpoints.classifier_folder import load_classifier, save_classifier
from sdkit.checkpoints.companion_folder import save_companion
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.loading import MODELS, load_vae, save
from sdkit.generation.png import read_foreign, read_parameters, write_png
from sdkit.generation.provenance import arguments_of
from sdkit.networks.latent_classifier import ClassifierConfig, LatentClassifier
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import load_tokenizer
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, draw_weights
from tests.finetune.tiny import drawn_updates

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing", "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
INFOTEXT = (
    "a red sphere, (blue:1.2)\nNegative prompt: a cube\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, "
    "Size: 16x16, Model hash: abcdef, Model: tiny, Clip skip: 2, Version: v1.6.0"
)
WORKFLOW = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 2, "cfg": 7.0, "sampler_name": "euler",
          "scheduler": "karras", "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
          "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red sphere", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cube", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
}  # fmt: skip


def tiny() -> StableDiffusion:
    """A model of some 40,000 weights, with the tokenizer of *tabletop*: 16 x 16 pixels."""
    unet = draw_weights(UNet2DConditionModel.from_config(UNET))
    vae = draw_weights(AutoencoderKL.from_config(VAE))
    tokenizer = load_tokenizer(MODELS / "tabletop" / "tokenizer")
    ids: Any = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, **ids,
    )  # fmt: skip
    return StableDiffusion(Components(unet, vae, draw_weights(CLIPTextModel(text)).eval(), tokenizer, SCHEDULER))


@cache
def shared() -> StableDiffusion:
    """The model that adapters are loaded into; whoever uses it leaves it as it was."""
    return tiny()


def drawn(sd: StableDiffusion, **options: Any) -> Tensor:
    """A picture, as a user draws one."""
    arguments = {"prompt": "a red sphere", "num_inference_steps": 1, "seed": 1, "height": 16, "width": 16}
    return sd.text_to_image(**arguments | options, output_type="pt", progress=False).images


Build = Callable[[Path], None]
Read = Callable[[Path], Iterable[Tensor]]


@dataclass(frozen=True)
class Subject:
    """build(folder) writes good files; read(folder) reads and uses them, and gives what the user gets as tensors.

    among: endings of the files that are damaged.
    """

    build: Build
    read: Read
    among: tuple[str, ...]


# Models


def build_folder(folder: Path) -> None:
    tiny().save_pretrained(folder / "model")


def read_folder(folder: Path) -> Iterable[Tensor]:
    sd = StableDiffusion.from_pretrained(folder / "model", device="cpu")
    return [*sd.unet.state_dict().values(), drawn(sd)]


def build_pickled(folder: Path) -> None:
    build_folder(folder)
    for file in (folder / "model" / "unet").glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def build_single(folder: Path) -> None:
    sd = tiny()
    save(sd.components, folder / "model.safetensors")


def read_single(folder: Path) -> Iterable[Tensor]:
    sd = StableDiffusion.from_single_file(folder / "model.safetensors", device="cpu")
    return [*sd.unet.state_dict().values(), drawn(sd)]


def build_vae(folder: Path) -> None:
    save(tiny().vae, folder / "vae.safetensors")
    save(tiny().vae, folder / "vae")


def read_vae(folder: Path) -> Iterable[Tensor]:
    picture = torch.zeros(1, 3, 16, 16)
    for name in ("vae.safetensors", "vae"):
        vae = load_vae(folder / name)
        yield from vae.state_dict().values()
        yield vae.decode(vae.encode(picture.to(next(vae.parameters()).dtype)).mode())


def build_companion(folder: Path) -> None:
    tiny().save_pretrained(folder / "base")
    weights = {"conv_in.weight": draw("conv", (8, 9, 3, 3)).float()}
    save_companion(folder / "companion", "../base", {"in_channels": 9}, weights)


def read_companion(folder: Path) -> Iterable[Tensor]:
    sd = StableDiffusion.from_pretrained(folder / "companion", device="cpu")
    return sd.unet.state_dict().values()


def build_classifier(folder: Path) -> None:
    config = ClassifierConfig(("red", "blue"), 4, (8, 8), 4)
    save_classifier(draw_weights(LatentClassifier(config)), folder / "classifier")


def read_classifier(folder: Path) -> Iterable[Tensor]:
    classifier = load_classifier(folder / "classifier", "cpu")
    options: dict[str, Any] = {"classifier": classifier, "class_labels": classifier.labels(["red"])}
    return [*classifier.state_dict().values(), drawn(shared(), guidance_scale=0.0, classifier_scale=1.0, **options)]


# Adapters


def build_lora(format: str, name: str) -> Build:
    def build(folder: Path) -> None:
        places = targets_of(shared().unet, "unet") + targets_of(shared().text_encoder, "text_encoder")
        write_lora(drawn_updates(match_targets(places, "attention"), lambda target: 2), folder / name, format)

    return build


def build_family(folder: Path) -> None:
    """LoHa, LoKr, (IA)^3, full differences and norms, as LyCORIS names them."""
    places = match_targets(targets_of(shared().unet, "unet"), "cross_attention")
    state: dict[str, Tensor] = {}
    for i, target in enumerate(places):
        rows, columns = target.shape
        key = target.kohya
        if i % 3 == 0:
            for part, shape in {
                "w1_a": (rows, 2),
                "w1_b": (2, columns),
                "w2_a": (rows, 2),
                "w2_b": (2, columns),
            }.items():
                state[f"{key}.hada_{part}"] = draw(f"{key}{part}", shape).float()
        elif i % 3 == 1:
            state[f"{key}.lokr_w1"] = draw(key, (2, 2)).float()
            state[f"{key}.lokr_w2"] = draw(key, (rows // 2, columns // 2)).float()
        else:
            state[f"{key}.diff"] = draw(key, (rows, columns)).float()
            continue
        state[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(state, folder / "family.safetensors", {"ss_network_args": "{}"})


def read_adapter(name: str) -> Read:
    def read(folder: Path) -> Iterable[Tensor]:
        sd = shared()
        before = drawn(sd)
        finetune.load_adapter(sd, folder / name)
        try:
            found = [drawn(sd)]
        finally:
            finetune.remove(sd)
        assert torch.equal(drawn(sd), before), "the adapter has left traces"
        return found

    return read


def build_hypernetwork(folder: Path) -> None:
    torch.manual_seed(0)
    network = finetune.Hypernetwork([16], layer_structure=[1.0, 2.0, 1.0])
    network.save(folder / "hyper.pt")
    content: Any = torch.load(folder / "hyper.pt", weights_only=False)
    torch.save(content, folder / "hyper.pt")


def build_words(folder: Path) -> None:
    vectors = draw("vectors", (2, 16)).float()
    save_file({"emb_params": vectors}, folder / "word.safetensors")
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "word", "step": 5}
    torch.save(content | {"sd_checkpoint": "abc", "sd_checkpoint_name": "tiny"}, folder / "word.pt")


def read_word(name: str) -> Read:
    def read(folder: Path) -> Iterable[Tensor]:
        sd = shared()
        sd.load_textual_inversion(folder / name, token="zorb")
        try:
            return [drawn(sd, prompt="a zorb")]
        finally:
            sd.textual_inversions.clear()

    return read


# The rest


def build_state(folder: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    state = {
        "step": 3,
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": [1.0, 0.5],
        "seed": 1,
    }
    save_state(folder, 3, state, keep=1)


def read_state(folder: Path) -> Iterable[Tensor]:
    load_state(folder / "checkpoint-3")
    return []


def build_picture(folder: Path) -> None:
    sd, picture = shared(), Image.new("RGB", (16, 16), "red")
    out = sd.text_to_image("a red sphere", num_inference_steps=1, seed=1, height=16, width=16, progress=False)
    write_png(out.images[0], folder / "ours.png", dict(out.images[0].info) | {"model": "tiny"})
    from PIL.PngImagePlugin import PngInfo

    for name, key, text in (("a1111.png", "parameters", INFOTEXT), ("comfyui.png", "prompt", json.dumps(WORKFLOW))):
        chunks = PngInfo()
        chunks.add_text(key, text)
        picture.save(folder / name, pnginfo=chunks)


def read_ours(folder: Path) -> Iterable[Tensor]:
    facts = read_parameters(folder / "ours.png")
    method, arguments = arguments_of(facts, "ours.png")
    assert method == "text_to_image" or facts["task"] != "text_to_image"
    return [getattr(shared(), method)(**arguments | {"progress": False, "output_type": "pt"}).images]


def read_theirs(folder: Path) -> Iterable[Tensor]:
    for name in ("a1111.png", "comfyui.png"):
        foreign = read_foreign(folder / name)
        if foreign is not None:
            arguments = {**foreign.facts, "num_inference_steps": 1}
            method, arguments = arguments_of(arguments, name)
            if method == "text_to_image":
                yield shared().text_to_image(**arguments | {"progress": False, "output_type": "pt"}).images


def read_by_inspection(folder: Path) -> Iterable[Tensor]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".pt", ".ckpt"):
            inspect_file(file)
    return []


def build_inspected(folder: Path) -> None:
    build_words(folder)
    build_family(folder)
    build_hypernetwork(folder)


def build_data(folder: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (16, 16), "red").save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{name}.png", "text": f"a red {name}"}) + "\n" for name in "abc")
    )


def build_csv(folder: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "red").save(folder / f"{name}.png")
    (folder / "metadata.csv").write_text('file_name,text\na.png,a red cube\nb.png,"a, b"\n')
    (folder / "c.txt").write_text("a red cube")


def read_data(folder: Path) -> Iterable[Tensor]:
    pictures = read_pictures(DataConfig(data=folder)).pictures
    assert all(isinstance(picture.caption, str) for picture in pictures)
    return []


SUBJECTS: dict[str, Subject] = {
    "model folder": Subject(build_folder, read_folder, (".json", ".txt")),
    "model folder's weights": Subject(build_folder, read_folder, (".safetensors",)),
    "model folder's pickled weights": Subject(build_pickled, read_folder, (".bin",)),
    "single file": Subject(build_single, read_single, (".safetensors",)),
    "VAE": Subject(build_vae, read_vae, (".safetensors", ".json")),
    "companion": Subject(build_companion, read_companion, ("companion.json", ".safetensors")),
    "classifier": Subject(build_classifier, read_classifier, (".json", ".safetensors")),
    "LoRA, diffusers": Subject(
        build_lora("diffusers", "it.safetensors"), read_adapter("it.safetensors"), (".safetensors",)
    ),
    "LoRA, kohya": Subject(build_lora("kohya", "it.safetensors"), read_adapter("it.safetensors"), (".safetensors",)),
    "LoRA, peft": Subject(build_lora("peft", "it"), read_adapter("it"), (".safetensors", ".json")),
    "LyCORIS": Subject(build_family, read_adapter("family.safetensors"), (".safetensors",)),
    "hypernetwork": Subject(build_hypernetwork, read_adapter("hyper.pt"), (".pt",)),
    "textual inversion": Subject(build_words, read_word("word.safetensors"), (".safetensors",)),
    "textual inversion, pickled": Subject(build_words, read_word("word.pt"), (".pt",)),
    "training state": Subject(build_state, read_state, (".pt",)),
    "our picture's facts": Subject(build_picture, read_ours, ("ours.png",)),
    "A1111's and ComfyUI's facts": Subject(build_picture, read_theirs, ("a1111.png", "comfyui.png")),
    "inspection": Subject(build_inspected, read_by_inspection, (".safetensors", ".pt")),
    "pictures with metadata.jsonl": Subject(build_data, read_data, (".jsonl", ".png")),
    "pictures with metadata.csv": Subject(build_csv, read_data, (".csv", ".txt")),
}
