"""The composite of Generative Photomontage, and life beside other patches."""

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from montage.kernels import labels, strokes
from montage.patching.engine import Engine
from montage.patching.internals import KEY
from montage.patching.models import sites_of
from montage.patching.streams import CondRole
from montage.workshop.neighbours import scaled_queries
from montage.workshop.random_models import demo_model, random_model
from montage.workshop.sampling import (
    MIXED,
    NEGATIVE,
    SAMPLERS,
    SIZE,
    STROKES,
    close,
    compose,
    cut,
    empty,
    evaluations_of,
    halves,
    inject,
    low_memory,
    masks_of,
    pictures,
    record,
    recorder,
    run_of,
    same,
    sample,
    sample_advanced,
    stack,
    two,
    words,
)

ALL_BASE, ALL_ONE = masks_of(torch.zeros(SIZE), 2), masks_of(torch.ones(SIZE), 2)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_labels_base_is_the_base_image(sampler, cache_mb):
    """Under every kind of sampler."""
    a, b = two(sampler=sampler, cache_mb=cache_mb)
    assert same(compose([a, b], ALL_BASE, sampler=sampler), a["samples"])


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_labels_k_is_image_k_with_its_noise_and_prompt(sampler, cache_mb):
    a, b = two(sampler=sampler, cache_mb=cache_mb)
    assert same(compose([a, b], ALL_ONE, base=1, seed=2, positive=words(2), sampler=sampler), b["samples"])
    if cache_mb and sampler == "euler":
        assert (compose([a, b], ALL_ONE, base=0, positive=words(1)) - b["samples"]).abs().max() > 1


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "euler_ancestral"])
def test_replay_equals_cache(sampler, monkeypatch):
    """Run by run to the bit; as rows of one batch but for rounding, which these random weights magnify."""
    images = two(sampler=sampler)
    cached = compose(two(sampler=sampler, cache_mb=64), MIXED, sampler=sampler)
    close(compose(images, MIXED, sampler=sampler), cached, 0.02)
    monkeypatch.setattr(Engine, "exact", True)
    assert same(compose(images, MIXED, sampler=sampler), cached)


def test_a_second_composite_reads_what_the_first_has_merged():
    """One image's worth of rows is kept, which outlives the features."""
    a, b = two(cache_mb=64)
    model, latent = inject([a, b], MIXED)
    first = sample(model, latent)["samples"]
    ((recipe,),) = model.attachments[KEY].groups
    steps, evaluation = len(run_of(a).sigmas) - 1, run_of(a).evaluation_bytes
    assert sum(part.nbytes for parts in recipe.kept.values() for part in parts) == steps * evaluation
    for run in (run_of(a), run_of(b)):
        run.forget_features()
    assert evaluations_of(model, lambda: sample(model, latent)) == 2 * steps
    assert same(sample(model, latent)["samples"], first)


def test_a_cache_that_holds_a_part_is_completed_by_replay():
    a, b = two(cache_mb=64)
    for evaluation in list(run_of(a).evaluations.values())[::2]:
        evaluation.features = {}
    close(compose([a, b], MIXED), compose(two(cache_mb=64), MIXED))


# ---------------------------------------------------------------- against the paper, written out


