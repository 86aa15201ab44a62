"""Results of a comparison that never ran, in the form of results.json: six architectures of
different kinds with curves, costs and probes as real ones look."""

from __future__ import annotations

import math
import random
from typing import Any

LENGTH, BATCH, STEPS = 256, 8, 160
CONTEXTS, FACTORS = (256, 1024, 4096, 16384), (1, 2, 4, 8)

# name: year, family, state growth, cost growth, final loss, seed spread, tokens/s, ms at 256,
# ms per 1k tokens of context, state bytes (constant, per token), MQAR, parity
ARCHS: dict[str, tuple[Any, ...]] = {
    "llama": (2023, "attention", "linear", "quadratic", 1.921, 1.5, 9200, 1.10, 0.21,
              (0, 4096), 0.97, 0.51),
    "mamba2": (2024, "state space", "constant", "linear", 1.948, 1.3, 7400, 1.35, 0.0,
               (297_000, 0), 0.93, 0.49),
    "gated_delta_net": (2024, "linear attention", "constant", "linear", 1.916, 1.6, 6100, 1.62,
                        0.0, (279_000, 0), 0.99, 0.52),
    "rwkv7": (2025, "linear attention", "constant", "linear", 1.937, 1.2, 4300, 1.91, 0.0,
              (268_000, 0), 0.98, 0.55),
    "lstm": (1997, "recurrent", "constant", "linear", 2.164, 1.8, 12100, 0.62, 0.0,
             (6144, 0), 0.21, 1.0),
    "hyena": (2023, "long convolution", "linear", "T log T", 2.041, 1.4, 5200, 1.45, 0.35,
              (0, 6144), 0.44, 0.50),
}


def sample_results(*, archs: tuple[str, ...] | None = None, seeds: int = 2, noise: float = 0.002,
                   random_seed: int = 0) -> dict[str, Any]:
    """A complete comparison with `noise` bits per byte between seeds."""
    names = archs or tuple(ARCHS)
    draw = random.Random(random_seed)
    tokens = STEPS * LENGTH * BATCH
    order = [draw.gauss(0, noise) for _ in range(seeds)]  # the data order moves all alike
    found = {name: _arch(name, tokens, order, noise, draw) for name in names}
    train = sum(r["seconds"] for a in found.values() for r in a["runs"])
    command = (f"manyform compare --archs {','.join(names)} --budget 15m --seeds {seeds} "
               "--out runs/six-kinds")
    return {
        "manyform": "0.1.0", "command": command, "created": "2026-03-14T09:26:53+00:00",
        "updated": "2026-03-14T09:36:21+00:00", "complete": True,
        "machine": {"device": "cpu", "name": "Intel(R) Xeon(R) Processor", "cores": 2,
                    "threads": 2, "memory_bytes": 25276502016, "system": "Linux 6.1",
                    "python": "3.12.3", "torch": "2.13.0+cpu", "amx": True,
                    "bf16_gflops": 2411.0, "fp32_gflops": 168.9},
        "data": {"name": "Python 3.12.3 standard library", "content_hash": "9fa2bf37" * 8,
                 "input": "stdlib", "tokenizer": "bytes", "vocab_size": 256,
                 "bytes_per_token": 1.0, "exact_bytes": True,
                 "train": {"documents": 570, "tokens": 10208291, "bytes": 10208291},
                 "val": {"documents": 39, "tokens": 495621, "bytes": 495621},
                 "split": {"by": "document", "seed": 0}, "skipped_files": 0,
                 "train_tokens": 10208291, "val_tokens": 495621, "path": "cache/stdlib"},
        "settings": {"data": None, "budget": "15m", "match": "params", "tokenizer": "bytes",
                     "column": None, "d_model": None, "n_layers": None, "length": None,
                     "batch_size": None, "device": "auto", "contexts": list(CONTEXTS),
                     "probe_steps": None, "seeds": seeds, "archs": list(names)},
        "plan": {"budget": "15m", "match": "params", "seeds": seeds, "length": LENGTH,
                 "batch_size": BATCH, "curve_batches": 8, "final_batches": 32,
                 "quantum": float(STEPS), "steps": STEPS, "tokens": tokens,
                 "lr_candidates": [0.0014, 0.0042, 0.013], "lr_factor": 3.0, "probe_steps": 600,
                 "contexts": list(CONTEXTS), "length_factors": list(FACTORS),
                 "archs": {n: {**a["planned"]} for n, a in found.items()},
                 "estimated_seconds": {"calibration": 31.0, "tuning": 0.2 * train,
                                       "training": train, "evaluation": 24.0, "decoding": 20.0,
                                       "length": 14.0, "probes": 92.0, "total": 1.2 * train + 181},
                 "minutes": (1.2 * train + 181) / 60},
        "archs": found}


