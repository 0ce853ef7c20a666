"""Montage: one image out of several, composed inside a diffusion model's attention. The entrypoint for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from comfy_api.latest import ComfyExtension

    from .nodes import collage, demo_model, layout_retouch, localize, mca_ctrl, photomontage, record, textual_inversion

    class Montage(ComfyExtension):
        async def get_node_list(self):
            return [
                *record.NODES,
                *photomontage.NODES,
                *collage.NODES,
                *mca_ctrl.NODES,
                *textual_inversion.NODES,
                *layout_retouch.NODES,
                *localize.NODES,
                *demo_model.NODES,
            ]

    return Montage()
