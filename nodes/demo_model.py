"""The small trained model that this pack brings along, for its example workflows and tests."""
import comfy.sd
import folder_paths
from comfy_api.latest import io


class MontageDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MontageDemoModel",
            display_name="Montage Demo Model",
            category="montage",
            description="Loads Montage's own small model, so that its example workflows run without a download: 128x128 scenes like "
                        '"a red striped ball and a blue star on grass", in a second each on a CPU.',
            search_aliases=["tiny model", "test model"],
            outputs=[
                io.Model.Output("model", tooltip="A small UNet of SD1.x's structure."),
                io.Clip.Output("clip",
                               tooltip="Its text encoder. Words: colours, plain striped dotted checkered, ball box star ring tree house, in the "
                                       "sky, on grass, on sand, at night, by a brick wall, on snow."),
                io.Vae.Output("vae", tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls):
        from ..demo import family

        family.register()
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(family.WEIGHTS), embedding_directory=folder_paths.get_folder_paths("embeddings"))
        return io.NodeOutput(model, clip, vae)


NODES = [MontageDemoModel]
