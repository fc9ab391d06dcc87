"""A weight is called the same whatever holds the model, and two weights never share a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from trainer_attrib.tap.names import adapter_weights, modules_by_name, parameters_by_name, walk
from trainer_attrib.tap.plan import plan_sketch
from trainer_attrib.tap.projections import Projections
from trainer_attrib.testing.zoo import MEMBERS, LinearOnThreeAxes, Member
from trainer_attrib.types import SketchConfig


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of one, which DDP and FSDP ask for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def _inner_compiled(model: nn.Module) -> nn.Module:
    model.first = torch.compile(model.first, backend="eager")
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.first = checkpoint_wrapper(model.first)
    return checkpoint_wrapper(model)


def _fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compile": _compiled,
    "ddp-compile": lambda model: nn.parallel.DistributedDataParallel(_compiled(model)),
    "layer-compiled": _inner_compiled,
    "checkpoint": _checkpointed,
    "fsdp1": _fsdp,
    "average": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_a_bare_model_keeps_torchs_own_names_in_torchs_order(kind: type[Member]) -> None:
    model = kind()
    assert list(parameters_by_name(model)) == [name for name, _ in model.named_parameters()]
    assert [(name, module) for name, module, _ in walk(model)] == list(model.named_modules())
    assert adapter_weights(model) == set()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_show_in_names(wrapper: str, one_process: None) -> None:
    bare = LinearOnThreeAxes()
    wrapped = WRAPPERS[wrapper](LinearOnThreeAxes())
    assert list(parameters_by_name(wrapped)) == list(parameters_by_name(bare))
    assert modules_by_name(wrapped).keys() == modules_by_name(bare).keys()
    assert plan_sketch(wrapped, SketchConfig()) == plan_sketch(bare, SketchConfig())


class _Awkward(nn.Module):
    """Children that are called like what wrappers put into names."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.my_module, self.base_layer = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5)
        self.add_module("_orig_mod", nn.Linear(5, 6))
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(self.base_layer(self.my_module(self.module(x)))) * self.weight


def test_a_models_own_children_keep_their_names(one_process: None) -> None:
    expected = [name for name, _ in _Awkward().named_parameters()]
    assert "module.weight" in expected
    for model in (_Awkward(), nn.parallel.DistributedDataParallel(_Awkward()), _compiled(_Awkward())):
        assert list(parameters_by_name(model)) == expected
        assert modules_by_name(model)["my_module"].out_features == 4


# ---- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_gpt2: Callable) -> Callable[..., nn.Module]:
    peft = pytest.importorskip("peft")

    def make(kind: str = "LoraConfig", **settings: object) -> nn.Module:
        targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
        return peft.get_peft_model(tiny_gpt2(), getattr(peft, kind)(**{**targets, **settings}))

    return make


def test_peft_leaves_base_weights_their_names(tiny_gpt2: Callable, adapted: Callable) -> None:
    bare, model = parameters_by_name(tiny_gpt2()), adapted()
    named, adapters = parameters_by_name(model), adapter_weights(model)
    assert named.keys() - adapters == bare.keys()
    assert all(torch.equal(named[name], bare[name]) for name in bare)
    assert adapters == {
        f"transformer.h.{block}.{layer}.lora_{side}.default.weight"
        for block in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        for side in "AB"
    }
    assert {name for name, p in named.items() if p.requires_grad} == adapters


def test_projections_of_base_weights_are_the_same_under_peft(tiny_gpt2: Callable, adapted: Callable) -> None:
    bare, model = tiny_gpt2(), adapted()
    for p in parameters_by_name(model).values():
        p.requires_grad_(True)
    plans = [plan_sketch(m, SketchConfig(rank=4)) for m in (bare, model)]
    name = "transformer.h.0.attn.c_attn.weight"
    found = [Projections(plan, m)[name] for plan, m in zip(plans, (bare, model), strict=True)]
    assert torch.equal(found[0].left, found[1].left)
    assert torch.equal(found[0].right, found[1].right)


def test_merging_gives_the_names_back(tiny_gpt2: Callable, adapted: Callable) -> None:
    merged = adapted(modules_to_save=["ln_f"]).merge_and_unload()
    assert parameters_by_name(merged).keys() == parameters_by_name(tiny_gpt2()).keys()


def test_the_copy_that_computes_has_the_modules_name(adapted: Callable) -> None:
    """Its original, and other adapters' copies, are told apart from it."""
    model = adapted(modules_to_save=["ln_f"])
    ln_f = model.base_model.model.transformer.ln_f
    named = parameters_by_name(model)
    assert named["transformer.ln_f.weight"] is ln_f.modules_to_save["default"].weight
    assert named["transformer.ln_f.original_module.weight"] is ln_f.original_module.weight
    assert "transformer.ln_f.weight" not in adapter_weights(model)
    assert "transformer.ln_f.original_module.weight" in adapter_weights(model)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    named = parameters_by_name(model)
    assert named["transformer.ln_f.weight"] is ln_f.modules_to_save["other"].weight
    assert named["transformer.ln_f.modules_to_save.default.weight"] is ln_f.modules_to_save["default"].weight
    assert len(named) == len(list(model.parameters()))


def test_wrappers_around_and_inside_peft(adapted: Callable, one_process: None) -> None:
    expected = list(parameters_by_name(adapted()))
    model = adapted()
    layer = model.base_model.model.transformer.h[0]
    model.base_model.model.transformer.h[0] = torch.compile(layer, backend="eager")
    assert list(parameters_by_name(model)) == expected
    assert list(parameters_by_name(nn.parallel.DistributedDataParallel(model))) == expected


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"kind": "IA3Config", "feedforward_modules": ["c_proj"]}, "transformer.h.0.attn.c_attn.ia3_l.default"),
        ({"use_dora": True}, "transformer.h.0.attn.c_attn.lora_magnitude_vector.default.weight"),
        ({"trainable_token_indices": {"wte": [1, 2]}}, "transformer.wte.trainable_tokens_delta.default"),
        ({"target_modules": ["wte"], "fan_in_fan_out": False}, "transformer.wte.lora_embedding_A.default"),
    ],
    ids=["ia3", "dora", "tokens", "embedding"],
)  # fmt: skip
def test_other_methods_add_names_of_their_own(settings: dict, added: str, tiny_gpt2: Callable, adapted: Callable):
    model = adapted(**settings)
    named = parameters_by_name(model)
    assert added in adapter_weights(model)
    assert named.keys() - adapter_weights(model) == parameters_by_name(tiny_gpt2()).keys()
    assert len(named) == len(list(model.parameters()))
