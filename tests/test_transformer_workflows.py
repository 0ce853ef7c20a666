"""The workflows for Flux.1-dev, Qwen-Image and Z-Image, on small random transformers of ComfyUI's own classes."""

import comfy_extras.nodes_flux
import comfy_extras.nodes_model_advanced
import comfy_extras.nodes_sd3
import pytest
import torch
import torch.nn.functional as F

import nodes
from montage.nodes.photomontage import CompositeAttentionInject, GraphCutMontage
from montage.nodes.record import FeatureRecorder
from montage.workshop.random_transformers import prompt as random_prompt
from montage.workshop.random_transformers import random_transformer
from montage.workshop.workflows import quick, workflow

STROKES = '{"v":1,"base":0,"strokes":[{"k":0,"r":500,"p":[800,800,800,9200]},{"k":1,"r":500,"p":[9200,800,9200,9200]}]}'
V3 = {
    "FluxGuidance": comfy_extras.nodes_flux.FluxGuidance,
    "EmptySD3LatentImage": comfy_extras.nodes_sd3.EmptySD3LatentImage,
    "FeatureRecorder": FeatureRecorder,
    "GraphCutMontage": GraphCutMontage,
    "CompositeAttentionInject": CompositeAttentionInject,
}
V1 = {
    "ConditioningZeroOut": nodes.ConditioningZeroOut,
    "KSampler": nodes.KSampler,
    "ModelSamplingAuraFlow": comfy_extras.nodes_model_advanced.ModelSamplingAuraFlow,
}


def decoded(samples):
    """A picture [B, H, W, 3] of a latent, instead of a VAE's."""
    x = samples["samples"]
    x = x.flatten(1, -3).mean(1, keepdim=True)
    return F.interpolate(x, scale_factor=8).movedim(1, -1).expand(-1, -1, -1, 3).sigmoid()


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
                    given[group] = value
            self.results[number] = self.run(number, node["class_type"], given)
        return self.results[number]

    def run(self, number, kind, given):
        if kind == "UNETLoader":
            return (random_transformer(self.transformer),)
        if kind in ("CLIPLoader", "DualCLIPLoader", "VAELoader"):
            return (None,)
        if kind == "CLIPTextEncode":
            return (random_prompt(self.transformer, int(number)),)
        if kind == "VAEDecode":
            return (decoded(given["samples"]),)
        if kind in V3:
            return V3[kind].execute(**given).args
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
