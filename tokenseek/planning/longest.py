"""The longest example whose training step fits into a given memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedConfig

from tokenseek.config import RunConfig
from tokenseek.config.sizes import format_size
from tokenseek.errors import UserError
from tokenseek.launching.engine import Engine
from tokenseek.planning.method import Method
from tokenseek.planning.step import MemoryPlan, load_model_config, most_positions, plan_memory
from tokenseek.quiet import hide_known_warnings

# What a step needs beside its plan: CUDA's context, gaps in the allocator.
RESERVE = 2**30
# Lengths are multiples of STEP. One is the longest if it leaves less than this share of what the states leave.
STEP, TOLERANCE = 64, 0.02
_FIRST, _SECOND, _MOST = 2048, 32768, 2**24


class Lengths:
    """Plans of one method at several lengths of an example, each made once.

    Example:
        >>> plan = Lengths(load_config("llama-3.2-1b"), Method(0.1, recompute=True)).longest(23 * 2**30)
        >>> plan.tokens
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        engine: Engine | None = None,
        *,
        model_config: PreTrainedConfig | None = None,
    ):
        self.config, self.method, self.engine = config, method, engine or Engine()
        self.model_config = model_config or load_model_config(config)
        self.most = most_positions(self.model_config) or _MOST
        self.known: dict[int, MemoryPlan] = {}

    def plan(self, tokens: int) -> MemoryPlan:
        """The plan for examples of `tokens` tokens, made once."""
        if tokens not in self.known:
            self.known[tokens] = plan_memory(
                self.config, self.method, self.engine, tokens=tokens, model_config=self.model_config
            )
        return self.known[tokens]

    def longest(self, budget: int) -> MemoryPlan | None:
        """The plan of the longest example that fits into `budget` bytes; None where one of STEP tokens does not.

        Memory is about linear in the length, so that a line through two lengths tells the next one to plan.

        Raises:
            UserError: the weights and their states alone are larger.
        """
        first = self.plan(min(_FIRST, self.most))
        if first.states > budget:
            raise UserError(
                f"{format_size(budget)} is below what weights, gradients and optimizer states take before the first "
                f"token, {format_size(first.states)}. Quantise the weights (model.quantization=nf4), train adapters "
                "(peft.method=lora) or shard them (--accelerate-config fsdp2)."
            )
        self.plan(min(_SECOND, self.most))
        spare = TOLERANCE * (budget - first.states)
        tries = 0
        while True:
            tries += 1
            low = max((tokens for tokens, plan in self.known.items() if plan.peak <= budget), default=0)
            high = min((tokens for tokens in self.known if tokens > low), default=None)
            if low and (low == self.most or budget - self.known[low].peak <= spare):
                return self.known[low]
            if high is not None and high - low <= STEP:
                return self.known[low] if low else None
            guess = self._guess(budget - spare / 2, first.states, low, high)
            if high is not None and tries % 4 == 3:  # steps in the curve mislead lines
                guess = (low + high) // 2 // STEP * STEP
            self.plan(min(guess, self.most) if high is None else min(max(guess, low + STEP), high - STEP))

    def longest_on_lines(self, budget: int) -> int:
        """Tokens that fit into `budget` bytes, on the lines between lengths that are planned already.

        Memory is the largest of what the moments of a step hold, and each of them grows evenly or faster: a line
        between two lengths is not below it. Short examples, which run without tiles, are planned. 0: nothing fits.
        """
        lengths = sorted(self.known)
        low = max((n for n in lengths if self.known[n].peak <= budget), default=0)
        high = min((n for n in lengths if n > low), default=low)
        if low < _FIRST:
            plan = self.longest(budget)
            return plan.tokens[1] if plan else 0
        if high == low:
            return low
        slope = (self.known[high].peak - self.known[low].peak) / (high - low)
        return (low + int((budget - self.known[low].peak) / slope)) // STEP * STEP if slope > 0 else low

    def _guess(self, peak: float, states: int, low: int, high: int | None) -> int:
        """The length with this peak, on the line through the two nearest known ones."""
        lengths = sorted({0, *self.known})
        one, other = (low, high) if high is not None else lengths[-2:]
        held = [self.known[n].peak if n else states for n in (one, other)]
        slope = (held[1] - held[0]) / (other - one)
        guess = one + int((peak - held[0]) / slope) if slope > 0 else 2 * other
        # Far beyond what is known, the line tells little.
        return max(low + STEP, min(guess, 16 * other) // STEP * STEP)


@dataclass(frozen=True)
class LongestOfMethod:
    """What :func:`longest_by_method` finds for one method.

    Attributes:
        tokens: of the longest example in each budget; 0 where none fits.
        plan: of the longest example in the largest budget; None where none fits.
        known: every plan that was made, by its length.
    """

    method: Method
    tokens: Sequence[int]
    plan: MemoryPlan | None
    known: dict[int, MemoryPlan]


def longest_by_method(
    config: RunConfig,
    methods: Sequence[Method],
    budgets: Sequence[int],
    engine: Engine | None = None,
    *,
    model_config: PreTrainedConfig | None = None,
    processes: int = 1,
) -> list[LongestOfMethod]:
    """The longest example of each method in each of several budgets.

    Args:
        budgets: bytes.
        processes: that search side by side, each for methods of its own. A script that asks for more than one needs
            the usual ``if __name__ == "__main__"``.

    Raises:
        UserError: the weights and their states alone are larger than the largest budget.
    """
    search = partial(_longest_of_method, config, budgets, engine, model_config)
    processes = min(processes, len(methods))
    if processes <= 1:
        return [search(method) for method in methods]
    # Not "fork": torch may have threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=hide_known_warnings) as pool:
        return list(pool.map(search, methods))


def _longest_of_method(
    config: RunConfig,
    budgets: Sequence[int],
    engine: Engine | None,
    model_config: PreTrainedConfig | None,
    method: Method,
) -> LongestOfMethod:
    lengths = Lengths(config, method, engine, model_config=model_config)
    plan = lengths.longest(max(budgets))
    tokens = [lengths.longest_on_lines(budget) for budget in budgets]
    return LongestOfMethod(method, tokens, plan, lengths.known)
