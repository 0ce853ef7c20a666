"""Every node that patches a MODEL, beside what else people patch a MODEL or a conditioning with: both work, in either
order, or the run is refused with a sentence that says what to disconnect.

PATCHERS has one line for each of our nodes, NEIGHBOURS one for each of theirs, REFUSED the pairs that do not go
together.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.multigpu
import pytest
import torch

from montage.nodes.collage import CollageControl, CollageCrossAttn, CollageNoise
from montage.nodes.layout_retouch import MultiSourceSwap, TokenAttentionMap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.patching.streams import streams_of
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.neighbours import (
    adapter,
    context_windows,
    controlled,
    differential,
    freeu,
    function_wrapper,
    hypertile,
    late,
    lora,
    lora_hook,
    nag,
    noise,
    pag,
    replaced_attention,
    sag,
    scaled_queries,
    tome,
)
from montage.workshop.random_models import build, random_model, text_encoder
from montage.workshop.sampling import (
    empty,
    halves,
    inject,
    low_memory,
    masks_of,
    record,
    recorder,
    same,
    sample,
    sample_advanced,
    words,
)

STEPS = 2
SIZE = (16, 16)  # FreeU and SAG want more than one token in the middle


def close(a, b, atol=1e-3):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def far(a, b, least=0.003):
    assert torch.isfinite(a).all() and (a - b).abs().max() > least


# ---------------------------------------------------------------- theirs


class Neighbour(NamedTuple):
    model: Callable = lambda model: model
    positive: Callable = lambda conditioning: conditioning
    masked: bool = False  # sampled over a picture, with a noise mask
    steps: int = STEPS


NEIGHBOURS = {
    "nothing": Neighbour(),
    "nothing, over a picture": Neighbour(masked=True),
    "an IPAdapter": Neighbour(adapter),
    "PAG": Neighbour(pag),
    "SAG": Neighbour(sag),
    "NAG": Neighbour(nag),
    "FreeU": Neighbour(freeu),
    "HyperTile": Neighbour(hypertile),
    "ToMe": Neighbour(tome),
    "DifferentialDiffusion": Neighbour(differential, masked=True, steps=4),
    "a LoRA": Neighbour(lora),
    "an attn1 patch": Neighbour(scaled_queries),
    "an attn1 replacement": Neighbour(replaced_attention),
    "a model function wrapper": Neighbour(function_wrapper),
    "ControlNet": Neighbour(positive=controlled),
    "a LoRA hook": Neighbour(positive=lora_hook),
    "two prompts in turn": Neighbour(positive=late),
    "context windows": Neighbour(context_windows),
}


# ---------------------------------------------------------------- ours


class Patched(NamedTuple):
    """What a node hands to a sampler."""

    model: Any
    latent: dict
    settings: dict = {}

    def sample(self, beside=NEIGHBOURS["nothing"], **settings):
        settings = {"positive": words(1), **self.settings, **settings}
        settings["positive"] = beside.positive(settings["positive"])
        return sample(self.model, self.latent, steps=settings.pop("steps", beside.steps), **settings)["samples"]


def start_of(beside):
    if not beside.masked:
        return empty(size=SIZE)
    return {"samples": noise(3, 1, 4, *SIZE), "noise_mask": torch.linspace(0, 1, 128).repeat(1, 128, 1)}


@functools.cache
def recorded(name):
    """Two images, recorded with a neighbour."""
    beside = NEIGHBOURS[name]
    model = (
        random_model("sd15-small") if name == "context windows" else beside.model(random_model("sd15-small"))
    )  # nothing is recorded in windows
    return [
        record(seed, model, start_of(beside), cache_mb=256, steps=beside.steps, positive=beside.positive(words(seed)))
        for seed in (1, 2)
    ]


def recording(model, name):
    return Patched(*recorder(model, start_of(NEIGHBOURS[name]), 256))


def composing(model, name):
    return Patched(*inject(recorded(name), masks_of(halves(SIZE)), model=model))


def composing_nothing(model, name):
    """All labels base: whatever stands beside it, the base image."""
    patched = Patched(*inject(recorded(name), masks_of(torch.zeros(SIZE), 2), model=model))
    return patched, recorded(name)[0]["samples"]


def without(model, name, latent=None, **settings):
    """What is sampled of a MODEL without our node."""
    return Patched(model, latent or start_of(NEIGHBOURS[name]), settings).sample(NEIGHBOURS[name])


def recording_nothing(model, name):
    return recording(model, name), without(model, name)


TEXT = "a red cat beside a blue dog"
clip = functools.cache(text_encoder)


def prompt():
    return clip().encode_from_tokens_scheduled(clip().tokenize(TEXT))


def collage(noise=(0.8, 0.2), control=(2.0, 0.0)):
    left, right = ({"x": x, "scale": 1.0, "noise": noise[i], "control": control[i]} for i, x in enumerate((0.25, 0.75)))
    return canvas(
        layer(plain(BLUE, 64, 32), "a blue dog", **right, behind=layer(plain(RED, 64, 32), "a red cat", **left)),
        128,
        128,
        TEXT,
    )[0]


def measuring(model, name):
    model, latent, positive = TokenAttentionMap.execute(
        model, start_of(NEIGHBOURS[name]), clip(), TEXT, "cat", "d@2-4,u@2-4"
    ).args
    return Patched(model, latent, {"positive": positive})


def measuring_nothing(model, name):
    return measuring(model, name), without(model, name, positive=prompt())


def biased(model, name, strength=1.0):
    model, positive = CollageCrossAttn.execute(model, clip(), collage(), strength, "log log", 0.0, 1.0, "all").args
    return Patched(model, start_of(NEIGHBOURS[name]), {"positive": positive})


def biased_by_nothing(model, name):
    return biased(model, name, 0.0), without(model, name, positive=prompt())


def harmonised(model, name, noise=(0.8, 0.2)):
    return Patched(
        CollageNoise.execute(model, collage(noise), 1.0).args[0],
        start_of(NEIGHBOURS[name]) | {"samples": noise_of_a_picture()},
        {"denoise": 0.8},
    )


def noise_of_a_picture():
    return noise(3, 1, 4, *SIZE)


def harmonised_alike(model, name):
    patched = harmonised(model, name, (0.8, 0.8))
    return patched, without(model, name, patched.latent, denoise=0.8)


def weighed(model, name, control=(2.0, 0.0)):
    return Patched(
        CollageControl.execute(model, collage(control=control), 1.0).args[0],
        start_of(NEIGHBOURS[name]),
        {"positive": controlled(words(1))},
    )


def weighed_alike(model, name):
    return weighed(model, name, (1.0, 1.0)), without(model, name, positive=controlled(words(1)))


RIGHT_HALF = halves((128, 128)).float()


def swapping(model, name, edit_mask=RIGHT_HALF):
    """SAGI in the first half of the steps, SALQ in the second."""
    subject, condition = recorded(name)
    windows = {
        "preset": "custom",
        "sagi_start": 0.0,
        "sagi_end": 0.5,
        "sagi_sites": "all",
        "salq_start": 0.5,
        "salq_end": 1.0,
        "salq_sites": "all",
    }
    model, latent = CollaborativeAttention.execute(
        model, subject, 1 - edit_mask, windows, 0, True, False, "SAGI first", 0.3, "soft", condition, edit_mask
    ).args
    return Patched(model, {**start_of(NEIGHBOURS[name]), **latent})  # the LATENT has no noise mask: a user sets one


def swapping_nothing(model, name):
    """Nothing to edit, all of the picture locked."""
    return swapping(model, name, torch.zeros(128, 128)), recorded(name)[1]["samples"]


def retouching(model, name, layout_end=0.5):
    layout, reference = recorded(name)
    return Patched(
        *MultiSourceSwap.execute(model, layout, reference, layout_end, 0.6, 1.0, "all").args, {"positive": words(2)}
    )


def retouching_nothing(model, name):
    """The layout's to the end."""
    return retouching(model, name, 1.0), recorded(name)[0]["samples"]


