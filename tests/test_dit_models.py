"""Transformers: every family, by ComfyUI's own class with small random weights, through the real sampler."""

import inspect
import logging
import weakref

import comfy.sample
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import attention_pytorch, wrap_attn
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider

from montage.methods.collage import CollageBias
from montage.methods.mca_ctrl import LATE, PRESETS
from montage.methods.photomontage import CompositeAttention
from montage.nodes.collage import CollageControl, CollageCrossAttn, CollageNoise
from montage.nodes.layout_retouch import AdaptiveMaskBlend, MultiSourceSwap, StepBlendSampler, TokenAttentionMap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.nodes.photomontage import CompositeAttentionInject
from montage.nodes.record import InvertImage
from montage.nodes.textual_inversion import LearnLayerToken
from montage.patching.attention_maps import TokenMap, marked
from montage.patching.bias import attach
from montage.patching.engine import Engine
from montage.patching.install import install
from montage.patching.internals import KEY
from montage.patching.models import Site, family_of, parse_sites, sites_of
from montage.patching.models.masks import say_left_out
from montage.patching.run_masks import part_of_schedule, scaled
from montage.patching.schedule import Window
from montage.patching.streams import LATENT_KEY, Recording
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.dispatches import Dispatches
from montage.workshop.random_models import text_encoder
from montage.workshop.random_transformers import (
    TRANSFORMERS,
    build_transformer,
    control_net,
    empty_latent,
    prompt,
    random_transformer,
)
from montage.workshop.sampling import (
    STROKES,
    close,
    cut,
    inject,
    masks_of,
    recorder,
    run_of,
    same,
    sample,
    sample_custom,
)
from nodes import ConditioningSetArea, ControlNetApplyAdvanced, KSamplerAdvanced

FAMILIES = list(TRANSFORMERS)
STEPS = 2
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def exact(monkeypatch):
    """Streams are replayed, bit for bit as they were recorded."""
    monkeypatch.setattr(Engine, "exact", True)


def draw(name, model, latent, seed=1, positive=None, negative=None, cfg=3.0, steps=STEPS, **settings):
    positive, negative = positive or prompt(name, seed), negative or prompt(name, 99)
    return sample(model, latent, seed, positive, negative, cfg=cfg, steps=steps, **settings)


def recorded(name, seed=1, model=None, cache_mb=0, latent=None, **settings):
    model, latent = recorder(model or random_transformer(name), latent or empty_latent(name), cache_mb)
    return draw(name, model, latent, seed, **settings)


