"""How tokens are scored inside a training step."""

from __future__ import annotations

from dataclasses import dataclass

from tokenseek.decoder.find import Decoder
from tokenseek.errors import UserError
from tokenseek.seeking.gradient import REDUCTIONS
from tokenseek.selection import SelectionRule


@dataclass(frozen=True)
class Seeking:
    """How tokens are scored inside a training step.

    Args:
        reduction: of Eq. 4's gradient, "abs", "signed" or "l2"; or "error", the norm of p - y (predicted probabilities
            less the target), which the forward pass alone gives.
        gradient_layer: the gradient is taken at the input of layer N-k+1 of N.
        exact_layers: so many top layers and the head are trained on all tokens; below them, selected rows are seeded
            with their gradient over their probability.

    Raises:
        UserError: a value that is not accepted, by name.
    """

    reduction: str = "abs"
    gradient_layer: int = 1
    exact_layers: int = 0

    def __post_init__(self) -> None:
        if self.reduction not in (accepted := [*REDUCTIONS, "error"]):
            raise UserError(f"reduction is {self.reduction!r}; it must be one of {', '.join(accepted)}.")
        if self.gradient_layer < 1:
            raise UserError(f"gradient_layer is {self.gradient_layer}; it counts layers from the end, from 1.")
        if self.exact_layers < 0:
            raise UserError(
                f"exact_layers is {self.exact_layers}; it must be 0 or the number of layers to train whole."
            )
        if self.exact_layers and self.reduction == "error":
            raise UserError("reduction 'error' knows no gradient, which exact_layers selects by; use 'l2' or 'abs'.")

    @classmethod
    def usual(cls, decoder: Decoder, rule: SelectionRule) -> Seeking:
        """How tokens are scored where nobody said how: one exact layer, where rule and model allow it.

        It takes about as long as scoring by the gradient and teaches as much or more (docs/evidence.md).
        """
        return cls(exact_layers=int(rule.draws_by_gradient and not decoder.sharing))

    def require_servable(self, decoder: Decoder, rule: SelectionRule) -> None:
        """Raise UserError for a model with fewer layers, or exact layers under a rule without weights."""
        layers = max(self.gradient_layer, self.exact_layers)
        if layers > len(decoder.layers):
            name = "gradient_layer" if self.gradient_layer == layers else "exact_layers"
            raise UserError(f"{name} is {layers}, and {decoder.name} has {len(decoder.layers)} layers.")
        if self.exact_layers and decoder.sharing:
            raise UserError(
                f"exact_layers is {self.exact_layers}, and {decoder.name} has layers that share the keys and values of "
                "layers below, past the border; set it to 0."
            )
        if self.exact_layers and not rule.draws_by_gradient:
            raise UserError(
                f"exact_layers is {self.exact_layers} with rule {rule.rule!r} (alpha {rule.alpha:g}): the rows "
                "below are drawn by their gradient and weighted, so use rule='sampled' with alpha=0 and beta=1."
            )
