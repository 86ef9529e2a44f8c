"""LoRA on 4-bit weights that FSDP2 has split: gradients of token ditching are those of the dequantised weights, whole.

Through accelerate, with ZeRO-3 and as one process trains: `tests/launch/test_engines.py`.
"""

import copy

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from distributed.test_fsdp import RANKS, Gathers, batch, num_items, shard
from numerics.dense_reference import dense_loss
from tiny_models import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from tokenseek import enable_token_ditching
from tokenseek.config import ModelConfig, PeftSettings
from tokenseek.decoder.find import find_decoder
from tokenseek.models.adapters import add_adapter
from tokenseek.models.loading import load_model

pytest.importorskip("bitsandbytes")

LORA = PeftSettings(method="lora", r=4, target_modules="all-linear", extra={"init_lora_weights": False})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def packed_model(folder, packed_in, **options):
    model = load_model(ModelConfig(name_or_path=str(folder), dtype="float32", **options), packed_in=packed_in)
    truth = copy.deepcopy(model).dequantize()
    torch.manual_seed(0)
    model = add_adapter(model, LORA).train()
    torch.manual_seed(0)
    return model, add_adapter(truth, LORA).train()


def local_bits(model):
    """The bytes of every packed weight that this rank keeps."""
    packed = {name: p for name, p in model.named_parameters() if name.endswith("base_layer.weight")}
    assert packed and all(isinstance(p, DTensor) for p in packed.values())
    return {name: p.to_local().detach().clone().view(torch.uint8) for name, p in packed.items()}


def exact(rank, folder, packed_in, options):
    mesh = init_device_mesh("cpu", (RANKS,))
    # Casting what is packed in this dtype to it leaves all bits as they are; computing stays in float32 here.
    policy = MixedPrecisionPolicy(param_dtype=packed_in if packed_in == torch.float32 else None)
    for sharded_first in (False, True):
        for recompute in (False, True):
            model, truth = packed_model(folder, packed_in, **options)
            whole = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
            for other in range(RANKS):
                dense_loss(truth, **batch(other, "uneven"), num_items_in_batch=num_items("uneven")).backward()
            expected = {name: p.grad for name, p in truth.named_parameters() if p.requires_grad}
            if sharded_first:
                shard(model, mesh, mp_policy=policy)
            enable_token_ditching(model, recompute=recompute)
            if not sharded_first:
                shard(model, mesh, mp_policy=policy)
            before = local_bits(model)
            assert sum(x.nbytes for x in before.values()) == whole // RANKS
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            for _ in range(2):  # the second step finds what the first has left
                optimizer.zero_grad()
                with Gathers() as forward:
                    loss = model(**batch(rank, "uneven"), num_items_in_batch=num_items("uneven")).loss
                (loss * RANKS).backward()
                got = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
                assert_close(got, expected)
                assert forward.count == len(find_decoder(model).layers) + 1
                optimizer.step()
            for name, bits in local_bits(model).items():
                assert torch.equal(bits, before[name]), name


@pytest.mark.parametrize("packed_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "nf4"},
        {"quantization": "nf4", "double_quantization": True},
        {"quantization": "fp4"},
    ],
    ids=["nf4", "nf4-double", "fp4"],
)
def test_gradients_are_those_of_the_dequantised_weights(folder, packed_in, options):
    spawn(RANKS, exact, folder, packed_in, options)
