"""What can be refused: before sampling wherever it is known by then, in one sentence that names the node to change."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from comfy.model_patcher import ModelPatcher

from . import internals
from .models import Site, SiteHandler, TextAttention, family_of
from .recipe import Recipe, never_acts
from .schedule import Window, in_words, position, why_apart
from .streams import CondRole, Run
from .weights import Weights

if TYPE_CHECKING:
    from .session import Session

# guidance that perturbs the middle block's self-attention and therefore needs it in one piece
WHOLE_MIDDLE_BLOCK = {"nodes_pag": "Perturbed-Attention Guidance", "nodes_sag": "Self-Attention Guidance"}
# what merges or tiles the tokens of an attention, and what resizes the picture inside the UNet, by their modules
CUT_TOKENS = {"nodes_tomesd": "ToMe", "nodes_hypertile": "HyperTile"}
RESIZING = {"nodes_model_downscale": "Deep Shrink"}
# nodes that skip evaluations or blocks and give an earlier result again, by the keys of their wrappers
CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache", "teacache": "TeaCache", "fbcache": "First Block Cache"}

# ---------------------------------------------------------------- before sampling


def before_sampling(session: Session) -> None:
    """Refuse a run that cannot give what the nodes on its MODEL promise. Changes nothing."""
    model = session.context.model
    if session.names:
        _check_latent(session.names, model, session.noise)
        _check_context_windows(session.names, session.biased_nodes, model)
        _check_caches(session.names, session.guider.model_options)
        _check_skips(session.names, session.guider.model_options)
    for recipe in session.recipes:
        for run in dict.fromkeys(stream.run for stream in recipe.followed):
            check_run(session, recipe, run)
        recipe.check(session.context)
    _check_several_terms(session)
    _check_guidance(session)
    _check_windows(session)
    _check_biases(session)


def _check_latent(names: str, model: Any, noise: Any) -> None:
    """Refuse a latent of another autoencoder; an empty one ComfyUI has made fit by now."""
    latents = model.model.latent_format
    if noise.ndim != latents.latent_dimensions + 2 or noise.shape[1] != latents.latent_channels:
        raise ValueError(
            f"{names}: the latent has the shape {'x'.join(map(str, noise.shape))}, and this MODEL works on"
            f" {latents.latent_channels} channels of a {'picture' if latents.latent_dimensions == 2 else 'video'}: it"
            " was made with another VAE. Encode the picture with the MODEL's own VAE."
        )


def _check_windows(session: Session) -> None:
    """Refuse a node in whose windows no step lies. One of several windows may hold none (a preset at few steps): the
    log says so.
    """
    steps = len(session.context.sigmas) - 1
    for recipes in session.groups:
        if never_acts(recipes, session.context):
            raise would_never_act(recipes[0].node, [r.window for r in recipes if r.window.sites], steps)
        for recipe in recipes:
            if recipe.window.sites and never_acts([recipe], session.context):
                logging.warning(
                    "%s: none of the %d steps lies in its window %g to %g, so that this part of it does nothing.",
                    recipe.node,
                    steps,
                    recipe.window.start,
                    recipe.window.end,
                )
    for bias, _ in session.biases.values():
        sigmas = session.context.sigmas
        if not any(bias.window.has(position(sigma, sigmas)) for sigma in sigmas[:-1]):
            raise would_never_act(bias.node, [bias.window], steps)


def would_never_act(node: str, windows: Sequence[Window], steps: int) -> ValueError:
    found = " and ".join(f"{window.start:g} to {window.end:g}" for window in windows)
    return ValueError(
        f"{node}: it would have no effect: none of the {steps} sampled steps lies in its window ({found}). Widen the"
        " window, sample more steps, or disconnect the node."
    )


def _check_context_windows(names: str, biased: str, model: Any) -> None:
    if internals.has_context_windows(model):
        what = "the canvas" if names == biased else "what was recorded"
        raise ValueError(
            f"{names}: context windows cut the latent into pieces that do not match {what}. "
            "Disconnect the context window node from this MODEL."
        )
    if internals.is_split_over_devices(model) and names != biased:
        raise ValueError(
            f"{names}: the work on this MODEL is split over several devices, which run on copies of it that"
            " cannot be recorded or composed together. Set MultiGPU CFG Split to one device, or disconnect it."
        )


def _check_caches(names: str, options: dict) -> None:
    for key in internals.wrapper_keys(options):
        name = next((title for word, title in CACHES.items() if word in key.lower().replace("_", "")), None)
        if name:
            raise ValueError(
                f"{names}: {name} on this MODEL skips evaluations of the model, so that a run can be neither recorded"
                f" nor composed. Disconnect {name}, for the recorded images and for this run."
            )


def _check_skips(names: str, options: dict) -> None:
    """Refuse guidance that evaluates a transformer with some of its blocks left out."""
    functions = [*options.get("sampler_post_cfg_function", ()), options.get("sampler_calc_cond_batch_function")]
    if any(internals.module_name(function) == "nodes_slg" for function in functions if function is not None):
        raise ValueError(
            f"{names}: Skip Layer Guidance evaluates this MODEL with blocks left out, so that a run can be neither"
            " recorded nor composed. Disconnect Skip Layer Guidance, for the recorded images and for this run."
        )


def check_frames(names: str, shape: tuple[int, ...]) -> None:
    """Refuse a latent of several frames."""
    if names and len(shape) == 5 and shape[2] > 1:
        raise ValueError(
            f"{names}: the latent has {shape[2]} frames, and only single pictures can be recorded and composed. Give a"
            " latent of length 1."
        )


def check_run(session: Session, recipe: Recipe, run: Run) -> None:
    """Refuse a recorded run that a recipe cannot follow here."""
    context = session.context
    if run.composed:
        raise ValueError(
            f"{recipe.node}: one of its images is itself a composite ({run.composed}). Use the images that it was made"
            " from."
        )
    check_size(recipe, run, context.size)
    _check_weights(recipe, run.weights, session.weights)
    if not set(context.sigmas[:-1]) <= set(run.sigmas):
        raise ValueError(
            f"{recipe.node}: its images were recorded over {in_words(run.sigmas)} and this run takes"
            f" {in_words(context.sigmas)}. Set the sampler's steps, scheduler and denoise to those of the recording;"
            " for a detailer or a second pass over an image, use the MODEL before this node."
            f"{why_apart(run.sigmas, context.sigmas)}"
        )
    _check_whole(session, recipe, run)
    if any("hooks" in cond for group in run.conds.values() for cond in group):
        raise ValueError(
            f"{recipe.node}: its images were recorded with hooks on their conditioning (a LoRA for one prompt,"
            " prompt-control's COUPLE), which cannot be replayed. Apply the LoRA to the MODEL instead, and write the"
            " prompt without COUPLE."
        )
    _check_resizing(recipe, run, session.guider.model_options)


def _check_whole(session: Session, recipe: Recipe, run: Run) -> None:
    """Refuse a run of which only the first steps were recorded, for steps after them."""
    context, last = session.context, min(sigma for sigma, _, _ in run.evaluations)
    needed = [sigma for sigma in context.sigmas[:-1] if recipe.acts_at(context, sigma)]
    missing = [sigma for sigma in needed if sigma < 0.999 * last]
    if missing:
        raise ValueError(
            f"{recipe.node}: {len(missing)} of its {len(needed)} steps were not recorded. A Step Blend Sampler needs a"
            " Feature Recorder on the MODEL of each part that is to be read: record all steps by one MODEL, or narrow"
            " the window of this node to the steps that were recorded."
        )


def _check_resizing(recipe: Recipe, run: Run, options: dict) -> None:
    """Refuse what makes blocks compute another number of tokens on one side only."""
    here = internals.patching_modules(options)
    there = set().union(*map(internals.patching_modules, run.options))
    for module, name in RESIZING.items():
        if (module in here) != (module in there):
            where = "this MODEL and not on that of its images" if module in here else "the MODEL of its images alone"
            raise ValueError(
                f"{recipe.node}: {name} resizes what a block computes, and it is on {where}. Disconnect {name}, or put"
                " it on both with the same settings."
            )


def _check_weights(recipe: Recipe, recorded: Weights, here: Weights) -> None:
    """What a MODEL is sampled with is known only now: other nodes may have changed it behind ours."""
    same = recorded.same_as(here) if recipe.same_weights else recorded.same_sampling(here)
    if not same:
        was, now = recorded.told_apart(here)
        raise ValueError(
            f"{recipe.node}: its images were recorded with {was}, but the MODEL that is sampled is {now}. Put what"
            " changes the MODEL (a LoRA, model sampling) before the Feature Recorder and before this node, the same for"
            " all."
        )


def check_size(recipe: Recipe, run: Run, size: tuple[int, int]) -> None:
    if run.size != size:
        raise ValueError(
            f"{recipe.node}: its images were recorded at {run.size[0]}x{run.size[1]} latent pixels and this run "
            f"has {size[0]}x{size[1]}. Sample the LATENT that the node gives, or one of its size; for a detailer, use"
            " the MODEL before this node."
        )


def _check_several_terms(session: Session) -> None:
    """Refuse two recipes that would both feed one attention from several images."""
    for sigma in session.context.sigmas[:-1]:
        owner: dict[Site, Recipe] = {}
        for recipe in session.acting(sigma):
            for site in recipe.window.sites if recipe.several_terms else ():
                if site in owner:
                    raise ValueError(
                        f"{recipe.node}: at sigma {sigma:.4g} {owner[site].node} already feeds the attention of"
                        f" block {tuple(site)} from several images, and only one node can. Give the two nodes"
                        " windows or sites that do not overlap."
                    )
                owner[site] = recipe


def _check_guidance(session: Session) -> None:
    """Refuse guidance that would take one term of the middle block's attention for all of it."""
    modules = internals.patching_modules(session.guider.model_options)
    found = next((WHOLE_MIDDLE_BLOCK[module] for module in WHOLE_MIDDLE_BLOCK if module in modules), None)
    cuts = next((CUT_TOKENS[module] for module in CUT_TOKENS if module in modules), None)
    for recipe in session.recipes:
        if cuts and (recipe.several_terms or recipe.longer_keys):
            raise ValueError(
                f"{recipe.node}: {cuts} on this MODEL expects attention over the tokens of one image, and here it spans"
                " those of several images. Disconnect HyperTile, ToMe and the like from this MODEL."
            )
        if found and recipe.several_terms and any(site.block == "middle" for site in recipe.window.sites):
            raise ValueError(
                f"{recipe.node}: {found} needs the middle block's attention in one"
                " piece, and here it is put together from several images. Disconnect it from this MODEL,"
                " or leave the middle block out of the sites."
            )


