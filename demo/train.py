"""Trains the demo model from nothing: `python demo/train.py`.

Autoencoder, denoiser with its text encoder, diffusion transformer, ControlNet, personalised subject, and the reader
that judges them all. On a GPU when there is one (a few minutes), else on the CPU (hours). Checkpoints lie in demo/runs;
the same command goes on from the last one. The weights are written to demo/weights.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # started as a script: find the rest as the package that this folder is
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    __package__ = "demo"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from . import autoencoder, auxiliary_head, detector, diffusion, dit, scenes, subject
from .training_loop import Budget, fit, ranks, restore, save_safely
from .vocabulary import TOKEN_IDS, leave_out, tokenise

HERE = Path(__file__).resolve().parent
# Share of the time for each part, in the order in which they are trained.
PARTS = {
    **{"autoencoder": 0.12, "diffusion": 0.42, "dit": 0.23, "controlnet": 0.09},
    **{"subject": 0.04, "dit_subject": 0.02, "reader": 0.08},
}
SHARD = 1024  # scenes in one file of cached latents
GUIDANCE = 3.0
FANCY = 0.12  # share of objects without words for their look
ALIGNMENT = 0.1  # weight of the lesson on the side
# Share of the transformer's captions that are short, and the share in the time after LATE.
SHORTENED, SHORTENED_LATE, LATE = 0.25, 0.5, 2 / 3


class Trainer:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.runs, self.weights = Path(args.runs), Path(args.weights)
        self.figures_file = self.runs / "figures.json"
        self.figures = json.loads(self.figures_file.read_text()) if self.figures_file.exists() else {}
        self.rank, self.world = ranks()
        torch.manual_seed(args.seed)
        on_gpu = self.device.type == "cuda"
        self.auto = self._place(autoencoder.Autoencoder(**(autoencoder.FULL if on_gpu else autoencoder.SLIM)))
        self.unet = self._place(diffusion.UNet())
        self.text = self._place(diffusion.TextEncoder(len(TOKEN_IDS) + 1))
        self.controlnet = self._place(diffusion.ControlNet())
        self.heads = self._place(auxiliary_head.Heads())
        self.dit = self._place(dit.DiT())
        self.dit_heads = self._place(auxiliary_head.Heads(dit.HIDDEN))
        self.judge = self._place(detector.Reader())
        unet = {f"unet.{key}": value for key, value in self.unet.named_parameters()}
        text = {f"text.{key}": value for key, value in self.text.named_parameters() if value.requires_grad}
        heads = {f"heads.{key}": value for key, value in self.heads.named_parameters()}
        transformer = {f"dit.{key}": value for key, value in self.dit.named_parameters()}
        dit_heads = {f"heads.{key}": value for key, value in self.dit_heads.named_parameters()}
        self.parameters = {
            "autoencoder": dict(self.auto.named_parameters()),
            "diffusion": unet | heads | ({} if args.keep_text else text),
            "dit": transformer | dit_heads,
            "controlnet": dict(self.controlnet.named_parameters()),
            "reader": dict(self.judge.named_parameters()),
        }
        self.shown: dict[str, int] = {}  # step of the last grid of samples, by name
        self.started: set[str] = set()  # parts that go on from earlier weights
        if args.init:
            self.load(Path(args.init))
        bar = diffusion.alphas_bar().to(self.device)
        self.signal, self.noise = bar.sqrt(), (1 - bar).sqrt()

    def _place(self, module: torch.nn.Module) -> torch.nn.Module:
        return module.to(self.device, memory_format=torch.channels_last)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def train(self) -> None:
        for part, share in PARTS.items():
            if part in self.args.only:
                budget = Budget(60 * self.args.minutes * share, self.args.steps)
                getattr(self, f"train_{part}")(budget)
                if not self.rank:
                    self.figures_file.write_text(json.dumps(self.figures, indent=1))
            elif part in self.parameters and (self.runs / f"{part}.safetensors").exists():
                restore(self.runs / f"{part}.safetensors", self.parameters[part])

    def fit(self, name, parameters, loss_of, budget, lr, **kwargs) -> None:
        self.figures[name] = {"command": self.args.command, "processes": self.world}
        self.figures[name] |= fit(name, self.runs, parameters, loss_of, budget, lr, self.args.seed, **kwargs)

    # ------------------------------------------------------------------------------------------ parts

    def train_autoencoder(self, budget: Budget) -> None:
        _, pictures = self.pictures(self.args.pictures)
        crop, batch = self.args.crop, self.args.batch

        def loss_of(generator):
            x = self._crops(pictures, batch, crop, generator)
            with self.autocast():
                z = self.auto.encode(x)
            z = z.float()
            jitter = 0.08 * torch.randn(z.shape, generator=generator, device=self.device)
            with self.autocast():
                y = self.auto.decode(z + jitter)
            error = y.float() - x
            edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
            # The denoiser wants channels of unit variance, and few values where the decoder's tanh is flat.
            scale = (
                z.mean((0, 2, 3)).square().mean()
                + (z.std((0, 2, 3)) - 1).square().mean()
                + F.relu(z.abs() - 2.8).mean()
            )
            return error.abs().mean() + 5 * error.square().mean() + 0.5 * edges + 0.02 * scale

        self.fit("autoencoder", self.parameters["autoencoder"], loss_of, budget, self.args.lr_auto)
        with torch.no_grad(), self.autocast():
            x = pictures[:64].float() / 255
            error = (self.auto.decode(self.auto.encode(x)).float() - x).square().mean((1, 2, 3))
        self.figures["autoencoder"]["psnr"] = round((-10 * error.log10()).mean().item(), 2)
        print("autoencoder", self.figures["autoencoder"], flush=True)

    def train_diffusion(self, budget: Budget) -> None:
        latents, tokens = self.latents()
        drawn, owner = self.known_scenes(self.args.size // 8)
        empty = tokenise([""]).to(self.device)
        batch = self.args.batch
        seen = {}
        # What leaves the 8x8 level for the finest one is what the lesson on the side is about.
        listener = self.unet.output_blocks[8][-1].register_forward_hook(lambda *call: seen.update(features=call[-1]))

        def loss_of(generator):
            rows = torch.randint(len(latents), (batch,), generator=generator, device=self.device)
            ids = self._captions(tokens, rows, empty, 0.1, generator, self.args.shortened)
            loss = self.denoising_loss(latents[rows].float(), lambda: self.text(ids), generator)
            with self.autocast():
                maps = self.heads(seen["features"])
            return loss + ALIGNMENT * auxiliary_head.loss(maps, drawn.take(rows), owner[rows])

        self.fit("diffusion", self.parameters["diffusion"], loss_of, budget, self.args.lr, show=self.show)
        listener.remove()
        self.figures["diffusion"]["scenes"] = len(latents)

    def train_dit(self, budget: Budget) -> None:
        """The transformer, told by the text encoder that the denoiser has trained, which it leaves as it is."""
        latents, tokens = self.latents()
        drawn, owner = self.known_scenes(self.args.size // 8 // dit.PATCH)
        empty = tokenise([""]).to(self.device)
        batch = self.args.batch
        network = torch.compile(self.dit) if self.args.compile else self.dit

        def loss_of(generator):
            rows = torch.randint(len(latents), (batch,), generator=generator, device=self.device)
            shortened = SHORTENED_LATE if budget.spent > LATE else SHORTENED
            ids = self._captions(tokens, rows, empty, 0.1, generator, shortened)
            loss, features = self.flow(network, latents[rows].float(), ids, generator)
            with self.autocast():
                maps = self.dit_heads(features)
            return loss + ALIGNMENT * auxiliary_head.loss(maps, drawn.take(rows), owner[rows])

        self.fit("dit", self.parameters["dit"], loss_of, budget, 1.5 * self.args.lr, show=self.show_dit)
        self.figures["dit"] |= {"scenes": len(latents), "samples": self.figures["dit"]["steps"] * batch * self.world}

    def flow(self, network: Callable, x0: Tensor, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean squared error of the transformer's velocity on latents x0 with the words of `ids`, and its features."""
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        sigma = self._spread(len(x0), generator)
        share = sigma.view(-1, 1, 1, 1)
        with self.autocast():
            with torch.no_grad():
                context = self.text(ids[:, : dit.WORDS])
            velocity, features = network((1 - share) * x0 + share * noise, sigma, context)
        return F.mse_loss(velocity.float(), noise - x0), features

    def train_controlnet(self, budget: Budget) -> None:
        latents, tokens = self.latents()
        hints = torch.cat(
            [
                (scenes.layout(part.to(self.device), self.args.size) * 255).byte()[:, :1]
                for number in range(min(self.args.shards, self.args.hints))
                for part in self._parts(self.shard(number))
            ]
        )
        empty = tokenise([""]).to(self.device)
        if "controlnet" not in self.started:
            copied = {k: v for k, v in self.unet.state_dict().items() if k in self.controlnet.state_dict()}
            self.controlnet.load_state_dict(copied, strict=False)

        def loss_of(generator):
            rows = torch.randint(len(hints), (self.args.batch,), generator=generator, device=self.device)
            # Half the captions are empty: the hint alone must carry the layout.
            ids = self._captions(tokens, rows, empty, 0.5, generator)
            hint = (hints[rows].float() / 255).expand(-1, 3, -1, -1)
            return self.denoising_loss(latents[rows].float(), lambda: self.text(ids), generator, hint)

        self.unet.requires_grad_(False)
        self.fit("controlnet", self.parameters["controlnet"], loss_of, budget, self.args.lr / 2)
        self.unet.requires_grad_(True)

    def train_subject(self, budget: Budget) -> None:
        subject.train(self, budget)

    def train_dit_subject(self, budget: Budget) -> None:
        subject.train_dit(self, budget)

    def train_reader(self, budget: Budget) -> None:
        drawn, pictures = self.pictures(self.args.pictures)
        drawn = drawn.to(self.device)

        # What it will judge comes out of the autoencoder: so does half of what it learns from.
        with torch.no_grad(), self.autocast():
            for part in pictures[::2].split(64):
                part.copy_(self.auto.decode(self.auto.encode(part.float() / 255)).float().clamp(0, 1) * 255 + 0.5)

        def loss_of(generator):
            rows = torch.randint(len(pictures), (self.args.batch,), generator=generator, device=self.device)
            x = pictures[rows].float() / 255
            x = x + 0.02 * torch.randn(x.shape, generator=generator, device=self.device)
            with self.autocast():
                return detector.loss(self.judge, x, drawn.take(rows))

        self.fit("reader", self.parameters["reader"], loss_of, budget, self.args.lr * 2)

    # ------------------------------------------------------------------------------------------- data

    def shard(self, number: int) -> scenes.Scenes:
        """The scenes of one file of latents: they depend on seed and number alone."""
        return scenes.sample(
            SHARD, torch.Generator().manual_seed(1_000_000 * (self.args.seed + 1) + number), fancy=FANCY
        )

    def known_scenes(self, side: int) -> tuple[scenes.Scenes, Tensor]:
        """What the cached latents show, and which object covers each of their side * side places."""
        drawn = [self.shard(number) for number in range(self.args.shards)]
        owner = torch.cat(
            [auxiliary_head.owners(part.to(self.device), side) for shard in drawn for part in self._parts(shard)]
        )
        return scenes.Scenes(*map(torch.cat, zip(*drawn))).to(self.device), owner

    def _parts(self, drawn: scenes.Scenes, size: int = 64):
        return (drawn.take(slice(i, i + size)) for i in range(0, len(drawn.radius), size))

    def _render(self, drawn: scenes.Scenes, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.cat(
            [scenes.render(part.to(self.device), self.args.size, generator) for part in self._parts(drawn)]
        ).contiguous(memory_format=torch.channels_last)

    def pictures(self, n: int) -> tuple[scenes.Scenes, Tensor]:
        """n scenes, other than those of `shard`, and their pictures (n, 3, s, s) uint8."""
        drawn = scenes.sample(n, torch.Generator().manual_seed(self.args.seed + 7), fancy=FANCY)
        pictures = torch.empty(n, 3, self.args.size, self.args.size, dtype=torch.uint8, device=self.device)
        for i, part in enumerate(self._parts(drawn)):
            pictures[64 * i : 64 * i + 64] = (self._render(part, self.args.seed + 7 + i) * 255 + 0.5).byte()
        return drawn, pictures

    def _crops(self, pictures: Tensor, n: int, size: int, generator) -> Tensor:
        rows = torch.randint(len(pictures), (n,), generator=generator, device=self.device)
        y, x = torch.randint(pictures.shape[2] - size + 1, (2, n, 1), generator=generator, device=self.device)
        along = torch.arange(size, device=self.device)
        crops = pictures[rows[:, None, None], :, (y + along)[:, :, None], (x + along)[:, None, :]]  # (n, s, s, 3)
        return crops.permute(0, 3, 1, 2).float() / 255

    def _captions(
        self, tokens: Tensor, rows: Tensor, empty: Tensor, without: float, generator, shortened: float = 0.0
    ) -> Tensor:
        """(n, 77): the objects named in either order, some captions empty, a share of them shortened: without the
        colours, without the textures and without the place, each in half of them."""
        order = torch.randint(2, rows.shape, generator=generator, device=self.device)
        dropped = torch.rand(rows.shape, generator=generator, device=self.device) < without
        ids = tokens[rows, order].long()
        if shortened:
            drawing = torch.rand(len(rows), 4, generator=generator, device=self.device)
            ids = leave_out(ids, (drawing[:, :1] < shortened) & (drawing[:, 1:] < 0.5))
        return torch.where(dropped[:, None], empty, ids)

    def latents(self) -> tuple[Tensor, Tensor]:
        """Cached latents (n, 4, h, w) half precision and captions (n, 2, 77) in both orders, as token rows."""
        paths = [self.runs / f"latents-{self.args.size}-{number:04d}.safetensors" for number in range(self.args.shards)]
        for number, path in enumerate(paths):
            if number % self.world == self.rank and not path.exists():
                drawn = self.shard(number)
                with torch.no_grad(), self.autocast():
                    latents = torch.cat([self.auto.encode(x) for x in self._render(drawn, number).split(64)])
                words = [
                    tokenise([scenes.caption(drawn, row, backwards) for row in range(SHARD)])
                    for backwards in (False, True)
                ]
                save_safely({"latents": latents.half(), "tokens": torch.stack(words, 1).short()}, path)
                print(f"latents {number + 1} of {self.args.shards}", flush=True)
        if self.world > 1:
            dist.barrier()
        shards = [load_file(path, device=str(self.device)) for path in paths]
        return torch.cat([s["latents"] for s in shards]), torch.cat([s["tokens"] for s in shards])

    # -------------------------------------------------------------------------------------- diffusion

    def _spread(self, n: int, generator) -> Tensor:
        """(n,) times in [0, 1] spread over a batch, twice as dense in the middle as on average: there the objects'
        textures are decided, which the denoiser learns last."""
        even = (torch.arange(n, device=self.device) + torch.rand(n, generator=generator, device=self.device)) / n
        return even + (2 * math.pi * even).sin() / (4 * math.pi)

    def denoising_loss(self, x0: Tensor, context_of, generator, hint: Tensor | None = None) -> Tensor:
        """Mean squared error of v."""
        t = (self._spread(len(x0), generator) * diffusion.TIMESTEPS).long().clamp(max=diffusion.TIMESTEPS - 1)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        a, b = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        x = (a * x0 + b * noise).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            context = context_of()
            control = self.controlnet(x, t, context, hint) if hint is not None else None
            v = self.unet(x, t, context, control)
        return F.mse_loss(v.float(), a * noise - b * x0)

    @torch.no_grad()
    def sample(self, captions: list[str], seed: int, steps: int = 12) -> Tensor:
        """(n, 3, s, s) by DDIM with guidance; ComfyUI's samplers do the same with the shipped weights."""
        n, side = len(captions), self.args.size // 8
        ids = tokenise(captions + [""] * n).to(self.device)
        x = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(seed)).to(self.device)
        times = torch.linspace(diffusion.TIMESTEPS - 1, 0, steps + 1).long().tolist()
        with self.autocast():
            context = self.text(ids)
            for now, then in zip(times, times[1:]):
                t = torch.full((2 * n,), now, device=self.device)
                told, free = self.unet(torch.cat([x, x]), t, context).float().chunk(2)
                v = free + GUIDANCE * (told - free)
                image = self.signal[now] * x - self.noise[now] * v
                noise = self.noise[now] * x + self.signal[now] * v
                x = self.signal[then] * image + self.noise[then] * noise
            return self.auto.decode(x).float().clamp(0, 1)

    @torch.no_grad()
    def sample_dit(self, captions: list[str], seed: int, steps: int = 12) -> Tensor:
        """(n, 3, s, s) by Euler's method with guidance; ComfyUI's samplers do the same with the shipped weights."""
        n, side = len(captions), self.args.size // 8
        x = torch.randn(n, dit.CHANNELS, side, side, generator=torch.Generator().manual_seed(seed)).to(self.device)
        sigmas = torch.linspace(1, 0, steps + 1, device=self.device)
        with self.autocast():
            context = self.text(tokenise(captions + [""] * n)[:, : dit.WORDS].to(self.device))
            for now, then in zip(sigmas, sigmas[1:]):
                told, free = self.dit(torch.cat([x, x]), now.expand(2 * n), context)[0].float().chunk(2)
                x = x + (then - now) * (free + GUIDANCE * (told - free))
            return self.auto.decode(x).float().clamp(0, 1)

    def show(self, step: int) -> None:
        self._show(step, self.sample, "samples")

    def show_dit(self, step: int) -> None:
        self._show(step, self.sample_dit, "dit-samples")

    def _show(self, step: int, sample: Callable[..., Tensor], name: str) -> None:
        """A grid of samples of the same 16 captions and noise, every few checkpoints."""
        drawn = scenes.sample(16, torch.Generator().manual_seed(12345))
        if step - self.shown.get(name, -(10**9)) < self.args.show_every:
            return
        self.shown[name] = step
        save_grid(
            sample([scenes.caption(drawn, i) for i in range(16)], seed=1), self.runs / f"{name}-{step:06d}.jpg", 8
        )
        self.write()

    # -------------------------------------------------------------------------------------- the files

    def load(self, path: Path) -> None:
        """Starts from earlier weights, a folder of them or a demo-model.safetensors, instead of from nothing."""
        folder = path if path.is_dir() else None
        for name, module in (("controlnet", self.controlnet), ("reader", self.judge)):
            if folder and (folder / f"demo-{name}.safetensors").exists():
                module.load_state_dict(
                    {k: v.float() for k, v in load_file(folder / f"demo-{name}.safetensors").items()}
                )
                self.started.add(name)

        def under(prefix, state):
            return {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}

        if folder and (folder / "demo-dit.safetensors").exists():
            self.dit.load_state_dict(under("model.diffusion_model.", load_file(folder / "demo-dit.safetensors")))
            self.started.add("dit")
        state = load_file(folder / "demo-model.safetensors" if folder else path)
        self.unet.load_state_dict(under("model.diffusion_model.", state))
        text = under("cond_stage_model.transformer.", state)
        # By their numbers: earlier weights may know fewer words.
        rows = text.pop(table := "text_model.embeddings.token_embedding.weight")
        known = dict(zip(state["cond_stage_model.token_ids"].tolist(), rows))
        text[table] = torch.stack([known.get(token, rows[-1]) for token in TOKEN_IDS] + [rows[-1]])
        self.text.load_state_dict(text)
        autoencoder.load_taesd(self.auto, under("first_stage_model.", state))
        # The denoiser knows these latents: of the autoencoder only the decoder learns on.
        self.auto.encoder.requires_grad_(False)
        self.parameters["autoencoder"] = dict(self.auto.decoder.named_parameters(prefix="decoder"))

    def write(self) -> None:
        """What has been trained as ComfyUI's loaders read it, in half precision."""
        words = {f"cond_stage_model.transformer.{k}": v for k, v in self.text.state_dict().items()}
        rows = words["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
        rows[-1] = rows[:-1].mean(0)  # every word that no caption uses
        shared = words | {f"first_stage_model.{k}": v for k, v in autoencoder.taesd_state(self.auto).items()}
        shared = {key: value.half() for key, value in shared.items()}
        # SD1.x's latents are scaled by 0.18215 on their way into the denoiser: this undoes it.
        shared["first_stage_model.vae_scale"] = torch.tensor(0.18215)
        shared["first_stage_model.vae_shift"] = torch.tensor(0.0)
        shared["cond_stage_model.token_ids"] = torch.tensor(TOKEN_IDS, dtype=torch.int32)

        def denoiser(network):
            return {f"model.diffusion_model.{key}": value.half() for key, value in network.state_dict().items()}

        v_pred = {"v_pred": torch.tensor([])}
        self.save(denoiser(self.unet) | shared | v_pred, "demo-model", "autoencoder", "diffusion")
        self.save(denoiser(self.dit) | shared, "demo-dit", "dit")
        for part, module in (("controlnet", self.controlnet), ("reader", self.judge)):
            self.save({key: value.half() for key, value in module.state_dict().items()}, f"demo-{part}", part)

    def save(self, tensors: dict[str, Tensor], name: str, *parts: str) -> None:
        """Writes one file of weights, if any of its parts was trained, and how; of several processes the first does."""
        figures = {part: self.figures[part] for part in parts if part in self.figures}
        if figures and not self.rank:
            metadata = {
                "license": "Apache-2.0",
                "command": list(figures.values())[-1]["command"],
                "seed": str(self.args.seed),
                "size": str(self.args.size),
                "trained on": self.args.trained_on,
                "figures": json.dumps(figures),
            }
            save_safely(tensors, self.weights / f"{name}.safetensors", metadata)


def save_grid(pictures: Tensor, path: Path, columns: int, quality: int = 85) -> None:
    """(n, 3, h, w) in [0, 1] as one JPEG, n a multiple of columns."""
    from PIL import Image

    rows = pictures.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rows.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy()).save(path, quality=quality)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9 if gpu else 240, help="time for all parts together")
    parser.add_argument("--steps", type=int, help="steps of every part, instead of a time")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to train")
    parser.add_argument(
        "--init", help="start from this folder of weights, or this demo-model.safetensors, instead of from nothing"
    )
    parser.add_argument("--size", type=int, default=192 if gpu else 128, help="pixels along a side, a multiple of 64")
    parser.add_argument("--shards", type=int, default=100 if gpu else 24, help=f"scenes for the denoiser, in {SHARD}s")
    parser.add_argument("--hints", type=int, default=20 if gpu else 4, help="of these shards, for the ControlNet")
    parser.add_argument(
        "--pictures", type=int, default=20_000 if gpu else 4_096, help="scenes for autoencoder and reader"
    )
    parser.add_argument("--batch", type=int, default=384 if gpu else 24)
    parser.add_argument("--crop", type=int, default=128 if gpu else 64, help="pixels the autoencoder sees at once")
    parser.add_argument(
        "--shortened", type=float, default=0.0, help="share of the denoiser's captions that leave words out"
    )
    parser.add_argument(
        "--keep-text",
        action="store_true",
        help="train the denoiser without its text encoder, which a DiT reads too",
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-auto", type=float, default=1e-3 if gpu else 2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=gpu,
        help="train in bfloat16: on a CPU, faster where it has AMX",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer, which needs a C++ compiler: a third faster"
    )
    parser.add_argument("--runs", default=str(HERE / "runs"), help="checkpoints and caches")
    parser.add_argument("--weights", default=str(HERE / "weights"), help="the finished weights")
    parser.add_argument("--show-every", type=int, default=500, help="steps between sample grids")
    args = parser.parse_args(argv)
    # For the weights' metadata: what was asked for, but not where the files lie on this machine.
    asked = {
        key: value
        for key, value in vars(args).items()
        if value != parser.get_default(key) and key not in ("runs", "weights")
    }
    words = [
        word
        for key, value in asked.items()
        for word in (
            f"--{key.replace('_', '-')}",
            *(
                value
                if isinstance(value, list)
                else []
                if value is True
                else [Path(value).name if key == "init" else str(value)]
            ),
        )
    ]
    args.command = shlex.join(["python", "demo/train.py", *words])
    args.trained_on = torch.cuda.get_device_name() if gpu and args.device == "cuda" else "CPU"
    return args


def main(argv: list[str] | None = None) -> Trainer:
    args = arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if "WORLD_SIZE" in os.environ:  # torchrun --nproc-per-node N demo/train.py
        dist.init_process_group("gloo")
    trainer = Trainer(args)
    trainer.train()
    trainer.write()
    return trainer


if __name__ == "__main__":
    main()