def labels(name, size=None, right=1):
    """Left half 0, right half `right`, on latent pixels."""
    found = torch.zeros(size or TRANSFORMERS[name].latent[-2:], dtype=torch.long)
    found[:, found.shape[1] // 2 :] = right
    return found


def composed(name, stack, owner, base=0, model=None, seed=None, positive=None, node={}, **settings):  # noqa: B006
    count = sum(len(latent["samples"]) for latent in stack)
    model, latent = inject(stack, masks_of(owner, count), base, model or random_transformer(name), **node)
    return draw(name, model, latent, base + 1 if seed is None else seed, positive, **settings)["samples"]


@each_family
def test_recording_changes_nothing(name):
    plain = draw(name, random_transformer(name), empty_latent(name))["samples"]
    assert plain.isfinite().all() and plain.std() > 0.1
    assert same(recorded(name)["samples"], plain)
    assert same(recorded(name, cache_mb=64)["samples"], plain)


@pytest.mark.parametrize(
    "name, sampler, cfg",
    [(name, "euler", 3.0) for name in FAMILIES]
    + [(name, *kind) for name in ("Flux.1", "SD3.5 medium", "Wan 2.1") for kind in (("heun", 3.0), ("dpmpp_2m", 1.0))],
)
def test_identities(exact, name, sampler, cfg):
    """All labels the base's: the base. All labels k's, on k's noise and prompt: k. Half of them: that half moves."""
    settings = {"sampler": sampler, "cfg": cfg, "steps": 3}  # in two dpmpp_2m is euler
    a, b = recorded(name, 1, **settings), recorded(name, 2, **settings)
    zeros = torch.zeros_like(labels(name))
    assert same(composed(name, [a, b], zeros, **settings), a["samples"])
    assert same(composed(name, [a, b], zeros + 1, base=1, **settings), b["samples"])
    half = composed(name, [a, b], labels(name), **settings)
    assert (half - a["samples"]).abs().max() > 1e-3


@each_family
def test_lockstep_is_replay(name, monkeypatch):
    a, b, c = (recorded(name, seed) for seed in (1, 2, 3))
    owner = labels(name)
    owner[: owner.shape[0] // 2] += 1
    together = composed(name, [a, b, c], owner)
    monkeypatch.setattr(Engine, "exact", True)
    apart = composed(name, [a, b, c], owner)
    close(together, apart, 1e-4)
    assert (apart - a["samples"]).abs().max() > 1e-2


# ---------------------------------------------------------------- composing


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "HiDream-I1", "Wan 2.1"])
def test_half_of_the_labels_move_that_half(exact, name):
    """Where tokens attend to themselves above all, what is composed stays in its place."""
    model = build_transformer(name)
    a, b = recorded(name, 1, model), recorded(name, 2, model)
    changes = (composed(name, [a, b], labels(name), model=model, node={"end": 0.5}) - a["samples"]).abs()
    left, right = changes.split(changes.shape[-1] // 2, -1)
    assert right.mean() > 1.2 * left.mean() > 0


@pytest.mark.parametrize(
    "name", ["Flux.1", "SD3.5 medium", "Qwen-Image", "Z-Image", "Cosmos-Predict2", "Anima", "HiDream-I1"]
)
def test_odd_sizes(exact, name):
    size = (7, 9)
    a, b = (recorded(name, seed, latent=empty_latent(name, size=size)) for seed in (1, 2))
    assert same(composed(name, [a, b], torch.zeros(size).long()), a["samples"])
    assert same(composed(name, [a, b], torch.ones(size).long(), base=1), b["samples"])
    mixed = composed(name, [a, b], labels(name, size))
    assert mixed.shape[-2:] == size and mixed.isfinite().all()


@each_family
def test_a_batch_of_two(name):
    """Two rows of a batch as sources, and a batch of two as target: in lockstep."""
    batch = recorded(name, latent=empty_latent(name, 2))
    first, second = ({**batch, "samples": batch["samples"][i : i + 1]} for i in range(2))
    owner = labels(name)
    close(composed(name, [batch], owner, seed=1), composed(name, [first, second], owner, seed=1), 1e-4)
    model, latent = inject([batch], masks_of(owner), 0, random_transformer(name))
    twice = draw(name, model, {"samples": latent["samples"].repeat(2, *[1] * (latent["samples"].ndim - 1))})["samples"]
    close(twice[0], twice[1], 1e-4)
    close(twice[:1], composed(name, [batch], owner, seed=1), 1e-4)


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Qwen-Image", "Z-Image", "Anima", "Wan 2.1", "HiDream-I1"])
def test_prompts_of_other_lengths(name, caplog):
    """They cannot share a batch, except where the model pads them itself: they are replayed."""
    a = recorded(name, 1)
    b = recorded(name, 2, positive=prompt(name, 2, tokens=33))
    with caplog.at_level("INFO"):
        mixed = composed(name, [a, b], labels(name))
    how = "go in lockstep" if name in ("Flux.2", "Anima") else "are replayed"
    assert [how in r.message for r in caplog.records if "the recorded images" in r.message] == [True]
    assert mixed.isfinite().all() and (mixed - a["samples"]).abs().max() > 1e-2
    close(composed(name, [a, b], torch.zeros_like(labels(name))), a["samples"], 1e-4)


@pytest.mark.parametrize("name", ["Flux.1", "Wan 2.1"])
def test_the_ablations_of_keys_and_values(name, monkeypatch):
    a, b = recorded(name, 1), recorded(name, 2)
    together = {kv: composed(name, [a, b], labels(name), node={"kv": kv}) for kv in ("composite", "concat", "model")}
    monkeypatch.setattr(Engine, "exact", True)
    for kv, found in together.items():
        close(found, composed(name, [a, b], labels(name), node={"kv": kv}), 1e-4)
    assert (together["composite"] - together["concat"]).abs().max() > 1e-2
    assert (together["composite"] - together["model"]).abs().max() > 1e-2
    # keys and values of one image given twice weigh as much as once, but against the text's
    zeros = torch.zeros_like(labels(name))
    assert same(composed(name, [a, b], zeros, node={"kv": "model"}), a["samples"])


def test_a_cache_serves_as_a_replay_does(exact):
    a, b = recorded("Flux.1", 1, cache_mb=64), recorded("Flux.1", 2, cache_mb=64)
    c, d = recorded("Flux.1", 1), recorded("Flux.1", 2)
    owner = labels("Flux.1")
    assert same(composed("Flux.1", [a, b], owner), composed("Flux.1", [c, d], owner))
    features = run_of(a).evaluations[run_of(a).sigmas[0], 0, 0].features
    assert {rows.shape for rows in features.values()} == {(1, 24, 3 * 64)} and len(features) == 2 * 5


@each_family
def test_features_that_do_not_fit_are_not_copied(name):
    """One step of a large transformer takes gigabytes: its first site tells that."""
    size = run_of(recorded(name, cache_mb=64)).evaluation_bytes
    copies, kept = {}, {}
    for budget in (0, size - 1, size):
        model, latent = recorder(random_transformer(name), empty_latent(name), 0)
        latent[LATENT_KEY].budget = budget
        with Dispatches() as dispatches:
            run = run_of(draw(name, model, latent))
        copies[budget] = dispatches.operations["to"] + dispatches.operations["_to_copy"]
        kept[budget] = [bool(evaluation.features) for evaluation in run.evaluations.values()]
    assert copies[size - 1] == copies[0] < copies[size]
    assert kept[size - 1] == [False, False] and kept[size] == [True, False]


def test_nothing_is_held_in_lockstep():
    """No rows of a source outlive the attention that they are read in."""
    a, b = recorded("Flux.1", 1), recorded("Flux.1", 2)
    held = []

    class Watching(CompositeAttention):
        def attend(self, context, target, sources, grid):
            held.append(sum(reference() is not None for reference in references))
            references[:] = [weakref.ref(source) for source in sources]
            return super().attend(context, target, sources, grid)

    references = []
    model, latent = inject([a, b], masks_of(labels("Flux.1")), 0, random_transformer("Flux.1"))
    ((recipe,),) = model.attachments[KEY].groups
    recipe.__class__ = Watching
    draw("Flux.1", model, latent)
    assert len(held) == STEPS * 5 and not any(held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "SD3.5 medium"])
def test_half_precision(exact, name, dtype):
    model = build_transformer(name, dtype=dtype)
    a, b = recorded(name, 1, model), recorded(name, 2, model)
    assert same(composed(name, [a, b], torch.zeros_like(labels(name)), model=model), a["samples"])
    assert composed(name, [a, b], labels(name), model=model).isfinite().all()


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
def test_a_lora_on_the_model(exact, name):
    plain = random_transformer(name)
    tuned = plain.clone()
    weights = [key for key in plain.model.state_dict() if key.endswith(("qkv.weight", "linear1.weight"))]
    tuned.add_patches({key: (0.2 * torch.ones_like(plain.model.state_dict()[key]),) for key in weights[:3]}, 0.5)
    a, b = recorded(name, 1, tuned), recorded(name, 2, tuned)
    assert not same(a["samples"], recorded(name, 1)["samples"])
    assert same(composed(name, [a, b], torch.zeros_like(labels(name)), model=tuned), a["samples"])
    with pytest.raises(ValueError, match="patched weights"):
        composed(name, [a, b], labels(name))


