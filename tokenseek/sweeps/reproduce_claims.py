"""What the paper claims, and whether it held in rows that were measured: plain rules over losses and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenseek.sweeps.paper import load_table
from tokenseek.sweeps.sweep import Row

# Losses that differ by less than this share of what training on all tokens gains are taken for the same.
SAME = 0.05
# Points of percent by which a share of memory may be above the paper's.
POINTS = 5.0
_AT_BEST_RATE = "LoRA, r = 10 %, each at its own best learning rate, 80 examples ([Evidence](evidence.md))"
HELD, PARTLY, NOT_HELD, NOT_RUN = "held", "in part", "did not hold", "not run"
WEIGHTS = {"1, 0": "alpha-1-beta-0", "0, 1": "alpha-0-beta-1", "3, 7": "alpha-3-beta-7", "7, 3": "alpha-7-beta-3"}
RATIOS = (50, 40, 30, 20, 10)


class Verdict(NamedTuple):
    """What a claim of the paper comes to here: what was measured, in words, and whether the claim held."""

    measured: str
    held: str


@dataclass(frozen=True)
class Measured:
    """Everything that claims are judged by.

    Attributes:
        rows: by table, name and seed (:mod:`tokenseek.sweeps.reproduce_here`).
        plans: memory at the sizes of the paper's models.
        evidence: rows of ``benchmarks/evidence.py``, by method and seed, each method at its own best learning rate.
    """

    rows: Sequence[Row]
    plans: Sequence[Row] = ()
    evidence: Sequence[Row] = ()

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Measured:
        """From the lines of one file, which has all three."""
        return cls(
            [row for row in rows if "table" in row],
            [row for row in rows if "lengths" in row],
            [row for row in rows if "regime" in row],
        )

    def at_best_rate(self, method: str) -> list[float]:
        """Held-out losses over seeds, in the order of their seeds."""
        found = [row for row in self.evidence if row["method"] == method and row["ratio"] in (None, 0.1)]
        return [row["loss_after"] for row in sorted(found, key=lambda row: row["seed"])]

    def of(self, table: str, name: str) -> dict[int, Row]:
        """By seed; without rows that failed."""
        found = [row for row in self.rows if (row["table"], row["row"]) == (table, name) and "error" not in row]
        return {row["seed"]: row for row in found}

    def losses(self, *places: tuple[str, str]) -> list[list[float]]:
        """Held-out losses of each place, over the seeds that all of them have; empty lists where there is none."""
        by_seed = [self.of(*place) for place in places]
        seeds = set.intersection(*(set(rows) for rows in by_seed))
        return [[rows[seed]["loss_after"] for seed in sorted(seeds)] for rows in by_seed]

    def gain(self, table: str, name: str, seeds: int) -> float:
        """What training on all tokens gains, in nats."""
        rows = [row for seed, row in self.of(table, name).items() if seed < seeds]
        return statistics.mean(row["loss_before"] - row["loss_after"] for row in rows)

    def share(self, table: str, name: str, column: str) -> float | None:
        """Of full tuning's bytes, in percent, with the first seed."""
        full, row = self.of("1", "full").get(0), self.of(table, name).get(0)
        if not full or not row or not full.get(column) or not row.get(column):
            return None
        return 100 * row[column] / full[column]


@dataclass(frozen=True)
class Claim:
    """Attributes:
    says: what the paper says, and where.
    judge: what was measured about it, and whether it held.
    """

    title: str
    says: str
    judge: Callable[[Measured], Verdict]


def _on_par(measured: Measured) -> Verdict:
    told, reached = [], []
    for title, everything, ours in (("LoRA", "qlora", "qlora-tokenseek"), ("full tuning", "full", "full-tokenseek")):
        share = _share_of_gain(measured, everything, ours)
        if share is None:
            continue
        ours_losses, all_losses = measured.losses(("1", ours), ("1", everything))
        told.append(f"{title}: {_mean(ours_losses)} against {_mean(all_losses)} on all tokens, {share:.0%} of its gain")
        reached.append(share >= 1 - SAME)
    all_losses, ours_losses = measured.at_best_rate("ordinary"), measured.at_best_rate("paper")
    if all_losses and ours_losses:
        before = measured.evidence[0]["loss_before"]
        share = (before - statistics.mean(ours_losses)) / (before - statistics.mean(all_losses))
        told.append(f"{_AT_BEST_RATE}: {_range(ours_losses)} against {_range(all_losses)}, {share:.0%} of its gain")
        reached.append(share >= 1 - SAME)
    return _verdict(told, reached)


