"""MCA-Ctrl: its mathematics, the two laws of a patching node, and what it costs."""

import copy

import pytest
import torch

from montage.kernels import grid_masks
from montage.methods import mca_ctrl as collaboration
from montage.nodes.layout_retouch import TokenAttentionMap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.patching.engine import Engine
from montage.patching.internals import KEY
from montage.patching.models import family_of, parse_sites, sites_of
from montage.patching.schedule import Window
from montage.patching.streams import LATENT_KEY, CondRole, Recording, streams_of
from montage.patching.terms import TargetRows, pack
from montage.workshop.random_models import build, half, random_model, text_encoder
from montage.workshop.sampling import (
    NEGATIVE,
    SAMPLERS,
    SIZE,
    STEPS,
    close,
    empty,
    evaluations_of,
    halves,
    image_latent,
    invert,
    low_memory,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_advanced,
    words,
)
from nodes import LatentFromBatch

MODEL = "sd15-small"
EVERYWHERE, NOWHERE = torch.ones(64, 64), torch.zeros(64, 64)
LEFT, RIGHT = (
    torch.nn.functional.interpolate((halves() == k).float()[None, None], scale_factor=8)[0, 0] for k in (0, 1)
)
WINDOWS = {
    "sagi_start": 0.0,
    "sagi_end": 0.1,
    "sagi_sites": "all",
    "salq_start": 0.1,
    "salq_end": 1.0,
    "salq_sites": "u2-",
}


def collaborate(
    subject,
    condition,
    subject_mask=LEFT,
    edit_mask=RIGHT,
    preset="custom",
    model=None,
    dilation=0,
    lock=False,
    order="SAGI first",
    share=0.3,
    form="soft",
    fresh=False,
    subject_positive=None,
    condition_positive=None,
    negative=None,
    **windows,
):
    """(MODEL, LATENT) of the node."""
    assert windows.keys() <= WINDOWS.keys()
    chosen = {"preset": preset, **(WINDOWS | windows if preset == "custom" else {})}
    return CollaborativeAttention.execute(
        model or random_model(MODEL),
        subject,
        subject_mask,
        chosen,
        dilation,
        lock,
        fresh,
        order,
        share,
        form,
        condition,
        edit_mask,
        subject_positive,
        condition_positive,
        negative,
    ).args


def edited(subject, condition, seed=5, positive=None, sampler="euler", steps=STEPS, **node):
    """The target's latent samples."""
    return sample(*collaborate(subject, condition, **node), seed=seed, positive=positive, sampler=sampler, steps=steps)[
        "samples"
    ]


def pair(**settings):
    """(subject, condition), recorded."""
    return record(seed=2, positive=words(2), **settings), record(seed=1, positive=words(1), **settings)


# ---------------------------------------------------------------- identities


def test_a_mask_of_the_condition_is_handed_on():
    """Where the image to edit might not change when it was recorded, it does not change now."""
    masked = image_latent() | {"noise_mask": RIGHT[None]}
    subject, condition = record(seed=2, positive=words(2)), record(seed=1, positive=words(1), latent=masked)
    close(edited(subject, condition, seed=1, positive=words(1), edit_mask=NOWHERE), condition["samples"])


@pytest.mark.parametrize(
    "sampler, cache_mb", [("euler", 0), ("euler", 64), ("heun", 0), ("dpm_2", 0), ("euler_ancestral", 0)]
)
def test_nothing_to_edit_gives_the_condition(sampler, cache_mb, monkeypatch):
    """M_C = 0 everywhere, the same prompt. The seed matters to the ancestral sampler alone. Streams are replayed run by
    run: the rounding of another batch is magnified by these random weights (noise that is changed by a millionth moves
    dpm_2's result by 0.03).
    """
    monkeypatch.setattr(Engine, "exact", True)
    subject, condition = pair(sampler=sampler, cache_mb=cache_mb)
    settings = {
        "salq_sites": "all",
        "sampler": sampler,
        "positive": words(1),
        "seed": 1 if sampler == "euler_ancestral" else 5,
    }
    close(edited(subject, condition, edit_mask=NOWHERE, **settings), condition["samples"])
    assert (edited(subject, condition, edit_mask=EVERYWHERE, **settings) - condition["samples"]).abs().max() > 0.05


