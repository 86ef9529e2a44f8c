"""Operations that would launch a kernel, per layer and beside the layers, and the host's time for a step.

    python -m benchmarks.launches

On a GPU short steps wait for the host to launch kernels (5 to 10 microseconds each, in eager mode). What the host does
can be counted without a GPU: every operation below autograd that is neither a view nor an allocation. Two models, of
3 and 4 layers, tell what a layer costs from what comes once (embeddings, the partition, masks, the head, the loss; and
the last layer, whose unselected rows end early). "host ms" is the time of a forward and a backward pass with tensors so
small that nothing but the host counts; "syncs" are the moments when the host waits for the device, before it reads what
a step or a batch of scores comes to.

Steps that select their own tokens count the pass over all tokens without gradient to the forward, and so does the
selection, though most of it is work of the host's, on what it knows: their "syncs" are of that. Of "online+exact",
with one exact layer, a layer is one below the border; of "exact layer" it is one more above.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import make_model
from tokenseek.decoder.head import next_token_labels
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.ditching.planned import KnownBatch, PlannedRows
from tokenseek.seeking import TokenScorer
from tokenseek.selection import SelectionRule

TOKENS, SELECTED = 128, 13
# Of the models that are compared: how many layers, and how many of them are exact.
LAYERS = (3, 0), (4, 0)
_LAYERS = {"online+exact": ((3, 1), (4, 1)), "exact layer": ((3, 1), (4, 2))}
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.empty_permuted,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.resize_,
    _aten.set_,
}
# Views that their schemas do not call so.
_VIEWS = {_aten._unsafe_view, _aten._reshape_alias, _aten.lift_fresh, _aten.detach, _aten.detach_, _aten.alias}
# Asked of dtypes, not of data.
_QUESTIONS = {_aten.promote_types, _aten.result_type}
# The host reads what the device computed, or needs it to know a size.
SYNCS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.unique_consecutive,
    _aten._unique2,
    _aten.equal,
    _aten.is_nonzero,
}


class Launches(TorchDispatchMode):
    """Counts the operations in the block that would launch a kernel on a GPU.

    Example:
        >>> with Launches() as launches:
        ...     _ = (torch.ones(4, 4) @ torch.ones(4, 4)).t()
        >>> launches.count
        3
    """

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.operations.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func._overloadpacket
        if operation in SYNCS:
            self.syncs[str(operation)] += 1
        if not (
            func.is_view
            or operation in _ALLOCATIONS
            or operation in _VIEWS
            or func.namespace == "prim"
            or operation in _QUESTIONS
        ):
            self.operations[str(operation).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def _batch(ditching: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(TOKENS)[None] % 200
    batch = dict(input_ids=ids, labels=ids.clone(), num_items_in_batch=torch.tensor(TOKENS))
    if ditching:  # as the Trainer's collator makes it
        batch["attention_mask"] = torch.ones_like(ids)
        batch["selected_positions"] = torch.linspace(3, TOKENS - 1, SELECTED).long()[None]
        batch["shift_labels"] = next_token_labels(ids).gather(1, batch["selected_positions"])
        batch["planned_rows"] = PlannedRows.of(batch, attention_is_ours=True)
    return batch


def _passes(
    method: str, layers: int, exact_layers: int = 0
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    """The forward and the backward pass of a method; scoring has one of both."""
    model = make_model(f"tiny:num_hidden_layers={layers}")
    if method == "score":
        scorer, batch = TokenScorer(model), _batch(False)
        # As scoring a data set does: a batch is prepared on the host.
        prepared = scorer.prepare(batch["input_ids"], torch.ones_like(batch["input_ids"]), batch["labels"])
        return lambda: torch.stack(scorer.run(prepared)), lambda _: None
    by_index = method.startswith("index")
    batch = _batch(by_index)
    if by_index:
        enable_token_ditching(model, recompute=method.endswith("recompute"))
    elif method == "full":
        model.config.use_cache = False  # as Transformers' Trainer sets it
    else:
        enable_token_ditching(model, seeking=Seeking("l2" if exact_layers else "error", exact_layers=exact_layers))
        batch["selection"] = SelectionRule("sampled", SELECTED / TOKENS, alpha=0, beta=1, explore=0.3)
        batch["selection_keys"] = torch.zeros(1, dtype=torch.int64)
        batch["known_batch"] = KnownBatch.of(batch["labels"], batch["selection_keys"], None, None, True)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        model.zero_grad()

    return lambda: model(**batch).loss, backward


METHODS = ("full", "index", "index+recompute", "online+error", "online+exact", "exact layer", "score")


def measure(method: str, repeats: int = 10) -> dict:
    """Launches of the forward and backward pass, per layer and fixed; syncs; milliseconds of the host per step."""
    counts = []
    few, many = _LAYERS.get(method, LAYERS)
    for layers, exact_layers in (few, many):
        forward, backward = _passes(method, layers, exact_layers)
        backward(forward())  # what is made once
        with Launches() as ahead:
            loss = forward()
        with Launches() as back:
            backward(loss)
        counts.append((ahead, back))
    row: dict = dict(method=method)
    for number, name in enumerate(("forward", "backward")):
        of_few, of_many = (passes[number].count for passes in counts)
        row[f"{name}_layer"] = of_many - of_few
        row[f"{name}_fixed"] = of_many - many[0] * (of_many - of_few)
    row["layer"] = row["forward_layer"] + row["backward_layer"]
    row["syncs"] = sum(launches.syncs.total() for launches in counts[-1])
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        backward(forward())
        times.append(time.perf_counter() - began)
    row["host_ms"] = round(1e3 * min(times), 2)
    row["operations"] = dict(sum((launches.operations for launches in counts[-1]), Counter()).most_common())
    return row


def table(rows: list[dict]) -> str:
    lines = ["| method | layer, forward | backward | fixed, forward | backward | / full's layer | syncs | host ms |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    full = next((row["layer"] for row in rows if row["method"] == "full"), None)
    for row in rows:
        ratio = f"{row['layer'] / full:.2f}" if full else ""
        lines.append(
            f"| {row['method']} | {row['forward_layer']} | {row['backward_layer']} | {row['forward_fixed']} | "
            f"{row['backward_fixed']} | {ratio} | {row['syncs']} | {row['host_ms']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--operations", action="store_true", help="print every operation and how often it is called")
    args = parser.parse_args()
    rows = []
    for method in args.methods.split(","):
        row = measure(method)
        operations = row.pop("operations")
        print(json.dumps(row | ({"operations": operations} if args.operations else {})), flush=True)
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
