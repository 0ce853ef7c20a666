"""Montage: one image out of several, composed inside a diffusion model's attention. The entrypoint for ComfyUI."""
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from comfy_api.latest import ComfyExtension

    from .nodes import collaborate, collage, demo_model, learn, localize, montage, record, retouch

    class Montage(ComfyExtension):
        async def get_node_list(self):
            return [*record.NODES, *montage.NODES, *collage.NODES, *collaborate.NODES, *learn.NODES, *retouch.NODES, *localize.NODES, *demo_model.NODES]

    return Montage()
