"""Train aspen or willow on CPU, resumably, against a deadline on the wall clock.

    python -m training.aspen.train --work DIR --shape 4m --until 10:20 --decay-minutes 25

Two single-thread processes compute half a batch each and sum gradients once a step: on a machine shared with other
work this loses far less to waiting than one process whose threads meet at every operator. The schedule is warm-up,
stable, decay: the learning rate stays constant until `decay-minutes` before the deadline, and the state just before
the decay is kept as `checkpoint-stable.pt`, from which a later call trains on (`--resume stable`). `DIR/mix.json`
says what a batch is made of and is read again every 20 steps, so the mix can be changed while training:

    {"lengths": {"512": 0.9, "2048": 0.1}, "packs": {"512": {"text": 0.3, "synthetic": 0.7}, "2048": {"long": 1.0}}}

`--align mixers|stream --donor CHECKPOINT` trains a transplanted model (see `transplant`) to do what aspen does inside;
see `align`. `"align": 0.5` in the mix does so in half of the steps, and trains to answer in the others; without it
every step aligns.
"""

import argparse
import datetime
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from training.aspen.align import OBJECTIVES
from training.aspen.build import build_model
from training.aspen.model import head_loss
from training.aspen.optimizer import Optimizer
from training.aspen.pack import Pack
from training.aspen.paths import default_work
from training.aspen.shape import SHAPES

END_OF_TEXT_NAME = "<|endoftext|>"
HEAD_CHUNK = 1024
"""Positions per block of the language-model head, so that its fp32 logits (32 MB) stay near the cache."""
Mix = dict[str, dict[str, dict[str, float]] | dict[str, float] | float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one training call does. Times are seconds since the epoch."""

    work: Path
    shape: str
    deadline: float
    decay_seconds: float
    world: int
    tokens_per_rank: int
    warmup_steps: int
    save_seconds: float
    resume: str
    peak: float = 1.0
    align: tuple[str, Path] | None = None
    """Name of an objective in `align`, and the donor's checkpoint; None trains to answer."""

    def factor(self, step: int, now: float) -> float:
        """Learning-rate factor: linear warm-up to `peak`, constant, then linear to zero at the deadline."""
        fall = min(1.0, max(0.0, (self.deadline - now) / self.decay_seconds))
        return self.peak * min(1.0, (step + 1) / self.warmup_steps) * fall


@dataclass(slots=True)
class Feed:
    """Draws batches of rows from packs; every rank draws the same and takes its share, so cursors agree."""

    folder: Path
    end_of_text: int
    cursors: dict[str, int] = field(default_factory=dict)
    opened: dict[str, Pack] = field(default_factory=dict)

    def row(self, name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The next row of a pack; after its last row it starts over."""
        key = f"{name}-{length}"
        if key not in self.opened:
            self.opened[key] = Pack.open(self.folder, name, length)
        pack = self.opened[key]
        index = self.cursors.get(key, 0)
        self.cursors[key] = index + 1
        return pack.tokens[index % len(pack.tokens)], pack.weights[index % len(pack.tokens)]

    def batch(self, mix: Mix, length: int, num_rows: int, rank: int, world: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens and weights [num_rows, length] for `rank`."""
        packs = mix["packs"]
        assert isinstance(packs, dict)
        shares = packs[str(length)]
        assert isinstance(shares, dict)
        names = random.Random(seed).choices(
            list(shares), [float(str(share)) for share in shares.values()], k=num_rows * world
        )
        rows = [self.row(name, length) for name in names][rank::world]
        tokens = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))
        return tokens, torch.from_numpy(np.stack([row[1] for row in rows]).astype(np.float32) / 100)

    def documents(self, tokens_BT: Tensor) -> Tensor:
        """Document number of every position: it grows after each end-of-text token."""
        ends = (tokens_BT == self.end_of_text).int()
        return ends.cumsum(1).int() - ends


