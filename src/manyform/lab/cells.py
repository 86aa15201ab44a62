"""The work of a sweep, in pieces that any machine with the run folder can do.

A cell is one architecture at one size under one seed. It trains one trunk at a constant learning
rate; for each token budget a branch leaves it, whose learning rate falls to zero. A branch is step
by step the run that had that budget from the start (the schedule is warm-up, stable, decay), so one
trunk yields all of them. Everything is read from and written to the folder:

    DIR/sweep.json                       the plan, written once
    DIR/tasks/ARCH/lr-I.json             trials of the learning rate
    DIR/tasks/ARCH/SIZE-SEED-STEPS.json  what a finished branch measured
    DIR/checkpoints/ARCH/SIZE-SEED/      where an unfinished cell goes on from
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyform.errors import ManyformError
from manyform.lab.exact import SPAN, exact_match
from manyform.lab.ladder import Rung, fork, rung_from, scaled_rate, train_config
from manyform.lab.match import Size
from manyform.lab.measure import DivergedError, forget, seeded, validate
from manyform.lab.plan import TRIALS, learning_rates, next_rate
from manyform.lab.tasks import slug, to_json, write_atomically
from manyform.training import Trainer, checkpoint


@dataclass(frozen=True)
class Piece:
    """A unit of work: the learning-rate search of an architecture (rung and seed None), or the
    cell of a rung and a seed."""

    arch: str
    rung: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        if self.rung is None:
            return f"{self.arch}, learning rate"
        return f"{self.arch}, size {self.rung + 1}, seed {self.seed}"


def work(folder: str, piece: Piece, checkpoint_seconds: float = 20.0) -> str:
    """Do one piece, from wherever it was left, and record it; what it cannot do is recorded as an
    error, for that architecture or branch only. Returns the piece's name."""
    import torch
    plan = read_plan(Path(folder))
    torch.set_num_threads(plan["threads"])  # results depend on how sums are cut
    desk = _Desk(Path(folder), plan, piece.arch, checkpoint_seconds)
    if piece.rung is None:
        desk.search()
    else:
        assert piece.seed is not None
        desk.cell(piece.rung, piece.seed)
    return piece.name


def read_plan(folder: Path) -> dict[str, Any]:
    """sweep.json; raises ManyformError where there is none or it is damaged."""
    try:
        return json.loads((folder / "sweep.json").read_text())
    except FileNotFoundError as error:
        raise ManyformError(f"{folder} holds no sweep: sweep.json is missing; start one with "
                            "`manyform sweep --out DIR`") from error
    except ValueError as error:
        raise ManyformError(f"{folder / 'sweep.json'} is damaged: {error}") from error


def trial_file(folder: Path, arch: str, index: int) -> Path:
    return folder / "tasks" / slug(arch) / f"lr-{index}.json"


def branch_file(folder: Path, arch: str, rung: Rung, seed: int, steps: int) -> Path:
    return folder / "tasks" / slug(arch) / f"{rung.params}-{seed}-{steps}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """A finished piece's figures, None where it has not run."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ManyformError(f"{path} is damaged ({error}); delete it to have it run again"
                            ) from error


def chosen_rate(folder: Path, arch: str) -> float:
    """The learning rate of the smallest size with the fewest bits per byte."""
    trials = [read_result(trial_file(folder, arch, i)) for i in range(TRIALS)]
    finite = [t for t in trials if t and t.get("bpb") is not None]
    if not finite:
        raise ManyformError(f"no learning rate trained {arch}")
    return min(finite, key=lambda t: t["bpb"])["lr"]


def rates_at_edge(folder: Path, archs: Iterable[str]) -> str:
    """A sentence naming the architectures whose best learning rate is the lowest or the highest of
    those tried, "" if there are none."""
    found = []
    for arch in archs:
        trials = [t for i in range(TRIALS)
                  if (t := read_result(trial_file(folder, arch, i))) is not None]
        finite = [t for t in trials if t.get("bpb") is not None]
        if len(finite) < 2:
            continue
        best, rates = min(finite, key=lambda t: t["bpb"])["lr"], [t["lr"] for t in trials]
        if best in (min(rates), max(rates)):
            found.append(f"{arch} ({best:g}, the {'lowest' if best == min(rates) else 'highest'})")
    return "" if not found else (
        f"The best learning rate is at the edge of the rates tried for {', '.join(found)}: one "
        "beyond it may do better.")


