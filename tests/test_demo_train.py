"""The one command that trains it all: it runs, it writes what ComfyUI loads, and a kill costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from montage.demo import autoencoder, auxiliary_head, detector, diffusion, dit, scenes, subject, train, training_loop

PARTS = ["autoencoder", "diffusion", "dit", "controlnet", "subject", "dit_subject", "reader"]


@pytest.fixture(autouse=True)
def learning(inference):
    """The other tests run under inference mode, like nodes; training needs gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def command(folder, steps, parts, *more):
    return train.main(
        [
            *more,
            "--runs",
            str(folder / "runs"),
            "--weights",
            str(folder / "weights"),
            "--device",
            "cpu",
            "--only",
            *parts,
            "--steps",
            str(steps),
            "--shards",
            "1",
            "--hints",
            "1",
            "--pictures",
            "64",
            "--batch",
            "2",
            "--size",
            "64",
        ]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False), torch.enable_grad():
        patch.setattr(train, "SHARD", 32)
        command(folder, 1, PARTS)
    return folder / "weights"


def test_everything_is_trained_and_comfyui_loads_it(trained):
    import comfy.controlnet
    import comfy.lora
    import comfy.utils

    from montage.demo import sampling, supported_model

    assert sorted(file.name for file in trained.iterdir()) == [
        "demo-controlnet.safetensors",
        "demo-dit-subject-lora.safetensors",
        "demo-dit.safetensors",
        "demo-model.safetensors",
        "demo-reader.safetensors",
        "demo-subject-embedding.safetensors",
        "demo-subject-lora.safetensors",
    ]
    with torch.inference_mode():
        model, clip, vae = models = sampling.load(trained / "demo-model.safetensors")
        net = comfy.controlnet.load_controlnet_state_dict(
            comfy.utils.load_torch_file(str(trained / "demo-controlnet.safetensors"))
        )
        hint = scenes.layout(scenes.sample(1, torch.Generator().manual_seed(0)), 128).movedim(1, -1)
        assert sampling.draw(models, ["a red ball"], [0], control=(net, hint), steps=1).shape == (1, 128, 128, 3)
        transformer = sampling.load(trained / "demo-dit.safetensors")
        assert supported_model.architecture(transformer[0]) == "dit"
        assert sampling.draw(transformer, ["a red ball"], [0], steps=1).shape == (1, 128, 128, 3)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        lora = load_file(trained / "demo-subject-lora.safetensors")
        assert len(comfy.lora.load_lora(lora, keys)) == len(lora) / 3 == 16 * 2 * 4
        keys = comfy.lora.model_lora_keys_unet(transformer[0].model, {})
        lora = load_file(trained / "demo-dit-subject-lora.safetensors")
        assert len(comfy.lora.load_lora(lora, keys)) == len(lora) / 3 == dit.DOUBLE * 4 + dit.SINGLE * 2
        clip.tokenizer.clip_l.embedding_directory = str(trained)
        tokens = [token for token, _ in clip.tokenize("a embedding:demo-subject-embedding ball")["l"][0]]
        assert [torch.is_tensor(token) for token in tokens[:5]] == [False, False, True, True, False]


def test_a_file_tells_how_it_was_trained(trained):
    for name, parts in (
        ("demo-model", {"autoencoder", "diffusion"}),
        ("demo-dit", {"dit"}),
        ("demo-subject-lora", {"lora"}),
        ("demo-dit-subject-lora", {"dit_lora"}),
        ("demo-reader", {"reader"}),
    ):
        with safe_open(trained / f"{name}.safetensors", "pt") as opened:
            told = opened.metadata()
        figures = json.loads(told["figures"])
        assert figures.keys() == parts
        assert all(figure["steps"] == 1 for figure in figures.values())
        assert (
            told["command"].startswith("python demo/train.py --steps 1 ") and str(trained.parent) not in told["command"]
        )