@pytest.mark.parametrize(
    "windows", [{}, {"salq_sites": "all"}, {"sagi_end": 1.0, "salq_start": 1.0}, {"sagi_end": 0.0, "salq_start": 0.0}]
)
def test_everything_edited_from_the_subjects_noise_gives_the_subject(windows):
    """M_C = M_S = 1, z_T and prompt of the subject."""
    subject, _ = pair()
    close(
        edited(subject, subject, subject_mask=EVERYWHERE, edit_mask=EVERYWHERE, positive=words(2), **windows),
        subject["samples"],
    )


def masked_softmax(attention, n_query, n_key, allowed):
    """The official way: explicit softmax over the full map, other keys removed; after the output projection."""
    q, k, v = (
        layer(n).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for layer, n in ((attention.to_q, n_query), (attention.to_k, n_key), (attention.to_v, n_key))
    )
    logits = (q @ k.mT * attention.dim_head**-0.5).masked_fill(~allowed.flatten(), -torch.inf)
    return attention.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("operation", ["SAGI", "SALQ"])
def test_one_layer_is_the_masked_attention_of_its_sources(operation):
    """Against explicit masked softmaxes, in both CFG halves; tokens outside the masks play no part."""
    subject, condition = pair(cache_mb=64)
    model = random_model(MODEL)
    (site,) = parse_sites("test", model, "d2")
    change = 1.0 if operation == "SAGI" else 0.0
    windows = {"sagi_sites": "d2", "salq_sites": "d2", "sagi_end": change, "salq_start": change}
    masks = {"subject_mask": LEFT, "edit_mask": grid_masks.dilate(RIGHT, 9).float()}

    def target():
        """(outputs of the layer at the first step by half, what the layer saw of the target by half)"""
        seen = []
        collaborating, latent = collaborate(subject, condition, model=model, **masks, **windows)
        recording, latent = recorder(collaborating, latent, 64)
        recording.set_model_attn1_output_patch(lambda n, extra: (seen.append((extra["block"], n)), n)[1])
        run = run_of(sample(recording, latent, positive=words(1)))
        (out,) = [n for block, n in seen[:16] if block == site[:2]]
        negative, positive = out.chunk(2)
        return {"positive": positive, "negative": negative}, run.evaluations[run.sigmas[0], 0, 0].features

    outputs, features = target()
    grid = (4, 4)
    inside_subject, inside = (
        grid_masks.cells(masks["subject_mask"] > 0, grid),
        grid_masks.cells(masks["edit_mask"] > 0, grid),
    )
    assert inside.float().mean() == 0.75 and inside_subject.float().mean() == 0.5
    attention = family_of(model).transformer_block(site).attn1
    for role, out in outputs.items():
        n_s, n_c = (
            run_of(latent).evaluations[run_of(latent).sigmas[0], 0, 0].features[CondRole(role, 0), site]
            for latent in (subject, condition)
        )
        n_t = features[CondRole(role, 0), site]
        foreground = masked_softmax(attention, n_s if operation == "SAGI" else n_t, n_s, inside_subject)
        background = masked_softmax(attention, n_c if operation == "SAGI" else n_t, n_c, ~inside)
        expected = torch.where(inside.flatten()[:, None], foreground, background)
        assert (out - expected).abs().max() < 2e-6

    outside = ~inside_subject.flatten()
    for evaluation in run_of(subject).evaluations.values():
        for name, n in evaluation.features.items():
            if name[1] == site and operation == "SALQ":
                n[:, outside] = n[:, outside].flip(1)
    for role, out in target()[0].items():
        assert same(out, outputs[role])


# ---------------------------------------------------------------- masks


def test_a_thin_mask_is_empty_at_no_level():
    """More than half of a cell; where that leaves nothing, whatever is touched."""
    thin = torch.zeros(512, 512, dtype=bool)
    thin[100:102, 50:400] = True
    for side in (64, 32, 16, 8, 1):
        assert grid_masks.cells(thin, (side, side)).any()
    assert grid_masks.cells(thin, (64, 64)).sum() == 44  # touched: 350 pixels of a row of 8x8 cells
    assert not grid_masks.cells(torch.zeros(512, 512, dtype=bool), (8, 8)).any()
    wide = torch.zeros(512, 512, dtype=bool)
    wide[:, :260] = True
    assert same(
        grid_masks.cells(wide, (8, 8)), torch.arange(8).expand(8, 8) < 4
    )  # four pixels of a cell of 64 do not count
    assert grid_masks.cells(wide, (65, 33)).shape == (65, 33)


