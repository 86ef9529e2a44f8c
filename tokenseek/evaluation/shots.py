"""Which solved examples stand before a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler


class SharedDraws(ContextSampler):
    """The harness's random draws, the same for a question in any number of processes, and never the question itself.

    The harness draws from one generator as it goes through its questions, of which each process has every n-th: the
    draws of a question would depend on n. Here a process makes those of the others' questions, too, and every question
    gets what it gets in a single process.

    Args:
        stock: the harness's sampler, with its pool and seed.
        docs: all questions, of which process `rank` of `processes` has every `processes`-th.
        question: tells whether two rows ask the same; None where pool and questions are different splits.
    """

    def __init__(
        self,
        stock: ContextSampler,
        docs: Sequence[dict[str, Any]],
        rank: int,
        processes: int,
        question: Callable[[dict[str, Any]], Any] | None,
    ) -> None:
        self.stock, self.docs, self.rank, self.processes, self.question = stock, docs, rank, processes, question
        self.turn = 0

    def sample(
        self, n: int, eval_doc: dict[str, Any] | None = None, df: object = None, **kwargs: Any
    ) -> Sequence[dict[str, Any]]:
        """`n` solved examples for the next question of this process; those of the others are drawn, and left out."""
        while self.turn % self.processes != self.rank:
            self._draw(n, None if eval_doc is None else self.docs[self.turn])
            self.turn += 1
        self.turn += 1
        return self._draw(n, eval_doc)

    def _draw(self, n: int, doc: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
        drawn = self.stock.sample(n, eval_doc=doc)
        if doc is not None and self.question:
            asked = self.question(doc)
            # The harness leaves out rows that are equal as a whole; some ask the same with other choices.
            if any(self.question(other) == asked for other in drawn):
                others = [other for other in self.stock.fewshot_docs() if self.question(other) != asked]
                drawn = self.stock.rnd.sample(others, n)
        return drawn
