"""`compare`: the same data, budget and tuning for every architecture, as resumable tasks."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from manyform.catalog import Entry, entry
from manyform.config import split_outside
from manyform.errors import ManyformError
from manyform.lab import live, measure, results
from manyform.lab.calibrate import calibrate, step_seconds
from manyform.lab.decode import decode_costs
from manyform.lab.match import Size, match_params, reference_size, table_length
from manyform.lab.plan import (
    Budget,
    Plan,
    Shape,
    Timing,
    extend_plan,
    make_plan,
    next_rate,
    parse_budget,
)
from manyform.lab.probes import PROBES
from manyform.lab.tasks import RunFolder, Task, task_list
from manyform.ops.kernels import compiling

DEFAULT_ARCHS = ("llama", "mamba2", "gated_delta_net", "rwkv7", "lstm", "hyena")
CONTEXTS = (256, 1024, 4096, 16384)
FACTORS = (1, 2, 4, 8)
LENGTH_WINDOWS = 16
LADDER = ((64, 2), (96, 3), (128, 4), (192, 4), (256, 6), (384, 6), (512, 8), (768, 12))
"""Widths and depths that the plan chooses from where none is given."""
TOKENS_PER_PARAM = 5
REPORT_EVERY = 20.0
_DEFAULTS: dict[str, Any] = {
    "data": None, "budget": "5m", "match": "params", "tokenizer": "bytes", "column": None,
    "d_model": None, "n_layers": None, "length": None, "batch_size": None, "device": "auto",
    "contexts": list(CONTEXTS), "probe_steps": None}
"""The settings of a comparison that stay as they were when its folder was begun."""


class Results(dict):
    """What results.json holds, with `path`, the run folder, and `report`, the page or None."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path

    @property
    def report(self) -> Path | None:
        page = self.path / "report.html"
        return page if page.exists() else None

    def bits_per_byte(self) -> dict[str, list[float]]:
        """Validation bits per byte of every finished seed, by architecture."""
        return {name: [r["final_bpb"] for r in a["runs"]] for name, a in self["archs"].items()}


def compare(data: str | Path | None = None, *, archs: Sequence[str] | str | None = None,
            budget: str = "5m", match: str = "params", seeds: int | None = None,
            tokenizer: str = "bytes", column: str | None = None, d_model: int | None = None,
            n_layers: int | None = None, length: int | None = None, batch_size: int | None = None,
            device: str = "auto", contexts: Sequence[int] = CONTEXTS,
            probe_steps: int | None = None, out: str | Path | None = None,
            resume: str | Path | None = None, checkpoint_seconds: float = 20.0,
            show: bool = True) -> Results:
    """Compare architectures on the same data within a budget; see docs for what keeps it fair.

    data: what `manyform.data.load` takes (None: the Python standard library's own text).
    archs: catalog names, patterns ("3 mamba2 : 1 attention") or your own mixers ("module:Class");
      the first sets the size that the others match.
    budget: wall-clock time of everything ("90s", "5m", "2h"), or what one training run may take at
      most: tokens ("20Mtok") or training FLOPs ("1e15").
    match: "params" (equal parameters and tokens), "flops" or "time" (equal parameters, and equal
      training FLOPs or seconds in place of tokens).
    seeds: runs of each architecture (None: what the budget allows, one to three).
    d_model, n_layers: size of the first architecture (None: from the budget). length, batch_size:
      tokens a row and rows a step. contexts: where decoding is measured. probe_steps: training
      steps of each probe (None: from the budget; 0: no probes).
    out: the run folder (a dated one under runs/ if None). An existing one goes on where it was
      left; more `archs` and more `seeds` than it has are added to it.
    resume: a run folder to go on with, all settings taken from it.
    checkpoint_seconds: how often an unfinished training run is saved.
    show: print the plan and the progress.

    Returns what results.json holds. Raises ManyformError for settings that make no sensible
    comparison or differ from the folder's.
    """
    if isinstance(archs, str):
        archs = [a for a in split_outside(archs, ",") if a]
    if archs is not None and not archs:
        raise ManyformError("archs names no architecture; give some, as in llama,mamba2")
    if resume is not None and out is not None and Path(resume) != Path(out):
        raise ManyformError("give resume or out, not both: resume goes on in its own folder")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a mixer of your own is imported from where you stand
    settings = {"data": _spec(data), "budget": str(budget), "match": match, "tokenizer":
                str(tokenizer), "column": column, "d_model": d_model, "n_layers": n_layers,
                "length": length, "batch_size": batch_size, "device": device,
                "contexts": sorted(contexts), "probe_steps": probe_steps}
    folder = RunFolder(resume or out or _dated())
    screen = live.display(show)
    comparison = _Comparison(folder, screen, checkpoint_seconds)
    try:
        if resume is not None or folder.exists:
            if resume is not None:  # what was not given is the folder's
                settings = {k: v for k, v in settings.items() if v != _DEFAULTS[k]}
            comparison.reopen(settings, archs, seeds)
        else:
            comparison.open(settings, list(archs or DEFAULT_ARCHS), seeds)
        return comparison.run()
    except KeyboardInterrupt:
        screen.close()
        screen.say(f"\nStopped. Go on with: manyform compare --resume {folder.path}"
                   if folder.exists else "\nStopped before there was a plan; nothing is kept.")
        raise
    finally:
        screen.close()


