"""MCA-Ctrl (arXiv 2505.01428): a subject of one picture in a region of another, by self-attention over their masked
tokens.
"""

from typing import NamedTuple

import torch
from comfy_api.latest import io

from ..kernels import grid_masks
from ..patching.recipes import KEY, Branch, Patch, Recipe, begin_on, install
from ..patching.schedule import Window
from ..patching.sites import parse_sites
from ..patching.streams import check_together, streams_of, with_prompt
from .inputs import mask_of, numbers

LATE = "u2-"  # the paper's layers 9 to 15: the decoder from its last block at a quarter of the latent on


class Preset(NamedTuple):
    """Parts of the schedule (start, end) in which SAGI and SALQ act, and the blocks of SALQ; SAGI acts in all."""

    sagi: tuple
    salq: tuple
    salq_sites: str


PRESETS = {
    "notebook edit": Preset((0.0, 0.1), (0.1, 1.0), LATE),
    "notebook generation": Preset((0.02, 0.1), (0.1, 1.0), "all"),
    "paper swap": Preset((0.0, 0.4), (0.4, 0.96), LATE),
    "paper generation": Preset((0.0, 0.7), (0.7, 0.96), "d1-,m,u"),
}
CUSTOM = "custom"
FORWARD, REVERSE = "SAGI first", "SALQ first"


# ---------------------------------------------------------------- where the subject goes


class Parts(NamedTuple):
    """The tokens of a level that the subject feeds (front) and that the condition feeds (back), int64; how much of
    their results counts, [B, tokens, 1], and which of the back tokens each image may attend to, bool [B, tokens]. None:
    all.
    """

    front: torch.Tensor
    back: torch.Tensor
    front_weight: torch.Tensor | None = None
    back_weight: torch.Tensor | None = None
    allowed: torch.Tensor | None = None


class MaskArea:
    """The edited area M_C, given as a mask."""

    def __init__(self, mask):
        """mask: [H, W] bool, True where the subject goes."""
        self.mask, self.found = mask, {}

    def parts(self, session, grid, device):
        key = grid, device
        if key not in self.found:
            inside = grid_masks.cells(self.mask, grid).flatten()
            self.found[key] = Parts(*(part.nonzero()[:, 0].to(device) for part in (inside, ~inside)))
        return self.found[key]


class WordsArea:
    """The edited area M_C, from where the target looks for words while it samples (section 3.3): the running map of the
    last Token Attention Map on the MODEL, in each image for itself."""

    def __init__(self, share, soft):
        """share: of the tokens, that belong to the subject. soft: whether the others do in part."""
        self.share, self.soft = share, soft
        self.maps, self.found = None, {}

    def parts(self, session, grid, device):
        """None in the first step, before there is a map."""
        maps = session.maps[-1].before
        if maps is not self.maps:
            self.maps, self.found = maps, {}
        if maps is not None and grid not in self.found:
            self.found[grid] = self.parts_of(
                grid_masks.strongest(maps, grid, self.share, self.soft).flatten(1).to(device)
            )
        return self.found.get(grid)

    @staticmethod
    def parts_of(share):
        """share: of the subject, [B, tokens] in [0, 1]."""
        front, back = (part.any(0).nonzero()[:, 0] for part in (share > 0, share < 1))
        allowed = share[:, back] < 1
        allowed |= ~allowed.any(
            1, keepdim=True
        )  # an image that is all subject: its weight is 0, but there must be a key
        return Parts(front, back, share[:, front, None], 1 - share[:, back, None], None if allowed.all() else allowed)


# ---------------------------------------------------------------- the recipes