def qkv_space(model, source_runs, owner, base, k_v="stored", base_q="running", swap_halves=False):
    """The paper's own way, as a reference: stored Q, K and V of every step and layer, composed after the projections.

    source_runs: [(seed, positive)]. Only for samplers with one evaluation for each sigma.
    """
    stored = []
    sites = sites_of(model)

    def with_attention(function):
        patched = model.clone()
        for site in sites:
            patched.set_model_attn1_replace(function, *site)
        return patched

    def key(extra, role):
        return float(extra["sigmas"][0]), (*extra["block"], extra["block_index"]), role

    def split(extra, *tensors):
        roles = extra["cond_or_uncond"]
        return zip(roles, *(t.chunk(len(roles)) for t in tensors))

    for seed, positive in source_runs:
        features = {}

        def remember(q, k, v, extra, features=features):
            features.update({key(extra, role): parts for role, *parts in split(extra, q, k, v)})
            return optimized_attention(q, k, v, extra["n_heads"])

        sample(with_attention(remember), empty(), seed=seed, positive=positive)
        stored.append(features)

    def composite(q, k, v, extra):
        rows = labels.at_grid(owner, extra["activations_shape"][-2:]).flatten()
        done = []
        for role, *running in split(extra, q, k, v):
            composed = [t.clone() for t in running]
            for image, features in enumerate(stored):
                source = features[key(extra, 1 - role if swap_halves else role)]
                for number in range(3):
                    if number == 0 and image == base and base_q == "running":
                        continue
                    if number > 0 and (k_v == "running" and image == base):
                        continue
                    composed[number][:, rows == image] = source[number][:, rows == image]
            done.append(composed)
        return optimized_attention(*(torch.cat(parts) for parts in zip(*done)), extra["n_heads"])

    seed, positive = source_runs[base]
    return sample(with_attention(composite), empty(), seed=seed, positive=positive)["samples"]


SOURCES = [(1, words(1)), (2, words(2))]


@pytest.mark.parametrize("base", [0, 1])
def test_the_composite_is_the_papers(base):
    """Rows of n compose as rows of Q, K and V do, and every choice is the paper's."""
    model, owner = random_model("sd15-small"), halves()
    ours = compose(two(cache_mb=64), MIXED, base=base, seed=SOURCES[base][0], positive=SOURCES[base][1])
    close(ours, qkv_space(model, SOURCES, owner, base))
    for variant in ({"k_v": "running"}, {"base_q": "stored"}, {"swap_halves": True}):
        assert (ours - qkv_space(model, SOURCES, owner, base, **variant)).abs().max() > 0.05, variant


def test_stored_base_queries_are_the_papers_ablation():
    close(
        compose(two(cache_mb=64), MIXED, base_q="stored"),
        qkv_space(random_model("sd15-small"), SOURCES, halves(), 0, base_q="stored"),
    )


def test_swapped_halves_do_not_give_image_k():
    """Uncond rows come from the source's uncond."""
    a, b = two(cache_mb=64)
    other = {"positive": "negative", "negative": "positive"}
    for evaluation in run_of(b).evaluations.values():
        evaluation.features = {
            (CondRole(other[half.role], 0), site): n for (half, site), n in evaluation.features.items()
        }
    composed = compose([a, b], ALL_ONE, base=1, seed=2, positive=words(2), base_q="stored")
    assert (composed - b["samples"]).abs().max() > 0.05


def test_the_paper_ablations_of_keys_and_values():
    a, b = two(cache_mb=64)
    results = {kv: compose([a, b], MIXED, kv=kv) for kv in ("composite", "concat", "model")}
    assert all(
        (results[x] - results[y]).abs().max() > 0.05
        for x, y in (("composite", "concat"), ("concat", "model"), ("model", "composite"))
    )
    for kv in results:
        close(compose(two(), MIXED, kv=kv), results[kv])
    # Keys and values of one image given twice weigh as much as once; with base tokens only that is the plain run.
    close(compose([a, a], ALL_BASE, kv="concat"), a["samples"])
    assert same(compose([a, b], ALL_BASE, kv="model"), a["samples"])


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("window", [{"start": 0.5, "end": 0.5}, {"start": 1.0, "end": 1.0}, {"end": 0.0}])
def test_an_empty_window_is_bit_equal_to_no_node(window):
    assert same(compose(two(), MIXED, seed=5, **window), sample(random_model("sd15-small"), empty(), seed=5)["samples"])


def test_a_window_reads_its_streams_in_its_own_steps_only():
    a, b = two()
    read = []
    model, latent = inject([a, b], MIXED, start=0.25, end=0.75)
    ((recipe,),) = model.attachments[KEY].groups
    select_all = recipe.select_all
    recipe.select_all = lambda n, grid: (read.append(n.shape[1]), select_all(n, grid))[1]
    calls = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(float(kwargs["transformer_options"]["sigmas"][0])), with_kwargs=True
    )
    sample(model, latent)
    hook.remove()
    sigmas = run_of(a).sigmas
    assert [calls.count(s) for s in sigmas[:-1]] == [1, 2, 2, 1]  # both images at once
    assert read == [2] * 2 * 16  # images; steps, sites


