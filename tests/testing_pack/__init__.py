"""A custom node pack for the tests' own server: takes one output out of ComfyUI's cache, as memory pressure would."""
import gc

from aiohttp import web
from execution import PromptExecutor
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.post("/montage_test/evict/{node}")
async def evict(request):
    executor, = (thing for thing in gc.get_objects() if isinstance(thing, PromptExecutor))
    cache = executor.caches.outputs
    key = cache.cache_key_set.get_data_key(request.match_info["node"])
    return web.json_response({"evicted": cache.cache.pop(key, None) is not None})
