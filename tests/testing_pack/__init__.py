"""A custom node pack for the tests' own server: takes one output out of ComfyUI's cache, as memory pressure would, and
loads a structure with random weights."""

import gc
import sys
from pathlib import Path

import folder_paths
from aiohttp import web
from execution import PromptExecutor
from server import PromptServer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from random_models import STRUCTURES, random_model, text_encoder  # noqa: E402


class Structure:
    """MODEL and CLIP of one of the tests' small structures."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": (list(STRUCTURES),)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "testing"

    def load(self, name):
        return random_model(name), text_encoder(name, embeddings=folder_paths.get_folder_paths("embeddings"))


NODE_CLASS_MAPPINGS = {"MontageTestStructure": Structure}


@PromptServer.instance.routes.post("/montage_test/evict/{node}")
async def evict(request):
    (executor,) = (thing for thing in gc.get_objects() if isinstance(thing, PromptExecutor))
    cache = executor.caches.outputs
    key = cache.cache_key_set.get_data_key(request.match_info["node"])
    return web.json_response({"evicted": cache.cache.pop(key, None) is not None})