def test_reference_images_stay_the_targets_own(exact):
    """Kontext and Qwen-Image Edit: their rows follow the picture's."""
    for name in ("Flux.1", "Qwen-Image"):
        reference = torch.randn(1, *TRANSFORMERS[name].latent, generator=torch.Generator().manual_seed(5))
        shown = [prompt(name, seed, reference_latents=[reference]) for seed in (1, 2)]
        a, b = (recorded(name, seed, positive=positive) for seed, positive in zip((1, 2), shown))
        assert not same(a["samples"], recorded(name, 1)["samples"])
        zeros = torch.zeros_like(labels(name))
        assert same(composed(name, [a, b], zeros, positive=shown[0]), a["samples"])
        assert same(composed(name, [a, b], zeros + 1, base=1, positive=shown[1]), b["samples"])
        assert composed(name, [a, b], labels(name), positive=shown[0]).isfinite().all()


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Qwen-Image"])
@pytest.mark.parametrize("is_exact", [True, False])
def test_each_image_of_a_batch_has_its_own_reference(name, is_exact):
    """All of the second image is the second image, with the reference that it was recorded with."""
    references = torch.randn(2, *TRANSFORMERS[name].latent, generator=torch.Generator().manual_seed(3))
    batch, alone = (
        [prompt(name, seed, reference_latents=[r]) for seed in (1, 9)] for r in (references, references[1:])
    )
    recorded_batch = recorded(name, 1, latent=empty_latent(name, 2), positive=batch[0], negative=batch[1])
    model, latent = inject(
        [recorded_batch], masks_of(torch.ones_like(labels(name)), 2), 1, random_transformer(name), exact=is_exact
    )
    made = draw(name, model, latent, 1, positive=alone[0], negative=alone[1])["samples"]
    close(made, recorded_batch["samples"][1:], 1e-4)


def test_references_that_cannot_be_told_apart_are_refused():
    image = torch.randn(1, 16, 12, 8)
    with pytest.raises(ValueError, match="reference images, whose tokens .* in HiDream-I1"):
        recorded("HiDream-I1", cache_mb=64, positive=prompt("HiDream-I1", 1, concat_latent_image=image))
    with pytest.raises(ValueError, match="reference images, whose tokens .* in Z-Image"):
        recorded("Z-Image", cache_mb=64, positive=prompt("Z-Image", 1, reference_latents=[image]))


def test_several_frames_are_refused():
    with pytest.raises(ValueError, match="Feature Recorder: the latent has 5 frames"):
        recorded("Wan 2.1", latent={"samples": torch.zeros(1, 16, 5, 12, 8)})


# ---------------------------------------------------------------- sites


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("all", "d0 d1 s0 s1 s2"),
        ("first third", "d0"),
        ("first half", "d0 d1"),
        ("last half", "s0 s1 s2"),
        ("middle half", "d1 s0 s1"),
        ("double0,single1-", "d0 s1 s2"),
        (" double , single0-0 ", "d0 d1 s0"),
        ("u@1-2", "s0 s1 s2"),
        ("u2-", "d0"),
        ("d1-,m,u", "d0 d1 s0 s1 s2"),
        ("d@2-4, u@2-4", "d1 s0 s1"),
    ],
)
def test_sites_are_named_by_kind_and_number(text, wanted):
    found = parse_sites("test", random_transformer("Flux.1"), text)
    assert " ".join(f"{site.block[0]}{site.number}" for site in found) == wanted


@pytest.mark.parametrize("text", ["u6-8", "d0", "encoder", "double2", "single3-2", "", "double0.1", "single-2"])
def test_a_wrong_text_lists_what_the_transformer_has(text):
    with pytest.raises(ValueError, match=r"^test: sites: .*double0-1, single0-2\."):
        parse_sites("test", random_transformer("Flux.1"), text)


def test_the_nodes_defaults_mean_something_on_a_transformer():
    model = random_transformer("Qwen-Image")
    for text in (LATE, *(preset.salq_sites for preset in PRESETS.values())):
        assert parse_sites("test", model, text)
    for node in (TokenAttentionMap, MultiSourceSwap, CompositeAttentionInject, CollageCrossAttn):
        (sites,) = (found for found in node.define_schema().inputs if found.id == "sites")
        assert parse_sites("test", model, sites.default), node


def test_the_second_attention_of_sd35_medium_is_a_site_without_text():
    family = family_of(random_transformer("SD3.5 medium"))
    assert [tuple(site) for site in family.sites()] == [
        ("double", 0, 0),
        ("double", 0, 1),
        ("double", 1, 0),
        ("double", 2, 0),
    ]
    assert Site("double", 0, 1) not in family.text_sites and len(family.text_sites) == 3


@each_family
def test_the_cuts_features_are_v_of_the_first_block(name):
    run = run_of(recorded(name))
    grid = family_of(random_transformer(name)).grid(run.size)
    assert run.keys_grid == grid
    ((_, tokens, channels),) = {keys.shape for keys in run.keys.values()}
    assert tokens == grid[0] * grid[1] and channels in (64, 128, 256)


def test_a_recorded_stack_is_cut():
    a, b = recorded("Flux.1", 1), recorded("Flux.1", 2)
    masks, _, _ = cut(
        [a, b],
        [torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2)],
        STROKES,
        sigma=0.0,
    )
    assert masks.shape[0] == 2 and set(masks.unique().tolist()) == {0.0, 1.0}


# ---------------------------------------------------------------- beside other packs


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Wan 2.1"])
@pytest.mark.parametrize("mode", ["lockstep", "exact"])
def test_who_holds_the_slot_computes_every_attention(name, mode, monkeypatch):
    """As SageAttention nodes do; and what it makes of an attention is in the picture."""
    monkeypatch.setattr(Engine, "exact", mode == "exact")
    calls = []

    def occupant(func, q, k, v, heads, mask=None, *args, **kwargs):
        calls.append(q.shape)
        return 0.9 * func(q, k, v, heads, mask, *args, **kwargs)

    model = random_transformer(name).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = occupant
    a = recorded(name, 1, model)
    attentions = len(calls) // STEPS
    assert not same(a["samples"], recorded(name, 1)["samples"])
    b = recorded(name, 2, model)
    calls.clear()
    made = composed(name, [a, b], torch.zeros_like(labels(name)), model=model)
    close(made, a["samples"], 1e-4)
    # a replay ends at the last self-attention that is read; behind Wan's comes one to the text
    replayed = 0 if mode == "lockstep" else attentions - (2 if name == "Wan 2.1" else 1)
    assert len(calls) == STEPS * (attentions + replayed)


def test_patches_of_others_are_replayed_not_stacked(caplog):
    """What acts row by row must not meet the rows of another image."""
    model = random_transformer("Flux.1").clone()
    model.set_model_attn1_patch(lambda q, k, v, pe=None, attn_mask=None, extra_options=None: {"q": 0.9 * q})
    a, b = recorded("Flux.1", 1, model), recorded("Flux.1", 2, model)
    assert not same(a["samples"], recorded("Flux.1", 1)["samples"])
    with caplog.at_level("INFO"):
        assert same(composed("Flux.1", [a, b], torch.zeros_like(labels("Flux.1")), model=model), a["samples"])
    assert "are replayed" in caplog.text


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium"])
def test_skipped_blocks_are_refused(name):
    def skip(args, extra):
        return args

    model = random_transformer(name).clone()
    model.set_model_patch_replace(skip, "dit", "double_block", 1)
    a, b = recorded(name, 1), recorded(name, 2)
    with pytest.raises(RuntimeError, match="1 blocks of the model were left out .*Skip Layer Guidance"):
        recorded(name, model=model, cache_mb=64)
    with pytest.raises(RuntimeError, match="were left out"):
        composed(name, [a, b], labels(name), model=model)


