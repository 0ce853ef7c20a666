"""Save Recording and Load Recording: what a file keeps, and what is refused."""

import folder_paths
import pytest
import torch

from montage.nodes.record import LoadRecording, SaveRecording, recordings
from montage.patching import streams
from montage.patching.streams import LATENT_KEY, Recording, streams_of
from montage.workshop.random_models import build, random_model
from montage.workshop.sampling import (
    NEGATIVE,
    compose,
    empty,
    halves,
    masks_of,
    record,
    recorder,
    run_of,
    sample,
    words,
)

MODEL = "sd15-small"
WEIGHT = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()


def saved(latent, model=None):
    return SaveRecording.execute(latent, model or random_model(MODEL), "recordings/test").args[0]


def loaded(name, model=None, positive=None, negative=NEGATIVE):
    return LoadRecording.execute(name, model or random_model(MODEL), positive or words(1), negative).args[0]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_loaded_recording_composes_bit_for_bit(sampler, monkeypatch):
    a, b = (record(seed=seed, positive=words(seed), sampler=sampler) for seed in (41, 42))
    expected = compose([a, b], masks_of(halves()), sampler=sampler)
    names = saved(a), saved(b)
    monkeypatch.setattr(Recording, "living", set())  # as in another process
    again = [loaded(name, positive=words(seed)) for name, seed in zip(names, (41, 42))]
    assert all(
        streams_of("test", [one])[0].run is not streams_of("test", [two])[0].run for one, two in zip(again, (a, b))
    )
    assert torch.equal(compose(again, masks_of(halves()), sampler=sampler), expected)
    assert set(recordings()) == set(names)
    for one, two in zip(again, (a, b)):  # the graph cut's features too
        keys = [streams_of("test", [latent])[0].run.keys for latent in (one, two)]
        assert keys[0].keys() == keys[1].keys() and all(torch.equal(keys[0][role], keys[1][role]) for role in keys[0])


def test_a_batch_is_one_file():
    latent = record(latent=empty(2))
    again = loaded(saved(latent))
    assert [row for _, row in streams_of("test", [again])] == [0, 1]
    assert again[LATENT_KEY] is not latent[LATENT_KEY] and torch.equal(again["samples"], latent["samples"])


def test_a_file_loads_whole_however_large_it_is(monkeypatch):
    """Though a recorder forgets its oldest runs when their trajectories are too large together."""
    latents = [record(seed=seed, positive=words(1)) for seed in (47, 48, 49)]
    joined = {"samples": torch.cat([latent["samples"] for latent in latents])}
    name = saved(joined)
    monkeypatch.setattr(streams, "TRAJECTORIES", run_of(latents[0]).trajectory_bytes * 3 // 2)
    monkeypatch.setattr(Recording, "living", set())  # as in another process
    again = loaded(name)
    assert torch.equal(again["samples"], joined["samples"])
    assert [run for run, _ in streams_of("test", [again])] == again[LATENT_KEY].runs


def test_another_model_is_refused():
    name = saved(record(seed=43))
    changed = random_model(MODEL).clone()
    changed.add_patches({WEIGHT: ("diff", (torch.ones(32, 32),))}, 0.5)
    with pytest.raises(ValueError, match="Load Recording: .* was recorded with another MODEL .*LoRAs: none recorded"):
        loaded(name, changed)
    with pytest.raises(ValueError, match="Load Recording: .* was recorded with another MODEL .*family"):
        loaded(name, random_model("sdxl-small"), words(1, name="sdxl-small"))


def test_another_model_is_not_saved():
    """Its checkpoint would be written down, so that Load Recording refused the right one and took the wrong one."""
    latent, other = record(seed=46), random_model(MODEL).clone()
    assert loaded(saved(latent, other))  # another clone of it is the same MODEL
    with pytest.raises(ValueError, match="Save Recording: the recording was sampled with .* loaded separately"):
        saved(latent, build(MODEL, 5))
    other.add_patches({WEIGHT: ("diff", (torch.ones(32, 32),))}, 0.5)
    with pytest.raises(ValueError, match="Save Recording: .* but the MODEL here is .* with 1 patched weights. Connect"):
        saved(latent, other)
    assert len(recordings()) == 1  # nothing was written


def test_a_missing_prompt_and_another_file_are_refused(tmp_path):
    name = saved(record(seed=44))
    with pytest.raises(ValueError, match="recorded with a negative prompt, and none is connected"):
        loaded(name, negative=None)
    import comfy.utils

    path = tmp_path / "input" / "other.recording.safetensors"
    comfy.utils.save_torch_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="other.recording.safetensors is not a recording"):
        loaded("other.recording.safetensors")
    assert "there is no file gone" in LoadRecording.validate_inputs("gone.recording.safetensors")
    assert LoadRecording.validate_inputs() is True  # connected: known when it runs
    with pytest.raises(ValueError, match="Load Recording: there is no file gone"):
        loaded("gone.recording.safetensors")


def test_what_cannot_be_stored_is_named():
    model, latent = recorder()
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    guided = PerturbedAttentionGuidance.execute(model, 3.0)
    guided = getattr(guided, "args", guided)[0]
    with pytest.raises(ValueError, match="Save Recording: .*Perturbed- or Self-Attention Guidance"):
        saved(sample(guided, latent, seed=45))
    with pytest.raises(ValueError, match="Save Recording: latent 0 was not recorded"):
        saved({"samples": torch.full((1, 4, 8, 8), 123.0)})
