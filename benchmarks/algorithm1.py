"""Algorithm 1 of the paper, literally: the baseline that TokenSeek is compared with.

Selected and unselected tokens are two tensors from the embeddings to the end. Every norm and every linear layer runs
once for each, attention is a materialised softmax over [K_unselected, K_selected], and the unselected half runs under
``torch.no_grad()`` (section S2; Simoulin et al., 2024). The head runs on selected rows only and the groups are not put
back in order between layers, since nothing needs that: both choices favour the baseline.

Shapes: B batch, T tokens, S selected, U unselected, R rows of one group, N query heads, K key/value heads, H head dim,
D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, softmax
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from tokenseek.decoder.find import find_decoder


def algorithm1_loss(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, selected_positions: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy over the selected positions that have a label, for Llama and Qwen2.

    Args:
        input_ids, labels: [B, T], without padding; labels are not shifted.
        selected_positions: [B, S], ascending.
    """
    decoder = find_decoder(model)
    body = decoder.body
    is_unselected_BT = torch.ones_like(input_ids).scatter(1, selected_positions, 0)
    positions_BU = is_unselected_BT.nonzero()[:, 1].view(len(input_ids), -1)
    order_BT = torch.cat([positions_BU, selected_positions], dim=1)

    selected_BSD = body.embed_tokens(input_ids.gather(1, selected_positions))
    selected_tables = body.rotary_emb(selected_BSD, selected_positions)
    selected_mask = _causal_mask(selected_positions, order_BT, selected_BSD.dtype)
    with torch.no_grad():
        unselected_BUD = body.embed_tokens(input_ids.gather(1, positions_BU))
        unselected_tables = body.rotary_emb(unselected_BUD, positions_BU)
        unselected_mask = _causal_mask(positions_BU, order_BT, unselected_BUD.dtype)

    for layer in decoder.layers:
        query_S, key_S, value_S = _project(layer, selected_BSD, selected_tables)
        with torch.no_grad():
            query_U, key_U, value_U = _project(layer, unselected_BUD, unselected_tables)
        keys, values = torch.cat([key_U, key_S], dim=2), torch.cat([value_U, value_S], dim=2)
        selected_BSD = _attend_and_feed_forward(layer, selected_BSD, query_S, keys, values, selected_mask)
        with torch.no_grad():
            unselected_BUD = _attend_and_feed_forward(layer, unselected_BUD, query_U, keys, values, unselected_mask)

    logits_BSV = decoder.causal_lm.lm_head(body.norm(selected_BSD))
    targets_BS = pad(labels, (0, 1), value=-100)[:, 1:].gather(1, selected_positions)
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def _causal_mask(rows_BR: torch.Tensor, keys_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, R, T], to be added to the attention's logits."""
    hidden = keys_BT[:, None, None, :] > rows_BR[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def _project(layer: nn.Module, hidden_BRD: torch.Tensor, tables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, N, R, H], keys and values [B, K, R, H]."""
    attention, normed_BRD = layer.self_attn, layer.input_layernorm(hidden_BRD)
    query, key, value = (
        projection(normed_BRD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return *apply_rotary_pos_emb(query, key, *tables), value


def _attend_and_feed_forward(layer: nn.Module, hidden_BRD, query_BNRH, key_BKTH, value_BKTH, mask_B1RT) -> torch.Tensor:
    attention = layer.self_attn
    keys, values = (repeat_kv(x, attention.num_key_value_groups) for x in (key_BKTH, value_BKTH))
    weights_BNRT = query_BNRH @ keys.transpose(2, 3) * attention.scaling + mask_B1RT
    at_least_float32 = torch.promote_types(weights_BNRT.dtype, torch.float32)
    weights_BNRT = softmax(weights_BNRT, dim=-1, dtype=at_least_float32).to(query_BNRH.dtype)
    hidden_BRD = hidden_BRD + attention.o_proj((weights_BNRT @ values).transpose(1, 2).flatten(2))
    return hidden_BRD + layer.mlp(layer.post_attention_layernorm(hidden_BRD))