@pytest.mark.parametrize("kv", ["composite", "concat"])
def test_images_whose_conditionings_serve_the_composite_in_different_ways(kv, monkeypatch):
    """One image was recorded with two prompts for both halves of CFG, the other with one for each."""
    both = words(1) + words(2)
    a, b = record(1, positive=both, negative=both), record(2, positive=words(3), negative=NEGATIVE)
    settings = {"positive": words(1) + words(3), "negative": NEGATIVE, "kv": kv}
    together = compose([a, b], MIXED, **settings)
    monkeypatch.setattr(Engine, "exact", True)
    close(together, compose([a, b], MIXED, **settings))


def test_a_window_of_sites_leaves_the_others_alone():
    a, b = two(cache_mb=64)
    model, latent = inject([a, b], MIXED, sites="u6-8")
    seen = {}

    def watch(n, k, v, extra):
        seen.setdefault((*extra["block"], 0), k is not n)
        return n, k, v

    model.set_model_attn1_patch(watch)
    sample(model, latent)
    assert {site for site, composed in seen.items() if composed} == {("output", n, 0) for n in (9, 10, 11)}
    assert (compose([a, b], MIXED, sites="u6-8") - compose([a, b], MIXED)).abs().max() > 0.01


def test_images_that_own_nothing_cost_nothing():
    a, b = two()
    c = record(seed=3)
    model, latent = inject([a, b, c], masks_of(halves(), 3))
    ((recipe,),) = model.attachments[KEY].groups
    assert [s.run for s in recipe.streams] == [run_of(a), run_of(b)]
    close(sample(model, latent)["samples"], compose([a, b], MIXED))


def test_a_recipe_that_never_acts_is_an_error():
    model, latent = inject(two(), MIXED, start=0.75)
    with pytest.raises(ValueError, match=r"Inject: it would have no effect: .* window \(0.75 to 1\)"):
        sample_advanced(model, latent, end=2)


# ---------------------------------------------------------------- the starting latent


@pytest.mark.parametrize("seed", [1, 77])
def test_any_seed_starts_from_the_base(seed):
    a, b = two(cache_mb=64)
    assert same(compose([a, b], ALL_BASE, seed=seed), a["samples"])


@pytest.mark.parametrize("noise", ["enable", "disable"])
@pytest.mark.parametrize("sampler, atol", [("euler", 1e-3), ("heun", 1e-3)])
def test_ksampler_advanced_continues_from_any_step(sampler, atol, noise):
    a, b = two(sampler=sampler)
    model, latent = inject([a, b], ALL_BASE)
    close(sample_advanced(model, latent, sampler=sampler, start=2, noise=noise)["samples"], a["samples"], atol)


def test_ksampler_advanced_composes_as_ksampler_does():
    model, latent = inject(two(), MIXED)
    close(sample_advanced(model, latent)["samples"], compose(two(), MIXED))


def test_image_to_image_and_inpainting_keep_their_latent_and_mask():
    start = {
        "samples": torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3)),
        "noise_mask": torch.zeros(1, 64, 64),
    }
    start["noise_mask"][:, 16:48, 16:48] = 1
    a, b = record(seed=1, latent=start, denoise=0.6), record(seed=2, latent=start, denoise=0.6)
    assert same(compose([a, b], ALL_BASE, denoise=0.6), a["samples"])
    mixed = compose([a, b], MIXED, denoise=0.6)
    close(mixed[:, :, 0], start["samples"][:, :, 0], 1e-4)
    assert (mixed - a["samples"]).abs().max() > 0.05


def test_a_row_of_a_batch_as_base():
    batch = record(latent=empty(3))
    masks = masks_of(torch.full(SIZE, 2), 3)
    close(compose([batch], masks, base=2), batch["samples"][2:], 5e-2)


