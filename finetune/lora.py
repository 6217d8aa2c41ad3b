"""Low-rank adapters (https://arxiv.org/abs/2106.09685) on every linear layer.

Parameter names are those that moshi's loader reads: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from finetune.args import LoraArgs
from finetune.errors import UserError

# The ends of the names of an adapter's halves.
_FIRST, _SECOND = ".lora_A.weight", ".lora_B.weight"


class LoRALinear(nn.Linear):
    """A frozen linear layer and its adapter. Adapter weights stay in float32 and compute in the input's type.

    Takes over the parameters of `base`, so their names do not change.
    """

    def __init__(self, base: nn.Linear, args: LoraArgs):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.dropout = args.scaling, args.dropout
        factory = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(self.in_features, args.rank, bias=False, **factory)
        self.lora_B = nn.Linear(args.rank, self.out_features, bias=False, **factory)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output with the adapter's added."""
        x = F.dropout(input, self.dropout, self.training)
        down = F.linear(x, self.lora_A.weight.to(x.dtype))
        up = F.linear(self.scaling * down, self.lora_B.weight.to(x.dtype))
        return F.linear(input, self.weight, self.bias) + up


def add_adapters(model: nn.Module, args: LoraArgs, inside: Sequence[nn.Module] | None = None) -> None:
    """Replace every linear layer by a LoRALinear, in place; only those `inside` some modules, if given."""
    chosen = {id(module) for root in ([model] if inside is None else inside) for module in root.modules()}
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and id(child) in chosen
    ]
    for parent, name, child in linears:
        setattr(parent, name, LoRALinear(child, args))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_parameters(model: nn.Module) -> list[torch.Tensor]:
    """What an adapter trains."""
    return [half.weight for layer in adapted_layers(model).values() for half in (layer.lora_A, layer.lora_B)]


def initial_adapter_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Initial weights of one half of an adapter: A uniform as in nn.Linear, B zero.

    Depends on the name and the seed only, so that every rank, however the model is sharded, makes the same.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged_weight(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The adapted layer as one weight, in float32; the caller rounds it, once."""
    return weight.float() + scaling * (lora_b.float() @ lora_a.float())


@torch.no_grad()
def merge_into(model: nn.Module, tensors: Mapping[str, torch.Tensor], scaling: float) -> None:
    """Add saved adapters to the weights of a model without adapters, and take over what else was trained.

    Raises:
        UserError: they are not of this model, or none; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    _check_adapters(parameters, tensors)
    for name, tensor in tensors.items():
        layer, is_first_half, _ = name.partition(_FIRST)
        if is_first_half:
            weight = parameters[f"{layer}.weight"]
            second = tensors[f"{layer}{_SECOND}"]
            weight.copy_(merged_weight(weight, tensor.to(weight.device), second.to(weight.device), scaling))
        elif not name.endswith(_SECOND):
            parameters[name].copy_(tensor)


def _check_adapters(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise UserError("the adapter holds no tensors; save it again")
    for name, tensor in tensors.items():
        layer = name.removesuffix(_FIRST).removesuffix(_SECOND)
        is_half = layer != name
        weight = parameters.get(f"{layer}.weight" if is_half else name)
        if weight is None:
            raise UserError(f"the adapter's {name} belongs to no layer of this model; give the model it was trained on")
        halves = [tensors.get(f"{layer}{half}") for half in (_FIRST, _SECOND)] if is_half else [tensor]
        shapes = [tuple(half.shape) for half in halves if half is not None]
        if len(shapes) < len(halves):
            raise UserError(f"the adapter holds one half of {layer} alone; save it again")
        fits = [(shapes[0][0], weight.shape[1]), (weight.shape[0], shapes[0][0])] if is_half else [tuple(weight.shape)]
        if shapes != fits:
            said = f"the adapter's {layer} has the shapes {shapes}, this model takes {fits}"
            raise UserError(f"{said}; give the model it was trained on")