@pytest.mark.parametrize("node", ["SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"])
def test_skip_layer_guidance_is_refused_before_sampling(node):
    from comfy_extras import nodes_slg

    settings = {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "1", "single_layers": "0"}
    if node == "SkipLayerGuidanceDiT":
        settings["scale"] = 3.0
    model = getattr(nodes_slg, node).execute(random_transformer("Flux.1"), **settings).args[0]
    with pytest.raises(ValueError, match="Feature Recorder: Skip Layer Guidance evaluates"):
        recorded("Flux.1", model=model)


def test_a_block_that_runs_twice_is_refused():
    def twice(args, extra):
        extra["original_block"](args)
        return extra["original_block"](args)

    model = random_transformer("Qwen-Image").clone()
    model.set_model_patch_replace(twice, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match=r"run more than once, the first of them \('double', 1, 1\)"):
        recorded("Qwen-Image", model=model, cache_mb=64)


def test_areas_are_refused():
    a, b = recorded("Flux.1", 1), recorded("Flux.1", 2)
    (corner,) = ConditioningSetArea().append(prompt("Flux.1", 1), 64, 64, 0, 0, 1.0)
    with pytest.raises(ValueError, match="the model is run on"):
        composed("Flux.1", [a, b], labels("Flux.1"), positive=corner)


@pytest.mark.parametrize(
    "kind, name", [("HunYuanDiT", "HunyuanDiT"), ("PixArtMS", "PixArt"), ("ErnieImageModel", "ERN")]
)
def test_a_transformer_that_cannot_be_reached_is_refused_by_name(kind, name):
    model = random_transformer("Flux.1").clone()
    model.add_object_patch("diffusion_model", type(kind, (torch.nn.Module,), {})())
    with pytest.raises(ValueError, match=f"this MODEL is {name}.*does not let nodes reach.*"):
        sites_of(model)
    with pytest.raises(ValueError, match="^test: Montage supports"):
        parse_sites("test", model, "all")


def test_a_class_that_nobody_has_listed_is_refused():
    """A subclass too: it may run its blocks in another way."""
    model = random_transformer("Flux.1").clone()
    model.add_object_patch("diffusion_model", type("OtherFlux", (Flux,), {}).__new__(type("OtherFlux", (Flux,), {})))
    torch.nn.Module.__init__(model.get_model_object("diffusion_model"))
    with pytest.raises(ValueError, match="Qwen-Image, Z-Image and Lumina 2, .*this MODEL is a Flux with a OtherFlux"):
        sites_of(model)


def test_nodes_for_unets_refuse_transformers_by_name():
    model = random_transformer("Flux.1")
    arguments = inspect.signature(LearnLayerToken.execute.__func__).parameters
    settings = dict.fromkeys(list(arguments)[1:], 1) | {"model": model, "clip": text_encoder(), "learning_rate": 0.1}
    with pytest.raises(ValueError, match="it works on SD1.x, SD2.x and SDXL only: it trains an embedding"):
        LearnLayerToken.execute(**settings)


# ---------------------------------------------------------------- the other methods


PROMPT_TEXT, TOKENS = "a red cat beside a blue dog", (3, 4, 5)


def two_layers():
    cat = layer(plain(RED, 48, 32), "a red cat", x=0.25, scale=0.5)
    return canvas(layer(plain(BLUE, 48, 32), "a blue dog", x=0.75, scale=0.5, behind=cat), width=64, height=96)[0]


def biased(name, model, positive, strength=1.0, start=0.0, sites="all"):
    window = Window(start, 1.0, parse_sites("test", model, sites))
    bias = CollageBias(window, two_layers(), dict.fromkeys(TOKENS, (0,)), strength, "constant")
    return install(model, heed_bias=True), attach(positive, bias)


@pytest.mark.parametrize("name", ["Flux.1", "Chroma", "SD3.5 medium", "Lumina 2", "Wan 2.1", "Hunyuan-Image"])
def test_the_collages_bias_draws_its_place_to_its_words(name):
    """More the longer it acts; one of no strength changes nothing."""
    plain_model, positive = random_transformer(name), prompt(name, 1)
    before = draw(name, plain_model, empty_latent(name))["samples"]
    model, carrying = biased(name, plain_model, positive, strength=0.0)
    close(draw(name, model, empty_latent(name), positive=carrying)["samples"], before, 1e-4)
    model, carrying = biased(name, plain_model, positive, start=0.99 - 1 / STEPS)
    last_only = draw(name, model, empty_latent(name), positive=carrying)["samples"]
    model, carrying = biased(name, plain_model, positive)
    after = draw(name, model, empty_latent(name), positive=carrying)["samples"]
    assert (after - before).abs().max() > (last_only - before).abs().max() > 1e-4
    assert after.isfinite().all()


@pytest.mark.parametrize(
    "name", ["Flux.1", "Flux.2", "Qwen-Image", "HiDream-I1", "Z-Image", "Cosmos-Predict2", "Anima"]
)
def test_the_bias_is_a_mask_on_image_rows_and_text_columns(name):
    """Against the mask written out, at every attention of the positive prompt; none for the negative."""
    masks = []

    def occupant(func, q, k, v, heads, mask=None, *args, **kwargs):
        masks.append((q.shape, k.shape[-2], mask, len(kwargs["transformer_options"]["uuids"])))
        return func(q, k, v, heads, mask, *args, **kwargs)

    plain_model = random_transformer(name).clone()
    plain_model.model_options["transformer_options"]["optimized_attention_override"] = occupant
    model, carrying = biased(name, plain_model, prompt(name, 1))
    draw(name, model, empty_latent(name), positive=carrying, steps=1, negative=prompt(name, 99, 13))
    family = family_of(plain_model)
    found = [(shape, keys, mask) for shape, keys, mask, _ in masks if mask is not None]
    assert len(found) == len(family.text_sites)
    tokens = 6 * 4
    for shape, keys, mask in found:
        assert tuple(mask.shape) == (1, 1, shape[-2], keys)
        rows = mask[0, 0].abs().sum(1).nonzero()[:, 0]
        columns = mask[0, 0].abs().sum(0).nonzero()[:, 0]
        first = {"HiDream-I1": tokens, "Flux.2": 512 - 20}.get(name, 0)
        assert columns.tolist() == [first + position for position in TOKENS]
        start = {"Flux.1": 20, "Flux.2": 512, "Qwen-Image": 20, "Z-Image": 32}.get(name, 0)
        assert rows.tolist() == list(range(start, start + tokens))
        drawn = mask[0, 0, start : start + tokens, first + TOKENS[0]].reshape(6, 4)
        assert (drawn[2:4, 0] > 0).all() and (drawn[:, 2:] < 0).all() and (drawn[:1] < 0).all()