def _check_biases(session: Session) -> None:
    if not session.heeds_bias:
        return
    if not session.biases:
        raise ValueError(
            "Collage Cross Attention: its MODEL is sampled without its CONDITIONING. Connect both to the sampler: the"
            " conditioning as positive."
        )
    for bias, _ in session.biases.values():
        check_shape(bias.node, bias.size, session.context.size)


def check_shape(node: str, canvas: Sequence[int], latent: Sequence[int]) -> None:
    """Refuse a latent of other proportions than the canvas; it may be of another size."""
    (height, width), (h, w) = canvas, latent
    if abs(h * width - w * height) > width + height:  # more than a row or column of latent pixels
        raise ValueError(
            f"{node}: the canvas is {width}x{height} and the latent {w}x{h}, another shape. Sample the encoded image of"
            " Collage Canvas, or a latent of its proportions."
        )


# ---------------------------------------------------------------- while sampling


def check_tokens(
    names: str, size: tuple[int, int], latent_size: tuple[int, int], tokens: int, grid: tuple[int, int]
) -> None:
    """Refuse an attention over anything but the whole latent."""
    if latent_size != size or tokens != grid[0] * grid[1]:
        raise ValueError(
            f"{names}: the model is run on {latent_size} of {size[0]}x{size[1]} latent"
            f" pixels ({tokens} tokens for a grid of {grid[0]}x{grid[1]}). Areas and tiles do not"
            " match what was recorded: use masks instead of areas, and disconnect what cuts the latent into"
            " tiles."
        )