def _share_of_gain(measured: Measured, everything: str, ours: str) -> float | None:
    """Of what training on all tokens gains, over the seeds that both have."""
    ours_losses, all_losses = measured.losses(("1", ours), ("1", everything))
    if not all_losses:
        return None
    before = measured.of("1", everything)[0]["loss_before"]
    return (before - statistics.mean(ours_losses)) / (before - statistics.mean(all_losses))


def _stable(measured: Measured) -> Verdict:
    told, held = [], []
    pairs = {
        "LoRA, r = 10 %": measured.losses(("1", "qlora-random"), ("1", "qlora-tokenseek")),
        _AT_BEST_RATE: [measured.at_best_rate("random"), measured.at_best_rate("paper")],
    }
    for title, (random, ours) in pairs.items():
        if len(ours) < 2 or len(random) < 2:
            continue
        spreads = [max(losses) - min(losses) for losses in (ours, random)]
        told.append(
            f"{title}, {len(ours)} seeds: TokenSeek {_range(ours)}, random {_range(random)}: spreads of "
            f"{spreads[0]:.3f} and {spreads[1]:.3f}"
        )
        held += [spreads[0] < spreads[1], statistics.mean(ours) < statistics.mean(random)]
    by_share = {r: measured.losses(("Fig3", f"random-{r}"), ("Fig3", f"tokenseek-{r}")) for r in RATIOS}
    if all(ours for _, ours in by_share.values()):
        drawn, sought = ([statistics.mean(pair[of]) for pair in by_share.values()] for of in (0, 1))
        shares = ", ".join(map(str, by_share))
        told.append(f"LoRA, r = {shares} %: TokenSeek {_listed(sought, 3)}, random {_listed(drawn, 3)}")
        held += [ours < other for ours, other in zip(sought, drawn, strict=True)]
    return _verdict(told, held)


def _favours_peft(measured: Measured) -> Verdict:
    adapter, full = (
        _share_of_gain(measured, everything, f"{everything}-tokenseek") for everything in ("qlora", "full")
    )
    if adapter is None or full is None:
        return Verdict("", NOT_RUN)
    told = f"TokenSeek keeps {adapter:.0%} of the gain of training on all tokens with LoRA, {full:.0%} with full tuning"
    return _verdict([told], [adapter > full, adapter > full + SAME])


def _weights(measured: Measured) -> Verdict:
    found = {"5, 5": measured.of("1", "qlora-tokenseek")} | {
        weights: measured.of("2", name) for weights, name in WEIGHTS.items()
    }
    return _alike(measured, {weights: rows[0]["loss_after"] for weights, rows in found.items() if 0 in rows}, least=3)


def _layers(measured: Measured) -> Verdict:
    found = {"N-1": measured.of("1", "qlora-tokenseek")} | {f"N-{k}": measured.of("S14", f"layer-{k}") for k in (2, 3)}
    return _alike(measured, {layer: rows[0]["loss_after"] for layer, rows in found.items() if 0 in rows}, least=3)


def _ratios(measured: Measured) -> Verdict:
    found = {f"{r} %": measured.of("2", f"r-{r}") for r in RATIOS}
    return _alike(measured, {ratio: rows[0]["loss_after"] for ratio, rows in found.items() if 0 in rows}, least=2)


def _alike(measured: Measured, losses: dict[str, float], least: int) -> Verdict:
    """Whether losses lie within :data:`SAME` of the gain of training on all tokens."""
    if len(losses) < least or not measured.of("1", "qlora"):
        return Verdict("", NOT_RUN)
    spread = max(losses.values()) - min(losses.values())
    share = spread / measured.gain("1", "qlora", seeds=1)
    told = ", ".join(f"{name}: {loss:.3f}" for name, loss in losses.items())
    return _verdict([f"{told}; between least and greatest {share:.0%} of the gain of all tokens"], [share <= SAME])