class Patcher(NamedTuple):
    """patch: what the node makes of a MODEL that has images recorded beside a neighbour. identity: the same where it
    must change nothing, with what is then sampled, bit for bit. display: its name in messages. changes: whether it
    changes what is sampled. recorded: whether it needs the MODEL that images were recorded with."""

    display: str
    patch: Callable
    identity: Callable
    changes: bool = True
    recorded: bool = False


PATCHERS = {
    "FeatureRecorder": Patcher("Feature Recorder", recording, recording_nothing, changes=False),
    "TokenAttentionMap": Patcher("Token Attention Map", measuring, measuring_nothing, changes=False),
    "CompositeAttentionInject": Patcher("Composite Attention Inject", composing, composing_nothing, recorded=True),
    "CollaborativeAttention": Patcher("Collaborative Attention", swapping, swapping_nothing, recorded=True),
    "MultiSourceSwap": Patcher("Multi Source Swap", retouching, retouching_nothing, recorded=True),
    "CollageCrossAttn": Patcher("Collage Cross Attention", biased, biased_by_nothing),
    "CollageNoise": Patcher("Collage Noise", harmonised, harmonised_alike),
    "CollageControl": Patcher("Collage Control", weighed, weighed_alike),
}

WINDOWS = "context windows .* Disconnect"
REFUSED = {  # (node, neighbour): what the message says
    ("FeatureRecorder", "context windows"): WINDOWS,
    ("TokenAttentionMap", "context windows"): WINDOWS,
    ("CompositeAttentionInject", "context windows"): WINDOWS,
    **{
        (node, "context windows"): WINDOWS for node in ("CollaborativeAttention", "MultiSourceSwap", "CollageCrossAttn")
    },
    **{
        (node, "a LoRA hook"): "Apply the LoRA to the MODEL instead"
        for node in ("CompositeAttentionInject", "CollaborativeAttention", "MultiSourceSwap")
    },
    **{("CollaborativeAttention", guidance): "in one piece, .*Disconnect it" for guidance in ("PAG", "SAG")},
    **{("CollaborativeAttention", cut): "Disconnect HyperTile, ToMe" for cut in ("HyperTile", "ToMe")},
}
ITS_OWN = {("CollageControl", "ControlNet")}  # a node that is nothing without that neighbour
PAIRS = [
    (node, name)
    for node in PATCHERS
    for name in NEIGHBOURS
    if not name.startswith("nothing") and (node, name) not in ITS_OWN
]
nodes = pytest.mark.parametrize("node", PATCHERS)