def _arch(name: str, tokens: int, order: list[float], noise: float, draw: random.Random,
          ) -> dict[str, Any]:
    (year, family, state, cost, final, start, rate, ms, slope, (fixed, grown), mqar,
     parity) = ARCHS[name]
    params = 1_050_000 + draw.randrange(-9000, 9000)
    flops = 6.0 * params * (1.3 if cost == "quadratic" else 1.1)
    runs = []
    for seed, shift in enumerate(order):
        mine = shift + draw.gauss(0, noise)
        speed = rate * (1 + draw.gauss(0, 0.01))
        runs.append({"seed": seed, "curve": _curve(final + mine, start, flops, speed, draw),
                     "final_bpb": final + mine, "seconds": tokens / speed,
                     "tokens_per_second": speed,
                     "events": [{"step": 41, "event": "loss spike, step skipped"}]
                     if name == "rwkv7" and seed == 1 else []})
    trials = []
    for lr in (0.0014, 0.0042, 0.0073, 0.013):
        off = math.log(lr / 0.0055) ** 2
        trials.append({"lr": lr, "bpb": None if name == "hyena" and lr == 0.013
                       else final + 0.55 + 0.09 * off, "tokens": tokens // 10,
                       "flops": flops * tokens / 10, "seconds": tokens / 10 / rate,
                       "steps": STEPS // 10,
                       "note": "training diverged at step 9 of 16"
                       if name == "hyena" and lr == 0.013 else ""})
    decode = []
    for c in CONTEXTS:
        middle = ms + slope * c / 1000
        decode.append({"context": c, "ms_per_token": middle, "ms_low": 0.97 * middle,
                       "ms_high": 1.04 * middle, "state_bytes": fixed + grown * c, "note": ""})
    gain = {"recurrent": -0.004, "attention": 0.06, "long convolution": 0.011}.get(family, -0.03)
    length = [{"factor": f, "length": f * LENGTH, "bpb": final - 0.02 + gain * math.log2(f),
               "note": ""} for f in FACTORS]
    return {
        "entry": {"name": name, "year": year, "paper": f"The {name} paper", "family": family,
                  "causal": True, "state_growth": state, "cost_growth": cost},
        "config": {"name": name}, "params": params, "target_params": 1_050_000, "d_model": 128,
        "n_layers": 4, "options": {}, "flops_per_token": flops,
        "timing": {"step": LENGTH * BATCH / rate}, "planned": {
            "steps": STEPS, "tokens": tokens, "flops": flops * tokens, "tuning_steps": STEPS // 10,
            "eval_every": STEPS // 10, "estimated_seconds": 2.5 * tokens / rate},
        "lr": 0.0073 if name != "lstm" else 0.013, "lr_at_edge": name == "lstm",
        "tuning": trials, "runs": runs,
        "tokens_per_second": sum(r["tokens_per_second"] for r in runs) / len(runs),
        "peak_memory_bytes": int(64e6 * (1 + 12000 / rate)),
        "memory_method": "PyTorch's log of CPU allocations during one training step",
        "decode": decode, "length": length,
        "probes": {"mqar": _probe(mqar, 1 / 32, "8 pairs of 32 symbols, length 64"),
                   "parity": _probe(parity, 0.5, "trained at length 32, scored at 128")},
        "paths": {"rms_norm": "numba", "linear_cross_entropy": "numba",
                  {"attention": "attention", "recurrent": "recurrent_layer",
                   "long convolution": "long_conv"}.get(family, "matrix_recurrence"): "chunked"},
        "seconds": {"memory": 1.2, "tune": 0.42 * tokens / rate, "train": len(runs) * tokens / rate,
                    "length": 3.1, "decode": 4.2, "probe": 15.5},
        "notes": [], "error": None}


def _curve(final: float, start: float, flops: float, rate: float, draw: random.Random,
           ) -> list[dict[str, Any]]:
    points = []
    for step in range(4, STEPS + 1, 4):
        share, t = step / STEPS, step * LENGTH * BATCH
        loss = final + start * (share ** -0.32 - 1) * 0.42 - 0.05 * min(0.0, 0.7 - share)
        loss += 0.05 * max(0.0, 1 - max(0.0, share - 0.7) / 0.3) if share < 1 else 0.0
        points.append({"step": step, "tokens": t, "flops": flops * t, "seconds": t / rate,
                       "train_loss": (loss + draw.gauss(0, 0.03)) * math.log(2),
                       "val_bpb": loss if step % (STEPS // 10) == 0 else None})
    return points


def _probe(accuracy: float, chance: float, setting: str) -> dict[str, Any]:
    from manyform.lab.probes import wilson
    hits = round(512 * accuracy)
    low, high = wilson(hits, 512)
    answers = 128 if chance == 0.5 else 8
    unsure = min(1.0, (1 - accuracy) / (1 - chance) + 1e-4)
    bits = unsure * -math.log2(chance)
    exact, brier = round(512 * 2 ** (-answers * bits)) / 512, unsure * (1 - chance)
    return {"accuracy": hits / 512, "low": low, "high": high, "chance": chance, "n": 512,
            "log_prob": -bits * math.log(2), "bits": bits, "brier": brier,
            "exact": exact, "answers": float(answers), "exact_bits": bits,
            "exact_brier": brier, "bits_at_train_length": bits,
            "setting": setting, "train_length": 32, "test_length": 128,
            "at_train_length": min(1.0, accuracy + 0.02), "steps": 600, "params": 120_000,
            "seconds": 7.5}


def partial(results: dict[str, Any]) -> dict[str, Any]:
    """The same comparison half-way: one seed, two architectures untrained, one failed."""
    names = list(results["archs"])
    archs = {n: dict(a) for n, a in results["archs"].items()}
    for i, name in enumerate(names):
        a = archs[name]
        a["runs"] = a["runs"][:1] if i < 2 else []
        if i >= 2:
            a.update(tokens_per_second=None, decode=[], length=[], probes={}, lr=None)
            a["tuning"] = a["tuning"][:2]
    if len(names) > 4:
        archs[names[-1]].update(entry=None, params=None, config=None, planned=None, tuning=[],
                                flops_per_token=None, peak_memory_bytes=None, paths={}, seconds={},
                                error="RuntimeError: it could not be built")
    return {**results, "complete": False, "archs": archs}
