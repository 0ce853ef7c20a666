"""Layout-and-Retouch (arXiv 2407.09779): a personal subject in a layout of the plain model."""
from comfy_api.latest import io

from ..patching.crossmap import TokenMap, marked
from ..patching.recipes import install
from ..patching.sites import parse_sites
from ..patching.streams import LATENT_KEY, Recording
from ..patching.tokens import token_runs


class TokenAttentionMap(io.ComfyNode):
    NAME = "Token Attention Map"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TokenAttentionMap",
            display_name=cls.NAME,
            category="montage",
            description="Measures where a model looks for some words of its prompt while it samples: the running mean of its cross-attention maps. "
                        "Nodes behind it on the MODEL read the map during the run; the sampled LATENT carries the finished one.",
            search_aliases=["cross attention map", "attention heatmap", "daam", "layout and retouch"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model. It samples as before, bit for bit."),
                io.Latent.Input("latent", tooltip="The latent that the sampler starts from."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="The positive prompt."),
                io.String.Input("words", tooltip="What to look for, as it stands in the prompt. Several phrases, separated by commas, count together; "
                                                 "so do all occurrences of one."),
                io.String.Input("sites", default="d@2-4,u@2-4", advanced=True,
                                tooltip="The cross-attention blocks to look at. d@2-4,u@2-4: down and up path at 1/2 and 1/4 of the latent."),
            ],
            outputs=[
                io.Model.Output("measuring_model", display_name="MODEL", tooltip="The model that measures. Connect it to one sampler."),
                io.Latent.Output("measuring_latent", display_name="LATENT",
                                 tooltip="The same latent. Connect it to the same sampler: what that returns carries the map to Adaptive Mask Blend."),
                io.Conditioning.Output("conditioning", display_name="CONDITIONING",
                                       tooltip="The prompt, encoded. Connect it to the same sampler's positive: only where it acts is measured."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, clip, prompt, words, sites):
        try:
            found = parse_sites(model, sites)
        except ValueError as error:
            raise ValueError(f"{cls.NAME}: sites: {error}") from None
        token_map = TokenMap(words, prompt, tokens_of(cls.NAME, clip, prompt, words), found)
        recording = Recording()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return io.NodeOutput(install(model, recording=recording, token_map=token_map), {**latent, LATENT_KEY: recording}, marked(conditioning, prompt))


def tokens_of(node, clip, prompt, words):
    """The token positions of comma-separated phrases in a prompt, all occurrences."""
    try:
        runs = [run for phrase in words.split(",") for run in token_runs(clip, prompt, phrase.strip())]
    except ValueError as error:
        raise ValueError(f"{node}: words: {error}") from None
    return tuple(sorted({token for run in runs for token in run}))


NODES = [TokenAttentionMap]