class MaskedAttention(Recipe):
    """Self-attention of the target: in the edited area over the subject's tokens, elsewhere over the condition's.

    Equations 6, 7, 10 and 11, as the released code reads them (7 and 11 are misprinted): M_C F_subject + (1 - M_C)
    F_condition, where F_subject attends to the tokens in M_S and F_condition to those outside M_C. Both by gathered
    queries and keys.
    """

    node = "Collaborative Attention"
    branches = True

    def __init__(self, window, subject, condition, subject_mask, area, fresh=None):
        """subject, condition: Streams, the condition None where the target is its own. subject_mask: M_S, [H, W] bool.
        area: MaskArea or WordsArea. fresh: where the target begins with noise of its own, [H, W] bool (None: nowhere).
        """
        super().__init__(window)
        self.condition, self.subject_mask, self.area, self.fresh = condition, subject_mask, area, fresh
        self.streams = (subject, condition) if condition else (subject,)
        self.subject_rows = {}

    def start(self, session, noise, latent_image, sigmas):
        """Begin where the condition began: z_T of the target is the condition's."""
        if not self.condition:
            return noise, latent_image, sigmas
        own, latent_image = begin_on(self.condition, self, session, noise, latent_image)
        if self.fresh is not None:
            own = torch.where(grid_masks.cells(self.fresh, session.size).to(own.device), noise, own)
        return own, latent_image, sigmas

    def rows_of_subject(self, grid, device):
        key = grid, device
        if key not in self.subject_rows:
            self.subject_rows[key] = grid_masks.cells(self.subject_mask, grid).flatten().nonzero()[:, 0].to(device)
        return self.subject_rows[key]

    def attn1(self, session, n, k, v, sources, grid):
        parts = self.area.parts(session, grid, n.device)
        if parts is None:
            return [Branch(n, k, v)]
        subject, condition = sources if self.condition else (*sources, n)
        branches = []
        if len(parts.front):
            keys = subject[:, self.rows_of_subject(grid, n.device)]
            branches.append(
                Branch(self.queries(n, subject)[:, parts.front], keys, keys, parts.front, parts.front_weight)
            )
        if len(parts.back):
            keys = condition[:, parts.back]
            branches.append(
                Branch(
                    self.queries(n, condition)[:, parts.back], keys, keys, parts.back, parts.back_weight, parts.allowed
                )
            )
        return branches

    def queries(self, target, source):
        raise NotImplementedError


class SAGI(MaskedAttention):
    """Self-attention global injection: the attention outputs of subject and condition themselves (section 3.3,
    equations 5 to 7).
    """

    def queries(self, target, source):
        return source


class SALQ(MaskedAttention):
    """Self-attention local query: the target asks, subject and condition answer (section 3.3, equations 8 to 11)."""

    def queries(self, target, source):
        return target


class BackgroundLock(Recipe):
    """Holds the latent outside the edited area on the condition's trajectory, and leaves the condition's own latent
    there in the end (the released code's LocalBlend, which is one step too noisy)."""

    node = MaskedAttention.node

    def __init__(self, condition, mask):
        """mask: M_C, [H, W] bool."""
        super().__init__(Window(0.0, 1.0, ()))
        self.condition, self.mask = condition, mask
        self.streams = (condition,)

    def locked(self, x, kept):
        """x [B, C, h, w] with the kept latent [1, C, h, w] outside the edited area."""
        return torch.where(grid_masks.cells(self.mask, x.shape[-2:]).to(x.device), x, kept.to(x))

    def at(self, session, key):
        run, row = self.condition
        return session.evaluation_of(self, run, key).x[row : row + 1]

    def final(self, session):
        """The condition's latent where the run at hand ends: its result, or on the way there."""
        run, row = self.condition
        sigma = session.sigmas[-1]
        if sigma == 0 and run.sigmas[-1] == 0:
            return run.final[row : row + 1]
        return session.model.model.process_latent_out(self.at(session, (sigma, run.visit_that_continues(sigma), 0)))

    def check(self, session):
        self.final(session)

    def latent(self, session, x):
        return self.locked(x, self.at(session, (*session.sigma_visit, 0)))

    def denoised(self, session, denoised):
        run, row = self.condition
        return self.locked(denoised, session.model.model.process_latent_in(run.final[row : row + 1]))

    def output(self, session, output):
        return self.locked(output, self.final(session))


# ---------------------------------------------------------------- the node


def window_inputs(name, start, end):
    return [
        io.Float.Input(
            f"{name.lower()}_start",
            default=start,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"Where in the schedule {name} begins: 0 is the first step.",
        ),
        io.Float.Input(
            f"{name.lower()}_end",
            default=end,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"Where in the schedule {name} ends: 1 is after the last step. At or below its start: no {name}.",
        ),
        io.String.Input(
            f"{name.lower()}_sites",
            default="all" if name == "SAGI" else LATE,
            tooltip=(
                f"The self-attention blocks of {name}: all, encoder, middle, decoder, or a list like d0-3,m0,u2-. "
                f"The paper: all for SAGI, {LATE} for SALQ when editing and all when generating."
            ),
        ),
    ]