def test_a_composed_image_is_no_source():
    a, b = two()
    montage = sample(*recorder(*inject([a, b], MIXED)))
    assert same(montage["samples"], compose([a, b], MIXED))
    with pytest.raises(ValueError, match=r"one of its images is itself a composite \(Composite Attention Inject\)"):
        compose([montage, record(seed=3)], MIXED)


# ---------------------------------------------------------------- batches, halves, sizes


def test_cond_and_uncond_in_calls_of_their_own(monkeypatch):
    together = compose(two(cache_mb=64), MIXED)
    low_memory(monkeypatch)
    close(compose(two(cache_mb=64), MIXED), together, 1e-2)
    close(compose(two(), MIXED), together, 1e-2)


def test_a_composite_with_cfg_of_images_recorded_without():
    """Recorded at CFG 1, the uncond half is in no cache: it is replayed."""
    a, b = two(cfg=1.0, cache_mb=64)
    composed = compose([a, b], MIXED)
    replayed = compose(two(cfg=1.0), MIXED)
    close(composed, replayed)
    assert same(compose([a, b], ALL_BASE, cfg=1.0), a["samples"])


def test_a_batch_of_two_equals_two_runs():
    batch = record(latent=empty(2))
    first, second = ({**batch, "samples": batch["samples"][i : i + 1]} for i in range(2))
    for base in range(2):
        close(compose([batch], MIXED, base=base), compose([first, second], MIXED, base=base), 1e-2)
    twice, latent = inject([batch], MIXED)
    target = {"samples": latent["samples"].repeat(2, 1, 1, 1)}
    composed = sample(twice, target)["samples"]
    close(composed[0], composed[1], 1e-2)
    close(composed[:1], compose([batch], MIXED), 1e-2)