class Trainer:
    """One rank's model, optimizer and data."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        torch.manual_seed(0)
        self.model = build_model(SHAPES[plan.shape]).bfloat16()
        self.optimizer = Optimizer(self.model.named_parameters(), max_gain=self.model.max_gain)
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        self.head = torch.compile(head_loss, dynamic=False)
        vocabulary = json.loads((plan.work / "tokenizer" / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        self.feed = Feed(
            plan.work / "packs", next(entry["id"] for entry in vocabulary if entry["content"] == END_OF_TEXT_NAME)
        )
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.step = 0
        self.num_tokens = 0
        self.align: Callable[[Tensor, Tensor], tuple[float, float]] | None = None
        if plan.align is not None:
            name, donor = plan.align
            self.align = OBJECTIVES[name](self.model, donor)

    def gradients(self, mix: Mix, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[float, float]:
        """Loss sum and weight sum of this step's objective; its gradients are left on the parameters."""
        share = mix.get("align", 1.0)
        assert isinstance(share, float | int), f"align: {share!r}"
        if self.align is not None and random.Random(f"align {self.step}").random() < share:
            return self.align(tokens_BT, self.feed.documents(tokens_BT))
        return self.losses(tokens_BT, weights_BT, backward=True)

    def losses(self, tokens_BT: Tensor, weights_BT: Tensor, *, backward: bool) -> tuple[float, float]:
        """Weighted loss sum and weight sum of a batch; `backward` leaves the sum's gradients on the parameters."""
        length = tokens_BT.shape[1]
        if length not in self.tables:
            self.tables[length] = self.model.rotary(length, torch.bfloat16)
        documents = self.feed.documents(tokens_BT)
        weights_BT[:, 1:] *= documents[:, 1:] == documents[:, :-1]
        with torch.set_grad_enabled(backward):
            hidden = self.model(tokens_BT, *self.tables[length], documents)
        targets, weights = tokens_BT[:, 1:].reshape(-1), weights_BT[:, 1:].reshape(-1)
        chosen = weights.nonzero().squeeze(1)
        missing = -len(chosen) % HEAD_CHUNK
        rows = torch.cat((chosen, chosen.new_zeros(missing)))
        picked = hidden[:, :-1].reshape(-1, hidden.shape[-1])[rows].detach().requires_grad_(backward)
        picked_weights = weights[rows]
        picked_weights[len(chosen) :] = 0
        total = 0.0
        for start in range(0, len(rows), HEAD_CHUNK):
            block = slice(start, start + HEAD_CHUNK)
            with torch.set_grad_enabled(backward):
                loss = self.head(
                    picked[block], self.model.model.embed_tokens.weight, targets[rows[block]], picked_weights[block]
                )
            if backward:
                loss.backward()
            total += loss.item()
        if backward and picked.grad is not None:
            gradient = torch.zeros_like(hidden[:, :-1]).reshape(-1, hidden.shape[-1])
            gradient.index_add_(0, rows[: len(chosen)], picked.grad[: len(chosen)])
            hidden[:, :-1].backward(gradient.view(hidden[:, :-1].shape))
        return total, float(picked_weights.sum())

    def train_step(self, mix: Mix, length: int, factor: float) -> float:
        """One step over all ranks; returns the mean loss in nats per supervised token."""
        num_rows = max(1, self.plan.tokens_per_rank // length)
        tokens, weights = self.feed.batch(mix, length, num_rows, self.rank, self.plan.world, seed=self.step)
        self.model.zero_grad()
        total, count = self.gradients(mix, tokens, weights)
        # An objective may train some parameters only; the others have no gradient, on every rank.
        found = {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}
        flat = torch.cat([*(gradient.reshape(-1).float() for gradient in found.values()), torch.tensor([total, count])])
        dist.all_reduce(flat)
        total, count = flat[-2].item(), flat[-1].item()
        flat /= count
        pieces = flat[:-2].split([gradient.numel() for gradient in found.values()])
        gradients = {
            name: piece.view_as(gradient) for (name, gradient), piece in zip(found.items(), pieces, strict=True)
        }
        self.optimizer.step(gradients, factor)
        self.step += 1
        self.num_tokens += num_rows * length * self.plan.world
        return total / count

    def validate(self, name: str, num_rows: int = 16) -> float:
        """Mean loss on the first rows of a held-out pack of row length 512, in nats per supervised token."""
        pack = Pack.open(self.feed.folder, name, 512)
        rows = slice(self.rank * num_rows, (self.rank + 1) * num_rows)
        tokens = torch.from_numpy(pack.tokens[rows].astype(np.int64))
        sums = torch.tensor(
            self.losses(tokens, torch.from_numpy(pack.weights[rows].astype(np.float32) / 100), backward=False)
        )
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def save(self, name: str) -> None:
        """Write a checkpoint atomically, keeping the one before as `<name>-previous.pt`."""
        if self.rank:
            return
        path = self.plan.work / f"{name}.pt"
        state = {
            "shape": self.plan.shape,
            "optimizer": self.optimizer.state_dict(),
            "cursors": self.feed.cursors,
            "step": self.step,
            "tokens": self.num_tokens,
        }
        torch.save(state, path.with_suffix(".partial"))
        if path.exists():
            os.replace(path, path.with_name(f"{name}-previous.pt"))
        os.replace(path.with_suffix(".partial"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        if state["shape"] != self.plan.shape:
            raise SystemExit(
                f"{path} holds shape {state['shape']!r}; train that one, or start over in an empty --work folder"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.feed.cursors = dict(state["cursors"])
        self.step, self.num_tokens = state["step"], state["tokens"]


def log(plan: Plan, record: dict[str, object]) -> None:
    """Append one line to `DIR/train.jsonl` and print it."""
    line = json.dumps({"time": datetime.datetime.now(datetime.timezone.utc).strftime("%H:%M:%S"), **record})
    print(line, flush=True)
    with (plan.work / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def run(trainer: Trainer) -> None:
    """The loop: rank 0 decides the length, the factor and the end; every rank follows."""
    plan, clock = trainer.plan, time.time()
    decayed = False
    mix: Mix = {}
    window: list[float] = []
    window_start, window_tokens = time.time(), trainer.num_tokens
    while True:
        if trainer.step % 20 == 0 or not mix:
            choice: list[object] = [
                json.loads((plan.work / "mix.json").read_text("utf-8")) if trainer.rank == 0 else None
            ]
            dist.broadcast_object_list(choice)
            mix = choice[0]  # type: ignore[assignment]
        now = time.time()
        control = torch.tensor([plan.factor(trainer.step, now), now - clock, now - plan.deadline], dtype=torch.float64)
        dist.broadcast(control, 0)
        factor, since_save, over = control.tolist()
        if over >= 0:
            break
        if not decayed and plan.factor(trainer.step, now=plan.deadline - plan.decay_seconds) > factor:
            trainer.save("checkpoint-stable")
            decayed = True
        lengths = mix["lengths"]
        assert isinstance(lengths, dict)
        length = int(
            random.Random(trainer.step).choices(list(lengths), [float(str(share)) for share in lengths.values()])[0]
        )
        window.append(trainer.train_step(mix, length, factor))
        if trainer.step % 20 == 0 and trainer.rank == 0:
            speed = (trainer.num_tokens - window_tokens) / (time.time() - window_start)
            log(
                plan,
                {
                    "step": trainer.step,
                    "tokens": trainer.num_tokens,
                    "loss": round(sum(window) / len(window), 4),
                    "factor": round(factor, 3),
                    "tok_per_s": round(speed),
                },
            )
            window, window_start, window_tokens = [], time.time(), trainer.num_tokens
        if since_save > plan.save_seconds:
            clock = time.time()
            report(trainer, "checkpoint")
    report(trainer, "checkpoint-final")


def report(trainer: Trainer, name: str) -> None:
    """Save a checkpoint and log the held-out losses."""
    trainer.save(name)
    packs = [
        path.name.removesuffix("-512.tokens.npy")
        for path in sorted(trainer.feed.folder.glob("heldout-*-512.tokens.npy"))
    ]
    losses = {pack: round(trainer.validate(pack), 4) for pack in packs}
    if trainer.rank == 0:
        log(trainer.plan, {"step": trainer.step, "tokens": trainer.num_tokens, "saved": name, **losses})


def worker(rank: int, plan: Plan, port: int) -> None:
    """Entry point of one process."""
    torch.set_num_threads(1)
    # Hours, because a machine shared with benchmarks may stop either process for long.
    store = dist.TCPStore("127.0.0.1", port, plan.world, rank == 0, timeout=datetime.timedelta(hours=12))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.world, timeout=datetime.timedelta(hours=12))
    trainer = Trainer(plan, rank)
    name = {"stable": "checkpoint-stable.pt", "final": "checkpoint-final.pt"}.get(plan.resume, "checkpoint.pt")
    if plan.resume != "never" and (plan.work / name).exists():
        trainer.load(plan.work / name)
    run(trainer)
    dist.destroy_process_group()


def deadline_of(until: str | None, minutes: float | None) -> float:
    """The deadline from `HH:MM` (UTC, the next such time) or from a number of minutes."""
    if minutes is not None:
        return time.time() + 60 * minutes
    now = datetime.datetime.now(datetime.timezone.utc)
    hour, minute = (int(part) for part in (until or "00:00").split(":"))
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (moment if moment > now else moment + datetime.timedelta(days=1)).timestamp()


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8m")
    parser.add_argument("--until", help="deadline HH:MM in UTC")
    parser.add_argument("--minutes", type=float, help="deadline as minutes from now")
    parser.add_argument("--decay-minutes", type=float, default=25)
    parser.add_argument("--world", type=int, default=2, help="processes; one per core")
    parser.add_argument("--tokens-per-rank", type=int, default=8192, help="tokens of a step in each process")
    parser.add_argument("--warmup-steps", type=int, default=60)
    parser.add_argument("--peak", type=float, default=1.0, help="highest learning-rate factor; below 1 for warm starts")
    parser.add_argument("--align", choices=sorted(OBJECTIVES), help="follow a donor inside instead of answering")
    parser.add_argument("--donor", type=Path, default=default_work() / "checkpoint-final.pt", help="aspen's checkpoint")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--resume", choices=("latest", "stable", "final", "never"), default="latest")
    parser.add_argument("--port", type=int, default=29517)
    args = parser.parse_args()
    if args.until is None and args.minutes is None:
        parser.error("give a deadline: --until HH:MM or --minutes N")
    deadline = deadline_of(args.until, args.minutes)
    plan = Plan(
        args.work,
        args.shape,
        deadline,
        60 * args.decay_minutes,
        args.world,
        args.tokens_per_rank,
        args.warmup_steps,
        60 * args.save_minutes,
        args.resume,
        args.peak,
        (args.align, args.donor) if args.align else None,
    )
    torch.multiprocessing.spawn(worker, args=(plan, args.port), nprocs=args.world)


if __name__ == "__main__":
    main()
