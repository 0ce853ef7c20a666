"""Why a claim was not found, and why the two models differ, where that is known; and how it was tested."""

from typing import NamedTuple


class Cause(NamedTuple):
    why: str
    test: str


COPIES = Cause(
    "Latent blending copies the latents of the others' regions, where a composite computes every pixel anew. In the"
    " base's region, which neither copies, the composite keeps more.",
    "columns *of the others* and *of the base*, and the claim on the base's region alone",
)
OFFSET = Cause(
    "Gradient-domain blending leaves the base's pixels as they are, and moves the others' by a smooth offset, which is"
    " small between images of one prompt.",
    "columns *of the base* and *of the others*, with one prompt and with prompts of their own",
)
SAME_CUT = Cause(
    "Both cuts give nearly all pixels to the same images: around these objects colours say as much as keys.",
    "column *same as the cut in features*",
)
ALIKE = Cause(
    "Images of one prompt are alike where they meet: even pasted seams are weak.",
    "*seam* of the pixel paste, with one prompt and with prompts of their own",
)
NAMED = Cause(
    "The prompt names the subject's colour and texture, so that it gets them without the attention too.",
    'the section "with words that leave the look open": there SALQ brings the colours closer',
)
NOT_NAMED = Cause(
    "Not known. It is not that the prompt names the look.",
    'the section "with words that leave the look open": without SAGI it is the same there',
)
DRIFT = Cause(
    "Not known. It is not that PSNR counts the drift of every pixel, which SALQ holds back, and DINO does not.",
    'column *around* of "with words that leave the look open": by an embedding the order is not found either',
)
BLUNT = Cause(
    "Cut out, these toy objects of one shape are all alike to a network that has seen photographs.",
    "its embedding cosine with the subject is the same, within its interval, in all rows, while their colours differ",
)
TRAVELS = Cause(
    "Of what no word says, little but the direction of the texture travels through this UNet's self-attention.",
    'demo/README.md, "Does style travel through self-attention?"',
)
OUTLINE = Cause(
    "A subject fills its area, and the strongest 30 % of a map are larger and rounder than most objects here.",
    "the row of the subject whose place is given",
)
NOT_LEARNED = Cause(
    "Not known. It is not that the subject's LoRA has learned its look already.",
    'the section "with a weaker personalisation": the swap gains none with half the LoRA or without it either',
)
NONE_GAINED = Cause(
    "Where the reference brings no likeness, neither the layout can lose any nor the mask gain any.",
    "the row of the reference swap alone",
)
FULL = Cause("The prompt is followed nearly to the full already: there is nothing to gain.", "column *prompt*")
ROVING = Cause(
    "The subject's eight photos have it in different places, so that its LoRA does not tie it to one.",
    "column *spread of places*",
)
TOLD = Cause(
    "The layer's words name its colour and texture already, and leave little to a token of 60 steps.",
    "the row of another layer's embedding, which is further off: the token does carry the look",
)
SMALL = Cause("The difference is smaller than what these samples can show.", "by its interval")
UNKNOWN = Cause("not known", "not tested")

CAUSES = {  # (method, pattern of the claim): the first that fits
    ("Generative Photomontage", r"^keeps regions better than blended|^the same (in|by)|base's region alone"): COPIES,
    ("Generative Photomontage", r"gradient-domain"): OFFSET,
    ("Generative Photomontage", r"^a cut in feature space|^and in the composite"): SAME_CUT,
    ("Generative Photomontage", r"^seams more often"): ALIKE,
    ("Collage Diffusion", r"^in (colours|texture)"): TOLD,
    ("MCA-Ctrl", r"undescribed style|style too"): TRAVELS,
    ("MCA-Ctrl", r"background (is kept|looks)"): DRIFT,
    ("MCA-Ctrl", r"^without SALQ, the subject's colours"): NAMED,
    ("MCA-Ctrl", r"^without SAGI, the subject's colours"): NOT_NAMED,
    ("MCA-Ctrl", r"it looks (more|less) like"): BLUNT,
    ("MCA-Ctrl", r"right object"): OUTLINE,
    ("Layout-and-Retouch", r"^the later the switch, the better|follows the prompt better"): FULL,
    ("Layout-and-Retouch", r"likeness is lost|^the mask gains"): NONE_GAINED,
    (
        "Layout-and-Retouch",
        r"^the reference swap alone|^the whole method has|^and than the personalised model|like the photo",
    ): NOT_LEARNED,
    ("Layout-and-Retouch", r"freely|^and so does"): ROVING,
}

# What differs between the two models, by the claim that shows it: (method, pattern of the claim) -> why.
DIFFERENCES = {
    ("Generative Photomontage", "keeps regions better than blended latent diffusion"): (
        "A transformer's key says its place, so that a region is copied token by token, and a token is 2x2 latent"
        " pixels: it comes closer to what copying keeps."
    ),
    ("Collage Diffusion", r"puts more objects where their layers are than img2img"): (
        "Text and image share one softmax there: what is added to a word is taken from the image's tokens too."
    ),
    ("MCA-Ctrl", r"^the right object is there more often than with the prompt alone"): (
        "A transformer's queries look at their own place in the subject's image (RoPE); the keys are shifted for that."
    ),
    ("MCA-Ctrl", r"^with the shift the right object"): "A UNet's keys say no place: there is nothing to shift.",
    ("Layout-and-Retouch", "the whole method has more likeness than its layout"): (
        "Each model has a LoRA of its own, which has the look already; less is closer."
    ),
}