def test_a_thin_subject_gives_a_finite_picture():
    thin = torch.zeros(64, 64)
    thin[20, 10] = 1
    found = []
    for model in (random_model(MODEL), half(build(MODEL))):
        subject, condition = pair(model=model)
        found.append(edited(subject, condition, model=model, subject_mask=thin, salq_sites="all"))
    full, short = found
    assert torch.isfinite(full).all() and not same(full, short) and (full - short).abs().max() < 0.1 * full.abs().max()
    with pytest.raises(ValueError, match="Collaborative Attention: subject_mask is empty"):
        collaborate(subject, condition, NOWHERE, model=model)


def test_the_edited_area_is_dilated_in_pixels_of_the_picture_and_the_subject_is_not():
    subject, condition = (record(seed=seed, latent=empty(size=(16, 16)), steps=1) for seed in (2, 1))
    dot = torch.zeros(128, 128)
    dot[40, 60] = 1
    for mask, radius, side in (
        (dot, 5, 11),
        (dot, 1, 3),
        (dot, 0, 1),
        (grid_masks.at_size(dot, (128, 128)).float()[::2, ::2], 5, 12),
    ):
        model, _ = collaborate(subject, condition, mask, mask, dilation=radius)
        ((recipe, _),) = model.attachments[KEY].groups
        assert recipe.area.mask.sum() == side**2 and recipe.area.mask.shape == (128, 128)
        assert (
            recipe.subject_mask.sum() == mask.numel()
            and len(mask) == 64
            or recipe.subject_mask.sum() == mask.sum() * (128 / len(mask)) ** 2
        )


def test_the_area_of_words_stays_two_dimensional():
    """A ramp along x stays one at every level; its strongest tokens are exactly 1 in each image."""
    ramp = torch.linspace(0, 0.9, 16).expand(1, 16, 16)
    maps = torch.cat([ramp, ramp.mT])
    for grid in ((16, 16), (8, 8), (32, 32), (5, 7)):
        soft, hard = (grid_masks.strongest(maps, grid, 0.25, form) for form in (True, False))
        assert (
            (soft[0].diff(dim=1) >= 0).all()
            and soft[0, :, 0].max() < soft[0, :, -1].min()
            and same(soft[0, :, -1], torch.ones(grid[0]))
        )
        tokens = round(0.25 * grid[0] * grid[1])
        assert all((part == 1).sum() == tokens for part in (*soft, *hard)) and set(hard.unique().tolist()) == {0, 1}
        assert (soft[0] - soft[0].mT).abs().max() > 0.1 if grid[0] == grid[1] else True
    assert same(
        grid_masks.strongest(maps, (16, 16), 0.25, True)[0], grid_masks.strongest(maps, (16, 16), 0.25, True)[1].mT
    )
    assert (grid_masks.strongest(maps, (1, 1), 0.1, False) == 1).all()


class Measured:
    """The context of a run whose attention map stands still."""

    def __init__(self, before):
        self.attention_map = before


def attention(q, k, v, *_):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operation", ["SAGI", "SALQ"])
@pytest.mark.parametrize("form", ["soft", "hard"])
def test_the_area_of_words_weighs_each_image_by_its_own_map(form, operation, dtype):
    """Against masked softmaxes: M F_subject + (1 - M) F_target, where F_target leaves out the keys at which M is 1. One
    image is all subject.
    """
    generator, grid = torch.Generator().manual_seed(1), (4, 4)
    maps = torch.rand(3, 8, 8, generator=generator)
    maps[2] = 1
    n, source = (torch.randn(count, 16, 8, generator=generator).to(dtype) for count in (3, 1))
    thin = torch.zeros(32, 32, dtype=bool)
    thin[9, 3:20] = True
    area = collaboration.WordsArea(0.3, form == "soft")
    recipe = getattr(collaboration, operation)(
        Window(0.0, 1.0, ()), streams_of("test", [record(steps=1)])[0], None, thin, area
    )
    held = recipe.select(0, source[None], grid)
    branches = recipe.attend(Measured(maps), TargetRows(*[n[None]] * 3), [held], grid)
    q, k, v, split = pack(branches, 3, 16)
    out = split.attend(q, k, v, attention)
    share, keys = (
        grid_masks.strongest(maps, grid, 0.3, form == "soft").flatten(1),
        grid_masks.cells(thin, grid).flatten(),
    )
    assert keys.sum() == 3 and (share == 1).sum(1).tolist() == ([5, 5, 16] if form == "soft" else [5, 5, 5])
    for i in range(3):
        front = attention(
            *(part.float() for part in (source[0] if operation == "SAGI" else n[i], source[0, keys], source[0, keys]))
        )
        kept = share[i] < 1
        back = attention(n[i].float(), n[i, kept].float(), n[i, kept].float()) if kept.any() else torch.zeros(16, 8)
        expected = share[i, :, None] * front + (1 - share[i, :, None]) * back
        assert torch.isfinite(out).all() and (out[i].float() - expected).abs().max() < (
            1e-6 if dtype == torch.float32 else 5e-3
        )


