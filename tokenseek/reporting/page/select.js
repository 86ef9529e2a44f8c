// The arithmetic of tokenseek/selection.py, operation by operation, so that the page selects what training would.
"use strict";

/** Eq. 5: alpha * log(context + offset) + beta * minmax(gradient); see combine_scores in Python. */
function combineScores(context, gradient, alpha, beta, logOffset) {
  const low = Math.min(...gradient), high = Math.max(...gradient);
  return context.map((value, t) => {
    let score = 0;
    if (alpha) score += alpha * Math.log(value + logOffset);
    if (beta && high > low) score += beta * (gradient[t] - low) / (high - low);
    return score;
  });
}

/** Half up, as Python's _round. */
function roundHalfUp(value) {
  return Math.floor(value + 0.5);
}

/** Positions by falling score; of two with the same score the earlier one comes first. */
function ranking(scores, candidates) {
  return [...candidates].sort((a, b) => (scores[b] > scores[a] ? 1 : scores[b] < scores[a] ? -1 : a - b));
}

/** Ascending positions of rule "top". `supervised` holds one flag per token; scope is "all" or "supervised". */
function selectTop(context, gradient, supervised, { ratio, alpha, beta, logOffset, scope }) {
  const everything = context.map((_, t) => t);
  let candidates = scope === "supervised" ? everything.filter((t) => supervised[t]) : everything;
  if (!candidates.length) candidates = everything;
  const scores = combineScores(context, gradient, alpha, beta, logOffset);
  const budget = Math.min(Math.max(1, roundHalfUp(ratio * context.length)), candidates.length);
  return { scores, selected: ranking(scores, candidates).slice(0, budget).sort((a, b) => a - b) };
}

if (typeof module !== "undefined") module.exports = { combineScores, ranking, roundHalfUp, selectTop };
