"""Step 4 of the method, the cheap half: which attempt fills a slot. A pure, deterministic pass.

Reference set of a class: all passing bases first; then the flagged slots in ascending order, and
each qualified choice joins. Among the passing candidates of a flagged slot the ``top_k`` by p(y)
stay, and the one most dissimilar to the reference set (cosine, float64) is chosen; with an empty set
the highest p(y). Where none passes, the highest p(y) of all attempts is taken, marked unqualified,
and never joins. Every tie goes to the lowest attempt.

Beyond the paper: ``slots="every"`` gives no base its slot beforehand, so that each slot is chosen among all of its
attempts that pass, and the whole set grows by dissimilarity; ``hardest`` takes the least sure attempt that passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.config import SelectionConfig
from engine.records import Attempt, Choice, UsageError
from engine.refinement import Policy, count_attempts


@dataclass(frozen=True, slots=True)
class Rule:
    """How a candidate is chosen; the fields are those of the section ``selection``."""

    kind: str  # dissimilar | weighted | confident | hardest
    dissimilarity: str  # nearest | mean
    confidence_weight: float
    slots: str = "flagged"  # flagged | every
    threshold: str = "fixed"  # fixed | class

    @classmethod
    def of(cls, options: SelectionConfig) -> Rule:
        """Return the rule that a configuration asks for."""
        kind, weight = options.rule, options.confidence_weight
        return cls(kind, options.dissimilarity, weight, options.slots, options.threshold)


_ALL_THAT_PASS = ("weighted", "hardest")  # kinds that do not ask for the top_k by confidence


class _References:
    """The qualified samples of a class so far, as unit vectors."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._rows: list[np.ndarray] = []

    @staticmethod
    def _unit(feature: np.ndarray) -> np.ndarray:
        vector = np.asarray(feature, np.float64)
        length = np.sqrt((vector * vector).sum())
        return vector / length if length > 0 else vector

    def add(self, feature: np.ndarray) -> None:
        """Let one qualified sample join."""
        self._rows.append(self._unit(feature))

    def dissimilarity(self, feature: np.ndarray) -> float:
        """Return the cosine dissimilarity in [0, 2] to the set; 0.0 for an empty one."""
        if not self._rows:
            return 0.0
        # a plain sum in a fixed order: no BLAS call whose blocking depends on threads
        cosines = (np.stack(self._rows) * self._unit(feature)).sum(axis=1)
        values = np.clip(1.0 - cosines, 0.0, 2.0)
        return float(values.min() if self._kind == "nearest" else values.mean())


def threshold_of(slots: Sequence[Sequence[Attempt]], beta: float) -> float:
    """Return the confidence that the share ``beta`` of a class's attempts stays below.

    A detector is less sure of some classes than of others; so each class has a threshold of its own, whatever it is.
    """
    verdicts = [attempt.verdict for attempts in slots for attempt in attempts]
    confidences = [v.target_probability for v in verdicts if not v.failed]
    return float(np.quantile(confidences, beta, method="higher")) if confidences else 0.0


def _score(rule: Rule, attempt: Attempt, dissimilarity: float, has_references: bool) -> float:
    probability = attempt.verdict.target_probability
    if rule.kind == "hardest":
        return -probability
    if rule.kind == "confident" or not has_references:
        return probability
    if rule.kind == "weighted":
        return rule.confidence_weight * probability + (1.0 - rule.confidence_weight) * dissimilarity
    return dissimilarity


def _fallback(class_index: int, slot: int, attempts: Sequence[Attempt]) -> Attempt:
    usable = [attempt for attempt in attempts if not attempt.verdict.failed]
    if not usable:
        raise UsageError(
            f"class {class_index}, slot {slot}: all {len(attempts)} images are flat or not finite; "
            "change generator.precision or generator.path"
        )
    return min(usable, key=lambda attempt: (-attempt.verdict.target_probability, attempt.key.attempt))


def choose_for_class(class_index: int, slots: Sequence[Sequence[Attempt]], policy: Policy, rule: Rule) -> list[Choice]:
    """Choose one attempt for every slot of a class; ``slots[s]`` holds the attempts of slot s in order.

    ``policy`` carries the beta and top_k of this selection. Raises UsageError where no image of a slot
    is usable.
    """
    if rule.threshold == "class":
        policy = replace(policy, beta=threshold_of(slots, policy.beta))
    considered = [
        attempts[: count_attempts(policy, class_index, [attempt.verdict for attempt in attempts])] for attempts in slots
    ]
    references = _References(rule.dissimilarity)
    undecided, size = [], 0
    choices: dict[int, Choice] = {}
    for slot, attempts in enumerate(considered):
        if rule.slots == "flagged" and attempts[0].verdict.passes(class_index, policy.beta):
            references.add(attempts[0].feature)
            size += 1
            choices[slot] = _choice(attempts, attempts[0], policy, 0.0)
        else:
            undecided.append(slot)
    for slot in undecided:
        attempts = considered[slot]
        passing = [attempt for attempt in attempts if attempt.verdict.passes(class_index, policy.beta)]
        if not passing:
            choices[slot] = _choice(attempts, _fallback(class_index, slot, attempts), policy, 0.0)
            continue
        if rule.kind not in _ALL_THAT_PASS:
            passing.sort(key=lambda attempt: (-attempt.verdict.target_probability, attempt.key.attempt))
            passing = passing[: policy.top_k]
        scored = [(attempt, references.dissimilarity(attempt.feature)) for attempt in passing]
        best, distance = min(scored, key=lambda pair: (-_score(rule, pair[0], pair[1], size > 0), pair[0].key.attempt))
        references.add(best.feature)
        size += 1
        choices[slot] = _choice(attempts, best, policy, distance)
    return [choices[slot] for slot in range(len(slots))]


def _choice(attempts: Sequence[Attempt], best: Attempt, policy: Policy, dissimilarity: float) -> Choice:
    class_index = best.key.class_index
    return Choice(
        class_index=class_index,
        slot=best.key.slot,
        attempt=best.key.attempt,
        flagged=not attempts[0].verdict.passes(class_index, policy.beta),
        qualified=best.verdict.passes(class_index, policy.beta),
        dissimilarity=dissimilarity,
        attempts_considered=len(attempts),
        base=attempts[0].verdict,
        chosen=best.verdict,
    )