class _Comparison:
    """One start of a comparison: opened or reopened, then run to the end."""

    def __init__(self, folder: RunFolder, screen: live.Silent, checkpoint_seconds: float) -> None:
        self.folder = folder
        self.screen = screen
        self.checkpoint_seconds = checkpoint_seconds
        self.facts: dict[str, Any] = {}
        self.data: Any = None
        self.device = torch.device("cpu")
        self._reported = 0.0

    # Opening

    def open(self, settings: dict[str, Any], archs: list[str], seeds: int | None) -> None:
        """Make the plan of a new comparison and write it down."""
        from manyform import __version__
        from manyform.data import load
        from manyform.training.machine import find_device, machine_facts, resolve_precision
        begun = time.perf_counter()
        budget = parse_budget(settings["budget"])
        names = _checked(archs)
        self.device = find_device(settings["device"])
        self.screen.say("Reading the data and measuring this machine …")
        self.data = load(settings["data"], tokenizer=settings["tokenizer"],
                         column=settings["column"])
        self.facts = {
            "manyform": __version__, "command": _command(settings, names, seeds, self.folder.path),
            "created": datetime.now(UTC).isoformat("T", "seconds"),
            "machine": machine_facts(str(self.device)).to_dict(), "data": _describe(self.data),
            "settings": {**settings, "seeds": seeds, "archs": names},
            "device": str(self.device), "archs": {},
            "precision": resolve_precision("auto", self.device)}
        with compiling() as compiled:
            shape = self._shape(budget, names[0])
            timings = self._admit(names, shape)
        spent = time.perf_counter() - begun

        def plan(spent: float) -> Plan:
            return make_plan(budget, timings, shape, match=settings["match"], seeds=seeds,
                             d_model=self.facts["d_model"], spent=spent,
                             contexts=settings["contexts"], length_factors=FACTORS,
                             probe_steps=settings["probe_steps"])
        try:
            made = plan(spent)
        except ManyformError:
            if compiled.seconds < 1:
                raise
            made = plan(spent - compiled.seconds)
            self.screen.say(f"Compiling loops for this machine took {compiled.seconds:.0f} s of "
                            f"the {budget.text}, once: that time comes on top.")
        self._commit(made)

    def reopen(self, settings: dict[str, Any], archs: Sequence[str] | None,
               seeds: int | None) -> None:
        """Take a comparison up again, with the architectures and seeds that are new. `settings`
        are those that must be the folder's."""
        from manyform.training.machine import find_device
        self.facts = self.folder.read()
        _same(self.facts["settings"], settings, self.folder.path)
        self.device = find_device(self.facts["settings"]["device"])
        if str(self.device) != self.facts["device"]:
            raise ManyformError(f"{self.folder.path} was begun on {self.facts['device']}, and this "
                                f"is {self.device}: timings of two devices cannot be compared; "
                                "start another with --out")
        self.data = _same_data(self.facts)
        begun = time.perf_counter()
        plan = Plan.from_dict(self.facts["plan"])
        if seeds is not None and seeds < plan.seeds:
            raise ManyformError(f"{self.folder.path} has {plan.seeds} seeds already; give at least "
                                "as many, or another --out")
        new = [a for a in _checked(archs or []) if a not in self.facts["archs"]]
        grown = bool(seeds and seeds > plan.seeds)
        if not new and not grown:
            return self._begin(plan)
        if grown:
            known = {n: Timing(**a["timing"]) for n, a in self.facts["archs"].items()
                     if n in plan.archs}
            plan = extend_plan(Plan.from_dict({**plan.to_dict(), "archs": {},
                                               "estimated_seconds": {}}), known, seeds=seeds)
        if new:
            self.screen.say(f"Adding {', '.join(new)} to {self.folder.path} …")
            timings = self._admit(new, plan.shape)
            plan = extend_plan(plan, timings, spent=time.perf_counter() - begun)
        self.facts["settings"].update(seeds=seeds or self.facts["settings"]["seeds"],
                                      archs=list(self.facts["archs"]))
        return self._commit(plan)

    def _commit(self, plan: Plan) -> None:
        self.facts["plan"] = plan.to_dict()
        self.folder.write(self.facts)
        for line in live.describe(plan, self.facts["archs"]):
            self.screen.say(line)
        self.screen.say(f"Run folder: {self.folder.path}")
        self._begin(plan)

    def _begin(self, plan: Plan) -> None:
        self.plan = plan
        self.screen.begin(plan, {n: a["params"] for n, a in self.facts["archs"].items()})

    def _shape(self, budget: Budget, first: str) -> Shape:
        """Length, batch and the size of the first architecture, where they are not given: the
        widest of the ladder that still sees several tokens for each parameter."""
        given = self.facts["settings"]
        length = given["length"] or 256
        if len(self.data.tokens("val")) <= length:
            raise ManyformError(f"the validation split of {self.data.name} has "
                                f"{len(self.data.tokens('val')):,} tokens, fewer than --length "
                                f"{length}; give more text or a shorter --length")
        ladder = [(d, n) for d, n in LADDER if given["d_model"] in (None, d)] or \
            [(given["d_model"], 4)]
        ladder, sizes = self._rungs(first, [(d, given["n_layers"] or n) for d, n in ladder])
        choice, tokens = 0, self._tokens(budget, sizes[0], length)
        for i, size in enumerate(sizes):
            expected = tokens
            if budget.kind != "tokens":  # slower in proportion to the size
                expected = tokens * sizes[0].params / size.params
            if expected >= TOKENS_PER_PARAM * size.params:
                choice = i
        tokens *= 1 if budget.kind == "tokens" else sizes[0].params / sizes[choice].params
        self.facts["d_model"], self.facts["n_layers"] = ladder[choice]
        batch = given["batch_size"]
        if batch is None:
            batch = max(2, next((b for limit, b in ((4e6, 2048), (16e6, 4096), (64e6, 8192))
                                 if tokens < limit), 16384) // length)
        per_step = batch * length
        # Evaluation is cheap beside training: a tenth of its tokens at the end, a fortieth on
        # the way, and no more than tell architectures apart.
        final = min(len(self.data.tokens("val")), 131072, max(8192, tokens / 10))
        batches = max(1, int(final / per_step))
        return Shape(length, batch, max(1, batches // 4), batches)

    def _rungs(self, first: str, ladder: list[tuple[int, int]],
               ) -> tuple[list[tuple[int, int]], list[Size]]:
        """The rungs that the first architecture can stand on, and its sizes there: not every width
        holds whole heads in whole groups."""
        found, refused = {}, None
        for d, n in ladder:
            try:
                found[d, n] = reference_size(first, vocab_size=self.data.vocab_size, d_model=d,
                                             n_layers=n)
            except ManyformError as error:
                refused = error
        if not found and refused is not None:
            raise refused
        return list(found), list(found.values())

    def _tokens(self, budget: Budget, size: Size, length: int) -> float:
        """Tokens of one run that the budget affords at this size, roughly."""
        if budget.kind == "tokens":
            return budget.amount
        model = measure.seeded(size, self.data.vocab_size, 0, self.device)
        # FLOPs of one run, or half of the time: two seeds and a search of 0.4 runs share it.
        if budget.kind == "flops":
            return budget.amount / model.cost(length).training_flops_per_token
        from manyform.training import Trainer
        config = measure.train_config(100, 1e-3, batch_size=max(2, 2048 // length), length=length,
                                      precision=self.facts["precision"])
        batches = self.data.batches(batch_size=config.batch_size, length=length, seed=0)
        rate = config.tokens_per_step / step_seconds(Trainer(model, batches, config), most=0.5)
        archs = len(self.facts["settings"]["archs"])
        return 0.5 * budget.amount * rate / (2.4 * archs)

    def _admit(self, names: list[str], shape: Shape) -> dict[str, Timing]:
        """Size and calibrate architectures; one that fails is recorded with the reason."""
        known = self.facts["archs"]
        timings: dict[str, Timing] = {}
        for name in names:
            facts: dict[str, Any] = {"entry": None, "params": None, "target_params": None}
            known[name] = facts
            self.screen.say(f"  measuring {name} …")
            try:
                facts["entry"] = _entry(name)
                size = self._size(name, shape.length)
                facts.update(d_model=size.d_model, n_layers=size.n_layers, params=size.params,
                             target_params=size.target_params, options=dict(size.options))
                timing = calibrate(size, self.data, shape, self.device, self.facts["precision"],
                                   contexts=self.facts["settings"]["contexts"], factors=FACTORS,
                                   length_windows=LENGTH_WINDOWS)
                model = size.create(self.data.vocab_size)
                facts.update(config=model.config.to_dict(), timing=asdict(timing),
                             flops_per_token=timing.flops_per_token)
                if abs(size.deviation) > 0.02:
                    facts["notes"] = [f"no size came nearer to {size.target_params:,} parameters "
                                      f"than {size.params:,} ({size.deviation:+.1%})"]
                timings[name] = timing
            except Exception as error:
                facts["error"] = _sentence(error)
                self.screen.say(f"  {name} is left out: {facts['error']}")
        if not timings and not self.facts.get("plan"):
            raise ManyformError("none of the architectures could be built and trained: "
                                + "; ".join(f"{n}: {known[n]['error']}" for n in names))
        return timings

    def _size(self, name: str, length: int) -> Size:
        """The matched size; the first architecture that can be built sets the target."""
        facts = self.facts
        common = {"vocab_size": self.data.vocab_size, "d_model": facts["d_model"],
                  "n_layers": facts["n_layers"], "options": table_length(name, length)}
        if facts.get("target_params") is None:
            size = reference_size(name, **common)
            facts["target_params"] = size.params
            return size
        return match_params(name, facts["target_params"], **common)

    # Running

    def run(self) -> Results:
        """Do every task that is not done, in order, and gather after each."""
        alive = [n for n in self.facts["archs"] if n in self.plan.archs]
        probes = self.plan.probe_steps > 0
        pending = set(self.folder.unfinished(alive, self.plan.seeds, probes))
        tasks = task_list(alive, self.plan.seeds, probes)
        for task in tasks:
            if task not in pending:
                self.screen.finish(task, self.folder.result(task) or {})
        dead: set[str] = set()
        for task in tasks:
            if task not in pending or task.arch in dead:
                continue
            self.screen.start(task)
            begun = time.perf_counter()
            try:
                result = self._do(task)
            except Exception as error:
                if not isinstance(error, ManyformError | RuntimeError | torch.OutOfMemoryError):
                    traceback.print_exc()
                result = {"error": _sentence(error)}
                if task.essential:
                    dead.add(task.arch)
            result["wall_seconds"] = time.perf_counter() - begun
            self.folder.record(task, result)
            measure.forget(self.folder.checkpoints(task))
            self.screen.finish(task, result)
            self._publish()
        return Results(self._publish(final=True), self.folder.path)

    def _publish(self, *, final: bool = False) -> dict[str, Any]:
        """The results as they are now; the page less often, since it is large."""
        found = results.write(self.folder)
        now = time.perf_counter()
        if final or now - self._reported > REPORT_EVERY:
            self._page()
            self._reported = time.perf_counter()
        return found

    def _page(self) -> None:
        """The report so far. The results are on disk already: a page that cannot be drawn is
        said, and costs no more than itself."""
        try:
            from manyform.lab.report import write_report
            write_report(self.folder.path)
        except Exception as error:
            self.screen.say(f"the report was not written: {_sentence(error)}")

    def _do(self, task: Task) -> dict[str, Any]:
        if task.kind in ("tune", "train"):
            return self._train(task)
        if task.kind == "probe":
            return {"result": measure.run_probe(task.arch, PROBES[task.key], self.plan.probe_steps,
                                                self.device, report=self._reporter(task))}
        if task.kind == "memory":
            config = self._config(10, 1e-3, 0)
            return measure.memory_and_paths(self._model(task.arch, 0), self._batches(0), config)
        if task.kind == "decode":
            return {"rows": decode_costs(self._trained(task.arch), self.plan.contexts)}
        return {"rows": measure.length_losses(
            self._trained(task.arch), self.data, self.plan.length, self.plan.length_factors,
            self.facts["precision"], count=LENGTH_WINDOWS, report=self._reporter(task))}

    def _train(self, task: Task) -> dict[str, Any]:
        """A learning-rate trial, or a full run at the rate that won."""
        arch = self.plan.archs[task.arch]
        trials = results.tuning(self.folder, task.arch)
        if task.kind == "tune":
            steps, seed, checks = arch.tuning_steps, 0, 0
            rate = self._trial_rate(int(task.key), trials)
        else:
            steps, seed, checks = arch.steps, int(task.key), arch.eval_every
            best = results.best_rate(trials)
            if best is None:
                raise ManyformError("every learning rate that was tried diverged: "
                                    + ", ".join(f"{t['lr']:g}" for t in trials))
            rate = best
        model = self._model(task.arch, seed)
        plan = self.plan
        per_step = plan.shape.tokens_per_step
        curve, final = (self.data.validation(plan.length, n * per_step, batch_size=plan.batch_size)
                        for n in (plan.curve_batches, plan.final_batches))
        try:
            run = measure.train_run(
                model, self._batches(seed), measure.Checks(checks, curve, final),
                self._config(steps, rate, seed), folder=self.folder.checkpoints(task),
                checkpoint_seconds=self.checkpoint_seconds, report=self._reporter(task))
        except measure.DivergedError as error:
            if task.kind == "train":
                raise
            return {"lr": rate, "bpb": None, "tokens": steps * per_step, "flops": None,
                    "seconds": None, "steps": steps, "note": str(error)}
        if task.kind == "tune":
            return {"lr": rate, "bpb": run["final_bpb"], "note": "",
                    **{k: run[k] for k in ("tokens", "flops", "seconds", "steps")}}
        if seed == 0:
            model.save(self.folder.model(task.arch))
            self.data.tokenizer.save(self.folder.model(task.arch) / "tokenizer.json")
        return {"seed": seed, "lr": rate, **run}

    def _trial_rate(self, number: int, trials: list[dict[str, Any]]) -> float:
        """The rate of a trial: the grid first, then where it points."""
        if number <= len(self.plan.lr_candidates):
            return self.plan.lr_candidates[number - 1]
        return next_rate([(t["lr"], float("inf") if t["bpb"] is None else t["bpb"])
                          for t in trials if t["lr"] in self.plan.lr_candidates],
                         self.plan.lr_factor)

    def _config(self, steps: int, rate: float, seed: int) -> Any:
        return measure.train_config(steps, rate, batch_size=self.plan.batch_size,
                                    length=self.plan.length, seed=seed,
                                    precision=self.facts["precision"])

    def _batches(self, seed: int) -> Any:
        """The order of the data depends on the seed alone: it is the same for all."""
        return self.data.batches(batch_size=self.plan.batch_size, length=self.plan.length,
                                 seed=seed)

    def _model(self, arch: str, seed: int) -> Any:
        a = self.facts["archs"][arch]
        size = Size(arch, a["d_model"], a["n_layers"], a["params"], a["target_params"],
                    a["options"])
        return measure.seeded(size, self.data.vocab_size, seed, self.device)

    def _trained(self, arch: str) -> Any:
        """The model of the first seed as it was saved."""
        from safetensors.torch import load_file
        model = self._model(arch, 0)
        weights = load_file(str(self.folder.model(arch) / "model.safetensors"))
        model.load_state_dict(weights, strict=False)  # a tied head is stored once
        return model

    def _reporter(self, task: Task) -> measure.Report:
        def report(share: float, **news: Any) -> None:
            self.screen.update(task, share, **news)
        return report


def _spec(data: str | Path | None) -> str | None:
    """The input by a name that holds from any folder."""
    if data is None or str(data) == "-" or not Path(data).exists():
        return None if data is None else str(data)
    return str(Path(data).resolve())


def _dated() -> Path:
    return Path("runs") / f"compare-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def _checked(archs: Sequence[str]) -> list[str]:
    """The names, each once; one that is unknown or looks ahead is refused before anything runs."""
    names = list(dict.fromkeys(archs))
    ahead = [name for name in names if _looks_ahead(entry(name))]
    if ahead:
        raise ManyformError(
            f"compare trains every model to tell the next token, which {', '.join(ahead)} would "
            "see; leave out what looks ahead, and train it by itself with `manyform train "
            f"{ahead[0]} --objective masked`")
    return names


def _looks_ahead(item: Entry) -> bool:
    """Whether it is known to; a mixer that cannot be built fails again, and is then reported with
    its reason, where its sizes are matched."""
    try:
        return not item.causal
    except Exception:
        return False


def _entry(name: str) -> dict[str, Any]:
    item = entry(name)
    keys = ("name", "year", "paper", "family", "causal", "state_growth", "cost_growth")
    return {k: getattr(item, k) for k in keys}


def _describe(data: Any) -> dict[str, Any]:
    return {**data.describe(), "train_tokens": data.train_tokens, "val_tokens": data.val_tokens,
            "path": str(data.path)}


def _same(stored: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """Raises ManyformError naming the first setting that differs from the folder's."""
    for key, value in given.items():
        if stored[key] != value:
            raise ManyformError(
                f"{path} holds a comparison with {key}={stored[key]!r}, and this asks for "
                f"{value!r}; use `manyform compare --resume {path}` to go on with it, or "
                "another --out")


def _same_data(facts: dict[str, Any]) -> Any:
    """The dataset of the comparison, by its stored tokens or read again."""
    from manyform.data import load, open_dataset
    settings = facts["settings"]
    try:
        data = open_dataset(facts["data"]["path"])
    except ManyformError:
        data = load(settings["data"], tokenizer=settings["tokenizer"], column=settings["column"])
    if data.content_hash != facts["data"]["content_hash"]:
        raise ManyformError("the data has changed since this comparison began, and results on "
                            "different data cannot be compared; start another with --out")
    return data


def _command(settings: dict[str, Any], archs: list[str], seeds: int | None, out: Path) -> str:
    """The command line that repeats this comparison."""
    import shlex
    words = ["manyform", "compare"]
    if settings["data"] is not None:
        words.append(settings["data"])
    words += ["--archs", ",".join(archs), "--budget", settings["budget"]]
    flags = {"n_layers": "layers"}
    for key, default in _DEFAULTS.items():
        if settings[key] != default and key not in ("data", "budget"):
            value = settings[key]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{flags.get(key, key).replace('_', '-')}", text]
    if seeds is not None:
        words += ["--seeds", str(seeds)]
    return shlex.join([*words, "--out", str(out)])


def _sentence(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ManyformError) else f"{type(error).__name__}: {text}"
