"""What a configuration may ask for: which engine, bfloat16, compile, activation checkpointing, and memory."""

import copy
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from fleet.errors import ConfigError, OutOfMemory
from learner.engine_torch import TorchEngine
from learner.engines import COMPILERS, check_engine, make_engine
from learner.main import EngineConfig
from learner.memory import free_knobs
from learner.modules import prepare_module
from tests.learner.engine_toys import ALONE, CPU, ActorCritic, Block, largest_difference, toy_batch, train_toy_engine


def make(**config):
    algorithm = ActorCritic()
    return algorithm, make_engine(EngineConfig(**config), algorithm, CPU, ALONE)


@pytest.mark.parametrize("name", ["auto", "torch", "ddp"])
def test_one_rank_trains_with_plain_torch(name):
    assert type(make(name=name)[1]) is TorchEngine


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        ({"name": "torch"}, 2, "engine.name = 'torch'.*one rank, here are 2.*engine.name=ddp"),
        ({}, 8, "a batch of 7 for 8 ranks"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(config, ranks, said):
    with pytest.raises(ConfigError) as error:
        check_engine(EngineConfig(**config), ActorCritic(), CPU, ranks)
    assert re.search(said, str(error.value))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine.name = 'deepspeed'"):
        make(name="deepspeed")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"engine.compile = True.*"):
        make(compile=True)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match=r"engine.dtype = 'bfloat16'"):
        check_engine(EngineConfig(dtype="bfloat16"), ActorCritic(), torch.device("cuda"), 1)


def test_bfloat16_trains_nearly_alike_and_keeps_float32_weights():
    whole = train_toy_engine(tensors=torch.float32)
    half = train_toy_engine(tensors=torch.float32, dtype="bfloat16")
    losses = [[n["loss"] for n in trained.numbers] for trained in (whole, half)]
    assert losses[1] == pytest.approx(losses[0], abs=0.03)  # bfloat16 has 8 bits: 0.004 of a value of about 1, a few times
    assert losses[1] != pytest.approx(losses[0], abs=1e-5)
    assert {v.dtype for named in half.weights.values() for v in named.values()} == {torch.float32}
    assert {v.dtype for s in half.state["policy"]["state"].values() for v in s.values()} == {torch.float32}


def test_a_weight_that_is_used_without_gradients_first_still_gets_its_own():
    def used_before(part, micro):
        with torch.no_grad():
            algorithm.policy.mean(micro.obs["observation.state"])
        return algorithm.loss(part, micro)

    norms = []
    for first in (False, True):
        algorithm = ActorCritic(dtype=torch.float32)
        engine = make_engine(EngineConfig(dtype="bfloat16"), algorithm, CPU, ALONE)
        loss = used_before if first else algorithm.loss
        norms.append(engine.update("policy", loss, toy_batch(0, dtype=torch.float32))["grad_norm"])
    assert norms[0] == norms[1]


def test_activation_checkpointing_computes_the_same_again():
    again, plain = make(activation_checkpointing=True), make()
    for (algorithm, engine), passes in ((again, 2), (plain, 1)):
        engine.update("policy", algorithm.loss, toy_batch(0))
        assert [block.calls for block in algorithm.policy.blocks] == [passes, passes]
    whole, kept = train_toy_engine(), train_toy_engine(activation_checkpointing=True)
    assert largest_difference(whole, kept) == 0
    # A copy made later (the moving average of a next phase) calls itself, not the module that it was copied from.
    policy = again[0].policy
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.blocks[0].linear.weight.zero_()
    state_BS = toy_batch(0).obs["observation.state"]
    assert not torch.equal(other.mean(state_BS), policy.mean(state_BS))
    cls = type(policy.blocks[0])
    prepare_module(policy, EngineConfig(activation_checkpointing=True))  # a second engine on the same module
    assert type(policy.blocks[0]) is cls and issubclass(cls, Block)


def test_activation_checkpointing_draws_the_same_dropout_again():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 1))
    gradients = []
    for checkpointing in (False, True):
        prepare_module(module, EngineConfig(activation_checkpointing=checkpointing))
        torch.manual_seed(1)
        module(torch.ones(8, 4)).sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
        module.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_modules_train_as_they_are():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip(f"torch.compile needs a C++ compiler: none of {COMPILERS}")
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh())).double()
    compiled = copy.deepcopy(eager)
    prepare_module(compiled, EngineConfig(compile=True))
    call = compiled[0]._compiled_call_impl
    prepare_module(compiled, EngineConfig(compile=True))
    assert call is not None and compiled[0]._compiled_call_impl is call
    assert list(compiled.state_dict()) == list(eager.state_dict())
    x, counted = torch.randn(7, 4, dtype=torch.float64), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for module in (eager, compiled):
        module(x).square().sum().backward()
    assert counted["unique_graphs"] == before + 1
    for first, second in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12)
    copy.deepcopy(compiled)(x)  # the moving average of a next phase


