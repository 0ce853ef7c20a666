"""A custom node pack for the tests' own server: takes one output out of ComfyUI's cache, as memory pressure would, and
loads a structure with random weights."""

import gc
import importlib.util
from pathlib import Path
from types import ModuleType

import folder_paths
from aiohttp import web
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from execution import PromptExecutor
from server import PromptServer


def load_models() -> ModuleType:
    """workshop/random_models.py by its path: in a server, ComfyUI gives the pack another name than `montage`."""
    path = Path(__file__).resolve().parents[2] / "workshop" / "random_models.py"
    spec = importlib.util.spec_from_file_location("montage_random_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_models()


class Structure:
    """MODEL and CLIP of one of the tests' small structures."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": (list(models.STRUCTURES),)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "testing"

    def load(self, name):
        embeddings = folder_paths.get_folder_paths("embeddings")
        return models.random_model(name), models.text_encoder(name, embeddings=embeddings)


NODE_CLASS_MAPPINGS = {"MontageTestStructure": Structure}


evaluated = 0  # images, by all UNets of this server
forward = UNetModel.forward


def counting(self, x, *args, **kwargs):
    global evaluated
    evaluated += len(x)
    return forward(self, x, *args, **kwargs)


UNetModel.forward = counting


@PromptServer.instance.routes.get("/montage_test/evaluations")
async def evaluations(request):
    return web.json_response({"count": evaluated})


@PromptServer.instance.routes.post("/montage_test/evict/{node}")
async def evict(request):
    (executor,) = (thing for thing in gc.get_objects() if isinstance(thing, PromptExecutor))
    cache = executor.caches.outputs
    key = cache.cache_key_set.get_data_key(request.match_info["node"])
    return web.json_response({"evicted": cache.cache.pop(key, None) is not None})