class _Desk:
    """One architecture of a sweep, with data and device at hand."""

    def __init__(self, folder: Path, plan: dict[str, Any], arch: str,
                 checkpoint_seconds: float) -> None:
        from manyform.data import open_dataset
        from manyform.training.machine import find_device
        self.folder, self.plan, self.arch = folder, plan, arch
        self.checkpoint_seconds = checkpoint_seconds
        self.data = open_dataset(plan["data"]["path"])
        if self.data.describe()["content_hash"] != plan["data"]["content_hash"]:
            raise ManyformError(f"the data of {folder} has changed since the sweep was begun; "
                                "start another with --out")
        self.device = find_device(plan["settings"]["device"])
        self.ladder = [rung_from(r) for r in plan["ladder"]]
        self.sizes = [Size(**s) for s in plan["archs"][arch]["sizes"]]

    def search(self) -> None:
        """The trials of the learning rate: the smallest size to its largest budget."""
        rung = self.ladder[0]
        candidates, factor = learning_rates(self.sizes[0].d_model)
        tried: list[tuple[float, float]] = []
        for i in range(TRIALS):
            path = trial_file(self.folder, self.arch, i)
            found = read_result(path)
            if found is None:
                rate = candidates[i] if i < len(candidates) else next_rate(tried, factor)
                found = {"lr": rate, "bpb": None}
                try:
                    found["bpb"] = self._whole_run(rung, rate)
                except DivergedError as error:
                    found["note"] = str(error)
                write_atomically(path, to_json(found))
            tried.append((found["lr"], math.inf if found["bpb"] is None else found["bpb"]))

    def _whole_run(self, rung: Rung, lr: float) -> float:
        config = train_config(rung, rung.steps[-1], lr, 0, self.plan["precision"])
        trainer = self._trainer(0, 0, rung, config)
        _advance(trainer, config.total_steps, lambda: None)
        return self._score(trainer, rung)

    def cell(self, index: int, seed: int) -> None:
        """Every branch of one rung and seed that has no result yet."""
        rung = self.ladder[index]
        todo = [s for s in rung.steps
                if read_result(branch_file(self.folder, self.arch, rung, seed, s)) is None]
        root = self.folder / "checkpoints" / slug(self.arch) / f"{rung.params}-{seed}"
        if not todo:
            return forget(root)
        lr = scaled_rate(chosen_rate(self.folder, self.arch), rung.params, self.ladder[0].params)
        trunk = self._trainer(index, seed, rung, train_config(
            rung, rung.steps[-1], lr, seed, self.plan["precision"], trunk=True))
        try:
            self._resume(trunk, root / "trunk")
            for steps in todo:
                self._grow(trunk, fork(steps), root / "trunk")
                self._branch(trunk, index, seed, steps, lr, root)
        except DivergedError as error:
            for steps in todo:
                path = branch_file(self.folder, self.arch, rung, seed, steps)
                if read_result(path) is None:
                    write_atomically(path, to_json({"error": str(error)}))
        forget(root)
        return None

    def _branch(self, trunk: Trainer, index: int, seed: int, steps: int, lr: float,
                root: Path) -> None:
        """Leave the trunk, let the learning rate fall, measure, and stand on the trunk again."""
        rung, model = self.ladder[index], trunk.model
        at = trunk.step_count
        branch = Trainer(model, trunk.batches, train_config(rung, steps, lr, seed,
                                                            self.plan["precision"]))
        branch.load_state_dict(trunk.state_dict())
        mine = root / f"branch-{steps}"
        self._resume(branch, mine)
        self._grow(branch, steps, mine)
        size = self.sizes[index]
        result = {
            "arch": self.arch, "run": f"{rung.params}-{seed}", "seed": seed,
            "params": size.params, "tokens": branch.tokens,
            "flops": branch.flops_per_token * branch.tokens, "bpb": self._score(branch, rung),
            "convention": "total", "unique_tokens": len(self.data.tokens("train")), "lr": lr,
            "batch_tokens": rung.tokens_per_step, "steps": steps, "warmup_steps": rung.warmup,
            "d_model": size.d_model, "n_layers": size.n_layers, **self._twins(branch, rung)}
        write_atomically(branch_file(self.folder, self.arch, rung, seed, steps), to_json(result))
        forget(mine)
        if at != self._resume(trunk, root / "trunk"):
            raise ManyformError(f"the trunk's checkpoint at step {at} in {root} is gone")

    def _trainer(self, index: int, seed: int, rung: Rung, config: Any) -> Trainer:
        model = seeded(self.sizes[index], self.data.vocab_size, seed, self.device)
        batches = self.data.batches(batch_size=rung.rows, length=rung.length, seed=seed)
        return Trainer(model, batches, config)

    def _validation(self, rung: Rung) -> Any:
        return self.data.validation(rung.length, self.plan["val_tokens"],
                                    batch_size=self.plan["val_rows"])

    def _twins(self, trainer: Trainer, rung: Rung) -> dict[str, Any]:
        """An accuracy-like figure and its continuous twins."""
        found = exact_match(trainer.model, self._validation(rung), trainer.precision,
                            span=min(SPAN, rung.length))
        return {"exact": found.exact, "exact_tokens": int(found.tokens), "spans": found.items,
                "span_nats": -found.log_prob, "span_brier": found.brier}

    def _score(self, trainer: Trainer, rung: Rung) -> float:
        bpb = validate(trainer.model, self._validation(rung), trainer.precision)
        if not math.isfinite(bpb):
            raise DivergedError("the validation loss after training is not finite")
        return bpb

    def _resume(self, trainer: Trainer, root: Path) -> int:
        """Put the newest checkpoint under `root` into the trainer, if there is one; the step."""
        found = checkpoint.load_newest(root, trainer.model, lambda text: None)
        if found is not None:
            trainer.load_state_dict({**found, "model": trainer.model.state_dict()})
        return trainer.step_count

    def _grow(self, trainer: Trainer, until: int, root: Path) -> None:
        """Train up to a step, with a checkpoint now and then and one at the end."""
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if trainer.step_count == until or time.monotonic() - saved >= self.checkpoint_seconds:
                state = {k: v for k, v in trainer.state_dict().items() if k != "model"}
                checkpoint.save(root, trainer.step_count, trainer.model, state, anchor=False)
                checkpoint.rotate(root, 1)
                saved = time.monotonic()

        _advance(trainer, until, save)
        if not checkpoint.folders(root):
            save()


def _advance(trainer: Trainer, until: int, after: Callable[[], None]) -> None:
    while trainer.step_count < until:
        done = trainer.step()
        if trainer.guard.diverged:
            raise DivergedError(f"training diverged at step {done.step} of {until} (learning rate "
                                f"{trainer.config.lr:g}, seed {trainer.config.seed})")
        after()