def generated(subject, batch=None, preset="notebook generation", **node):
    """A new picture with the subject where its words draw."""
    latent = empty(2) if batch is None else {**empty(), "batch_index": [batch]}
    words_of = text_encoder(MODEL), "a red cat and a dog", "red cat", "d@2-4,u@2-4"
    model, latent, positive = TokenAttentionMap.execute(random_model(MODEL), latent, *words_of).args
    model, _ = collaborate(subject, None, edit_mask=None, model=model, preset=preset, **node)
    return sample(model, latent, positive=positive)["samples"]


@pytest.mark.parametrize("form", ["soft", "hard"])
def test_a_batch_of_generated_pictures_is_its_pictures(form):
    """Each has a map of its own."""
    subject = record(seed=2, positive=words(2))
    both = generated(subject, form=form)
    close(both, torch.cat([generated(subject, number, form=form) for number in (0, 1)]))
    assert (both - generated(subject, share=0.6, form=form)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["notebook generation", "paper generation"])
def test_a_generated_picture_is_the_same_whichever_half_is_evaluated_first(preset, monkeypatch):
    subject = record(seed=2, positive=words(2))
    together = generated(subject, preset=preset)
    low_memory(monkeypatch)
    close(generated(subject, preset=preset), together)


def test_a_new_picture_may_have_its_place_for_the_subject_painted():
    subject = record(seed=2, positive=words(2))
    model, latent = collaborate(subject, None, edit_mask=RIGHT, lock=True)
    assert same(latent["samples"], empty()["samples"])
    assert (sample(model, latent)["samples"] - sample(random_model(MODEL), latent)["samples"]).abs().max() > 1e-3


# ---------------------------------------------------------------- windows


def log(monkeypatch):
    calls = []
    for recipe in (collaboration.SAGI, collaboration.SALQ):

        def attend(self, context, target, sources, grid, recipe=recipe):
            calls.append((recipe.__name__, self.condition.run.sigmas.index(context.sigma_visit[0]), grid))
            return collaboration.MaskedAttention.attend(self, context, target, sources, grid)

        monkeypatch.setattr(recipe, "attend", attend)
    return calls


LAYERS = {"all": range(16), "late": range(9, 16), "but the first": range(1, 16)}  # by the paper's numbers


@pytest.mark.parametrize(
    "preset, steps, layers",
    [
        ("notebook edit", (0, 5, 50), "late"),
        ("paper swap", (0, 20, 48), "late"),
        ("notebook generation", (1, 5, 50), "all"),
        ("paper generation", (0, 35, 48), "but the first"),
    ],
)
def test_presets_act_where_their_source_says(preset, steps, layers):
    """(operation, step, layer) over 50 steps, against the table of the paper and its code; disjoint."""
    model = random_model(MODEL)
    order, (begin, change, end) = sites_of(model), steps
    windows = CollaborativeAttention.windows(model, {"preset": preset}, "SAGI first")
    found = {
        (name, step, order.index(site))
        for name, window in zip(("SAGI", "SALQ"), windows)
        for step in range(50)
        if window.has(step / 50)
        for site in window.sites
    }
    assert found == (
        {("SAGI", step, layer) for step in range(begin, change) for layer in LAYERS["all"]}
        | {("SALQ", step, layer) for step in range(change, end) for layer in LAYERS[layers]}
    )