@pytest.mark.parametrize("part, file", [("autoencoder", "demo-model"), ("dit", "demo-dit")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, part, file):
    monkeypatch.setattr(train, "SHARD", 32)
    whole = command(tmp_path / "whole", 3, [part])

    step = training_loop.torch.optim.AdamW.step
    count = iter(range(3))

    def power_cut(optimiser):
        if next(count) == 2:
            raise KeyboardInterrupt
        return step(optimiser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop.torch.optim.AdamW, "step", power_cut)
        patch.setattr(training_loop, "SAVE_EVERY", 0.0)
        command(tmp_path / "cut", 3, [part])
    again = command(tmp_path / "cut", 3, [part])

    written = [path.name for path in (tmp_path / "whole" / "weights").iterdir()]
    assert written == [f"{file}.safetensors"], "only what was trained"
    assert again.figures[part]["steps"] == whole.figures[part]["steps"] == 3
    for key, value in whole.parameters[part].items():
        assert torch.equal(value, again.parameters[part][key]), key
    fresh = train.Trainer(whole.args).parameters[part]
    assert any(not torch.equal(value, fresh[key]) for key, value in whole.parameters[part].items())


def test_further_training_keeps_the_latents_that_the_denoiser_knows(tmp_path):
    before = train.Trainer(
        train.arguments(["--device", "cpu", "--init", str(train.HERE / "weights"), "--runs", str(tmp_path)])
    ).auto.state_dict()
    after = command(tmp_path, 1, ["autoencoder"], "--init", str(train.HERE / "weights")).auto.state_dict()
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"decoder"}


def test_further_training_starts_from_the_transformer_that_is_there(tmp_path, monkeypatch, trained):
    monkeypatch.setattr(train, "SHARD", 32)
    made = load_file(trained / "demo-dit.safetensors")
    again = train.Trainer(train.arguments(["--device", "cpu", "--init", str(trained), "--runs", str(tmp_path)]))
    for key, value in again.dit.state_dict().items():
        assert torch.equal(value, made[f"model.diffusion_model.{key}"].float()), key


def test_the_transformer_learns_and_leaves_the_text_encoder_alone(tmp_path, monkeypatch, trained):
    """From one set of scenes, whose noised latents it must do better than say nothing about."""
    monkeypatch.setattr(train, "SHARD", 32)
    before = train.Trainer(train.arguments(["--device", "cpu", "--init", str(trained), "--runs", str(tmp_path)]))
    after = command(tmp_path, 40, ["dit"], "--init", str(trained), "--lr", "3e-3")
    words = train.tokenise(["a red striped ball and a fancy star on grass"])
    assert torch.equal(before.text(words), after.text(words))
    latents, _ = after.latents()
    context = after.text(train.tokenise([""] * len(latents)))[:, : dit.WORDS]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    sigma = torch.full((len(latents),), 0.7)
    x0 = latents.float()

    def error(trainer):
        velocity, _ = trainer.dit(0.3 * x0 + 0.7 * noise, sigma, context)
        return (velocity - (noise - x0)).square().mean()

    assert error(after) < 0.9 * error(before)


def test_the_denoiser_can_be_trained_without_its_text_encoder(tmp_path):
    common = ["--device", "cpu", "--runs", str(tmp_path)]
    alone = train.Trainer(train.arguments([*common, "--keep-text"])).parameters["diffusion"]
    both = train.Trainer(train.arguments(common)).parameters["diffusion"]
    assert alone.keys() == {name for name in both if not name.startswith("text.")} != both.keys()


def test_a_share_of_the_captions_leaves_words_out(tmp_path):
    trainer = train.Trainer(train.arguments(["--device", "cpu", "--runs", str(tmp_path)]))
    drawn = scenes.sample(1, torch.Generator().manual_seed(0), count=1)
    drawn.colour[0, 0], drawn.texture[0, 0], drawn.shape[0, 0], drawn.background[0] = 0, 1, 0, 1
    tokens = train.tokenise([scenes.caption(drawn, 0)]).expand(1, 2, -1)
    rows, empty = torch.zeros(4000, dtype=torch.long), train.tokenise([""])
    for share in (0.0, 0.5):
        captions = trainer._captions(tokens, rows, empty, 0.1, torch.Generator().manual_seed(1), share)

        def part(words, captions=captions):
            return (captions == train.tokenise([words])).all(1).float().mean().item()

        assert abs(part("") - 0.1) < 0.02
        assert abs(part("a red striped ball on grass") - 0.9 * (1 - share * 7 / 8)) < 0.03
        for short in (
            "a striped ball on grass",
            "a red ball on grass",
            "a red striped ball",
            "a ball on grass",
            "a ball",
        ):
            assert abs(part(short) - 0.9 * share / 8) < 0.02, short


