"""Models of manyform in the LM Evaluation Harness; importing this registers them as "manyform".

A context is read once, and each of its continuations is scored from the state behind it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

import manyform
from manyform.data import load_tokenizer
from manyform.errors import ManyformError
from manyform.exchange import load_pretrained
from manyform.model import ModelState
from manyform.training import find_device

CHUNK = 1024
"""Tokens read at a time."""


@register_model("manyform")
class ManyformLM(TemplateLM):
    """`lm_eval`'s interface to a folder of manyform's, or of Hugging Face's.

    path: the folder. device: auto, cpu, cuda, ... begin: the token that stands before a text
    without context, as text; by default the folder's end-of-text token, else a line's end. (No
    tokenizer of manyform adds tokens of its own.) bos: put `begin` before every text, as Gemma
    needs it. batch_size must be 1: rows are not padded together, contexts are shared instead.
    """

    def __init__(self, path: str, device: str | None = "auto", begin: str | None = None,
                 bos: bool = False, batch_size: int | str = 1,
                 max_batch_size: int | None = None) -> None:
        super().__init__()
        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise ManyformError("batch_size of --model manyform must be 1: continuations of one "
                                "context share its state instead")
        folder = Path(path)
        where = find_device(device or "auto")
        imported = _json(folder / "config.json").get("model_type") is not None
        self.model = (load_pretrained(folder, device=where) if imported
                      else manyform.load(folder, device=where)).eval()
        if not self.model.causal:
            raise ManyformError(f"the model in {folder} looks ahead, so that it gives texts no "
                                "likelihood")
        self.tokens = load_tokenizer(folder)
        self._begin = self._first_token(folder, begin)
        self._bos = bos

    def _first_token(self, folder: Path, begin: str | None) -> int:
        if begin is None:
            for name in ("generation_config.json", "pretrained_config.json", "config.json"):
                end = _json(folder / name).get("eos_token_id")
                if end is not None:
                    return int(end[0] if isinstance(end, list) else end)
        ids = self.tokens.encode("\n" if begin is None else begin)
        if len(ids) != 1:
            raise ManyformError(f"begin must be one token of the tokenizer, and {begin!r} is "
                                f"{len(ids)}")
        return int(ids[0])

    @property
    def eot_token_id(self) -> int:
        return self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, behind `begin` where `bos` was asked for."""
        ids = [int(i) for i in self.tokens.encode(string)]
        return [self._begin, *ids] if self._bos and add_special_tokens is not False else ids

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False,
                              ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for context, members in groups.items():
            last, state = self._read(list(context))
            for i in members:
                found[i] = self._score(last, state, requests[i][2])
        return found

    @torch.no_grad()
    def _read(self, ids: list[int]) -> tuple[Tensor, ModelState | None]:
        """Logits (1, vocabulary) behind the tokens, and the state there."""
        state, features = None, None
        for first in range(0, len(ids), CHUNK):
            features, state = self.model.features(self._row(ids[first:first + CHUNK]), state)
        assert features is not None
        return self.model.logits(features[:, -1]), state

    @torch.no_grad()
    def _score(self, last: Tensor, state: ModelState | None, ids: list[int],
               ) -> tuple[float, bool]:
        """ids: what follows the state whose logits are `last`."""
        total, greedy = 0.0, True
        for first in range(0, len(ids), CHUNK):
            chunk = ids[first:first + CHUNK]
            logits, state = self.model(self._row(chunk), state)
            seen = torch.cat([last[:, None], logits[:, :-1]], dim=1)[0].float().log_softmax(-1)
            wanted = self._row(chunk)[0]
            total += float(seen.gather(1, wanted[:, None]).double().sum())
            greedy &= bool((seen.argmax(-1) == wanted).all())
            last = logits[:, -1]
        return total, greedy

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.embedding.weight.device)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False,
                              ) -> list[float]:
        """Log-likelihood of whole texts, each with all of its past as context; a model with a
        table of learned positions starts anew where the table ends."""
        limit = (self.model.config.max_length if self.model.config.position in
                 ("learned", "axial") else None)
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            step = len(ids) if limit is None else limit - 1
            total = 0.0
            for first in range(0, len(ids), max(step, 1)):
                before = ids[first - 1] if first else self._begin
                last, state = self._read([before])
                total += self._score(last, state, ids[first:first + step])[0]
            found.append(total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context up to one of the texts in `until`."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ManyformError(f"--model manyform does not know the generation option "
                                f"{unknown[0]!r}; known: {', '.join(sorted(known))}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampled = bool(options.get("do_sample", False)) and options.get("temperature", 1.0) > 0
        how = {k: v for k, v in options.items() if k in ("temperature", "top_k", "top_p", "min_p")
               } if sampled else {"greedy": True}
        ids = self.tok_encode(context) or [self._begin]
        decoder, text = self.tokens.decoder(), ""

        def show(token: Tensor) -> None:
            nonlocal text
            text += decoder.push(int(token[0]))
            if any(end in text for end in until):
                raise _Enough
        try:
            self.model.generate(self._row(ids), options.get("max_gen_toks", 256), stream=show,
                                stop=self._begin, **how)
            text += decoder.close()
        except _Enough:
            pass
        ends = [text.index(end) for end in until if end in text]
        return text[:min(ends)] if ends else text


class _Enough(Exception):  # noqa: N818  (an end, not an error)
    """Raised from within a generation whose text is complete."""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
