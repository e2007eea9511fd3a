"""The plan of a run against what real runs take, and the arithmetic on top of it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mamba2_train.adapters import save_adapter
from mamba2_train.commands import extend_hydra
from mamba2_train.commands.plan import known_shape
from mamba2_train.commands.train import adapt, warn_of_memory
from mamba2_train.errors import UserError
from mamba2_train.memory import LiveMemory
from mamba2_train.model import PRESETS, Mamba2Config, Mamba2LM, initialize
from mamba2_train.optim import build_optimizer
from mamba2_train.plan import (
    CONTEXT,
    GB,
    SEGMENT_LEN,
    Plan,
    cure,
    optimizer_bytes,
    shortage,
    smaller,
    variants,
)
from mamba2_train.quantization import is_quantized, quantize
from mamba2_train.schema import PlanConfig, validated

SMALL = Mamba2Config(d_model=256, n_layers=6, vocab_size=4096, d_state=64, headdim=32)
WIDE = Mamba2Config(d_model=512, n_layers=4, vocab_size=8192, d_state=64)
DEEP = Mamba2Config(d_model=128, n_layers=12, vocab_size=4096, d_state=32, headdim=32)
ROWS = ["data.batch_size=4", "data.seq_len=128"]
LONG = ["data.batch_size=1", "data.seq_len=512"]
RUNS = [
    (SMALL, ["adapter=full", *ROWS]),
    (WIDE, ["adapter=lora", "model.checkpointing=selective", *LONG]),
    (DEEP, ["adapter=full", "model.checkpointing=full", "data.batch_size=3", "data.seq_len=384"]),
    (
        dataclasses.replace(WIDE, d_state=256),  # states of a MB a layer, at 7 boundaries
        [
            *("adapter=lora", "model.checkpointing=full", "data.batch_size=1"),
            *("data.seq_len=2048", "long_context=exact", "long_context.segment_len=256"),
        ],
    ),
]
IN_16_BITS = [
    (SMALL, ["adapter=lora", "precision=bf16", "model.checkpointing=every_2", *ROWS]),
    (SMALL, ["adapter=full", "precision=bf16-mixed", *ROWS]),
    (WIDE, ["adapter=lora", "precision=bf16", "quantization=nf4", *LONG]),
    (WIDE, ["adapter=lora", "quantization=int8", "optimizer=adafactor", *ROWS]),
    (SMALL, ["adapter=full", "optimizer=muon", *ROWS]),
]

MOMENTS = (
    *("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "momentum_buffer"),
    *("state1", "state2", "absmax1", "absmax2"),
)


def configured(*overrides: str) -> PlanConfig:
    extend_hydra()
    with initialize_config_module("mamba2_configs", version_base="1.3"):
        composed = compose("plan", overrides=list(overrides))
    return validated(PlanConfig, OmegaConf.to_container(composed, resolve=True))


def planned(shape: Mamba2Config, *overrides: str, gpu: bool = True) -> Plan:
    return Plan(configured(*overrides), shape, adapt, gpu=gpu)


def assert_estimates_hold(runs, limit):
    requests = [{"shape": dataclasses.asdict(s), "overrides": o} for s, o in runs]
    script = Path(__file__).parent / "peak_memory.py"
    done = subprocess.run(
        [sys.executable, script, json.dumps(requests)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for (shape, overrides), measured in zip(runs, done.stdout.split(), strict=True):
        estimate = planned(shape, *overrides, gpu=False).memory().peak
        assert abs(estimate / int(measured) - 1) <= limit, (overrides, estimate, measured)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_measured_peaks():
    """Layers, width, length, LoRA or full, and checkpointing differ."""
    assert_estimates_hold(RUNS, 0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_measured_peaks_in_16_bits():
    assert_estimates_hold(IN_16_BITS, 0.15)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=full"],
        ["adapter=lora", "precision=bf16", "model.checkpointing=selective"],
        ["adapter=lora", "model.checkpointing=full"],
        ["adapter=full", "model.checkpointing=every_3", "precision=bf16-mixed"],
        ["adapter=lora", "adapter.targets=[lm_head]"],
    ],
)
def test_many_blocks_follow_from_few(overrides):
    """The whole model simulated is the truth, and the prediction equals it to the byte."""
    deep = dataclasses.replace(SMALL, n_layers=18)
    plan = planned(deep, *overrides, *ROWS)
    whole = plan._of_first(18, 1)
    assert len(plan._moments) == 1
    predicted = plan._step()
    assert len(plan._moments) == 3
    peak = max(whole.forward, whole.loss, whole.head, whole.top, whole.bottom)
    fields = dataclasses.asdict(predicted)
    assert max(list(fields.values())[3:]) == pytest.approx(peak, abs=64)
    for name in ("weights", "gradients", "activations", "forward", "loss", "bottom"):
        assert fields[name] == pytest.approx(getattr(whole, name), abs=64), name


def test_weights_are_counted_once_and_in_their_dtypes():
    plan = planned(PRESETS["mamba2-130m"], "adapter=full")
    assert plan.n_parameters == plan.n_trained == 128_989_632
    assert plan.memory().weights == 4 * 128_989_632
    narrow = planned(PRESETS["mamba2-130m"], "precision=bf16", "adapter.targets=[in_proj]")
    wide = 24 * 3 * 24  # A_log, D and dt_bias of every head
    lora = 24 * 32 * (768 + 3352)
    assert narrow.n_trained == lora
    assert narrow.memory().weights == 2 * (128_989_632 - wide) + 4 * (wide + lora)
    assert narrow.memory().optimizer == pytest.approx(8 * lora, abs=1000)  # step numbers


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor", "muon"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_optimizers(kind, adapter):
    """Against the optimizer itself, its state added up and its step counted as it runs."""
    config = configured(f"optimizer={kind}", f"adapter={adapter}").optimizer
    sketch, model = (planned(SMALL, f"adapter={adapter}").model, initialize(Mamba2LM(SMALL)))
    adapt(model, configured(f"adapter={adapter}"))
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    kept = [t for s in optimizer.state.values() for name, t in s.items() if name in MOMENTS]
    with LiveMemory() as count:
        count.add(
            *model.parameters(), *kept, *(p.grad for p in model.parameters() if p.requires_grad)
        )
        before = count.live
        optimizer.step()
    state, update = optimizer_bytes(sketch, config, gpu=False)
    n_tensors = len(optimizer.state)
    assert state == pytest.approx(sum(t.nbytes for t in kept), abs=8 * n_tensors)  # step numbers
    if kind != "adamw_8bit":  # which allocates nothing that PyTorch could see
        assert update == pytest.approx(count.peak - before, abs=8 * n_tensors)
    assert not any(p.grad is not None or not p.is_meta for p in sketch.parameters())


def test_paged_moments_may_leave_a_gpu():
    """All but those of what bitsandbytes does not page; one comes back at a time."""
    plan = planned(WIDE, "adapter=full", "optimizer=paged_adamw_8bit", *LONG)
    sizes = [p.numel() for p in plan.trained]
    state, update = plan._of_optimizer()
    kept = sum(8 * n if n < 4096 else 2 * n for n in sizes if n < 100_000)
    scales = sum(8 * n / 256 for n in sizes if n >= 4096)
    assert state == pytest.approx(kept + scales, rel=1e-4)
    assert update == 2 * max(sizes)
    on_cpu = planned(WIDE, "adapter=full", "optimizer=paged_adamw_8bit", gpu=False)
    state, update = on_cpu._of_optimizer()
    moments = sum(8 * n if n < 4096 else 2 * n for n in sizes)
    assert (state, update) == (pytest.approx(moments + scales, rel=1e-4), 0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_projections_are_counted_as_stored(kind):
    """Against what bitsandbytes makes of the weights."""
    adapter = ["precision=bf16", "adapter.targets=[in_proj]", *LONG]
    plain, quantized = (
        planned(WIDE, f"quantization={k}", *adapter).memory() for k in ("none", kind)
    )
    model = initialize(Mamba2LM(WIDE))
    saved = largest = 0
    for name, p in list(model.named_parameters()):
        if is_quantized(name):
            quantize(model, name, p.detach().bfloat16(), kind, dtype=torch.bfloat16)
            layer = model.get_submodule(name.removesuffix(".weight"))
            saved += 2 * p.numel() - stored(layer)
            largest = max(largest, 2 * p.numel())
    # code books of 16 and 256 numbers to a layer are left out
    assert plain.weights - quantized.weights == pytest.approx(saved, rel=2e-3)
    # and one weight is dequantized at a time, in the blocks
    product = largest if quantized.at in ("forward", "top", "bottom") else 0
    assert plain.peak - quantized.peak == pytest.approx(saved - product, rel=2e-3)


def stored(layer):
    """Bytes of a quantized layer's weight and its scales."""
    if (scales := getattr(layer.weight, "SCB", None)) is not None:
        return layer.weight.nbytes + scales.nbytes
    state = layer.weight.quant_state
    return layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