def test_the_transformer_in_bfloat16_is_the_same():
    """On a CPU it goes through an attention of its own."""
    torch.manual_seed(0)
    network = dit.DiT()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, context = torch.randn(2, 4, 8, 6), torch.randn(2, dit.WORDS, 64)
    sigma = torch.tensor([0.2, 0.9])
    velocity, features = network(x, sigma, context)
    assert velocity.shape == x.shape and features.shape == (2, dit.HIDDEN, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = network(x, sigma, context)
    assert torch.nn.functional.cosine_similarity(velocity.flatten(), rough.float().flatten(), dim=0) > 0.999


@pytest.mark.slow
def test_processes_meet_and_stop_together(tmp_path):
    """Two processes see different batches, go on from the mean of their weights, and stop at the same step."""
    script = tmp_path / "both.py"
    script.write_text("""
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from demo.training_loop import Budget, fit
dist.init_process_group("gloo")
weight, seen = torch.nn.Parameter(torch.zeros(2)), []
def loss_of(generator):
    seen.append(weight.detach().clone())
    return (weight * (torch.rand(2, generator=generator) - 0.5)).sum()
steps = fit("both", Path(sys.argv[1]), {"w": weight}, loss_of, Budget(0.5), 1e-3, warmup=1)["steps"]
torch.save({"steps": steps, "seen": seen}, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
""")
    root = str(Path(training_loop.__file__).resolve().parents[1])
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(tmp_path),
            root,
        ],
        check=True,
        timeout=120,
    )
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one["steps"] == two["steps"] >= training_loop.MEET_EVERY
    before, after = training_loop.MEET_EVERY - 1, training_loop.MEET_EVERY
    assert not torch.equal(one["seen"][before], two["seen"][before])
    assert torch.equal(one["seen"][after], two["seen"][after]) and (one["seen"][after] != 0).all()


def test_noise_levels_are_twice_as_dense_in_the_middle(tmp_path):
    trainer = train.Trainer(train.arguments(["--device", "cpu", "--runs", str(tmp_path)]))
    seen = []
    trainer.unet = lambda x, t, context, control: (seen.append(t), x)[1]
    trainer.denoising_loss(torch.zeros(4000, 4, 1, 1), lambda: None, torch.Generator().manual_seed(0))
    density = torch.histogram(seen[0].double(), 100, range=(0.0, 1000.0)).hist / 40
    assert abs(density[49:51].mean() - 2) < 0.1 and abs(density[[0, -1]].mean() - 2 / 3) < 0.05
    assert seen[0].min() >= 0 and seen[0].max() <= 999


def test_bfloat16_teaches_the_same(tmp_path):
    """On a CPU it goes through an attention of its own."""

    def gradient(*more):
        trainer = train.Trainer(
            train.arguments(["--device", "cpu", "--init", str(train.HERE / "weights"), "--runs", str(tmp_path), *more])
        )
        ids = train.tokenise(["a red ball on grass", "a blue star at night"])
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        trainer.denoising_loss(latents, lambda: trainer.text(ids), torch.Generator().manual_seed(0)).backward()
        return torch.cat(
            [
                value.grad.flatten()
                for value in (*trainer.unet.parameters(), *trainer.text.parameters())
                if value.requires_grad
            ]
        )

    assert torch.nn.functional.cosine_similarity(gradient("--no-bf16"), gradient("--bf16"), dim=0) > 0.99
    assert "True" not in train.arguments(["--bf16"]).command