@pytest.mark.parametrize("name", ["Flux.1", "Cosmos-Predict2"])
def test_who_knows_no_masks_is_left_out_where_one_is_needed(name, caplog):
    """As SageAttention's kernels, which leave a mask out without a word: the bias acts all the same. Said once."""
    say_left_out.cache_clear()
    masked = []

    def heedless(func, q, k, v, heads, mask=None, *args, **kwargs):
        masked.append(mask is not None)
        return func(q, k, v, heads, None, *args, **kwargs)

    model, carrying = biased(name, random_transformer(name), prompt(name, 1))
    wanted = draw(name, model, empty_latent(name), positive=carrying)["samples"]
    holding = random_transformer(name).clone()
    holding.model_options["transformer_options"]["optimized_attention_override"] = heedless
    model, carrying = biased(name, holding, prompt(name, 1))
    with caplog.at_level(logging.INFO):
        close(draw(name, model, empty_latent(name), positive=carrying)["samples"], wanted, 1e-5)
    assert len([r for r in caplog.records if "supports no attention masks" in r.message]) == 1
    assert masked.count(True) == 1 and masked.count(False) > STEPS


def test_flash_attention_is_left_out_where_a_mask_is_needed(caplog, monkeypatch):
    say_left_out.cache_clear()
    called = []

    def flash(q, k, v, heads, mask=None, *args, **kwargs):
        called.append(mask)
        return attention_pytorch(q, k, v, heads, mask, *args, **kwargs)

    monkeypatch.setattr("montage.patching.models.masks._FLASH", flash)
    monkeypatch.setattr("comfy.ldm.flux.math.optimized_attention", wrap_attn(flash))
    model, carrying = biased("Flux.1", random_transformer("Flux.1"), prompt("Flux.1", 1))
    with caplog.at_level(logging.INFO):
        draw("Flux.1", model, empty_latent("Flux.1"), positive=carrying)
    assert called and called.count(None) == len(called)
    assert len([r for r in caplog.records if "flash attention supports no attention masks" in r.message]) == 1


@each_family
def test_a_token_map_measures_and_changes_nothing(name):
    model = random_transformer(name)
    token_map = TokenMap("cat", PROMPT_TEXT, TOKENS, parse_sites("test", model, "middle half"))
    recording = Recording()
    measuring = install(model, recording=recording, token_map=token_map)
    positive = marked(prompt(name, 1), PROMPT_TEXT)
    mapped = draw(name, measuring, empty_latent(name, 2), positive=positive)
    made = mapped["samples"]
    assert same(made, draw(name, model, empty_latent(name, 2))["samples"])
    scale = model.model.latent_format.spacial_downscale_ratio  # 16 in Flux.2, 32 in Hunyuan-Image
    mask = AdaptiveMaskBlend.execute(0.3, 0.01, "or", mapped).args[0]
    assert mask.shape == (2, *(scale * side for side in made.shape[-2:]))
    found = recording.runs[0].maps["cat"]
    assert found.shape == (2, *family_of(model).grid(made.shape[-2:])) and found.min() == 0 and found.max() == 1
    assert not same(found[0], found[1])


def test_the_map_is_the_plain_formula():
    """Softmax over the text's columns of q and k after RoPE, mean over heads, sites and steps."""
    seen = []

    def occupant(func, q, k, v, heads, mask=None, *args, **kwargs):
        if kwargs["transformer_options"]["cond_or_uncond"] == [0]:
            seen.append((q[:, :, 20:] @ k[:, :, :20].mT / q.shape[-1] ** 0.5).softmax(-1)[..., TOKENS].sum(-1).mean(1))
        return func(q, k, v, heads, mask, *args, **kwargs)

    model = random_transformer("Flux.1").clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = occupant
    recording = Recording()
    token_map = TokenMap("cat", PROMPT_TEXT, TOKENS, sites_of(model))
    measuring = install(model, recording=recording, token_map=token_map)
    draw("Flux.1", measuring, empty_latent("Flux.1"), positive=marked(prompt("Flux.1", 1), PROMPT_TEXT), cfg=1.0)
    mean = torch.stack(seen).mean(0)
    assert len(seen) == STEPS * 5
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    close(recording.runs[0].maps["cat"].flatten(1), expected, 1e-4)


def collaborate(name, subject, condition, edit, model=None, lock=False, subject_mask=None, **windows):
    size = TRANSFORMERS[name].latent[-2:]
    scale = random_transformer(name).model.latent_format.spacial_downscale_ratio
    masks = [torch.as_tensor(m).float()[None].expand(1, *(scale * side for side in size)) for m in (1, edit)]
    subject_mask = masks[0] if subject_mask is None else subject_mask
    preset = {
        "preset": "custom",
        "sagi_start": 0.0,
        "sagi_end": 0.4,
        "sagi_sites": "all",
        "salq_start": 0.4,
        "salq_end": 1.0,
        "salq_sites": "u2-",
        **windows,
    }
    return CollaborativeAttention.execute(
        model or random_transformer(name), subject, subject_mask, preset, 0, lock, False, "SAGI first", 0.3, "soft",
        condition, masks[1],
    ).args  # fmt: skip


