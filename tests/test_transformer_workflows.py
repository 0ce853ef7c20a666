"""The workflows for Flux.1-dev, Qwen-Image and Z-Image, on small random transformers of ComfyUI's own classes."""

from types import SimpleNamespace

import comfy_extras.nodes_compositing
import comfy_extras.nodes_custom_sampler
import comfy_extras.nodes_flux
import comfy_extras.nodes_model_advanced
import comfy_extras.nodes_sd3
import pytest
import torch
import torch.nn.functional as F
from comfy.text_encoders import flux, qwen_image, z_image
from comfy_api.latest import io

import nodes
from montage.nodes.collage import CollageCanvas, CollageCrossAttn, CollageLayer, CollageNoise
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.nodes.photomontage import CompositeAttentionInject, GraphCutMontage
from montage.nodes.record import FeatureRecorder, InvertImage
from montage.patching.tokens import rows_of
from montage.workshop.random_transformers import TRANSFORMERS, random_transformer
from montage.workshop.random_transformers import prompt as random_prompt
from montage.workshop.workflows import quick, workflow

STROKES = '{"v":1,"base":0,"strokes":[{"k":0,"r":500,"p":[800,800,800,9200]},{"k":1,"r":500,"p":[9200,800,9200,9200]}]}'
V3 = {
    "FluxGuidance": comfy_extras.nodes_flux.FluxGuidance,
    "EmptySD3LatentImage": comfy_extras.nodes_sd3.EmptySD3LatentImage,
    "FeatureRecorder": FeatureRecorder,
    "GraphCutMontage": GraphCutMontage,
    "CompositeAttentionInject": CompositeAttentionInject,
    "CollageLayer": CollageLayer,
    "CollageCanvas": CollageCanvas,
    "CollageCrossAttn": CollageCrossAttn,
    "CollageNoise": CollageNoise,
    "CollaborativeAttention": CollaborativeAttention,
    "InvertImage": InvertImage,
    "BasicScheduler": comfy_extras.nodes_custom_sampler.BasicScheduler,
    "JoinImageWithAlpha": comfy_extras.nodes_compositing.JoinImageWithAlpha,
    "SplitImageWithAlpha": comfy_extras.nodes_compositing.SplitImageWithAlpha,
}
V1 = {
    "ImageScale": nodes.ImageScale,
    "ConditioningZeroOut": nodes.ConditioningZeroOut,
    "KSampler": nodes.KSampler,
    "ModelSamplingAuraFlow": comfy_extras.nodes_model_advanced.ModelSamplingAuraFlow,
}


def decoded(samples):
    """A picture [B, H, W, 3] of a latent, instead of a VAE's."""
    x = samples["samples"]
    x = x.flatten(1, -3).mean(1, keepdim=True)
    return F.interpolate(x, scale_factor=8).movedim(1, -1).expand(-1, -1, -1, 3).sigmoid()


TOKENIZERS = {
    "Flux.1": flux.FluxTokenizer,
    "Qwen-Image": qwen_image.QwenImageTokenizer,
    "Z-Image": z_image.ZImageTokenizer,
}


class RandomFeatures:
    """A CLIP with a model's own tokenizer, which gives its tokens random features of the random transformers' width."""

    def __init__(self, transformer):
        self.transformer, self.tokenizer, self.text = transformer, TOKENIZERS[transformer](), ""
        self.cond_stage_model = SimpleNamespace()

    def tokenize(self, text, return_word_ids=False):
        self.text = text
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens):
        return random_prompt(self.transformer, len(self.text), rows_of(self, self.text))


def encoded(pixels, transformer):
    """A latent of a picture [1, H, W, 3], instead of a VAE's."""
    channels, *frames, _, _ = TRANSFORMERS[transformer].latent
    small = F.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True) * 4 - 2
    return {"samples": small.expand(-1, channels, -1, -1).reshape(1, channels, *frames, *small.shape[-2:]).clone()}


def loaded(number):
    """A picture, of which the left third is painted with a mask; or a cut-out, of which it is cut off."""
    mask = torch.zeros(1, 96, 128)
    mask[:, :, :43] = 1
    return torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(int(number))), mask