@pytest.mark.parametrize("name", ["sd15-small", "sd2-small", "sdxl-small"])
def test_late_layers_are_chosen_by_resolution(name):
    """The decoder at full and half resolution, and its last block at a quarter."""
    model = random_model(name)
    quarter = parse_sites("test", model, "u@4")
    last = [site for site in quarter if site.number == quarter[-1].number]
    assert parse_sites("test", model, collaboration.LATE) == (*last, *parse_sites("test", model, "u@1-2"))


def test_operations_act_in_their_steps_and_blocks(monkeypatch):
    calls = log(monkeypatch)
    edited(*pair(), sagi_end=0.25, salq_start=0.25, salq_end=0.75)
    assert {call[0]: {step for name, step, _ in calls if name == call[0]} for call in calls} == {
        "SAGI": {0},
        "SALQ": {1, 2},
    }
    grids = [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2)] * 2 + [(1, 1)] + [(2, 2)] * 3 + [(4, 4)] * 3 + [(8, 8)] * 3
    seen = {operation: [grid for name, _, grid in calls if name == operation] for operation in ("SAGI", "SALQ")}
    assert seen == {"SAGI": grids, "SALQ": 2 * grids[9:]}


def test_salq_first_exchanges_the_windows(monkeypatch):
    calls = log(monkeypatch)
    subject, condition = pair()
    edited(subject, condition, sagi_end=0.25, salq_start=0.25, order="SALQ first")
    assert {(name, step) for name, step, _ in calls} == {("SALQ", 0), ("SAGI", 1), ("SAGI", 2), ("SAGI", 3)}
    assert len([call for call in calls if call[0] == "SALQ"]) == 7  # sites stay with the operation


@pytest.mark.parametrize("lock", [False, True])
def test_empty_windows_are_bit_equal_to_no_node(lock):
    subject, condition = pair()
    never = {"sagi_end": 0.0, "salq_end": 0.0}
    assert same(edited(subject, condition, lock=lock, **never), sample(random_model(MODEL), empty(), seed=5)["samples"])


def test_the_model_that_came_in_stays_unpatched():
    subject, condition = pair()
    model = random_model(MODEL)
    options = str(model.model_options), str(model.wrappers), str(model.attachments)
    before = sample(model, empty())["samples"]
    edited(subject, condition, lock=True)
    assert (str(model.model_options), str(model.wrappers), str(model.attachments)) == options and same(
        sample(model, empty())["samples"], before
    )


def test_each_operation_acts_alone():
    subject, condition = pair()
    windows = {}, {"sagi_end": 0.0, "salq_start": 0.0}, {"salq_start": 1.0}, {"sagi_end": 0.0}
    results = [edited(subject, condition, **parts) for parts in windows]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(results) for b in results[:i])


# ---------------------------------------------------------------- the background lock


@pytest.mark.parametrize(
    "sampler, inverted",
    [*((sampler, False) for sampler in SAMPLERS), ("euler", True), ("dpmpp_2m", True), ("lcm", True)],
)
def test_the_lock_keeps_the_background_exactly(sampler, inverted):
    """Under every kind of sampler. An inversion visits each sigma once, so only such samplers can follow it."""
    subject, condition = (
        (
            invert(image_latent(seed, size=(9, 8)))[0]
            if inverted
            else record(seed=seed, positive=words(seed), sampler=sampler, latent=empty(size=(9, 8)))
        )
        for seed in (2, 1)
    )
    seen = []

    def spy(apply, arguments):
        seen.append(arguments["input"])
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    masks = {"subject_mask": torch.ones(72, 64), "edit_mask": torch.nn.functional.pad(LEFT, (0, 0, 0, 8))}
    model, latent = collaborate(subject, condition, lock=True, dilation=5, **masks)
    model.set_model_unet_function_wrapper(spy)
    result = sample(model, latent, sampler=sampler)["samples"]
    ((recipe, *_),) = model.attachments[KEY].groups
    inside = grid_masks.cells(recipe.area.mask, (9, 8))
    assert 0.4 < inside.float().mean() < 0.9
    assert (
        same(result[..., ~inside], condition["samples"][..., ~inside])
        and (result - condition["samples"])[..., inside].abs().min() > 0
    )
    streams = [evaluation.x for stream in (subject, condition) for evaluation in run_of(stream).evaluations.values()]
    kept = [evaluation.x[..., ~inside] for evaluation in run_of(condition).evaluations.values()]
    targets = [x[:1] for x in seen if not any(same(x[:1], stream) for stream in streams)]
    assert targets and all(any(same(x[..., ~inside], k) for k in kept) for x in targets)


