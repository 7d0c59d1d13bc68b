"""Which layers of a model get an adapter, and which are left out or refused by name."""

import warnings

import pytest
import torch
from models import qwen2, tokens
from test_model import trained
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import tinylora
from tinylora import LoraXSConfig, TinyLoraConfig
from tinylora.nn.model import adapted_layers


def test_targets():
    def names(model):
        return [s.name for s in model.tinylora["default"].sites]

    default = names(tinylora.apply(qwen2(), TinyLoraConfig()))
    assert len(default) == 14 and "lm_head" not in default
    assert default[:7] == [f"model.layers.0.{n}" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    config = TinyLoraConfig(target_modules=["down_proj", "layers.1.self_attn.q_proj"])
    assert [n.removeprefix("model.layers.") for n in names(tinylora.apply(qwen2(), config))] == [
        "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj",
    ]  # fmt: skip
    assert names(tinylora.apply(qwen2(), TinyLoraConfig(target_modules=r".*\.0\..*_proj"))) == default[:7]


def test_what_a_mixture_and_mamba_leave_out(recwarn):
    from transformers import MambaConfig, MambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=8))
    tinylora.apply(mamba, tinylora.LoraXSConfig(r=2))
    assert {n.rpartition(".")[2] for n in tinylora.nn.model.adapted_layers(mamba)} == {"in_proj"}
    assert not [w for w in recwarn if "experts" in str(w.message)]
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.out_proj, by whose weight its parent multiplies without"):
        tinylora.apply(MambaForCausalLM(mamba.config), tinylora.LoraXSConfig(r=2, target_modules=["out_proj"]))
    config = Qwen3MoeConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, moe_intermediate_size=32
    )
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj \(4 of the kind\) is several matrices in one tensor"):
        tinylora.apply(Qwen3MoeForCausalLM(config), tinylora.TinyLoraConfig())


def test_layers_that_a_parent_reads_and_never_calls():
    """WavLM's attention hands q, k, v and out to torch as weights; Qwen3-Next's gated DeltaNet calls its out_proj."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, WavLMConfig, WavLMModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    wavlm = WavLMModel(WavLMConfig(**sizes, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its convolutions are no experts
        tinylora.apply(wavlm, tinylora.LoraConfig(r=2))
    adapted = {n.rpartition(".")[2] for n in tinylora.nn.model.adapted_layers(wavlm)}
    assert "intermediate_dense" in adapted and not adapted & {"q_proj", "k_proj", "v_proj", "out_proj"}
    config = Qwen3NextConfig(
        **sizes, vocab_size=64, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = tinylora.apply(Qwen3NextForCausalLM(config), tinylora.LoraConfig(r=2, target_modules=["out_proj"]))
    for p in tinylora.adapter_parameters(model):
        nn.init.normal_(p)
    model(tokens(vocabulary=64), labels=tokens(vocabulary=64)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in tinylora.adapter_parameters(model))


def test_pefts_own_layers_are_no_targets():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(qwen2(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj\.base_layer is a part of one of PEFT's adapters"):
        tinylora.apply(model, tinylora.TinyLoraConfig())
    assert [n for n, p in model.named_parameters() if p.requires_grad], "and PEFT's still trains"
    tinylora.apply(model, tinylora.LoraConfig(r=2, target_modules=["k_proj"]))


def test_torchs_own_encoder_calls_the_layers_in_eval():
    """Its fast path would multiply with their weights itself, and pass the adapter over."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = trained(nn.TransformerEncoder(layer, 2), TinyLoraConfig(u=2), scale=0.3)
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        training = model.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            y = model.eval()(x, src_key_padding_mask=mask)
        real = slice(None) if mask is None else ~mask
        torch.testing.assert_close(y[real], training[real], rtol=1e-4, atol=1e-5)
        with tinylora.disabled(model), torch.no_grad():
            assert torch.dist(model(x, src_key_padding_mask=mask)[real], y[real]) > 1e-2


def test_gates_and_full_names_among_the_targets():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gate = nn.Linear(8, 8), nn.Linear(8, 1)

    class Tower(nn.Module):
        def __init__(self, tower=None):
            super().__init__()
            self.layers = nn.ModuleList([Block()])
            if tower is not None:
                self.tower = tower

    def names(targets):
        model = tinylora.apply(Tower(Tower()), LoraXSConfig(r=2, target_modules=targets))
        return [s.name for s in model.tinylora["default"].sites]

    assert names(None) == ["layers.0.fc", "tower.layers.0.fc"]
    assert names(["layers.0.fc"]) == ["layers.0.fc"]
    assert names(["fc"]) == ["layers.0.fc", "tower.layers.0.fc"]
    tower = Tower(Tower())
    nn.utils.parametrize.register_parametrization(tower.tower.layers[0].fc, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"names tower.layers.0.fc, a ParametrizedLinear"):
        tinylora.apply(tower, LoraXSConfig(r=2, target_modules=["fc"]))
    tinylora.apply(tower, LoraXSConfig(r=2, target_modules=["layers.0.fc"]))
    assert list(adapted_layers(tower)) == ["layers.0.fc"]


def test_a_weight_of_another_kind_is_refused():
    """As torchao's quantize_ leaves in a torch.nn.Linear."""
    model = qwen2(layers=1)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data))
    with pytest.raises(ValueError, match=r"up_proj has a weight of kind TwoTensor, expected plain numbers"):
        tinylora.apply(model, tinylora.TinyLoraConfig())
    assert not tinylora.adapter_names(model)

    class Tagged(nn.Parameter):
        pass

    layer.weight = Tagged(layer.weight.data.a, requires_grad=False)
    assert tinylora.apply(model, tinylora.TinyLoraConfig()).model.layers[0].mlp.up_proj.weight is layer.weight


def test_linear_layers_of_other_classes_are_said():
    model = qwen2()
    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", nn.Identity())
    for names in (["q_proj"], r".*\.q_proj", ["layers.0.self_attn.q_proj"]):
        with pytest.raises(ValueError, match=r"q_proj"):
            tinylora.apply(model, tinylora.TinyLoraConfig(target_modules=names))
    with pytest.raises(
        ValueError, match=r"names model.layers.0.self_attn.q_proj, a ParametrizedLinear, expected torch"
    ):
        tinylora.apply(model, tinylora.TinyLoraConfig(target_modules=["q_proj", "k_proj"]))
    with pytest.warns(UserWarning, match=r"layers.0.self_attn.q_proj .1 of the kind. is a ParametrizedLinear"):
        tinylora.apply(model, tinylora.TinyLoraConfig())
    assert len(adapted_layers(model)) == 13


def test_a_model_without_blocks_says_what_to_name():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"none of its linear layers lies in a block .*: name some, \['0', '2'\]"):
        tinylora.apply(model, tinylora.TinyLoraConfig())
    tinylora.apply(model, tinylora.TinyLoraConfig(target_modules=["0", "2"]))
