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
    "Gradient-domain blending leaves the base's pixels as they are, and shifts the others' colours by a smooth offset:"
    " what it gains in the base's region it loses in the others.",
    "columns *base region* and *other regions*",
)
SAME_CUT = Cause(
    "Both cuts assign nearly all pixels to the same images: around these objects, colours say as much as keys.",
    "column *agreement*",
)
NAMED = Cause(
    "The prompt names the subject's colour and texture, so they appear without the attention too.",
    'the section "prompts that leave the appearance open": there, SALQ brings the colours closer',
)
LAYOUT = Cause(
    "SAGI sets the layout (the paper, section 3.3), which these pairs have already: objects of one shape, and exact"
    " masks. The appearance is SALQ's.",
    'the section "prompts that leave the appearance open": without SALQ, colours and likeness are further off, without'
    " SAGI hardly",
)
EXACT = Cause(
    "Dilation makes up for masks that miss the object's rim, and these masks are exact.",
    "without dilation the subject is the same, and more of the background is preserved",
)
FED = Cause(
    "SAGI and SALQ both feed the background from the picture that is edited, so each preserves it, in either order.",
    "column *background*: the row of the prompt alone is further off than those without SALQ or without SAGI",
)
OUTLINE = Cause(
    "A subject fills its area, and the strongest 30 % of a map are larger and rounder than most objects here.",
    "the row of the subject with its place given",
)
LEARNED = Cause(
    "The subject's LoRA has learned the appearance already, and leaves little for the reference to add.",
    'the section "with a weaker personalisation": without the LoRA, the swap gains likeness',
)
CHANGED = Cause(
    "The swap takes the reference's outline and surroundings too, which the network sees. It brings the colours closer"
    " where the LoRA has not learned them.",
    'columns *embedding cosine* and *colour distance* of the section "with a weaker personalisation"',
)
FEW_STEPS = Cause(
    "The first two of ten steps decide little of this model's layout: the swap then loses it all the same.",
    "column *layout like the base model's*: the rows of the swap with the layout first and without it, and with the"
    " mask, which does preserve it",
)
NONE_GAINED = Cause(
    "Where the reference brings no likeness, the layout cannot lose any and the mask cannot gain any.",
    "the row of the reference swap alone",
)
FULL = Cause(
    "The prompt is already followed almost completely: there is nothing to gain, and what the swap loses of it the mask"
    " does not quite bring back.",
    "column *prompt*",
)
ROVING = Cause(
    "The subject's eight photos show it in different places, so its LoRA does not tie it to one.",
    "column *spread of places*",
)
CANNOT_TELL = Cause(
    "The figure cannot tell: photos of one subject score no higher than a plain ball.",
    'demo/README.md, "What does not work yet"',
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
    ("Collage Diffusion", r"closer to its input.* \(texture\)$"): CANNOT_TELL,
    ("MCA-Ctrl", r"background (is preserved|looks)"): FED,
    ("MCA-Ctrl", r"^without SALQ, (the subject's colours|it looks)"): NAMED,
    ("MCA-Ctrl", r"^without SAGI, (the subject's colours|the style error|it looks)"): LAYOUT,
    ("MCA-Ctrl", r"^without dilation, the subject's colours"): EXACT,
    ("MCA-Ctrl", r"right object"): OUTLINE,
    ("Layout-and-Retouch", r"\(0.5, not 0.1\), the better|(blending|full method) follows the prompt better"): FULL,
    ("Layout-and-Retouch", r"^with the layout first, there is less|^the mask blend gains"): NONE_GAINED,
    ("Layout-and-Retouch", r"^the reference swap alone gains|^the full method has more"): LEARNED,
    ("Layout-and-Retouch", r"^the (reference swap alone|full method) looks more"): CHANGED,
    ("Layout-and-Retouch", r"^with the layout first, the prompt"): FEW_STEPS,
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