class CollaborativeAttention(io.ComfyNode):
    NAME = MaskedAttention.node

    @classmethod
    def define_schema(cls):
        custom = io.DynamicCombo.Option(CUSTOM, [*window_inputs("SAGI", 0.0, 0.1), *window_inputs("SALQ", 0.1, 1.0)])
        return io.Schema(
            node_id="CollaborativeAttention",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Makes a model sample the subject of one picture into a region of another, or into a new picture, by"
                " attending to both while it samples (MCA-Ctrl): swap a subject, add one, or generate with one."
            ),
            search_aliases=[
                "mca-ctrl",
                "mca ctrl",
                "subject swap",
                "subject driven",
                "masactrl",
                "mutual self-attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the pictures were inverted or recorded with."),
                io.Latent.Input(
                    "subject",
                    tooltip="The picture that the subject is in, with its history: from Invert Image, or recorded.",
                ),
                io.Mask.Input("subject_mask", tooltip="The subject in its picture (M_S)."),
                io.Latent.Input(
                    "condition",
                    optional=True,
                    tooltip=(
                        "The picture to edit, with its history, of the same size. Leave it out to generate a new one:"
                        " the running picture is then its own background."
                    ),
                ),
                io.Mask.Input(
                    "edit_mask",
                    optional=True,
                    tooltip=(
                        "Where the subject goes (M_C): the object to replace, or an empty place. Leave it out to take"
                        " it from a Token Attention Map on the MODEL: where the prompt's words for the subject draw."
                    ),
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[*(io.DynamicCombo.Option(name, []) for name in PRESETS), custom],
                    tooltip=(
                        "When SAGI (attention outputs injected) and SALQ (keys and values offered) act. notebook: as in"
                        " the released notebooks; paper: as printed; custom: your own numbers."
                    ),
                ),
                io.Int.Input(
                    "dilation",
                    default=5,
                    min=0,
                    max=256,
                    tooltip="Grows edit_mask, in pixels of the picture (5 in the code, 1 in the paper, at 512 pixels).",
                ),
                io.Boolean.Input(
                    "background_lock",
                    default=True,
                    tooltip=(
                        "Holds everything outside the edited area at the condition, exactly. Needs condition and"
                        " edit_mask; without them it does nothing."
                    ),
                ),
                io.Boolean.Input(
                    "fresh_noise",
                    default=False,
                    tooltip=(
                        "Begins the edited area with the sampler's own noise (its seed matters then) instead of the"
                        " condition's. For adding to an empty place of an inverted picture, whose noise leads back to"
                        " the empty place. Needs condition and edit_mask."
                    ),
                ),
                io.Combo.Input(
                    "order",
                    options=[FORWARD, REVERSE],
                    default=FORWARD,
                    advanced=True,
                    tooltip="SALQ first is the paper's ablation: the two exchange their windows.",
                ),
                io.Float.Input(
                    "map_share",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Without edit_mask: the share of the picture, where the words draw most, that is the subject's"
                        " alone (code: 0.3)."
                    ),
                ),
                io.Combo.Input(
                    "map_form",
                    options=["soft", "hard"],
                    default="soft",
                    advanced=True,
                    tooltip=(
                        "Without edit_mask: outside that share the subject acts as strongly as the map says (soft), or"
                        " not at all (hard)."
                    ),
                ),
                io.Conditioning.Input(
                    "subject_positive",
                    optional=True,
                    tooltip=(
                        "Evaluates the subject's picture with its own prompt, as the paper does, instead of the one it"
                        " was inverted with. Costs a second evaluation for each step."
                    ),
                ),
                io.Conditioning.Input("condition_positive", optional=True, tooltip="The same for the condition."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt to go with them (paper: the sampler's)."
                ),
            ],
            outputs=[
                io.Model.Output(
                    "collaborating_model",
                    display_name="MODEL",
                    tooltip=(
                        "The model that attends to both pictures. Sample it with the sampler settings of their"
                        " histories."
                    ),
                ),
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip=(
                        "Where the condition started; KSampler may use any seed. Without a condition: an empty latent."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        subject,
        subject_mask,
        preset,
        dilation,
        background_lock,
        fresh_noise,
        order,
        map_share,
        map_form,
        condition=None,
        edit_mask=None,
        subject_positive=None,
        condition_positive=None,
        negative=None,
    ):
        numbers(
            cls.NAME, map_share=map_share, **{name: value for name, value in preset.items() if isinstance(value, float)}
        )
        subject = cls.stream("subject", subject)
        condition = cls.stream("condition", condition) if condition else None
        check_together(
            cls.NAME,
            [stream for stream in (subject, condition) if stream],
            model,
            names=["the subject", "the condition"],
        )
        size = cls.picture_size(model, subject)
        subject_mask = cls.mask("subject_mask", subject_mask, size)
        if not subject_mask.any():
            raise ValueError(
                f"{cls.NAME}: subject_mask is empty: nothing of the subject's picture is selected. Paint the subject,"
                " or lower the thresholds of what finds it."
            )
        if edit_mask is not None:
            area = MaskArea(grid_masks.dilate(cls.mask("edit_mask", edit_mask, size), dilation))
        elif model.attachments.get(KEY, Patch()).maps:
            area = WordsArea(map_share, map_form == "soft")
        else:
            raise ValueError(
                f"{cls.NAME}: there is no edit_mask, and no Token Attention Map on the MODEL to take it from. Connect"
                " one of them."
            )
        sagi, salq = cls.windows(model, preset, order)
        feeding = (
            cls.prompted(model, subject, subject_positive, negative),
            cls.prompted(model, condition, condition_positive, negative),
        )
        painted = condition and edit_mask is not None
        fresh = area.mask if painted and fresh_noise else None
        recipes = [
            recipe(window, *feeding, subject_mask, area, fresh)
            for recipe, window in ((SAGI, sagi), (SALQ, salq))
            if not window.empty
        ]
        if recipes and background_lock and painted:
            recipes.append(BackgroundLock(condition, area.mask))
        run, row = condition or subject
        latent = run.latent_image[row : row + 1] if condition else torch.zeros_like(run.latent_image[row : row + 1])
        return io.NodeOutput(install(model, *recipes), {"samples": latent})

    @classmethod
    def stream(cls, name, latent):
        streams = streams_of(f"{cls.NAME}: {name}", [latent])
        if len(streams) > 1:
            raise ValueError(
                f"{cls.NAME}: {name} is a batch of {len(streams)}, and one picture was expected. Pick one with Latent"
                " From Batch."
            )
        return streams[0]

    @classmethod
    def prompted(cls, model, stream, positive, negative):
        """The stream with prompts of its own, where they are given."""
        if positive is None or stream is None:
            return stream
        return with_prompt(stream, model, positive=positive, **({"negative": negative} if negative else {}))

    @classmethod
    def picture_size(cls, model, stream):
        """(height, width) of the pictures, in pixels."""
        scale = model.model.latent_format.spacial_downscale_ratio
        return tuple(scale * side for side in stream.run.size)

    @classmethod
    def mask(cls, name, mask, size):
        """A MASK input as bool at the size of the pictures."""
        mask = mask_of(cls.NAME, name, mask)
        (height, width), (h, w) = mask.shape[-2:], size
        if len(mask) > 1:
            raise ValueError(
                f"{cls.NAME}: {name} is a batch of {len(mask)}, and one mask was expected. Join them "
                "with MaskComposite, or connect one."
            )
        if abs(height / width - h / w) > 8 / min(h, w):
            raise ValueError(
                f"{cls.NAME}: {name} is {width}x{height} and the pictures are {w}x{h}, another shape. Use a mask of the"
                " picture."
            )
        return grid_masks.at_size(mask[0], size)

    @classmethod
    def windows(cls, model, preset, order):
        """The windows of SAGI and SALQ."""
        name = preset["preset"]
        chosen = PRESETS.get(name) or Preset(
            *((preset[f"{part}_start"], preset[f"{part}_end"]) for part in ("sagi", "salq")), preset["salq_sites"]
        )
        sagi, salq = (chosen.sagi, chosen.salq) if order == FORWARD else (chosen.salq, chosen.sagi)
        sites = []
        for part, text in (("sagi", preset.get("sagi_sites", "all")), ("salq", chosen.salq_sites)):
            try:
                sites.append(parse_sites(model, text))
            except ValueError as error:
                raise ValueError(f"{cls.NAME}: {part}_sites: {error}") from None
        if max(sagi[0], salq[0]) < min(sagi[1], salq[1]) and set(sites[0]) & set(sites[1]):
            raise ValueError(
                f"{cls.NAME}: SAGI ({sagi[0]:g} to {sagi[1]:g}) and SALQ ({salq[0]:g} to {salq[1]:g}) overlap in the"
                " same blocks. Let one begin where the other ends: each makes the whole attention of a block."
            )
        return Window(*sagi, sites[0]), Window(*salq, sites[1])


NODES = [CollaborativeAttention]