def test_initial_values_change_no_byte(init):
    run = ["precision=bf16", "adapter.targets=[in_proj,out_proj]", *ROWS]
    assert planned(SMALL, f"adapter.init={init}", *run).memory() == planned(SMALL, *run).memory()


def test_an_adapter_that_is_continued_is_the_one_that_was_saved(tmp_path):
    """As a plain LoRA of the same settings; its folder is read for no weight, tp included."""
    run = ["adapter.r=4", "adapter.targets=[in_proj,embeddings]", "adapter.train=[norm,A_log]"]
    config = configured(*run)
    model = initialize(Mamba2LM(SMALL))
    save_adapter(adapt(model, config), tmp_path, "embedded")
    further = planned(SMALL, "adapter=continue", f"adapter.source={tmp_path}", *ROWS)
    fresh = planned(SMALL, "adapter.dropout=0.1", *run, *ROWS)
    for strategy in ("single", "fsdp", "tp"):
        assert further.memory(strategy, 4) == fresh.memory(strategy, 4)


def test_frozen_parameters_have_no_gradient_and_no_moments():
    """Blocks that differ are simulated one and all."""
    plan = planned(
        SMALL, "adapter=full", "adapter.freeze=[embeddings]", "adapter.freeze_layers=[0-2]"
    )
    blocks = list(plan.model.backbone.layers)
    n = sum(p.numel() for b in blocks[3:] for p in b.parameters()) + SMALL.d_model
    assert plan.n_trained == n
    memory = plan.memory()
    assert memory.gradients == 4 * n
    assert memory.optimizer == pytest.approx(8 * n, abs=1000)
    assert set(plan._moments) == {(6, 4, 256, False, 1, False, "none")}