@pytest.mark.parametrize(
    "scheduler, denoise",
    [("normal", 1.0), ("karras", 1.0), ("ddim_uniform", 1.0), ("linear_quadratic", 1.0), ("normal", 0.5)],
)
def test_everything_locked_returns_the_picture_bit_for_bit(scheduler, denoise):
    """Nothing edited, nothing changed, whatever the schedule of the inversion."""
    settings = {"scheduler": scheduler, "denoise": denoise}
    subject, condition = (invert(image_latent(seed), **settings)[0] for seed in (1, 2))
    result = sample(*collaborate(subject, condition, edit_mask=NOWHERE, lock=True), seed=5, sampler="ddim", **settings)
    assert same(result["samples"], condition["samples"])


def test_a_part_of_the_schedule_starts_and_ends_on_the_conditions_trajectory():
    subject, condition = pair()
    model, latent = collaborate(subject, condition, edit_mask=NOWHERE, salq_sites="all")
    close(sample_advanced(model, latent, positive=words(1), start=2)["samples"], condition["samples"])
    model, latent = collaborate(subject, condition, lock=True)
    result = sample_advanced(model, latent, positive=words(1), end=2, leftover="enable")["samples"]
    run, outside = run_of(condition), ~grid_masks.cells(RIGHT > 0, SIZE)
    kept = random_model(MODEL).model.process_latent_out(run.evaluations[run.sigmas[2], 0, 0].x)
    assert same(result[..., outside], kept[..., outside])


def test_fresh_noise_is_the_samplers_own_inside_the_edited_area():
    """The target at its first evaluation: the condition's outside, what the seed says inside; a second seed gives
    another picture.
    """
    subject, condition = pair()
    model, latent = collaborate(subject, condition, fresh=True, lock=True)
    recording, latent = recorder(model, latent)
    own, result = run_of(record(seed=8)), sample(recording, latent, seed=8)
    begun, inside = run_of(result).evaluations[own.sigmas[0], 0, 0].x, grid_masks.cells(RIGHT > 0, SIZE)
    for where, run in ((inside, own), (~inside, run_of(condition))):
        assert same(begun[..., where], run.evaluations[own.sigmas[0], 0, 0].x[..., where])
    assert same(result["samples"][..., ~inside], condition["samples"][..., ~inside])
    assert (sample(model, latent, seed=9)["samples"] - result["samples"])[..., inside].abs().max() > 1e-2


# ---------------------------------------------------------------- cost


def test_streams_cost_one_evaluation_a_step_while_they_are_read():
    """Two with a prompt of their own. So 50 steps that act to the end are 400, or 300, and the released code's are
    500.
    """
    model, streams, windows = random_model(MODEL), [], {"lock": True, "steps": 8, "salq_end": 0.75}
    inversions = evaluations_of(
        model, lambda: streams.extend(invert(image_latent(seed), steps=8)[0] for seed in (1, 2))
    )
    assert inversions == 2 * 8
    assert evaluations_of(model, lambda: edited(*streams, **windows)) == 6 * (2 + 2) + 2 * 2
    own = {"subject_positive": words(7), "condition_positive": words(8), "negative": NEGATIVE}
    assert evaluations_of(model, lambda: edited(*streams, **windows, **own)) == 6 * (2 + 4) + 2 * 2


def test_pictures_that_were_inverted_as_a_batch_are_read_at_once():
    model, together, calls = random_model(MODEL), invert(image_latent(1, batch=2))[0], []
    picked = subject, condition = [LatentFromBatch().frombatch(together, row, 1)[0] for row in (0, 1)]
    another = Recording()
    another.add(copy.copy(run_of(together)))
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    result = edited(*picked)
    hook.remove()
    assert calls == [2, 2] * STEPS  # the two pictures, then the two halves
    assert (result - edited({**subject, LATENT_KEY: another}, condition)).abs().max() < 1e-2 * result.abs().max()