def _bands(measured: Measured) -> Verdict:
    random, top, bands = measured.losses(("S11", "random"), ("S11", "top"), ("S11", "bands"))
    if not bands:
        return Verdict("", NOT_RUN)
    means = [statistics.mean(losses) for losses in (top, bands, random)]
    told = "top 20 %: {:.3f}, top 10 % and 40-50 %: {:.3f}, random 20 %: {:.3f}".format(*means)
    return _verdict([told], [means[0] < means[1], means[1] < means[2]])


def _budget(measured: Measured) -> Verdict:
    told, falls = [], []
    for title, lengths in (("average", "average_tokens"), ("peak", "peak_tokens")):
        names = [f"r-{r}" if r > 10 else "qlora-tokenseek" for r in RATIOS]
        shares = [planned_share(measured.plans, "llama-3.2-1b", name, lengths) for name in names]
        planned = [share for share in shares if share is not None]
        if len(planned) == len(RATIOS):
            told.append(f"planned for Llama-3.2 1B with QLoRA, {title}: {_listed(planned, 1)} % of full tuning's")
            falls.append(planned == sorted(planned, reverse=True))
    found = {r: rows[0] for r in RATIOS if 0 in (rows := measured.of("2", f"r-{r}"))}
    if {10, 50} <= set(found):
        for title, column in (("average", "average_memory_bytes"), ("peak", "step_peak_bytes")):
            sizes = [found[r][column] / 2**20 for r in found]
            ratios = ", ".join(map(str, found))
            told.append(f"measured here with LoRA, r = {ratios} %, {title}: {_listed(sizes, 0)} MiB")
            falls.append(sizes == sorted(sizes, reverse=True))
    return _verdict([f"r = {', '.join(map(str, RATIOS))} %", *told] if told else [], falls)


def _listed(numbers: Sequence[float], digits: int) -> str:
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


def _memory(measured: Measured) -> Verdict:
    told, fits = [], []
    for row in load_table("1").rows:
        for model, (*_, average, peak) in row.paper.items():
            own_average = planned_share(measured.plans, model, row.name, "average_tokens")
            own_peak = planned_share(measured.plans, model, row.name, "peak_tokens")
            if row.name.endswith("-tokenseek") and own_average is not None and own_peak is not None:
                told.append(
                    f"{model}, {row.label}: {own_average:.1f} and {own_peak:.1f} % ({average:g} and {peak:g} %)"
                )
                fits.append(own_average <= average + POINTS and own_peak <= peak + POINTS)
    here_average = measured.share("1", "full-tokenseek", "average_memory_bytes")
    here_peak = measured.share("1", "full-tokenseek", "step_peak_bytes")
    if here_average is not None and here_peak is not None:
        told.append(f"measured here with full tuning: {here_average:.1f} and {here_peak:.1f} %")
    head = "average and peak as planned at the paper's sizes (the paper's): " if fits else ""
    return _verdict([head + "; ".join(told)] if told else [], fits)


def planned_share(plans: Sequence[Row], model: str, name: str, lengths: str) -> float | None:
    """Planned memory of a row of Table 1 in percent of full tuning's: average of usual texts, or peak of long ones."""
    kind = {"average_tokens": "average", "peak_tokens": "peak"}[lengths]
    found = {row["row"]: row[kind] for row in plans if row["model"] == model and row["lengths"] == lengths}
    return 100 * found[name] / found["full"] if {name, "full"} <= set(found) else None


def _scoring(measured: Measured) -> Verdict:
    full = measured.of("1", "full").get(0)
    scored = [row for row in measured.rows if row.get("scoring_average_memory_bytes")]
    if not full or not scored:
        return Verdict("", NOT_RUN)
    size = scored[0]["scoring_average_memory_bytes"]
    share = size / full["average_memory_bytes"]
    told = (
        f"scoring holds {size / 2**20:.0f} MiB on average, full tuning {full['average_memory_bytes'] / 2**20:.0f} MiB: "
        f"{share:.1%}. In one number format weights alone are a quarter of full tuning's weights, gradients and Adam's "
        "moments; less takes longer texts, whose activations full tuning holds, or weights of fewer bits for scoring"
    )
    return _verdict([told], [share <= 0.133])