def test_strategies_divide_what_they_say():
    plan = planned(WIDE, "adapter=full", *ROWS)
    single, ddp, fsdp, tp = (plan.memory(s, 4) for s in ("single", "ddp", "fsdp", "tp"))
    assert ddp.peak == single.peak + single.gradients
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp, name) == getattr(single, name) / 4
    assert fsdp.activations == single.activations
    many = plan.memory("fsdp", 10**6).peak  # nothing but activations, and what is whole for a time
    transient = single.activations + single.logits
    assert transient < many < min(fsdp.peak, 1.05 * (transient + plan._gathered()))
    assert fsdp.peak < single.peak
    # projections, convolution and heads are divided (B and C, of one group, are not)
    c, rest = WIDE, WIDE.vocab_size * WIDE.d_model
    shared = c.n_layers * 2 * c.n_groups * c.d_state * (c.d_model + c.d_conv + 1)
    norms = (c.n_layers + 1) * c.d_model
    divided = single.weights / 4 - rest - norms - shared
    assert tp.weights / 4 == pytest.approx(divided / 4 + rest + norms + shared)
    with pytest.raises(UserError, match="16 heads in 1 groups cannot be divided over 3"):
        plan.memory("tp", 3)
    both, half = plan.memory("fsdp_tp", 8), plan.memory("tp", 2)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(both, name) == pytest.approx(getattr(half, name) / 4)
    assert both.activations == half.activations
    assert plan.strategies(8) == ("ddp", "fsdp", "tp", "fsdp_tp")
    assert plan.strategies(2) == ("ddp", "fsdp", "tp")


@pytest.mark.parametrize("flag", ["optimizer=adamw_8bit", "quantization=int8"])
def test_what_cannot_be_sharded(flag):
    plan = planned(SMALL, flag, *ROWS)
    plan.memory("ddp", 2)
    for strategy in ("fsdp", "tp", "fsdp_tp"):
        with pytest.raises(UserError, match=f"{strategy} cannot shard .*{flag}.*: use "):
            plan.memory(strategy, 4)


def test_a_cure_of_what_is_sharded_shards():
    plan = planned(WIDE, *LONG)
    for strategy, n in (("single", 1), ("fsdp", 4)):
        possible = [(f, plan.of(c)) for f, c in smaller(plan.config)]
        least = min(p.memory(strategy, n).peak for f, p in possible if "optimizer" not in f)
        flags, _ = cure(plan, lambda m, least=least: m.peak <= least, strategy, n)
        assert flags["quantization"] == "nf4"
        assert "optimizer" not in flags
    assert any("optimizer" in flags for flags, _ in possible)