def test_prompts_of_their_own_reach_the_streams():
    subject, condition = pair()
    plain = edited(subject, condition)
    for own in (
        {"subject_positive": words(7)},
        {"condition_positive": words(8)},
        {"subject_positive": words(2), "negative": words(9)},
    ):
        assert (edited(subject, condition, **own) - plain).abs().max() > 1e-3
    recorded_ones = {"subject_positive": words(2), "condition_positive": words(1), "negative": NEGATIVE}
    close(edited(subject, condition, **recorded_ones), plain)


def test_replay_equals_cache_and_a_batch_its_images():
    alone = edited(*pair())
    close(edited(*pair(cache_mb=64)), alone)
    model, latent = collaborate(*pair())
    both = sample(model, {"samples": latent["samples"].expand(2, -1, -1, -1)}, seed=5)["samples"]
    close(both, alone.expand(2, -1, -1, -1))


@pytest.mark.parametrize("name, size", [("sdxl-small", (16, 16)), ("sd2-small", (8, 12)), (MODEL, (9, 7))])
def test_other_families_and_shapes(name, size):
    model = random_model(name)
    settings = {"model": model, "latent": empty(size=size), "steps": 2, "negative": words(99, name=name)}
    subject, condition = (record(seed=seed, positive=words(seed, name=name), **settings) for seed in (2, 1))
    mask = torch.zeros(8 * size[0], 8 * size[1])
    mask[:, : 4 * size[1]] = 1
    collaborating, latent = collaborate(subject, condition, mask, mask, model=model, lock=True, preset="paper swap")
    result = sample(collaborating, latent, positive=words(1, name=name), negative=words(99, name=name), steps=2)[
        "samples"
    ]
    assert torch.isfinite(result).all() and result.shape[-2:] == size
    assert same(result[..., size[1] // 2 + 1 :], condition["samples"][..., size[1] // 2 + 1 :])
    assert (result - condition["samples"])[..., : size[1] // 2].abs().max() > 0.01


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "case, part",
    [
        (lambda a, b: collaborate(empty(), b), "subject: latent 0 was not recorded.*Invert Image"),
        (lambda a, b: collaborate(a, empty()), "condition: latent 0 was not recorded"),
        (lambda a, b: collaborate(record(latent=empty(2)), b), "subject is a batch of 2, and one image was expected"),
        (lambda a, b: collaborate(a, b, subject_mask=torch.zeros(2, 64, 64)), "subject_mask is a batch of 2"),
        (
            lambda a, b: collaborate(a, b, edit_mask=torch.zeros(64, 128)),
            "edit_mask is 128x64 and the picture 64x64, another aspect ratio",
        ),
        (lambda a, b: collaborate(a, b, edit_mask=None), "no edit_mask, and no Token Attention Map on the MODEL"),
        (lambda a, b: collaborate(a, b, salq_sites="u2-9"), 'salq_sites: "u2-9": this model has no u9'),
        (lambda a, b: collaborate(a, b, sagi_sites="x"), 'sagi_sites: "x" names no'),
        (
            lambda a, b: collaborate(a, b, sagi_end=0.5),
            r"SAGI \(0 to 0.5\) and SALQ \(0.1 to 1\) overlap in the same blocks",
        ),
        (
            lambda a, b: collaborate(a, record(latent=empty(size=(8, 12)))),
            "the subject was recorded at 8x8 latent pixels and the condition at 8x12",
        ),
        (lambda a, b: collaborate(a, b, model=random_model("sd2-small")), "recorded with"),
        (lambda a, b: edited(a, b, steps=5), "its images were recorded over 4 steps"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(case, part):
    with pytest.raises(ValueError, match=f"Collaborative Attention: .*{part}"):
        case(*pair())


def test_a_second_collaboration_in_the_same_steps_is_refused():
    a, b = pair()
    model, _ = collaborate(a, b)
    with pytest.raises(ValueError, match="Collaborative Attention already feeds the attention of block"):
        edited(a, b, model=model)


def test_the_subject_is_found_again_after_the_run():
    """Its streams are those of the latents that were given."""
    a, b = pair()
    model, _ = collaborate(a, b, lock=True)
    ((sagi, salq, lock),) = model.attachments[KEY].groups
    assert (
        sagi.streams == salq.streams == (*streams_of("test", [a]), *streams_of("test", [b]))
        and lock.streams == sagi.streams[1:]
    )
