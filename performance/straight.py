"""The straightforward evaluator of the field, which ``evaluation.py`` compares with.

Every metric makes its own pass, every answer is a row of its own with its question, batches of 32
rows in file order are padded to the longest, and logits are computed at every position.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from delible.lm.lm import LM
from delible.measure.scoring.text import rouge_l_recall
from delible.records import QA
from delible.system.questions import ask

BATCH, NEW_TOKENS = 32, 64
FORGET, HOLDOUT = "forget", "holdout"
KEPT = ("retain", "real_authors", "world_facts")

Splits = dict[str, list[QA]]


@dataclass
class Tokens:
    """Teacher-forced values of one row: shape [answer] each."""

    logprobs: np.ndarray
    hits: np.ndarray
    standard: np.ndarray


class Straight:
    """Every metric its own pass."""

    def __init__(self, lm: LM) -> None:
        self.lm, self.positions = lm, 0

    def _batches(self, rows: Sequence[tuple[QA, str]]) -> list[list]:
        encoded = [self.lm.template.encode(ask(record), answer) for record, answer in rows]
        return [encoded[at : at + BATCH] for at in range(0, len(encoded), BATCH)]

    def forced(self, rows: Sequence[tuple[QA, str]], moments: bool = False) -> list[Tokens]:
        """One pass over (record, answer) rows with full logits."""
        found = []
        for batch in self._batches(rows):
            longest = max(len(row.ids) for row in batch)
            ids = torch.full((len(batch), longest), self.lm.pad_id)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(row.ids)] = torch.tensor(row.ids)
                mask[place, : len(row.ids)] = 1
            self.positions += ids.numel()
            with torch.inference_mode():
                logits = self.lm.core(input_ids=ids, attention_mask=mask).logits.float()
            for place, row in enumerate(batch):
                every = logits[place, row.start - 1 : len(row.ids) - 1].log_softmax(dim=1)
                target = ids[place, row.start : len(row.ids)]
                own = every.gather(1, target[:, None])[:, 0]
                standard = own
                if moments:
                    mean = (every.exp() * every).sum(dim=1)
                    spread = (every.exp() * every.square()).sum(dim=1) - mean.square()
                    standard = (own - mean) / spread.clamp(min=1e-6).sqrt()
                found.append(
                    Tokens(own.numpy(), (every.argmax(1) == target).numpy(), standard.numpy())
                )
        return found

    def generate(self, records: Sequence[QA]) -> list[str]:
        prompts = [self.lm.template.prompt_ids(ask(record)) for record in records]
        texts = []
        for at in range(0, len(prompts), BATCH):
            batch = prompts[at : at + BATCH]
            longest = max(map(len, batch))
            ids = torch.full((len(batch), longest), self.lm.pad_id)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, longest - len(row) :] = torch.tensor(row)
                mask[place, longest - len(row) :] = 1
            with torch.inference_mode():
                out = self.lm.core.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS,
                    do_sample=False, eos_token_id=sorted(self.lm.ends), pad_token_id=self.lm.pad_id,
                )  # fmt: skip
            texts += [
                str(self.lm.tokenizer.decode(row[longest:], skip_special_tokens=True)).strip()
                for row in out
            ]
        return texts

    def gradient_norms(self, records: Sequence[QA]) -> list[float]:
        found = []
        for record in records:
            row = self.lm.template.encode(ask(record), record.answer)
            logits = self.lm.core(input_ids=torch.tensor([row.ids])).logits[0].float()
            end = len(row.ids) - 1 - int(row.has_end)
            target = torch.tensor(row.ids[row.start : end + 1])
            loss = torch.nn.functional.cross_entropy(logits[row.start - 1 : end], target)
            self.lm.core.zero_grad()
            loss.backward()
            norms = [float(p.grad.norm()) for p in self.lm.core.parameters() if p.grad is not None]
            found.append(float(np.mean(norms)))
        self.lm.core.zero_grad()
        return found

    # ---- the metrics, each asking for itself

    def run(self, part: str, splits: Splits) -> dict[str, list[float]]:
        if part == "generation":
            return {
                f"rouge_l_recall/{split}": [
                    rouge_l_recall((record.answer,), text) or 0.0
                    for record, text in zip(
                        splits[split], self.generate(splits[split]), strict=True
                    )
                ]
                for split in (FORGET, *KEPT)
            }
        if part == "gradient norms":
            return {
                f"gradient_norm/{split}": self.gradient_norms(splits[split])
                for split in (FORGET, HOLDOUT)
            }
        found = {}
        for split in (FORGET, "retain"):
            found[f"answer_probability/{split}"] = self._each(
                splits[split], lambda row: float(np.exp(row.logprobs.mean()))
            )
        for split in KEPT[1:]:
            right = self._each(splits[split], lambda row: float(np.exp(row.logprobs.mean())))
            wrong = self._wrong(splits[split])
            found[f"normalised_probability/{split}"] = [
                one / (one + float(np.exp(others).sum()) + 1e-10)
                for one, others in zip(right, wrong, strict=True)
            ]
        for split in (FORGET, *KEPT):
            right = [
                float(row.logprobs.mean())
                for row in self.forced(
                    [(r, (r.paraphrased_answers or (r.answer,))[0]) for r in splits[split]]
                )
            ]
            wrong = self._wrong(splits[split])
            found[f"truth_ratio/{split}"] = [
                float(np.exp(others.mean()) / (np.exp(one) + 1e-10))
                for one, others in zip(right, wrong, strict=True)
            ]
        found[f"extraction_strength/{FORGET}"] = self._each(splits[FORGET], _extraction)
        found[f"exact_memorisation/{FORGET}"] = self._each(
            splits[FORGET], lambda row: float(row.hits[:-1].mean())
        )
        for split in (FORGET, HOLDOUT):
            records = splits[split]
            found[f"loss_attack/{split}"] = self._each(records, lambda r: -float(r.logprobs.mean()))
            losses = self._each(records, lambda row: -float(row.logprobs.mean()))
            found[f"zlib_attack/{split}"] = [
                loss / len(zlib.compress(record.answer.encode()))
                for loss, record in zip(losses, records, strict=True)
            ]
            found[f"min_k/{split}"] = self._each(records, lambda row: _lowest(row.logprobs[:-1]))
            found[f"min_k_plus_plus/{split}"] = [
                _lowest(row.standard[:-1])
                for row in self.forced([(r, r.answer) for r in records], moments=True)
            ]
        return found

    def _each(self, records: Sequence[QA], value: Callable[[Tokens], float]) -> list[float]:
        return [value(row) for row in self.forced([(r, r.answer) for r in records])]

    def _wrong(self, records: Sequence[QA]) -> list[np.ndarray]:
        count = len(records[0].perturbed)
        means = [
            [
                float(row.logprobs.mean())
                for row in self.forced([(r, r.perturbed[k]) for r in records])
            ]
            for k in range(count)
        ]
        return list(np.array(means).T)


def _extraction(row: Tokens) -> float:
    kept = row.hits[:-1]
    for start in range(len(kept)):
        if kept[start:].all():
            return 1 - start / len(kept)
    return 0.0


def _lowest(values: np.ndarray, share: float = 0.4) -> float:
    kept = np.sort(values.astype(np.float64))
    return -float(kept[: max(1, int(share * len(kept)))].mean())
