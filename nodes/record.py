"""Recording what a sampler does, so that other images can be composed from it."""
from comfy_api.latest import io

from ..patching.recipes import install
from ..patching.streams import LATENT_KEY, Recording

MEBIBYTE = 2**20


class FeatureRecorder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatureRecorder",
            display_name="Feature Recorder",
            category="montage",
            description="Records how a sampler makes its images, so that Graph Cut Montage and Composite Attention Inject "
                        "can build one image out of them. Wire MODEL and LATENT through it into one sampler; what that sampler "
                        "returns carries the recording.",
            search_aliases=["record attention", "generative photomontage", "stack", "montage recorder"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with whatever patches the images are to have."),
                io.Latent.Input("latent", tooltip="The latent that the sampler starts from. A batch of N is a stack of N images."),
                io.Int.Input("cache_mb", default=1024, min=0, max=1_000_000, step=64, tooltip=(
                    "Main memory that attention features may take, in MiB. Inside it a composite costs little more than a plain "
                    "run; beyond it (or at 0) the images are replayed, which gives the same picture, stores a few MB and costs "
                    "one more model evaluation per image and step. SD1.5 at 512x512: about 44 MiB per image and step in fp16.")),
            ],
            outputs=[
                io.Model.Output("recorded_model", display_name="MODEL", tooltip="The model that records. Connect it to one sampler."),
                io.Latent.Output("recorded_latent", display_name="LATENT", tooltip="The same latent, carrying the recording. Connect it to the same sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, cache_mb):
        recording = Recording(budget=cache_mb * MEBIBYTE)
        return io.NodeOutput(install(model, recording=recording), {**latent, LATENT_KEY: recording})


NODES = [FeatureRecorder]