def resized(recipe: Recipe, site: Site, recorded: int, here: int) -> ValueError:
    return ValueError(
        f"{recipe.node}: another node resizes what block {tuple(site)} computes: {recorded} tokens for its images and"
        f" {here} in this run. Disconnect it (Deep Shrink does this), or put it on both with the same settings."
    )


def other_batch(names: str, images: int, evaluated: int) -> ValueError:
    return ValueError(
        f"{names}: another node evaluates the model on {evaluated} of the {images} images of this run (context windows"
        " of its own, as AnimateDiff-Evolved has), so that it is unclear which they are. Disconnect it from this"
        " MODEL."
    )


def other_guider(names: str, guider: str) -> ValueError:
    return ValueError(
        f"{names}: {guider}, or a node on this MODEL, evaluates the model past the guider's predict_noise, so that its"
        " steps cannot be told. Use CFG Guider or one that is built on it, and disconnect nodes that sample by"
        " themselves."
    )


def other_noise(names: str) -> ValueError:
    return ValueError(
        f"{names}: another node changes the noise after this run was begun (sample settings, a noise of its own), so"
        " that it does not start where its images did. Disconnect it from this MODEL, and give the noise to the sampler"
        " instead."
    )


def check_measured(names: str, size: tuple[int, int], latent_size: tuple[int, int]) -> None:
    if latent_size != size:
        raise ValueError(
            f"{names}: the model is run on {latent_size} of {size[0]}x{size[1]}"
            " latent pixels, but the attention map must cover the whole image. Use masks instead of areas, and"
            " disconnect what cuts the latent into tiles."
        )


