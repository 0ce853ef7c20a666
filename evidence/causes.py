"""Why a claim was not found, and why the two models differ, where that is known; and how it was tested."""

from typing import NamedTuple


class Cause(NamedTuple):
    why: str
    test: str


COPIES = Cause(
    "Latent blending copies the latents of the other images' regions, whereas a composite computes every pixel again."
    " In the base's region, which neither copies, the composite preserves more.",
    "columns *other regions* and *base region*, and the claim about the base's region",
)
OFFSET = Cause(
    "Gradient-domain blending leaves the base's pixels as they are, and shifts the others' by a smooth offset, which is"
    " small between images of one prompt.",
    "columns *base region* and *other regions*, with one prompt and with different ones",
)
SAME_CUT = Cause(
    "Both cuts assign nearly all pixels to the same images: around these objects, colours say as much as keys.",
    "column *agreement*",
)
ALIKE = Cause(
    "Images of one prompt are alike where they meet: even pasted seams are weak.",
    "*seam* of the pixel paste, with one prompt and with different ones",
)
NAMED = Cause(
    "The prompt names the subject's colour and texture, so they appear without the attention too.",
    'the section "prompts that leave the appearance open": there, SALQ brings the colours closer',
)
NOT_NAMED = Cause(
    "Unknown. It is not that the prompt names the appearance.",
    'the section "prompts that leave the appearance open": without SAGI, the result is the same there',
)
DRIFT = Cause(
    "Unknown. It is not that PSNR, unlike DINO, counts the drift of every pixel, which SALQ suppresses.",
    'column *surroundings* of "prompts that leave the appearance open": an embedding does not show the order either',
)
BLUNT = Cause(
    "Cut out, these toy objects of one shape are all alike to a network that was trained on photographs.",
    "its embedding cosine with the subject is the same in all rows, within the interval, while their colours differ",
)
TRAVELS = Cause(
    "Of what the prompt does not name, this UNet's self-attention carries little but the direction of the texture.",
    'demo/README.md, "Does style travel through self-attention?"',
)
OUTLINE = Cause(
    "A subject fills its area, and the strongest 30 % of a map are larger and rounder than most objects here.",
    "the row of the subject with its place given",
)
NOT_LEARNED = Cause(
    "Unknown. It is not that the subject's LoRA has already learned the appearance.",
    'the section "with a weaker personalisation": the swap gains none with half the LoRA or without it either',
)
NONE_GAINED = Cause(
    "Where the reference brings no likeness, the layout cannot lose any and the mask cannot gain any.",
    "the row of the reference swap alone",
)
FULL = Cause("The prompt is already followed almost completely: there is nothing to gain.", "column *prompt*")
ROVING = Cause(
    "The subject's eight photos show it in different places, so its LoRA does not tie it to one.",
    "column *spread of places*",
)
TOLD = Cause(
    "The layer's words already name its colour and texture, and leave little for an embedding of 60 steps to learn.",
    "the row of another layer's embedding, which is further off: the embedding does carry the appearance",
)
ALL_BLOCKS = Cause(
    "In part that SALQ reads the subject in all blocks when generating: in the first third alone, the right object is"
    " present more often. In part the outline, as on the UNet.",
    'the last claim of "the blocks that read the subject", and the row of the subject with its place given',
)
ALL_READ = Cause(
    "All blocks read more of the reference, its composition as well: they preserve less of the layout.",
    "the claim after it",
)
SMALL = Cause("The difference is smaller than these samples can show.", "its interval")
UNKNOWN = Cause("Unknown.", "not tested")

CAUSES = {  # (method, pattern of the claim): the first that fits
    ("Generative Photomontage", r"^preserves regions better than blended|^preserves the base's region"): COPIES,
    ("Generative Photomontage", r"gradient-domain"): OFFSET,
    ("Generative Photomontage", r"^a cut in feature space"): SAME_CUT,
    ("Generative Photomontage", r"^has seams within"): ALIKE,
    ("Collage Diffusion", r"closer to its input.* \((colours|texture)\)$"): TOLD,
    ("MCA-Ctrl", r"style error"): TRAVELS,
    ("MCA-Ctrl", r"background (is preserved|looks)"): DRIFT,
    ("MCA-Ctrl", r"^without SALQ, the subject's colours"): NAMED,
    ("MCA-Ctrl", r"^without SAGI, the subject's colours"): NOT_NAMED,
    ("MCA-Ctrl", r"it looks (more|less) like"): BLUNT,
    ("MCA-Ctrl", r"right object"): OUTLINE,
    ("Layout-and-Retouch", r"\(0.5, not 0.1\), the better|(blending|full method) follows the prompt better"): FULL,
    ("Layout-and-Retouch", r"^with the layout first, there is less|^the mask blend gains"): NONE_GAINED,
    (
        "Layout-and-Retouch",
        r"^the reference swap alone (gains|looks)|^the full method (has|looks) more",
    ): NOT_LEARNED,
    ("Layout-and-Retouch", r"varies the object's place"): ROVING,
}

# Causes that hold on the transformer alone; they go before the others.
CAUSES_ON_DIT = {
    ("MCA-Ctrl", r"^(soft|hard) map: the right object"): ALL_BLOCKS,
    ("Layout-and-Retouch", r"likeness than in all blocks"): ALL_READ,
    ("MCA-Ctrl", r"style error|^with fresh noise"): SMALL,
}

# What differs between the two models, by the claim that shows it: (method, pattern of the claim) -> why.
DIFFERENCES = {
    ("Generative Photomontage", r"^preserves regions better than blended latent diffusion \(PSNR\)"): (
        "A transformer's keys carry their position, so a region is copied token by token, and a token is 2x2 latent"
        " pixels: that comes closer to what copying preserves."
    ),
    ("Collage Diffusion", r"in place than img2img"): (
        "Text and image tokens share one softmax there: attention added to a word is taken from the image's tokens too."
    ),
    ("Collage Diffusion", r"^a layer with denoise 0.3"): (
        "No difference: denoise per layer acts on the latent, not in the attention; a flow's time stands for the UNet's"
        " time steps."
    ),
    ("MCA-Ctrl", r"^the right object is present more often than with the prompt alone"): (
        "A transformer's queries look at their own position in the subject's image (RoPE); the keys are shifted for"
        " that."
    ),
    ("MCA-Ctrl", r"^with the shift, the right object"): "A UNet's keys carry no position: there is nothing to shift.",
    ("MCA-Ctrl", r"^with SALQ in the first third, the right object.* all blocks"): (
        "A transformer has no decoder to read the subject in: the blocks were chosen by measurement, on other scenes."
    ),
    ("MCA-Ctrl", r"^with fresh noise"): (
        "On the transformer the subject often arrives from the picture's own inverted noise already: first row there."
    ),
    ("MCA-Ctrl", r"^soft map: the right object"): (
        "Read in all of the transformer's blocks, the subject disturbs the object; in the first third alone, less so."
    ),
    ("Layout-and-Retouch", r"^with the reference in the last half, the layout"): (
        "A transformer has no levels to name blocks by: they were chosen by measurement, on other scenes."
    ),
    ("Layout-and-Retouch", "the full method has more likeness than its layout"): (
        "Each model has a LoRA of its own, which has the appearance already; a smaller colour distance is closer."
    ),
}