class Graph:
    """An API workflow in this process. Loaders, text encoder and VAE are replaced; other nodes are the real ones."""

    def __init__(self, api, transformer):
        self.api, self.transformer, self.results = api, transformer, {}

    def __getitem__(self, number):
        if number not in self.results:
            node = self.api[number]
            given = {}
            for name, value in node["inputs"].items():
                group, _, item = name.partition(".")
                value = self[value[0]][value[1]] if isinstance(value, list) else value
                if item:
                    given.setdefault(group, {})[item] = value
                else:
                    given[group] = {group: value} if group == "preset" else value
            self.results[number] = self.run(number, node["class_type"], given)
        return self.results[number]

    def run(self, number, kind, given):
        if kind == "UNETLoader":
            return (random_transformer(self.transformer),)
        if kind in ("CLIPLoader", "DualCLIPLoader"):
            return (RandomFeatures(self.transformer),)
        if kind == "VAELoader":
            return (None,)
        if kind == "CLIPTextEncode":
            return (random_prompt(self.transformer, int(number)),)
        if kind == "LoadImage":
            return loaded(number)
        if kind == "VAEEncode":
            return (encoded(given["pixels"], self.transformer),)
        if kind == "VAEDecode":
            return (decoded(given["samples"]),)
        if kind in V3:
            hidden = {"hidden_inputs": {io.Hidden.unique_id: number, io.Hidden.prompt: self.api}}
            return V3[kind].PREPARE_CLASS_CLONE(hidden).execute(**given).args
        return getattr(V1[kind](), V1[kind].FUNCTION)(**given)


@pytest.mark.parametrize(
    "name, transformer",
    [
        ("20 Photomontage with Flux.1-dev", "Flux.1"),
        ("21 Photomontage with Qwen-Image", "Qwen-Image"),
        ("22 Photomontage with Z-Image", "Z-Image"),
    ],
)
def test_it_runs_on_a_small_structure(name, transformer):
    api = quick(workflow(name))
    for node in api.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"].update(width=128, height=96)
    unpainted = Graph(api, transformer)
    image, other, composite = (unpainted[number][0]["samples"] for number in ("13", "23", "34"))
    assert torch.isfinite(image).all() and not torch.equal(image, other)
    torch.testing.assert_close(composite, image, rtol=1e-3, atol=1e-3)  # nothing is painted: everything is the base's

    api["30"]["inputs"]["strokes"] = STROKES
    painted = Graph(api, transformer)
    painted.results = {number: result for number, result in unpainted.results.items() if int(number) < 30}
    masks, composite = painted["30"][0], painted["34"][0]["samples"]
    assert 0 < masks[0].mean() < 1
    assert torch.isfinite(composite).all()
    assert all((composite - latent).abs().mean() > 0.01 for latent in (image, other))
    assert painted["35"][0].shape == (1, 96, 128, 3)


def small(name, steps=4):
    """The workflow with few steps, and pictures of 128x96."""
    api = quick(workflow(name), steps)
    for node in api.values():
        if node["class_type"] in ("CollageCanvas", "ImageScale"):
            node["inputs"].update(width=128, height=96)
    return api


@pytest.mark.parametrize(
    "name, transformer",
    [
        ("28 Collage with Flux.1-dev", "Flux.1"),
        ("30 Collage with Qwen-Image", "Qwen-Image"),
        ("32 Collage with Z-Image", "Z-Image"),
    ],
)
def test_a_collage_runs_on_a_small_structure(name, transformer):
    api = small(name)
    made = Graph(api, transformer)["28"][0]["samples"]
    assert torch.isfinite(made).all()
    api["24"]["inputs"]["strength"] = 0
    assert (Graph(api, transformer)["28"][0]["samples"] - made).abs().max() > 1e-3
    for layer in ("11", "13", "15"):
        api[layer]["inputs"]["noise"] = 0
    kept = Graph(api, transformer)
    locked = F.interpolate(kept["20"][0].noise[None, None], size=made.shape[-2:], mode="nearest-exact")[0, 0] == 0
    assert locked.any() and torch.equal(kept["28"][0]["samples"][..., locked], kept["22"][0]["samples"][..., locked])


@pytest.mark.parametrize(
    "name, transformer",
    [
        ("29 Subject swap with Flux.1-dev", "Flux.1"),
        ("31 Subject swap with Qwen-Image", "Qwen-Image"),
        ("33 Subject swap with Z-Image", "Z-Image"),
    ],
)
def test_a_swap_runs_on_a_small_structure(name, transformer):
    graph = Graph(small(name), transformer)
    made, condition = graph["42"][0]["samples"], graph["25"][0]["samples"]
    assert torch.isfinite(made).all()
    assert torch.equal(made[..., 8:], condition[..., 8:])  # locked: what is not painted
    assert (made[..., :4] - condition[..., :4]).abs().max() > 1e-3
    assert graph["43"][0].shape == (1, 96, 128, 3)