def both_orders(node, name):
    """The node's patch after the neighbour's, and before it."""
    model, beside, patch = random_model("sd15-small"), NEIGHBOURS[name], PATCHERS[node].patch
    yield lambda: patch(beside.model(model), name)
    if name == "a LoRA" and PATCHERS[node].recorded:
        return  # the MODEL that comes in must be the one that was recorded
    yield lambda: (ours := patch(model, name))._replace(model=beside.model(ours.model))


@functools.cache
def alone(node, name):
    """What the node does beside nobody, in the same place."""
    beside = NEIGHBOURS[name]
    patched = PATCHERS[node].patch(
        random_model("sd15-small"),
        name if beside.steps != STEPS else "nothing, over a picture" if beside.masked else "nothing",
    )
    return patched.sample(Neighbour(steps=beside.steps))


# ---------------------------------------------------------------- side by side


@pytest.mark.slow
@pytest.mark.parametrize("node, name", PAIRS)
def test_side_by_side_in_either_order(node, name):
    model, beside, ours = random_model("sd15-small"), NEIGHBOURS[name], PATCHERS[node]
    if (node, name) in REFUSED:
        for patched in both_orders(node, name):
            with pytest.raises(ValueError, match=f"^{ours.display}: .*{REFUSED[node, name]}"):
                patched().sample(beside)
        return
    first, *others = (patched().sample(beside) for patched in both_orders(node, name))
    for other in others:
        close(other, first)
    unchanged, expected = ours.identity(beside.model(model), name)
    assert same(unchanged.sample(beside), expected)
    far(first, alone(node, name))  # the neighbour does something
    if ours.changes:
        far(first, expected)  # and so does the node