def _more_tokens(measured: Measured) -> Verdict:
    told, falls = [], []
    for title, few, many in (
        ("LoRA", ("2", "r-10"), ("2", "r-50")),
        ("full tuning", ("Fig5", "full-10"), ("Fig5", "full-50")),
    ):
        rows = [measured.of(*place).get(0) for place in (few, many)]
        if None not in rows:
            ends = [statistics.mean(loss for _, loss in row["losses"][-5:]) for row in rows if row]
            told.append(f"{title}: training loss over the last 5 logs {ends[0]:.3f} at 10 %, {ends[1]:.3f} at 50 %")
            falls.append(ends[1] < ends[0])
    return _verdict(told, falls)


def _more_data(measured: Measured) -> Verdict:
    few, more = measured.losses(("S6", "qlora-tokenseek"), ("S6", "qlora-tokenseek-more"))
    if not more or not measured.of("S6", "qlora"):
        return Verdict("", NOT_RUN)
    share = (statistics.mean(few) - statistics.mean(more)) / measured.gain("S6", "qlora", seeds=len(few))
    told = f"{_mean(more)} with made-up texts, {_mean(few)} without: {share:.0%} of the gain of all tokens apart"
    return _verdict([told], [share > 0, share > SAME])


def _translation(measured: Measured) -> Verdict:
    rows = [measured.of("S7", name).get(0) for name in ("untrained", "lora", "lora-tokenseek")]
    if None in rows:
        return Verdict("", NOT_RUN)
    untrained, everything, ours = (row["scores"]["BLEU"] for row in rows if row)
    told = f"BLEU {everything:.1f} with LoRA, {ours:.1f} with TokenSeek, {untrained:.1f} untrained; made-up sentences"
    return _verdict([told], [ours - untrained > SAME * (everything - untrained), ours >= everything])


def _mean(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.3f}" + (f" ({len(losses)} seeds)" if len(losses) > 1 else "")


def _range(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def _verdict(told: Sequence[str], held: Sequence[bool]) -> Verdict:
    if not held:
        return Verdict("; ".join(told), NOT_RUN)
    return Verdict("; ".join(told), HELD if all(held) else PARTLY if any(held) else NOT_HELD)


CLAIMS = (
    Claim("On par at 10 %", "With 10 % of the tokens on par with all of them, or better (abstract, Table 1).", _on_par),
    Claim(
        "More stable than random",
        "Better than random tokens at every share, and with narrower fluctuations (section 4.3, Figure 3).",
        _stable,
    ),
    Claim(
        "TokenSeek favours PEFT",
        "Adapters lose less by it than full tuning does (section 4.3, Table 1).",
        _favours_peft,
    ),
    Claim(
        "Low sensitivity to alpha and beta",
        "48.28 to 48.65 for 5, 5 and 3, 7 and 7, 3; 46.39 for 0, 1 and 48.45 for 1, 0 (section 4.4, Table 2).",
        _weights,
    ),
    Claim("Layers N-1 to N-3 alike", "52.61, 52.78 and 52.53 (section S7.1, Table S14).", _layers),
    Claim(
        "Misjudged tokens cost little",
        "Top 10 % and 40-50 % is worse than top 20 %, and better than random 20 % (section S7.1, Table S11).",
        _bands,
    ),
    Claim("Every ratio alike", "51.80 to 52.75 from 10 to 50 % (section 4.4, Table 2).", _ratios),
    Claim(
        "r from a budget",
        "Memory falls sharply from 50 to 10 %: r is to be chosen by it (S7.1, Table 2, Figure 6).",
        _budget,
    ),
    Claim(
        "More tokens, lower training loss",
        "At 50 % the training loss is lower than at 10 % (section 4.3, Figure 5).",
        _more_tokens,
    ),
    Claim(
        "Memory at 10 %",
        "14.8 % on average and 14.3 % at most of full tuning's memory for 1B with QLoRA, and so on (Table 1).",
        _memory,
    ),
    Claim("More data helps", "63.26 with 100,000 texts more, 62.14 without (Table S6).", _more_data),
    Claim(
        "Better translations",
        "BLEU 41.63 with TokenSeek, 40.16 with LoRA, 33.13 untrained (Table S7).",
        _translation,
    ),
    Claim("Scoring takes 13 %", "13.2, 11.5 and 10.9 % of full tuning's memory on average (Table S12).", _scoring),
)