def test_more_kinds_of_layers_are_compiled_than_torch_would(monkeypatch):
    """With a backend that takes no time: it counts, and runs the graph as it is."""
    graphs, compile_ = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call: compile_(call, backend=lambda graph, _: graphs.append(1) or graph.forward)
    )
    module = nn.Sequential(
        *[nn.Linear(3, 3, bias=False) if i % 2 else nn.Sequential(*[nn.Tanh()] * (i + 5)) for i in range(24)]
    )
    prepare_module(module, EngineConfig(compile=True))
    module(torch.ones(2, 3, requires_grad=True))
    assert len(graphs) == 12 + 1  # 12 that differ, and 12 alike


@pytest.mark.parametrize(
    ("config", "ranks", "rows", "free"),
    [
        ({}, 1, 256, ["engine.micro_batch=128 (now 256)", "engine.activation_checkpointing=true", "engine.dtype=bfloat16"]),
        ({"micro_batch": 1, "dtype": "bfloat16"}, 1, 256, ["engine.activation_checkpointing=true"]),
        (
            {"name": "ddp", "micro_batch": 1, "activation_checkpointing": True},
            2,
            9,
            ["engine.dtype=bfloat16", "engine.name=deep"],
        ),
        (
            {"name": "deepspeed", "micro_batch": 8},
            2,
            9,
            ["engine.micro_batch=4", "engine.activation_c", "dtype", "zero_stage=2"],
        ),
    ],
)
def test_out_of_memory_names_the_settings_that_are_left(config, ranks, rows, free):
    knobs = free_knobs(EngineConfig(**config), ranks, rows)
    assert [want in knob for want, knob in zip(free, knobs, strict=False)] == [True] * len(free)


def test_all_settings_used_up():
    config = EngineConfig("deepspeed", 3, 0, "bfloat16", 1, 0.0, True, True)
    assert free_knobs(config, 2, 9) == ["more ranks (cluster.ranks)"]


def test_an_absurd_size_is_out_of_memory():
    algorithm, engine = make()

    def loss(part, micro):
        torch.empty(1 << 58)
        return algorithm.loss(part, micro)

    with pytest.raises(OutOfMemory, match="rank 0 is out of memory") as error:
        engine.update("policy", loss, toy_batch(0))
    assert error.value.code == "out_of_memory" and "engine.micro_batch=3 (now 7)" in error.value.remedy
    with pytest.raises(RuntimeError, match="not a matter of memory") as other:
        engine.update("policy", lambda part, micro: (_ for _ in ()).throw(RuntimeError("not a matter of memory")), toy_batch(0))
    assert not isinstance(other.value, OutOfMemory)
    assert engine.update("policy", algorithm.loss, toy_batch(0))["weight"] > 0  # and it can go on


LIMITED = """
import resource, sys
import torch
from algorithms.base import LossOutput
from fleet.errors import OutOfMemory
from learner.engines import make_engine
from learner.main import EngineConfig
from tests.learner.engine_toys import ALONE, CPU, ActorCritic, toy_batch

torch.set_num_threads(1)
algorithm, wide = ActorCritic(batch_size=1024), torch.ones(1, 65536, dtype=torch.float64)

def loss(part, micro):  # 0.5 MB of activations a row and layer
    out = algorithm.loss(part, micro)
    out.sum = out.sum + 0 * (out.per_sample_B[:, None] * wide).tanh().exp().sum()
    return out

size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20),) * 2)
micro_batch = 0
while True:
    engine = make_engine(EngineConfig(micro_batch=micro_batch), algorithm, CPU, ALONE)
    try:
        engine.update("policy", loss, toy_batch(0, 1024))
        break
    except OutOfMemory as error:
        knob = error.remedy.split(" ")[0]
        print(knob)
        micro_batch = int(knob.removeprefix("engine.micro_batch="))
print("trained")
"""


def test_following_the_remedy_helps():
    """In a process that may have 400 MB more than it starts with."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[:2] == ["engine.micro_batch=512", "engine.micro_batch=256"] and said[-1] == "trained", done.stdout