def test_checkpointing_and_precision_order_as_they_should():
    plan = planned(dataclasses.replace(SMALL, n_layers=4), "adapter=lora", *ROWS)
    peaks = {(p, m): plan.of(c).memory().activations for p, m, c in variants(plan.config)}
    assert len(peaks) == 12
    for precision in ("fp32", "bf16"):
        none, selective, full, every_2 = (
            peaks[precision, mode] for mode in ("none", "selective", "full", "every_2")
        )
        assert full < selective < every_2 < none
    assert peaks["bf16", "none"] < peaks["fp32", "none"]


def test_a_million_tokens_of_codestral():
    """In the memory of one segment and 127 states: the arithmetic by hand."""
    run = ["adapter=lora", "model.checkpointing=full", "precision=bf16"]
    run += ["data.seq_len=1048576", "data.batch_size=1"]
    codestral = PRESETS["mamba-codestral-7b"]
    plan = planned(codestral, *run, "long_context=exact")
    state = 64 * (128 * 64 * 128 * 4 + 3 * (8192 + 2 * 8 * 128) * 2)
    here = plan.memory()
    assert here.states == 127 * state
    assert here.fits(80)
    on_host = configured(*run, "long_context=exact", "long_context.offload=true")
    there = plan.of(on_host).memory()
    assert (there.states, there.on_host) == (0, 127 * state)
    assert here.peak - there.peak == 125 * state  # but those of the segment that is computed
    forward, step = planned(codestral, *run).flops()
    # a second forward pass of all segments but the last
    assert plan.flops() == (forward, pytest.approx(step + forward * 127 / 128))


def test_a_segment_beside_a_row_of_its_length():
    row = ["adapter=full", "data.batch_size=2"]
    whole = planned(SMALL, *row, "data.seq_len=256").memory()
    exact = [*row, "long_context=exact", "long_context.segment_len=256"]
    assert planned(SMALL, *exact, "data.seq_len=256").memory() == whole
    segment = planned(SMALL, *exact, "data.seq_len=1024", "long_context.offload=true").memory()
    state = segment.on_host / 3
    # it begins and ends in a state and has the gradients of both, and those of the weights
    assert 2 * state <= segment.peak - whole.peak <= 4 * state + whole.gradients


def test_a_part_of_a_row_beside_a_row_of_its_length():
    """Four GPUs to a row. A layer keeps the state that it begins in, for the exchange and for the
    scan, and some numbers to a head and position."""
    row = ["adapter=full", "data.batch_size=2", "strategy=fsdp"]
    whole = planned(SMALL, *row, "data.seq_len=256").memory("fsdp", 4)
    split = [*row, "long_context=parallel", "data.seq_len=1023"]
    plan = planned(SMALL, *split)
    part = plan.memory("fsdp", 4)
    states = sum(layer.ssm.nbytes for layer in plan.state().layers)
    per_head = SMALL.n_layers * 2 * 256 * SMALL.n_heads * 4
    assert 2 * states <= part.activations - whole.activations <= 2.1 * states + 10 * per_head
    assert part.weights == whole.weights
    assert plan.strategies(4) == ("fsdp", "fsdp_tp")
    assert plan.memory("fsdp_tp", 4).peak < plan.memory("fsdp", 2).peak
    three = planned(SMALL, *split, "long_context.ranks=3")
    assert three.memory("fsdp", 3).activations > part.activations
    with pytest.raises(UserError, match=r"4 GPUs are no multiple of the long_context.ranks=3"):
        three.memory("fsdp", 4)


def test_a_cure_for_long_rows_is_to_cut_them():
    shape = dataclasses.replace(SMALL, n_layers=2)
    plan = planned(shape, "adapter=full", "data.seq_len=65536", "data.batch_size=1")
    limit = planned(shape, "adapter=full", "data.seq_len=16384", "data.batch_size=1").memory().peak
    flags, memory = cure(plan, lambda m: m.peak <= limit)
    assert flags == {"long_context": "exact"}
    assert memory.states
    assert configured("long_context=exact").long_context.segment_len == SEGMENT_LEN