@pytest.mark.slow
@pytest.mark.parametrize("name", ["an IPAdapter", "PAG", "SAG", "FreeU", "an attn1 patch", "an attn1 replacement"])
def test_images_are_replayed_with_their_neighbours(name):
    model = NEIGHBOURS[name].model(random_model("sd15-small"))
    replayed = [record(seed, model, empty(size=SIZE), cache_mb=0, steps=STEPS, positive=words(seed)) for seed in (1, 2)]
    close(Patched(*inject(replayed, masks_of(halves(SIZE)), model=model)).sample(), composing(model, name).sample())


# ---------------------------------------------------------------- how ComfyUI runs a model


@pytest.mark.slow
@nodes
def test_the_model_that_came_in_stays_as_it_was(node):
    model = random_model("sd15-small")
    plain, options = (
        Patched(model, empty(size=SIZE)).sample(),
        [str(part) for part in (model.model_options, model.wrappers, model.attachments, model.additional_models)],
    )
    PATCHERS[node].patch(model, "nothing").sample()
    assert [
        str(part) for part in (model.model_options, model.wrappers, model.attachments, model.additional_models)
    ] == options
    assert same(Patched(model, empty(size=SIZE)).sample(), plain)


@pytest.mark.slow
@nodes
def test_cond_and_uncond_in_calls_of_their_own(node, monkeypatch):
    together = PATCHERS[node].patch(random_model("sd15-small"), "nothing").sample()
    low_memory(monkeypatch)
    close(PATCHERS[node].patch(random_model("sd15-small"), "nothing").sample(), together, 1e-2)


@pytest.mark.slow
@nodes
def test_weights_that_are_cast_for_every_call(node, monkeypatch):
    """--lowvram: no weight stays on the device, each comes when it is called."""
    patched = PATCHERS[node].patch(random_model("sd15-small"), "nothing")
    expected = patched.sample()
    load = comfy.model_management.LoadedModel.model_load
    monkeypatch.setattr(
        comfy.model_management.LoadedModel, "model_load", lambda self, memory=0, **how: load(self, 1, **how)
    )
    comfy.model_management.unload_all_models()
    close(patched.sample(), expected)
    unet = patched.model.model.diffusion_model
    assert (
        patched.model.model.model_lowvram
        and unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.comfy_cast_weights
    )
    comfy.model_management.unload_all_models()