@each_family
def test_collaborative_attention_with_nothing_edited_is_the_condition(name):
    """SAGI and SALQ over no edited area, in lockstep: both attend to the condition alone."""
    subject, condition = recorded(name, 1), recorded(name, 2)
    made = draw(name, *collaborate(name, subject, condition, torch.zeros(1, 1)), 2)["samples"]
    close(made, condition["samples"], 1e-3)
    left = torch.zeros(1, 8 * TRANSFORMERS[name].latent[-1])
    left[:, : left.shape[1] // 2] = 1
    scale = random_transformer(name).model.latent_format.spacial_downscale_ratio
    left = left[:, : scale * TRANSFORMERS[name].latent[-1]] if scale <= 8 else left.repeat(1, scale // 8)
    locked = draw(name, *collaborate(name, subject, condition, left, lock=True), 2)["samples"]
    assert (locked - condition["samples"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Z-Image", "Wan 2.1", "Qwen-Image"])
def test_several_terms_in_lockstep_are_those_of_replay(name, monkeypatch):
    subject, condition = recorded(name, 1), recorded(name, 2)
    left = torch.zeros(1, 64)
    left[:, :32] = 1
    together = draw(name, *collaborate(name, subject, condition, left), 2)["samples"]
    monkeypatch.setattr(Engine, "exact", True)
    apart = draw(name, *collaborate(name, subject, condition, left), 2)["samples"]
    close(together, apart, 1e-4)
    assert (together - condition["samples"]).abs().max() > 1e-2


def swapped(name, layout, reference, model=None, **settings):
    node = {"layout_end": 0.3, "mask_start": 0.5, "end": 1.0, "sites": "u@1-2", **settings}
    return MultiSourceSwap.execute(model or random_transformer(name), layout, reference, **node).args


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Hunyuan-Image"])
def test_a_mask_may_have_what_the_latent_cut_off(name):
    """Of a picture whose height is not a multiple of what a pixel of the latent stands for: 8, 16 or 32."""
    stack = [recorded(name, seed) for seed in (1, 2)]
    scale = random_transformer(name).model.latent_format.spacial_downscale_ratio
    height, width = (scale * side for side in TRANSFORMERS[name].latent[-2:])
    takes = (
        lambda mask: inject(stack, torch.cat([mask, mask]), 0, random_transformer(name)),
        lambda mask: collaborate(name, *stack, torch.zeros(1, 1), subject_mask=mask),
        lambda mask: swapped(name, *stack, mask=mask),
    )
    for take in takes:
        take(torch.ones(1, height + scale - 1, width))
        with pytest.raises(ValueError, match="another aspect ratio"):
            take(torch.ones(1, height + 4 * scale, width))


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Z-Image", "Wan 2.1", "HiDream-I1"])
def test_multi_source_swap(exact, name):
    layout, reference = recorded(name, 1), recorded(name, 2)
    model, latent = swapped(name, layout, reference, layout_end=1.0, mask_start=1.0)
    assert same(draw(name, model, latent, 7)["samples"], layout["samples"])
    everywhere = torch.ones(1, 12, 8)
    fed = draw(name, *swapped(name, layout, reference, layout_end=0.0), 7)["samples"]
    assert (fed - layout["samples"]).abs().max() > 1e-3
    made = {m: draw(name, *swapped(name, layout, reference, mask=m * everywhere), 7)["samples"] for m in (0, 1)}
    assert (made[0] - made[1]).abs().max() > 1e-4
    if name == "Wan 2.1":  # no text in the attention, which would attend to what stands in the picture's place
        close(made[1], draw(name, *swapped(name, layout, reference), 7)["samples"], 1e-4)


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_a_bias_and_several_terms_at_one_attention(exact, name):
    """Both act; a bias of no strength leaves the composite alone."""
    subject, condition = recorded(name, 1), recorded(name, 2)
    left = torch.zeros(1, 64)
    left[:, :32] = 1
    model, latent = collaborate(name, subject, condition, left)
    alone = draw(name, model, latent, 2)["samples"]
    both = {}
    for strength in (0.0, 2.0):
        with_bias, positive = biased(name, model, prompt(name, 2), strength)
        both[strength] = draw(name, with_bias, latent, 2, positive=positive)["samples"]
    close(both[0.0], alone, 1e-4)
    assert (both[2.0] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_step_blend(name):
    """Switched at once it is the first MODEL's steps and then the second's."""
    first, second = build_transformer(name, 0), build_transformer(name, 1)
    guiders = []
    for model in (first, second):
        guider = CFGGuider.execute(model, prompt(name, 1), prompt(name, 99), 3.0).args[0]
        guiders.append(guider)
    (sigmas,) = BasicScheduler.execute(first, "normal", 4, 1.0).args
    blend = StepBlendSampler.execute(*guiders, 0.5, 0.0).args[0]
    latent = empty_latent(name)
    made = sample_custom(latent, blend, sigmas)[0]["samples"]
    assert same(sample_custom(latent, StepBlendSampler.execute(*guiders, 1.0, 0.0).args[0], sigmas)[0]["samples"],
                sample_custom(latent, guiders[0], sigmas)[0]["samples"])  # fmt: skip
    assert same(sample_custom(latent, StepBlendSampler.execute(*guiders, 0.0, 0.0).args[0], sigmas)[0]["samples"],
                sample_custom(latent, guiders[1], sigmas)[0]["samples"])  # fmt: skip
    assert made.isfinite().all()


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Qwen-Image"])
def test_places_without_noise_stay_the_images_own(name):
    cat = layer(plain(RED, 96, 32), x=0.25, scale=1.0, noise=0.0)
    dog = layer(plain(BLUE, 96, 32), x=0.75, scale=1.0, noise=0.8, behind=cat)
    collage = canvas(dog, width=64, height=96, background_noise=0.8)[0]
    start = {"samples": torch.randn(1, *TRANSFORMERS[name].latent, generator=torch.Generator().manual_seed(3))}
    model, denoise = CollageNoise.execute(random_transformer(name), collage, 0.0).args
    made = draw(name, model, start, steps=6, denoise=denoise)["samples"]
    assert same(made[..., :3], start["samples"][..., :3])
    assert (made[..., 5:] - start["samples"][..., 5:]).abs().min(1).values.max() > 1e-2


def test_each_layer_scales_its_rows_of_a_control_net():
    """Of Flux's structure: 1 everywhere changes nothing, 0 is no ControlNet, and a layer's value acts on its tokens."""
    positive, negative = prompt("Flux.1", 1), prompt("Flux.1", 99)
    hint = torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(5))
    controlled = ControlNetApplyAdvanced().apply_controlnet(positive, negative, control_net(), hint, 1.0, 0.0, 1.0)
    seen = {}

    def residuals(name):
        def take(executor, x, t, c_concat, c_crossattn, control, *args, **kwargs):
            seen.setdefault(name, control["input"][0])
            return executor(x, t, c_concat, c_crossattn, control, *args, **kwargs)

        return take

    def made(name, collage=None, background=1.0, conditioning=controlled):
        model = random_transformer("Flux.1")
        if collage is not None:
            (model,) = CollageControl.execute(model, collage, background).args
        if conditioning is controlled:
            model = model.clone()
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, name, residuals(name))  # after Collage Control's
        return sample(model, empty_latent("Flux.1"), 1, *conditioning, cfg=3.0, steps=STEPS)["samples"]

    def halves(left, right):
        first = layer(plain(RED, 96, 32), x=0.25, scale=1.0, control=left)
        return canvas(layer(plain(BLUE, 96, 32), x=0.75, scale=1.0, control=right, behind=first), width=64, height=96)[
            0
        ]

    alone = made("alone")
    assert same(made("ones", halves(1.0, 1.0)), alone)
    without = made("none", conditioning=(positive, negative))
    assert same(made("zeros", halves(0.0, 0.0), 0.0), without) and (alone - without).abs().max() > 1e-2
    made("left", halves(2.0, 0.5))
    whole, scaled = (seen[name].unflatten(1, (6, 4)) for name in ("alone", "left"))
    close(scaled[:, :, :2], 2 * whole[:, :, :2], 1e-6)
    close(scaled[:, :, 2:], 0.5 * whole[:, :, 2:], 1e-6)
    with pytest.raises(ValueError, match="Collage Control: no ControlNet acts in this run"):
        made("refused", halves(1.0, 1.0), conditioning=(positive, negative))


def test_a_control_net_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="Collage Control: a ControlNet adds 1x25x8 to this MODEL, which has 6x4"):
        scaled("Collage Control", torch.zeros(1, 25, 8), torch.ones(96, 64), (6, 4))


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Qwen-Image"])
def test_what_is_locked_has_the_noise_of_its_step(name):
    """A layer that stays is shown to the model as its own image, noised to the sigma that the sampler is at."""
    left = layer(plain(RED, 96, 32), x=0.25, scale=1.0, noise=0.0)
    collage = canvas(layer(plain(BLUE, 96, 32), x=0.75, scale=1.0, noise=0.8, behind=left), width=64, height=96)[0]
    start = {"samples": picture_of(name)}
    model, denoise = CollageNoise.execute(random_transformer(name), collage, 0.0).args
    seen = []

    def take(executor, model, conds, x, timestep, options):
        seen.append((timestep[0], x.clone()))
        return executor(model, conds, x, timestep, options)

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", take)
    draw(name, model, start, steps=6, denoise=denoise)
    sampling = model.get_model_object("model_sampling")
    image = model.model.process_latent_in(start["samples"])
    noise = comfy.sample.prepare_noise(start["samples"], 1)
    assert len(seen) == 6
    for sigma, x in seen:
        close(x[..., :3], sampling.noise_scaling(sigma[None], noise, image)[..., :3], 1e-5)
        if sigma < 0.7:
            assert (x - sampling.noise_scaling(sigma[None], noise, image))[..., 5:].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Cosmos-Predict2"])
def test_a_flows_time_is_that_of_its_schedule(name):
    """Of equal steps of the schedule, whatever its shift."""
    sampling = random_transformer(name).get_model_object("model_sampling")
    for t in (0.1, 0.5, 0.8, 1.0):
        sigma = sampling.sigmas[round(t * len(sampling.sigmas)) - 1]
        if isinstance(sampling, CONST):
            assert abs(part_of_schedule(sampling, sigma) - t) < 1e-3


# ---------------------------------------------------------------- inversion


@pytest.mark.parametrize("name", ["Flux.1", "SD3.5 medium", "Qwen-Image", "Cosmos-Predict2"])
def test_an_inverted_picture_is_sampled_again(name):
    """The more iterations, the nearer; and it is a source like any other."""
    model, positive = random_transformer(name), prompt(name, 5)
    (sigmas,) = BasicScheduler.execute(model, "normal", 6, 1.0).args
    picture = draw(name, model, empty_latent(name), 3, positive, cfg=1.0, steps=6)
    errors = []
    for iterations in (1, 8):
        inverted, noise = InvertImage.execute(model, picture, sigmas, positive, iterations).args
        assert noise["samples"].isfinite().all()
        plain_model, latent = inject([inverted], masks_of(0 * labels(name), 1), 0, model, end=0.0001)
        alone = draw(name, plain_model, latent, 9, positive, cfg=1.0, steps=6)["samples"]
        errors.append(float((alone - picture["samples"]).std() / picture["samples"].std()))
    assert errors[1] < 0.15 and errors[1] < errors[0]
    inverted = InvertImage.execute(model, picture, sigmas, positive).args[0]
    other = recorded(name, 2, steps=6, cfg=1.0)
    mixed = composed(name, [inverted, other], labels(name), seed=9, positive=positive, cfg=1.0, steps=6)
    assert mixed.isfinite().all() and (mixed - picture["samples"]).abs().max() > 1e-2


def test_a_flows_noise_is_noise():
    """Of the scale that samplers add."""
    model, positive = random_transformer("Flux.1"), prompt("Flux.1", 5)
    (sigmas,) = BasicScheduler.execute(model, "normal", 8, 1.0).args
    picture = draw("Flux.1", model, empty_latent("Flux.1"), 3, positive, cfg=1.0, steps=8)
    inverted, noise = InvertImage.execute(model, picture, sigmas, positive, 8).args
    assert same(noise["samples"], run_of(inverted).noise)
    own = comfy.sample.prepare_noise(empty_latent("Flux.1")["samples"], 3)
    assert float((noise["samples"] - own).std()) < 0.05


# ---------------------------------------------------------------- where a run begins


def picture_of(name, seed=3):
    return torch.randn(1, *TRANSFORMERS[name].latent, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "Cosmos-Predict2"])
def test_image_to_image_and_inpainting(exact, name):
    """With frames too, which a mask does not have."""
    start = {"samples": picture_of(name), "noise_mask": torch.zeros(1, 96, 64)}
    start["noise_mask"][:, 32:] = 1
    settings = {"denoise": 0.6}
    a, b = (recorded(name, seed, latent=start, **settings) for seed in (1, 2))
    assert same(composed(name, [a, b], 0 * labels(name), **settings), a["samples"])
    mixed = composed(name, [a, b], labels(name), **settings)
    close(mixed[..., :3, :], start["samples"][..., :3, :], 1e-4)
    assert (mixed - a["samples"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image", "Cosmos-Predict2"])
def test_a_run_goes_on_from_any_step(exact, name):
    a, b = recorded(name, 1, steps=4), recorded(name, 2, steps=4)
    model, latent = inject([a, b], masks_of(labels(name) * 0, 2), 0, random_transformer(name))
    arguments = ("enable", 1, 4, 3.0, "euler", "normal", prompt(name, 1), prompt(name, 99), latent, 2, 1000, "disable")
    close(KSamplerAdvanced().sample(model, *arguments)[0]["samples"], a["samples"], 1e-3)


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_the_background_is_locked_to_the_conditions(name):
    subject, condition = recorded(name, 1), recorded(name, 2)
    left = torch.zeros(1, 64)
    left[:, :32] = 1
    made = draw(name, *collaborate(name, subject, condition, left, lock=True), 2)["samples"]
    assert same(made[..., 4:], condition["samples"][..., 4:])
    assert (made[..., :4] - condition["samples"][..., :4]).abs().max() > 1e-2


def test_words_say_where_the_subject_goes():
    """A token map on a transformer is the area of Collaborative Attention, in lockstep."""
    subject = recorded("Flux.1", 1, steps=4)
    token_map = TokenMap("cat", PROMPT_TEXT, TOKENS, sites_of(random_transformer("Flux.1")))
    model = install(random_transformer("Flux.1"), recording=Recording(), token_map=token_map)
    settings = {"preset": "notebook generation"}
    mask = torch.ones(1, 96, 64)
    arguments = (mask, settings, 0, False, False, "SAGI first", 0.3, "soft")
    fed, latent = CollaborativeAttention.execute(model, subject, *arguments).args
    positive = marked(prompt("Flux.1", 1), PROMPT_TEXT)
    made = draw("Flux.1", fed, latent, 4, positive, steps=4)["samples"]
    assert made.isfinite().all()
    plain_run = draw("Flux.1", random_transformer("Flux.1"), latent, 4, positive, steps=4)["samples"]
    assert (made - plain_run).abs().max() > 1e-2


# ---------------------------------------------------------------- reference images in the conditioning


def edited_by_reference(name):
    """A positive prompt with a reference image, as Kontext's and Qwen-Image Edit's nodes make it."""
    reference = torch.randn(1, *TRANSFORMERS[name].latent, generator=torch.Generator().manual_seed(5))
    return prompt(name, 1, reference_latents=[reference])


def seen_first(name, seen):
    """A MODEL whose attentions of the first block and step are written into a list: (queries, mask, K, V). Their rows:
    20 of the text, 24 of the picture, 24 of the reference image.
    """

    def occupant(func, q, k, v, heads, mask=None, *args, **kwargs):
        options = kwargs["transformer_options"]
        is_first = options["block_index"] == 0 and options.get("block_type", "double") == "double"
        if is_first and options["sigmas"][0] == options["sample_sigmas"][0]:
            seen.append((q.shape[-2], mask, k, v))
        return func(q, k, v, heads, mask, *args, **kwargs)

    model = random_transformer(name).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = occupant
    return model


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
@pytest.mark.parametrize("method", ["photomontage", "subject swap", "personal subject"])
def test_every_method_leaves_a_reference_images_rows_alone(name, method, is_exact, monkeypatch):
    """What is composed attends to the reference image's own rows, of a target and its streams with one prompt."""
    monkeypatch.setattr(Engine, "exact", is_exact)
    positive, plain, of_a, of_b, seen = edited_by_reference(name), [], [], [], []
    without = draw(name, seen_first(name, plain), empty_latent(name), 3, positive, cfg=1.0)["samples"]
    a = recorded(name, 1, seen_first(name, of_a), positive=positive, cfg=1.0)
    b = recorded(name, 2, seen_first(name, of_b), positive=positive, cfg=1.0)
    fed = of_b[0][2][..., 20:44, :]  # K of the picture, where all of it is b's
    model, left = seen_first(name, seen), torch.zeros(1, 64)
    left[:, :32] = 1
    if method == "photomontage":
        model, latent = inject([a, b], masks_of(labels(name), 2), 0, model)
        fed = torch.where(labels(name, (6, 4)).bool().flatten()[:, None], fed, of_a[0][2][..., 20:44, :])
    elif method == "subject swap":
        model, latent = collaborate(name, a, b, left, model)
    else:
        model, latent = swapped(
            name, a, b, model, layout_end=0.0, mask_start=0.0, sites="all", mask=left.expand(1, 96, 64)
        )
    made = draw(name, model, latent, 3, positive, cfg=1.0)["samples"]
    assert made.isfinite().all() and (made - without).abs().max() > 1e-2
    assert len(seen) >= (1 if method == "photomontage" else 3)  # of the two terms and the other rows
    for own, reference in ((own, plain[0][number]) for call in seen for number, own in enumerate(call) if number > 1):
        for image in own:
            close(image[None, ..., -24:, :], reference[..., -24:, :], 1e-5)
    if is_exact and method != "subject swap":  # else others' calls are among them, or a part of the rows is fed
        whole = [k[..., 20:44, :] for _, _, k, _ in seen if k.shape[-2] == 68]
        assert any(torch.allclose(k, fed, atol=1e-5) for k in whole)


@pytest.mark.parametrize("name", ["Flux.1", "Qwen-Image"])
def test_nothing_is_added_to_what_a_reference_image_looks_for(name):
    """The collage's bias is on the picture's rows, not on those of a reference image."""
    seen = []
    model, positive = biased(name, seen_first(name, seen), edited_by_reference(name))
    made = draw(name, model, empty_latent(name), positive=positive, cfg=1.0)["samples"]
    without = draw(name, random_transformer(name), empty_latent(name), positive=positive, cfg=1.0)["samples"]
    assert (made - without).abs().max() > 1e-3
    rows, mask, *_ = seen[0]
    assert rows == 20 + 24 + 24
    assert mask[0, 0].abs().sum(1).nonzero()[:, 0].tolist() == list(range(20, 20 + 24))
    assert mask[0, 0].abs().sum(0).nonzero()[:, 0].tolist() == list(TOKENS)