def test_flops():
    """PyTorch counts the products of a step; the scan and the convolution are not among them."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, 64, dtype=torch.int64)
    for mode in ("none", "full"):
        model = initialize(Mamba2LM(SMALL))
        model.set_checkpointing(mode)
        c = SMALL
        outside = 2 * c.n_layers * (3 * c.d_inner * c.d_state + c.d_conv * c.d_conv_channels)
        with FlopCounterMode(display=False) as counter:
            model(ids).logits.sum().backward()
        plan = planned(SMALL, "adapter=full", f"model.checkpointing={mode}")
        forward, step = plan.flops()
        # scan and convolution: forward, inputs' gradients, and once more where it is repeated
        products = step - outside * (2 if mode == "none" else 3)
        # out_proj is the last of a block, and is never repeated
        spared = 2 * c.n_layers * c.d_inner * c.d_model if mode == "full" else 0
        assert counter.get_total_flops() / 64 == pytest.approx(products - spared, rel=0.01)
        assert forward < step


def test_cure_is_the_cheapest_that_fits():
    plan = planned(dataclasses.replace(SMALL, n_layers=4), "adapter=full", *ROWS)
    taken = []
    for flags in ("selective", "full"):
        changed = plan.config.model_copy(
            update={"model": plan.config.model.model_copy(update={"checkpointing": flags})}
        )
        taken.append(plan.of(changed).memory().peak)
    limit = taken[0] + 1000
    flags, memory = cure(plan, lambda m: m.peak <= limit)
    assert flags == {"model.checkpointing": "selective"}
    assert memory.peak == taken[0]
    assert cure(plan, lambda m: m.peak < 10) is None
    flags, memory = cure(plan, lambda m: m.peak < taken[1])
    assert memory.peak < taken[1]


def test_a_run_that_will_not_fit_is_announced():
    plan = planned(SMALL, "adapter=full", *ROWS)
    assert shortage(plan, int(80 * GB)) is None
    free = int(plan.memory().on_gpu) - 1000
    line = shortage(plan, free)
    assert f"has {free / GB:.1f} free" in line
    assert "model.checkpointing=selective would need" in line
    assert "take a larger GPU" in shortage(plan, int(CONTEXT))


def test_a_run_on_a_gpu_warns_before_it_begins(monkeypatch, caplog):
    config = configured("adapter=full", *ROWS)
    warn_of_memory(config, SMALL)
    assert not caplog.records  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(80 * GB), int(80 * GB)))
    warn_of_memory(config, SMALL)
    assert not caplog.records
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(0.7 * GB), int(80 * GB)))
    warn_of_memory(config, SMALL)
    (record,) = caplog.records
    assert "0.7 free; model.checkpointing=selective" in record.message
    monkeypatch.setenv("RANK", "1")
    warn_of_memory(config, SMALL)
    assert len(caplog.records) == 1


def test_planning_draws_no_random_numbers():
    before = torch.get_rng_state()
    planned(SMALL, "adapter=lora", *ROWS).memory()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("source", "preset"),
    [
        ("state-spaces/mamba2-2.7b", "mamba2-2.7b"),
        ("mistralai/Mamba-Codestral-7B-v0.1", "mamba-codestral-7b"),
        ("mamba2-370m", "mamba2-370m"),
    ],
)
def test_official_models_need_no_hub(source, preset):
    assert known_shape(configured(f"model.source={source}")) == PRESETS[preset]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.sizes=[-3]", r"plan.sizes.0: Input should be greater than 0 \(got -3\)"),
        ("plan.sizes=[a100]", "plan.sizes.0: Input should be a valid number"),
        ("plan.gpus=0", "plan.gpus: Input should be greater than 0"),
        ("model.checkpointing=every_0", "checkpointing is 'every_0'; choose none, selective, full"),
    ],
)
def test_bad_input(override, message):
    with pytest.raises(UserError, match=message):
        configured(override)


def test_a_model_that_is_not_there():
    with pytest.raises(UserError, match="neither a folder nor in the hub's cache"):
        known_shape(configured("model.source=nobody/nothing"))


def test_command(tmp_path):
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from mamba2_train.commands.plan import main; main()"),
            *("plan.gpus=2", "plan.sizes=[0.7, 24]", f"plan.out={out}", "adapter=full"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [m["strategy"] for m in figures["bytes_per_gpu"]] == ["ddp", "fsdp", "tp"]
    assert figures["parameters"] == figures["trained"] == 2_796_512
    assert "24 GB: yes (ddp" in done.stdout
    assert "0.7 GB: no; " in done.stdout
    assert "fp32        selective" in done.stdout