@pytest.mark.slow
@pytest.mark.parametrize(
    "node, first",
    [("CompositeAttentionInject", "plain"), ("CompositeAttentionInject", "patched"), ("CollageCrossAttn", "plain")],
)
def test_a_compiled_model_does_not_drop_a_patch(node, first, caplog):
    """A model compiled unpatched ignores patches that come later; one compiled patched breaks without them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        return model

    model, patch = random_model("sd15-small"), PATCHERS[node].patch
    plain, expected = Patched(model, empty(size=SIZE)).sample(), patch(model, "nothing").sample()
    base = compiled(model)
    if first == "plain":
        close(Patched(base, empty(size=SIZE)).sample(), plain, 1e-2)
    caplog.clear()
    close(patch(base, "nothing").sample(), expected, 1e-2)
    assert (
        len([r for r in caplog.records if "torch.compile is skipped" in r.message and r.levelno == logging.WARNING])
        == 1
    )
    close(Patched(base, empty(size=SIZE)).sample(), plain, 1e-2)
    later = patch(model, "nothing")
    close(later._replace(model=compiled(later.model)).sample(), expected, 1e-2)


GOES_SPLIT = {"CollageCrossAttn", "CollageNoise", "CollageControl"}


@pytest.mark.slow
@nodes
def test_work_split_over_several_devices(node, monkeypatch):
    """Core's MultiGPU CFG Split runs the halves in threads, on copies of the model that our patches know nothing of.
    Here the second device is the first under another name, which the real node takes for two."""
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    def split(model):
        comfy.model_management.unload_all_models()
        monkeypatch.setattr(
            comfy.model_management, "current_loaded_models", []
        )  # the node trips over those of earlier tests that nobody holds
        return MultiGPUCFGSplitNode.execute(model, 2).args[0]

    monkeypatch.setattr(
        comfy.model_management,
        "get_all_torch_devices",
        lambda exclude_current=False: [torch.device("cpu"), torch.device("cpu", 0)],
    )
    model = random_model("sd15-small").clone()
    model.cached_patcher_init = build, ("sd15-small",)
    close(
        Patched(split(model), empty(size=SIZE)).sample(), Patched(model, empty(size=SIZE)).sample(), 1e-2
    )  # by itself it works
    ours = PATCHERS[node]
    for patched in (
        ours.patch(split(model), "nothing"),
        (bare := ours.patch(model, "nothing"))._replace(model=split(bare.model)),
    ):
        if node in GOES_SPLIT:
            close(patched.sample(), alone(node, "nothing"), 1e-2)
            continue
        with pytest.raises(ValueError, match=f"^{ours.display}: .*MultiGPU CFG Split .* disconnect"):
            patched.sample()


# ---------------------------------------------------------------- a detailer, which samples a crop with the same MODEL

CROPS = {
    "another size": ((12, 12), {"denoise": 0.5}),
    "another shape": ((12, 20), {"denoise": 0.5}),
    "another denoise": (SIZE, {"denoise": 0.45}),
    "a part of the schedule": (
        SIZE,
        {"steps": STEPS // 2, "denoise": 0.5},
    ),  # its sigmas are those of the recording's second half
    "the whole schedule": (SIZE, {}),
}
ANOTHER_LATENT = "another latent .* use the MODEL before this node"
ANOTHER_SHAPE = "canvas is 128x128 and the latent 20x12, another shape"
CROPS_REFUSED = {
    ("CompositeAttentionInject", "another size"): "recorded at 16x16 latent pixels and this run has 12x12",
    ("CompositeAttentionInject", "another shape"): "recorded at 16x16 latent pixels and this run has 12x20",
    ("CompositeAttentionInject", "another denoise"): "Set the sampler's steps, scheduler and denoise",
    ("CompositeAttentionInject", "a part of the schedule"): ANOTHER_LATENT,
    ("CompositeAttentionInject", "the whole schedule"): ANOTHER_LATENT,
    ("CollageCrossAttn", "another shape"): ANOTHER_SHAPE,
    ("CollageNoise", "another shape"): ANOTHER_SHAPE,
    ("CollageControl", "another shape"): ANOTHER_SHAPE,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "node, crop", [*CROPS_REFUSED, *((node, crop) for node in PATCHERS for crop in CROPS if not PATCHERS[node].changes)]
)
def test_a_crop_is_refused_or_sampled_as_if_the_node_were_not_there(node, crop):
    """A collage's nodes take a latent of the canvas's proportions, at any size, for the canvas: a second pass at a
    larger size is one.
    """
    ours = PATCHERS[node]
    patched = ours.patch(random_model("sd15-small"), "nothing")
    before = patched.sample()
    size, settings = CROPS[crop]
    again = patched._replace(latent={"samples": noise(4, 1, 4, *size)}, settings={**patched.settings, **settings})
    if (node, crop) in CROPS_REFUSED:
        with pytest.raises(ValueError, match=f"^{ours.display}: .*{CROPS_REFUSED[node, crop]}"):
            again.sample()
    else:
        assert same(again.sample(), again._replace(model=random_model("sd15-small")).sample())
    assert same(patched.sample(), before)


def test_a_recording_outlives_a_detailer():
    model, latent = recorder(latent=empty(size=SIZE))
    image = sample(model, latent, steps=STEPS)
    sample(model, {"samples": noise(4, 1, 4, 12, 12)}, denoise=0.5, steps=STEPS)
    (stream,) = streams_of("test", [image])
    assert stream.run.size == SIZE


def test_a_second_stage_goes_on_with_what_the_first_composed():
    """KSampler Advanced twice, the first handing its noisy latent on: the same as one sampler."""
    a, b = recorded("nothing")
    model, latent = inject([a, b], masks_of(halves(SIZE)))
    half = sample_advanced(model, latent, end=1, leftover="enable", steps=STEPS)
    close(
        sample_advanced(model, half, start=1, noise="disable", steps=STEPS)["samples"],
        sample(model, latent, steps=STEPS)["samples"],
    )
