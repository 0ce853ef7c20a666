"""One sampling run of a patched MODEL: records it, replays the streams that its recipes read, and applies the
recipes.
"""

import logging

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from .attention_maps import RunningMap
from .branches import join
from .schedule import Visits, in_words, position
from .sites import Site, sites_of, transformer_block
from .streams import INVERSION, Evaluation, Half, Run, Weights, conds_of, halves_of, recorded_conds, rows_to_replay

WHOLE = {
    "comfy_extras.nodes_pag": "Perturbed-Attention Guidance",
    "comfy_extras.nodes_sag": "Self-Attention Guidance",
}  # they need the middle block's
KEY = "montage"  # of our wrappers and attachments in a MODEL, and of the Session in a run's transformer options


class Step:
    """One model evaluation of the target or of a stream: its name (sigma, visit, call), its conditionings, the recipes
    that act in it, and what their streams gave."""

    def __init__(self, key, halves, recipes=()):
        self.key, self.halves, self.recipes = key, halves, recipes
        self.kept = {}  # (recipe, stream number, half, site) -> tensor


class Session:
    """One sampling run of a patched MODEL. Everything that lives only as long as the run is here."""

    def __init__(self, guider, patch, noise, sampler, sigmas):
        self.guider, self.model, self.recordings = guider, guider.model_patcher, patch.recordings
        self.groups = [[recipe for recipe in group if not recipe.window.empty] for group in patch.groups]
        self.recipes = sorted((recipe for group in self.groups for recipe in group), key=lambda recipe: recipe.branches)
        self.sigmas, self.size = tuple(sigmas.tolist()), tuple(noise.shape[-2:])
        self.sampler = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
        nodes = (
            [r.node for r in self.recipes]
            + ["Token Attention Map"] * bool(patch.maps)
            + ["Feature Recorder"] * (len(patch.recordings) > len(patch.maps))
        )
        self.names = " and ".join(dict.fromkeys(nodes))
        self.visits = Visits()
        self.sigma_visit, self.calls = None, 0  # the evaluation of the guider, and how often it called the model
        self.run = None  # being recorded
        self.maps = [RunningMap(wanted, self.model, guider.conds) for wanted in patch.maps]
        self.acted = set()  # recipes that did
        self.conds = {}  # (run, rows) -> its conditioning, ready on the device
        self.compiled = False  # whether torch.compile had to be left out
        if self.names and self.model.model_options.get("context_handler") is not None:
            raise ValueError(
                f"{self.names}: context windows cut the latent into pieces that do not match what was recorded. "
                "Disconnect the context window node from this MODEL."
            )
        if self.names and self.model.get_additional_models_with_key("multigpu"):
            raise ValueError(
                f"{self.names}: the work on this MODEL is split over several devices, which run on copies of it that"
                " cannot be recorded or composed together. Set MultiGPU CFG Split to one device, or disconnect it."
            )
        for recipe in self.recipes:
            for run, _ in recipe.streams:
                self.check_run(recipe, run)
            recipe.check(self)
        self.check_branches()
        self.check_guidance()

    def acting(self, sigma):
        """The recipes in whose window an evaluation lies."""
        return [
            recipe
            for recipe in self.recipes
            if recipe.window.has(position(sigma, recipe.streams[0].run.sigmas if recipe.streams else self.sigmas))
        ]

    def check_branches(self):
        """Refuse two recipes that would split one attention."""
        for sigma in self.sigmas[:-1]:
            owner = {}
            for recipe in self.acting(sigma):
                for site in recipe.window.sites if recipe.branches else ():
                    if site in owner:
                        raise ValueError(
                            f"{recipe.node}: at sigma {sigma:.4g} {owner[site].node} already feeds the attention of"
                            f" block {tuple(site)} from several images, and that can be done once. Give the two nodes"
                            " windows or sites that do not overlap."
                        )
                    owner[site] = recipe

    def check_guidance(self):
        """Refuse guidance that would take one branch of the middle block's attention for all of it, whatever comes of
        that.
        """
        for recipe in self.recipes:
            if recipe.branches and any(site.block == "middle" for site in recipe.window.sites):
                for function in self.guider.model_options.get("sampler_post_cfg_function", ()):
                    if function.__module__ in WHOLE:
                        raise ValueError(
                            f"{recipe.node}: {WHOLE[function.__module__]} needs the middle block's attention in one"
                            " piece, and here it is put together from several images. Disconnect it from this MODEL,"
                            " or leave the middle block out of the sites."
                        )

    def check_run(self, recipe, run):
        """Refuse a recorded run that a recipe cannot follow here."""
        if run.composed:
            raise ValueError(
                f"{recipe.node}: one of its images was itself composed, by {run.composed}. Compose from the images that"
                " it was made of."
            )
        self.check_size(recipe, run)
        if not set(self.sigmas[:-1]) <= set(run.sigmas):
            raise ValueError(
                f"{recipe.node}: its images were recorded over {in_words(run.sigmas)} and this run takes"
                f" {in_words(self.sigmas)}. Set the sampler's steps, scheduler and denoise to those of the recording."
            )
        if any("hooks" in cond for group in run.conds.values() for cond in group):
            raise ValueError(
                f"{recipe.node}: its images were recorded with hooks on their conditioning, which cannot be replayed. "
                "Apply the LoRA to the MODEL instead of the conditioning."
            )
        self.visits.seen[self.sigmas[0]] = run.visit_that_continues(self.sigmas[0])

    def check_size(self, recipe, run):
        if run.size != self.size:
            raise ValueError(
                f"{recipe.node}: its images were recorded at {run.size[0]}x{run.size[1]} latent pixels and this run "
                f"has {self.size[0]}x{self.size[1]}. Sample the LATENT that the node gives, or one of its size."
            )

    def record(self, noise, latent_image, sigmas, denoise_mask):
        if self.recordings:
            composed = " and ".join(dict.fromkeys(recipe.node for recipe in self.recipes))
            self.run = Run(Weights(self.model), self.sampler, sigmas, noise, latent_image, denoise_mask, composed)
            self.budget = max(recording.budget for recording in self.recordings)
            self.take_keys = keys_taker(self.run, self.model)

    def visit(self, sigma):
        self.sigma_visit, self.calls = self.visits.next(sigma), 0

    def evaluate(self, executor, model, conds, x, timestep, options):
        """A model evaluation of the target. There may be several in a visit (PAG, SAG): each has a record of its own,
        with its own latent and options."""
        if self.sigma_visit is None:  # a guider that does not go through predict_noise
            self.visit(float(timestep[0]))
        step = Step((*self.sigma_visit, self.calls), halves_of(self.guider.conds), self.acting(self.sigma_visit[0]))
        evaluation = (
            None if self.run is None else self.note(step, x, options)
        )  # before we are in the options: a recording must not hold the MODEL
        if self.maps and self.calls == 0:  # further calls of a visit see attention that was disturbed on purpose
            for running in self.maps:
                running.begin()
            options = self.patched(options, self.measure, "attn2_patch")
        self.calls += 1
        if evaluation is None:
            return self.compute(executor, model, conds, x, timestep, options, step)
        result = self.compute(executor, model, conds, x, timestep, options, step, self.recorder(step, evaluation))
        self.budget -= evaluation.bytes
        if self.budget < 0:  # only the first can overshoot, since its size is not known before
            evaluation.features = {}
        return result

    def measure(self, n, context, value, extra):
        """The attn2_patch that follows where the model looks for words."""
        if tuple(extra["original_shape"][-2:]) != self.size:
            raise ValueError(
                f"{self.names}: the model is run on {extra['original_shape'][-2:]} of {self.size[0]}x{self.size[1]}"
                " latent pixels, and a map of the whole picture is wanted. Use masks instead of areas, and disconnect"
                " what cuts the latent into tiles."
            )
        for running in self.maps:
            running.patch(n, context, value, extra)
        return n, context, value

    def note(self, step, x, options):
        """Take down what went into an evaluation."""
        if not self.run.conds:
            self.run.conds = recorded_conds(self.guider.conds)
        call = step.key[2]
        if call not in self.run.options:
            self.run.options[call] = recorded_options(options)
        self.run.evaluations[step.key] = Evaluation(x)
        return self.run.evaluations[step.key]

    def recorder(self, step, evaluation):
        """What takes the target's attention inputs down: features while the budget lasts, and K of the first
        self-attention at the end of the schedule (the graph cut's features). None when there is nothing to take."""
        keep_features = self.budget > 0 and self.budget >= self.run.evaluation_bytes
        is_last = step.key[0] <= self.sigmas[-2] and step.key[2] == 0

        def take(site, half, n, grid):
            if keep_features:
                evaluation.features[half, site] = n.to("cpu", copy=True)  # other patches may write into n
            if is_last:
                self.take_keys(site, half, n, grid)

        return take if keep_features or is_last else None

    def compute(self, executor, model, conds, x, timestep, options, step, take=None):
        """One evaluation with its recipes on; `take(site, half, n, grid)` sees the attention inputs before them."""
        self.gather(executor, model, conds, x.device, timestep, step)
        if not step.recipes and take is None:
            return executor(model, conds, x, timestep, options)
        fired, splits = set(), {}
        options = self.with_slots(self.patched(options, self.attn1_patch(step, take, fired, splits)), step, splits)
        result = executor(model, conds, x, timestep, options)
        for recipe in step.recipes:
            missing = [site for site in recipe.window.sites if site not in fired]
            if missing:
                raise RuntimeError(
                    f"{recipe.node}: the attention of {len(missing)} of its {len(recipe.window.sites)} blocks was never"
                    f" reached, the first of them {tuple(missing[0])}. Another node runs these blocks in its own way:"
                    " disconnect it from this MODEL, or leave the blocks out."
                )
        return result

    def attn1_patch(self, step, take, fired, splits):
        def patch(n, k, v, extra):
            site = Site(*extra["block"], extra["block_index"])
            grid = tuple(extra["activations_shape"][-2:])
            if tuple(extra["original_shape"][-2:]) != self.size or n.shape[1] != grid[0] * grid[1]:
                raise ValueError(
                    f"{self.names}: the model is run on {extra['original_shape'][-2:]} of {self.size[0]}x{self.size[1]}"
                    f" latent pixels ({n.shape[1]} tokens for a grid of {grid[0]}x{grid[1]}). Areas and tiles do not"
                    " match what was recorded: use masks instead of areas, and disconnect what cuts the latent into"
                    " tiles."
                )
            fired.add(site)
            halves = [step.halves[uuid] for uuid in extra["uuids"]]
            if take:
                for half, part in zip(halves, n.chunk(len(halves))):
                    take(site, half, part, grid)
            for recipe in step.recipes:
                if site in recipe.window.sites:
                    self.acted.add(recipe)
                    branches = [
                        recipe.attn1(self, *part, self.sources(step, recipe, half, site, grid, n), grid)
                        for half, *part in zip(halves, *(tensor.chunk(len(halves)) for tensor in (n, k, v)))
                    ]
                    n, k, v, split = join(branches, n.shape[0] // len(halves), n.shape[1])
                    if split:
                        splits[site, tuple(extra["uuids"])] = split
            return n, k, v

        return patch

    def attn1_replace(self, site, splits, occupant):
        """What stands in the attn1 slot of a site: runs each branch through `occupant`, who stood there before, or
        ComfyUI's attention.
        """

        def attend(q, k, v, extra):
            if occupant:
                result = occupant(q, k, v, extra)
            else:
                result = optimized_attention(
                    q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"], transformer_options=extra
                )
            if result.shape != q.shape:
                raise ValueError(
                    f"{self.names}: another node replaces the self-attention of block {tuple(site)} and gave"
                    f" {tuple(result.shape)} for queries of {tuple(q.shape)}: it does not go with attention that is fed"
                    " from several images. Disconnect it (Perturbed-Attention Guidance does this), or leave the block"
                    " out."
                )
            return result

        def replace(q, k, v, extra):
            split = splits.pop((site, tuple(extra["uuids"])), None)
            if split is None:
                return attend(q, k, v, extra)
            lengths = q.shape[1], k.shape[1], v.shape[1]
            if lengths != split.lengths:
                raise ValueError(
                    f"{self.names}: another node cuts the tokens of block {tuple(site)} after they were composed"
                    f" ({lengths} of {split.lengths} in q, k and v). Disconnect HyperTile, ToMe and the like from this"
                    " MODEL."
                )
            return split.attend(q, k, v, lambda *part: attend(*part, extra))

        return replace

    def with_slots(self, options, step, splits):
        """Give the options the attn1 slots of the step's branching recipes."""
        sites = [site for recipe in step.recipes if recipe.branches for site in recipe.window.sites]
        if sites:
            slots = options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn1", {})
            slots.update(
                {tuple(site): self.attn1_replace(site, splits, slots.get(site, slots.get(site[:2]))) for site in sites}
            )
        return options

    def patched(self, options, patch, kind="attn1_patch"):
        options, compiled = with_patch(options, patch, kind)
        if compiled and not self.compiled:
            self.compiled = True
            logging.warning(
                "%s: torch.compile is left out of this run, since it would leave out the attention patches.", self.names
            )
        return options

    # ------------------------------------------------------------ the streams

    def gather(self, executor, model, conds, device, timestep, step):
        """Replay the streams of the step's recipes that no cache holds, for the halves that `conds` will compute."""
        halves = [step.halves[cond["uuid"]] for group in conds for cond in group or ()]
        wanted = {}  # run -> {row}
        for recipe in step.recipes:
            for run, row in recipe.streams:
                features = self.evaluation_of(recipe, run, step.key).features
                if not all(
                    (stream_half(recipe, run, half), site) in features
                    for half in halves
                    for site in recipe.window.sites
                ):
                    wanted.setdefault(run, set()).add(row)
        for run, rows in wanted.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.replay(executor, model, halves, device, timestep, step, run, rows_to_replay(run, rows))

    def replay(self, executor, model, halves, device, timestep, step, run, rows):
        """Evaluate the model on a run's own latents, conditioning and options, for some halves of the target, and keep
        what the recipes read."""
        own = self.conds_on(run, rows, model, device)
        readers = [
            (recipe, number, rows.index(stream.row))
            for recipe in step.recipes
            for number, stream in enumerate(recipe.streams)
            if stream.run is run and stream.row in rows
        ]
        roles = dict.fromkeys(stream_half(readers[0][0], run, half).role for half in halves)

        def take(site, half, n, grid):
            for recipe, number, row in readers:
                if site in recipe.window.sites:
                    step.kept[recipe, number, half, site] = recipe.keep(number, n[row : row + 1], grid)

        evaluation, call = run.evaluation(step.key)
        self.compute(
            executor,
            model,
            [own[role] for role in roles],
            evaluation.x[rows].to(device),
            timestep[:1].expand(len(rows)),
            run.options[call],
            Step(step.key, run.halves),
            take,
        )

    def sources(self, step, recipe, half, site, grid, like):
        """What a recipe kept of its streams for one half of the target at one site, on the target's device."""
        found = []
        for number, (run, row) in enumerate(recipe.streams):
            own = stream_half(recipe, run, half)
            kept = step.kept.get((recipe, number, own, site))
            if kept is None:
                features = run.evaluation(step.key)[0].features.get((own, site))
                if features is None:
                    raise RuntimeError(
                        f"{recipe.node}: image {number} has no {half.role} conditioning at sigma {step.key[0]:.4g}, "
                        "and this run has. Give both the same start and end percent."
                    )
                kept = recipe.keep(number, features[row : row + 1], grid)
            found.append(kept.to(like))
        return found

    def evaluation_of(self, recipe, run, key):
        evaluation, _ = run.evaluation(key)
        if evaluation is None:
            fitting = (
                "one of a single evaluation a step (euler, ddim, dpmpp_2m)"
                if run.sampler == INVERSION
                else "that of the recording, and no adaptive one"
            )
            raise ValueError(
                f"{recipe.node}: this run ({self.sampler}) evaluates the model at sigma {key[0]:.6g} for time"
                f" {key[1] + 1}, which the recorded run ({run.sampler}) did not. As sampler, use {fitting}."
            )
        return evaluation

    def conds_on(self, run, rows, model, device):
        key = run, tuple(rows)
        if key not in self.conds:
            conds = conds_of(run, rows, device)
            for group in conds.values():
                comfy.samplers.pre_run_control(model, group)
            self.cast(run, device)
            self.conds[key] = conds
        return self.conds[key]

    # ------------------------------------------------------------ the end

    def close(self):
        """Let go of everything that was held for the run, however it ended."""
        for (run, _), conds in self.conds.items():
            comfy.sampler_helpers.cleanup_models(conds, [])
            self.cast(run, self.model.offload_device)
        self.conds = {}

    @staticmethod
    def cast(run, device):
        """Move what the patches of a recorded run hold, as ComfyUI does it for those of the run at hand."""
        for options in run.options.values():
            comfy.samplers.cast_transformer_options(options["transformer_options"], device=device)

    def finish(self, output):
        for group in self.groups:
            if group and not self.acted.intersection(group):
                windows = " and ".join(
                    f"{recipe.window.start:g} to {recipe.window.end:g}" for recipe in group if recipe.window.sites
                )
                raise RuntimeError(
                    f"{group[0].node}: it never acted: the steps that were sampled lie outside its window ({windows}). "
                    "Widen the window, or disconnect the node."
                )
        if self.run is not None:
            self.run.final = output.detach().cpu()
            self.run.maps = {running.wanted.words: running.read().cpu() for running in self.maps if running.count}
            for recording in self.recordings:
                recording.add(self.run)


def recorded_options(options):
    """A run's model options, for its replays. Without what holds the MODELs that it was sampled with: its Session, and
    what is for loading alone.
    """
    options = create_model_options_clone(options)
    options.pop("to_load_options", None)
    transformer = options["transformer_options"]
    transformer.pop(KEY, None)
    transformer.get("wrappers", {}).pop(WrappersMP.PREPARE_SAMPLING, None)
    return options


def with_patch(options, patch, kind="attn1_patch"):
    """(a copy of model options with our patch before all others, whether they were compiled). Without torch.compile,
    which would run the graph it traced without the patch."""
    options = create_model_options_clone(options)
    transformer = options["transformer_options"]
    patches = transformer.setdefault("patches", {})
    patches[kind] = [patch, *patches.get(kind, ())]
    compiled = transformer.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop("torch.compile", None)
    return options, bool(compiled)


def keys_taker(run, model):
    """What takes K of the first self-attention down into a run."""
    first = sites_of(model)[0]
    attention = transformer_block(model, first).attn1

    def take(site, half, n, grid):
        if site == first:
            run.keys[half], run.keys_grid = attention.to_k(n).to("cpu"), grid

    return take


def taking_keys(run, guider, options):
    """Model options with which a run that no Session records gets its keys."""
    take, halves = keys_taker(run, guider.model_patcher), halves_of(guider.conds)

    def patch(n, k, v, extra):
        for uuid, part in zip(extra["uuids"], n.chunk(len(extra["uuids"]))):
            take(
                Site(*extra["block"], extra["block_index"]), halves[uuid], part, tuple(extra["activations_shape"][-2:])
            )
        return n, k, v

    return with_patch(options, patch)[0]


def stream_half(recipe, run, half):
    """The half of a stream that serves a half of the target: same role, same number where there are several; the first
    of its roles that have the same conditioning."""
    group = run.conds.get(half.role)
    if not group:
        raise ValueError(
            f"{recipe.node}: this run has a {half.role} conditioning and the recorded one has only "
            f"{', '.join(role for role in run.conds if run.conds[role])}. Sample both with the same kind of guider."
        )
    return Half(run.served[half.role], half.number if half.number < len(group) else 0)