@pytest.mark.parametrize("size", [(8, 12), (9, 8), (13, 9)])
def test_other_sizes(size):
    """Odd latents have levels of ceil(h / 2^k)."""
    a, b = (record(seed=s, latent=empty(size=size)) for s in (1, 2))
    masks = masks_of(halves(size))
    assert same(compose([a, b], masks_of(torch.zeros(size), 2)), a["samples"])
    assert compose([a, b], masks).shape[-2:] == size
    grids = {}
    model, latent = inject([a, b], masks)
    model.set_model_attn1_patch(
        lambda n, k, v, extra: (
            grids.setdefault(tuple(extra["block"]), tuple(extra["activations_shape"][-2:])),
            (n, k, v),
        )[1]
    )
    sample(model, latent)
    assert set(grids.values()) == {tuple(-(-s // 2**level) for s in size) for level in range(4)}


@pytest.mark.parametrize("name", ["sd2-small", "sdxl-small"])
def test_other_families(name):
    model = random_model(name)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    settings = {"model": model, "latent": latent, "negative": words(9, name=name), "steps": 2}
    for cache_mb in (0, 64):
        a, b = (record(seed=s, positive=words(s, name=name), cache_mb=cache_mb, **settings) for s in (1, 2))
        later = {"model": model, "negative": words(9, name=name), "steps": 2}
        assert same(
            compose([a, b], masks_of(torch.zeros(16, 16), 2), positive=words(1, name=name), **later), a["samples"]
        )
        mixed = compose([a, b], masks_of(halves((16, 16))), positive=words(1, name=name), **later)
        assert (mixed - a["samples"]).abs().max() > 0.01
        if cache_mb == 0:
            replayed = mixed
    close(replayed, mixed)


# ---------------------------------------------------------------- refusals, before sampling


def test_another_size_schedule_model_or_sampler_is_refused():
    a, b = two()
    model, latent = inject([a, b], MIXED)
    with pytest.raises(ValueError, match="recorded at 8x8 latent pixels and this run has 16x16"):
        sample(model, empty(size=(16, 16)))
    with pytest.raises(
        ValueError, match="recorded over 4 steps from sigma 14.61 through .* to 0 and this run takes 6 steps from"
    ):
        sample(model, latent, steps=6)
    with pytest.raises(
        ValueError,
        match=r"sample_heun\) evaluates the model at sigma .* which the recorded run \(sample_euler\) did not",
    ):
        sample(model, latent, sampler="heun")
    with pytest.raises(ValueError, match="image 0 was recorded at 8x8 .* and image 1 at 8x12"):
        inject([a, record(latent=empty(size=(8, 12)))], MIXED)
    with pytest.raises(ValueError, match="image 0 was recorded over 4 steps .* and image 1 over 6 steps"):
        inject([a, record(steps=6)], MIXED)
    with pytest.raises(ValueError, match="image 0 was recorded with SD15.*, but the MODEL here is SD15"):
        inject([a, b], MIXED, model=random_model("sd15-small", 1))
    with pytest.raises(ValueError, match="negative conditioning and the recorded one has only positive"):
        from comfy_extras.nodes_custom_sampler import BasicGuider

        from montage.workshop.sampling import sample_custom

        recording, recorded_latent = recorder()
        import comfy.samplers

        sigmas = comfy.samplers.calculate_sigmas(recording.get_model_object("model_sampling"), "normal", 4)
        only_positive, _ = sample_custom(recorded_latent, BasicGuider.execute(recording, words(1)).args[0], sigmas)
        compose([only_positive, a], MIXED)


def test_other_loras_are_refused_and_the_same_are_not():
    def with_lora(strength, value=0.01):
        model = random_model("sd15-small").clone()
        name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
        model.add_patches({name: ("diff", (torch.full((32, 32), value),))}, strength)
        return model

    a, b = (record(seed=s, model=with_lora(1.0)) for s in (1, 2))
    assert same(compose([a, b], ALL_BASE, model=with_lora(1.0)), a["samples"])
    for other in (with_lora(0.5), with_lora(1.0, 0.02), random_model("sd15-small")):
        with pytest.raises(ValueError, match="Use the same checkpoint, LoRAs and sampling settings"):
            inject([a, b], MIXED, model=other)


@pytest.mark.parametrize(
    "masks, base, sites, part",
    [
        (MIXED[:1], 0, "all", "1 masks for 2 images"),
        (MIXED, 2, "all", r"base is image 2, and there are 2 images \(0 to 1\)"),
        (MIXED, 0, "d9", "sites: .*no d9"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(masks, base, sites, part):
    with pytest.raises(ValueError, match=f"Composite Attention Inject: {part}"):
        inject(two(), masks, base, sites=sites)


# ---------------------------------------------------------------- neighbours (test_neighbours.py has the others)


def test_the_recorder_stands_before_or_after_a_neighbour():
    recording, latent = recorder(cache_mb=64)
    a = sample(scaled_queries(recording), latent)
    b = record(model=scaled_queries(random_model("sd15-small")), cache_mb=64)
    for name, n in run_of(a).evaluations[run_of(a).sigmas[-2], 0, 0].features.items():
        assert same(n, run_of(b).evaluations[run_of(b).sigmas[-2], 0, 0].features[name])


def test_two_composites_on_one_model():
    a, b = two(cache_mb=64)
    c = record(seed=3, positive=words(3), cache_mb=64)
    one, latent = inject([a, b], MIXED, end=0.5)
    both, _ = inject([a, c], masks_of(halves().T), model=one, start=0.5)
    composed = sample(both, latent)["samples"]
    alone, _ = inject([a, b], MIXED, end=0.5)
    other, _ = inject([a, c], masks_of(halves().T), start=0.5)
    assert (composed - sample(alone, latent)["samples"]).abs().max() > 0.01
    assert (composed - sample(other, latent)["samples"]).abs().max() > 0.01
    close(
        sample(inject([a, b], MIXED, start=0.5, model=inject([a, b], MIXED, end=0.5)[0])[0], latent)["samples"],
        compose([a, b], MIXED),
    )


def test_a_block_that_another_pack_runs_in_its_own_way_is_named(monkeypatch):
    a, b = two(cache_mb=64)
    model, latent = inject([a, b], MIXED)
    block = comfy.ldm.modules.attention.BasicTransformerBlock
    original = block.forward

    def own_way(self, x, context=None, transformer_options=None):
        if transformer_options["block"] == ("output", 7):
            return x
        return original(self, x, context, transformer_options)

    monkeypatch.setattr(block, "forward", own_way)
    with pytest.raises(
        RuntimeError, match=r"attention of 1 of its 16 blocks was never reached, the first of them \('output', 7, 0\)"
    ):
        sample(model, latent)


def test_a_wrapper_called_outside_of_sampling_passes_through():
    import comfy.samplers

    model, _ = recorder()
    model.pre_run()
    cond = {"uuid": "u", "model_conds": {}, "cross_attn": words(1)[0][0]}
    conds = comfy.samplers.encode_model_conds(
        model.model.extra_conds, [cond], torch.zeros(1, 4, *SIZE), "cpu", "positive"
    )
    options = {**model.model_options, "transformer_options": {"wrappers": model.wrappers}}
    (out,) = comfy.samplers.calc_cond_batch(model.model, [conds], torch.zeros(1, 4, *SIZE), torch.ones(1), options)
    model.cleanup()
    assert torch.isfinite(out).all()


# ---------------------------------------------------------------- the cut, on recordings


def test_the_cut_gives_a_partition_that_keeps_strokes():
    a, b = two()
    masks, colours, paste = cut([a, b], pictures(1, 2), STROKES)
    assert masks.shape == (2, 64, 64) and (masks.sum(0) == 1).all()
    assert (masks[0, 8:56, 6] == 1).all() and (masks[1, 8:56, 58] == 1).all()
    assert colours.shape == paste.shape == (1, 64, 64, 3)
    first, second = pictures(1, 2)
    assert same(paste[0][masks[0] == 1], first[0][masks[0] == 1]) and same(
        paste[0][masks[1] == 1], second[0][masks[1] == 1]
    )
    assert len(colours.reshape(-1, 3).unique(dim=0)) == 2
    again, *_ = cut([record(seed=1, positive=words(1)), record(seed=2, positive=words(2))], pictures(1, 2), STROKES)
    assert same(again, masks)  # the same seeds give the same cut


def test_strokes_as_document_masks_and_picture_are_the_same():
    a, b = two()
    images = pictures(1, 2)
    reference, *_ = cut([a, b], images, STROKES)
    _, painted = strokes.parse_document(STROKES, 2)
    drawn = strokes.draw(painted, 2, 64, 64)
    assert same(cut([a, b], images, stroke_masks=drawn)[0], reference)
    owner = torch.where(drawn.amax(0) > 0.5, drawn.argmax(0), -1)
    assert same(cut([a, b], images, stroke_picture=labels.picture(owner, 2)[None])[0], reference)


def test_the_cut_of_a_batch_is_the_cut_of_its_images():
    batch = record(latent=empty(2))
    rows = [{**batch, "samples": batch["samples"][i : i + 1]} for i in range(2)]
    images = pictures(1, 2)
    assert same(cut([batch], [torch.cat(images)], STROKES)[0], cut(rows, images, STROKES)[0])


def test_without_strokes_everything_is_the_base():
    a, b = two()
    masks, *_ = cut([a, b], pictures(1, 2), base=1)
    assert (masks[1] == 1).all() and (masks[0] == 0).all()


def test_sigma_zero_measures_itself():
    a, b = two()
    keys = [[run_of(r).keys[half][0] for half in run_of(r).keys] for r in (a, b)]
    from montage.kernels import graphcut

    median = graphcut.median_distance([graphcut.image_distances(k, SIZE, 10) for k in keys])
    assert same(
        cut([a, b], pictures(1, 2), STROKES, sigma=0.0)[0], cut([a, b], pictures(1, 2), STROKES, sigma=median)[0]
    )


@pytest.mark.parametrize(
    "case, part",
    [
        (lambda a, b: cut([a, b], pictures(1)), "2 latents and 1 images"),
        (lambda a, b: cut([a, b], [*pictures(1), *pictures(2, size=32)]), "different sizes .32x32, 64x64."),
        (lambda a, b: cut([a, b], [torch.rand(2, 64, 96, 3)]), "images are 96x64 pixels and the latents 8x8"),
        (lambda a, b: cut([a, b], pictures(1, 2), base=2), "base is image 2, and there are 2 images"),
        (
            lambda a, b: cut([a, b], pictures(1, 2), '{"v":1,"base":1,"strokes":[]}'),
            "base is 0, but the strokes were painted for base 1",
        ),
        (
            lambda a, b: cut([a, b], pictures(1, 2), '{"v":1,"strokes":[{"k":2,"r":9,"p":[0,0]}]}'),
            "stroke 0 is on image 2, and there are 2 images",
        ),
        (
            lambda a, b: cut([a, b], pictures(1, 2), stroke_masks=torch.zeros(1, 64, 64)),
            "stroke_masks are 1 of 64x64, and there are 2 images of 64x64",
        ),
        (lambda a, b: cut([a, b], pictures(1, 2), stroke_masks=torch.zeros(2, 32, 64)), "stroke_masks are 2 of 64x32"),
        (
            lambda a, b: cut([a, b], pictures(1, 2), stroke_picture=torch.zeros(1, 32, 32, 3)),
            "stroke_picture is 32x32 and the images are 64x64",
        ),
        (
            lambda a, b: cut([a, b], pictures(1, 2), stroke_masks=torch.ones(2, 64, 64)),
            r"4096 pixels are painted for several images at once, the first at \(0, 0\) for images 0 and 1",
        ),
        (lambda a, b: cut([a, empty()], pictures(1, 2)), "latent 1 was not recorded"),
    ],
)
def test_a_cut_that_cannot_be_made_says_why(case, part):
    with pytest.raises(ValueError, match=f"Graph Cut Montage: .*{part}"):
        case(*two())


# ---------------------------------------------------------------- the demo model


def test_the_demo_model_composes():
    """End to end on the trained model: text, ComfyUI's sampler, cut, composite, decode."""
    from nodes import CLIPTextEncode, VAEDecode

    model, clip, vae = demo_model()
    encode = CLIPTextEncode().encode
    positive, negative = encode(clip, "a red ball on grass")[0], encode(clip, "")[0]
    batch = record(model=model, latent=empty(2, (16, 16)), positive=positive, negative=negative, cfg=3.0, steps=6)
    images = VAEDecode().decode(vae, batch)[0]
    assert images.shape == (2, 128, 128, 3)
    masks, _, paste = cut([batch], [images], STROKES, sigma=0.0)
    assert 0.05 < masks[1].mean() < 0.95
    composite = compose([batch], masks, model=model, positive=positive, negative=negative, cfg=3.0, steps=6)
    result = VAEDecode().decode(vae, {"samples": composite})[0]
    own = [(result - images[i]).abs()[0][masks[i] == 1].mean() for i in range(2)]
    assert torch.isfinite(result).all() and own[0] < (result - images[1]).abs()[0][masks[0] == 1].mean()
    assert paste.shape == (1, 128, 128, 3)


def test_fp16_and_bf16_recordings_keep_their_type():
    """The cache holds what was computed: half precision stays half the size."""
    a, _ = two(cache_mb=64)
    features = next(iter(run_of(a).evaluations.values())).features
    assert {n.dtype for n in features.values()} == {torch.float32}
    run = run_of(a)
    for evaluation in run.evaluations.values():
        evaluation.features = {name: n.half() for name, n in evaluation.features.items()}
    composed = compose([a, record(seed=2, positive=words(2), cache_mb=64)], MIXED)
    assert composed.dtype == torch.float32
    close(composed, compose(two(cache_mb=64), MIXED), 0.05)


def test_stack_and_masks_are_in_one_order():
    a, b = two(cache_mb=64)
    flipped = compose([b, a], masks_of(1 - halves()), base=1)
    close(flipped, compose([a, b], MIXED))
    assert list(stack(a, b)) == ["latent0", "latent1"]