def check_biased(node: str, size: tuple[int, int], attention: TextAttention) -> None:
    """Refuse a biased attention over anything but the whole latent, or over a batch that another node changed."""
    tokens, grid = attention.q.shape[1], attention.grid
    if attention.latent_size != size or tokens != grid[0] * grid[1]:
        raise ValueError(
            f"{node}: the model is run on {attention.latent_size} of {size[0]}x{size[1]} latent"
            f" pixels ({tokens} tokens for a grid of {grid[0]}x{grid[1]}). Areas and tiles do not match the canvas:"
            " use masks instead of areas, and disconnect what cuts the latent into tiles."
        )
    if attention.q.shape[0] != attention.images:
        raise ValueError(
            f"{node}: another node (an attention couple, for instance) multiplies the batch inside cross-attention."
            " Disconnect it from this MODEL."
        )


def check_read(node: str, model: ModelPatcher, positions: Iterable[int]) -> None:
    """Refuse words that stand behind the last token of a prompt that the model reads. positions: of the words."""
    most, last = family_of(model).most_text_tokens, max(positions, default=0)
    if most is not None and last >= most:
        raise ValueError(
            f"{node}: the words stand at token {last + 1} of the prompt, and this model reads the first {most}. Shorten"
            " the prompt, or write the words further to the front."
        )


def check_text(node: str, tokens: int, length: int) -> None:
    """Refuse a text that another node has changed on its way to the model (NegPip and its kin)."""
    if length % tokens:
        raise ValueError(
            f"{node}: the model reads {length} text tokens and the conditioning has {tokens}: another node changes the"
            " text inside cross-attention. Disconnect it from this MODEL."
        )


def never_reached(node: str, missing: Sequence[Site], wanted: int, what: str = "attention") -> RuntimeError:
    return RuntimeError(
        f"{node}: the {what} of {len(missing)} of its {wanted} blocks was never "
        f"reached, the first of them {tuple(missing[0])}. Another node runs these blocks in its own way: "
        "disconnect it from this MODEL, or leave the blocks out."
    )