def test_the_lesson_on_the_side_knows_what_the_picture_shows():
    drawn = scenes.sample(32, torch.Generator().manual_seed(0), fancy=0.2)
    owner = auxiliary_head.owners(drawn, 16)
    centres = (drawn.centre * 16).long().clamp(max=15)
    for row, slot in (drawn.shape == scenes.SHAPES.index("ball")).nonzero().tolist():
        x, y = centres[row, slot]
        assert owner[row, y, x] == slot
    corner = owner[:, 0, 0] == 3
    assert corner.float().mean() > 0.9, "objects keep off the edges"

    def maps(of):
        """A head that answers for the scenes `of` with certainty."""
        slot, covered = owner.long().clamp(max=2), owner < 3

        def at(field):
            return field.gather(1, slot.flatten(1)).view_as(slot).clamp(min=0)

        what = torch.where(covered, at(of.shape), len(scenes.SHAPES) + of.background[:, None, None])
        answers = {"what": what, "colour": at(of.colour).clamp(max=7), "texture": at(of.texture)}
        logits = {
            name: 20 * torch.nn.functional.one_hot(answer, auxiliary_head._OUTPUTS[name]).float()
            for name, answer in answers.items()
        }
        return logits | {"style": detector.encode_style(of.style)[:, None, None].expand(-1, 16, 16, -1)}

    assert auxiliary_head.loss(maps(drawn), drawn, owner) < 1e-6
    assert auxiliary_head.loss(maps(drawn.with_style(tint=1.0)), drawn, owner) > 0.05
    assert auxiliary_head.loss(maps(drawn.with_style(light=0.0)), drawn, owner) > 0.1
    assert auxiliary_head.loss(maps(drawn._replace(texture=(drawn.texture + 1) % 4)), drawn, owner) > 1


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    training_loop.save_safely({"x": torch.ones(2)}, path)

    def disk_full(tensors, name, metadata):
        name.write_bytes(b"half a fi")
        raise OSError

    monkeypatch.setattr(training_loop, "save_file", disk_full)
    with pytest.raises(OSError):
        training_loop.save_safely({"x": torch.zeros(2)}, path)
    assert load_file(path)["x"].tolist() == [1, 1]


def test_a_slim_autoencoder_padded_to_taesd_draws_the_same():
    from comfy.taesd.taesd import TAESD

    slim = autoencoder.Autoencoder(**autoencoder.SLIM)
    for value in slim.parameters():
        torch.nn.init.normal_(value, std=0.05)
    theirs = TAESD()
    theirs.load_state_dict(autoencoder.taesd_state(slim), strict=False)
    picture = torch.rand(1, 3, 64, 64)
    latent = slim.encode(picture)
    assert (theirs.taesd_encoder(picture) - latent).abs().max() < 1e-5
    assert (theirs.taesd_decoder(latent) - slim.decode(latent)).abs().max() < 1e-5
    again = autoencoder.Autoencoder(**autoencoder.SLIM)
    autoencoder.load_taesd(again, autoencoder.taesd_state(slim))
    assert all(torch.equal(a, b) for a, b in zip(slim.state_dict().values(), again.state_dict().values()))


def test_a_new_controlnet_changes_nothing():
    unet, net = diffusion.UNet(), diffusion.ControlNet()
    torch.nn.init.normal_(unet.out[2].weight, std=0.1)
    x, t, context, hint = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 64), torch.rand(1, 3, 64, 64)
    plain = unet(x, t, context)
    assert plain.std() > 0.01
    assert torch.equal(unet(x, t, context, net(x, t, context, hint)), plain)
    torch.nn.init.normal_(net.middle_block_out[0].weight, std=0.1)
    assert not torch.equal(unet(x, t, context, net(x, t, context, hint)), plain)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_lora_acts_until_removed(network):
    network = diffusion.UNet() if network == "unet" else dit.DiT()
    for value in network.parameters():
        if not value.any():  # layers that are 0 before the training
            torch.nn.init.normal_(value, std=0.1)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    is_unet = isinstance(network, diffusion.UNet)

    def run():
        return network(x, torch.tensor([500]), context) if is_unet else network(x, torch.tensor([0.5]), context)[0]

    plain = run()
    lora = subject.LoRA(network, torch.Generator().manual_seed(0))
    assert torch.equal(run(), plain)
    for value in lora.factors.values():
        torch.nn.init.normal_(value.detach(), std=0.1)
    assert not torch.allclose(run(), plain, atol=1e-4)
    lora.remove()
    assert torch.equal(run(), plain)