class OfAttention(SiteHandler):
    """What can be refused inside an attention. names: of the nodes on the MODEL."""

    def __init__(self, names: str) -> None:
        self.names = names

    def wrong_result(self, site: Site, got: tuple[int, ...], queries: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"{self.names}: another node replaces the self-attention of block {tuple(site)} and gave {got} for queries"
            f" of {queries}: it cannot be combined with attention that is composed from several images. Disconnect it"
            " (Perturbed-Attention Guidance does this), or leave the block out."
        )

    def wrong_rows(self, site: Site, got: tuple[int, ...], wanted: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"{self.names}: another node cuts the tokens of block {tuple(site)} after they were composed ({got} of"
            f" {wanted} in q, k and v). Disconnect HyperTile, ToMe and the like from this MODEL."
        )

    def wrong_tokens(self, site: Site, got: tuple[int, ...], wanted: str) -> ValueError:
        return ValueError(
            f"{self.names}: the attention of block {tuple(site)} has {got} instead of {wanted} and their text:"
            " another node changes the tokens or the batch inside the model, or adds reference images in a"
            " way that is not known. Disconnect it from this MODEL."
        )

    def skipped(self, blocks: Sequence[Site]) -> RuntimeError:
        return RuntimeError(
            f"{self.names}: {len(blocks)} blocks of the model were left out or run more than once, the first of them"
            f" {tuple(blocks[0])}. Disconnect what skips blocks (Skip Layer Guidance, TeaCache and the like) from this"
            " MODEL."
        )

    def references(self, title: str) -> ValueError:
        return ValueError(
            f"{self.names}: the conditioning carries reference images, whose tokens cannot be told from the picture's"
            f" own in {title}. Take them out of the conditioning; Flux.1 Kontext, Flux.2 and Qwen-Image Edit can have"
            " them."
        )


def missing_conditioning(recipe: Recipe, number: int, role: str, sigma: float) -> RuntimeError:
    return RuntimeError(
        f"{recipe.node}: this run has a {role} conditioning at sigma {sigma:.4g}, but image {number} was recorded"
        " without one. Give both the same start and end percent; a node that skips evaluations (EasyCache and the like)"
        " does this too."
    )


def role_of_stream(recipe: Recipe, run: Run, role: CondRole) -> CondRole:
    """The conditioning of a stream that serves one of the target: same role, same number where there are several; the
    first of its roles that have the same conditioning. Raises ValueError if there is none.
    """
    group = run.conds.get(role.role)
    if not group:
        raise ValueError(
            f"{recipe.node}: this run has a {role.role} conditioning and the recorded one has only"
            f" {', '.join(name for name in run.conds if run.conds[name])}. Sample both with the same kind of guider."
        )
    return CondRole(run.served[role.role], role.number if role.number < len(group) else 0)


def never_acted(node: str, windows: Sequence[Window]) -> RuntimeError:
    found = " and ".join(f"{window.start:g} to {window.end:g}" for window in windows)
    return RuntimeError(
        f"{node}: it had no effect: no evaluation of the model lay in its window ({found}), or another node ran the"
        " model in its own way (DeepCache and the like). Widen the window, or disconnect the other node."
    )


def some_are_foreign(names: str) -> ValueError:
    return ValueError(
        f"{names}: another node evaluates conditionings of its own together with the sampler's, which cannot be"
        " composed separately. Disconnect it from this MODEL."
    )


def in_order(names: Iterable[str]) -> str:
    """Names of nodes for a message, each once."""
    return " and ".join(dict.fromkeys(names))


# ---------------------------------------------------------------- refusals that another node swallows

_refused: tuple[tuple[str, str], str] | None = None  # (the prompt and node at work, what was refused there last)


def remember(refused: ValueError) -> None:
    """Keep what was refused while a node of a prompt was at work."""
    global _refused
    place = internals.node_at_work()
    _refused = place and (place, str(refused))


def insist() -> None:
    """Raise RuntimeError where the same execution of a node samples again after a refusal: some nodes take every
    ValueError of a sampler for "nothing to do" (Impact's regional sampler), and go on with what is not composed.
    """
    if _refused and _refused[0] == internals.node_at_work():
        raise RuntimeError(_refused[1])
