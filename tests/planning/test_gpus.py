"""Plans for GPUs: their table and topologies, the roofline of a program, and what a plan without the compiler says."""

import dataclasses
import importlib.util

import jax
import pytest

from secvec_jax.errors import UserError
from secvec_jax.planning import plan as planner
from secvec_jax.planning.gpus import BY_KIND, GPUS, names_gpus, parse_gpus
from secvec_jax.planning.plan import Plan, topology_mesh
from secvec_jax.planning.roofline import Roofline, roofline
from secvec_jax.recipes.plan import PlanRun, report_lines
from tests.processes import call, run

H100 = GPUS["h100"]
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the CUDA plugin is not installed"
)


# ---- Topologies


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [("h100", "h100", 1), ("H100:8", "h100", 8), ("a100-40:4", "a100-40", 4), ("b200:16", "b200", 16)],
)
def test_topologies(topology, name, count):
    assert names_gpus(topology)
    assert parse_gpus(topology) == (GPUS[name], count)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:2x4", "v5p:2x2x1", "v4:2x2x1"])
def test_slices_of_tpus_are_no_gpus(topology):
    assert not names_gpus(topology)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("h1000:8", "unknown GPU 'h1000' (did you mean 'h100'?)"),
        ("a100:8", "unknown GPU 'a100' (use a100-40 or a100-80)"),
        ("potato", "known are a100-40, a100-80, h100, h200, b200, l4, rtx4090"),
        ("", "unknown GPU ''"),
        ("h100:0", "use h100:N, with N from 1 to 8, or a multiple of 8"),
        ("h100:12", "use h100:N"),
        ("h100:2x4", "use h100:N"),
        ("h100:", "use h100:N"),
    ],
)
def test_a_topology_that_is_none_is_reported_in_a_line(topology, words):
    with pytest.raises(UserError) as told:
        parse_gpus(topology)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_the_table_is_complete():
    assert len(BY_KIND) == len(GPUS)
    for name, gpu in GPUS.items():
        assert gpu.name == name and gpu.peak > 1e14
        assert f'device_description_str: "{gpu.kind}"' in gpu.target_config
        assert str(gpu.device_memory) in gpu.target_config
        assert 0.9 * gpu.device_memory < gpu.memory < gpu.device_memory
    gigabytes = {"a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 180, "l4": 24, "rtx4090": 24}
    for name, size in gigabytes.items():
        assert GPUS[name].device_memory / 1e9 == pytest.approx(size, rel=0.08)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(planner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"secvec_jax\[cuda\]\""):
        topology_mesh("h100:8", "")


def test_an_unknown_gpu_is_reported_by_the_verb():
    code, _, errors = call("train.py", "plan", "--topology", "h1000:8")
    assert code == 2
    assert errors.strip().count("\n") == 0 and "did you mean 'h100'?" in errors


# ---- The roofline

MIB = 2**20
PROGRAM = """HloModule step, is_scheduled=true

%sliced (param_0: bf16[4,512,1024], param_1: s32[]) -> bf16[512,1024] {
  %param_0 = bf16[4,512,1024]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,512,1024]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,512,1024}
  ROOT %layer = bf16[512,1024]{1,0} bitcast(%slice)
}

%product (param_0: bf16[256,1024], param_1: bf16[512,1024]) -> bf16[256,512] {
  %param_0 = bf16[256,1024]{1,0} parameter(0)
  %param_1 = bf16[512,1024]{1,0} parameter(1)
  ROOT %dot = bf16[256,512]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (state: (s32[], bf16[4,512,1024], bf16[256,1024])) -> (s32[], bf16[4,512,1024], bf16[256,1024]) {
  %state = (s32[], bf16[4,512,1024]{2,1,0}, bf16[256,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = bf16[4,512,1024]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[256,1024]{1,0} get-tuple-element(%state), index=2
  %w = bf16[512,1024]{1,0} fusion(%weights, %i), kind=kLoop, calls=%sliced
  %gathered = bf16[1024,1024]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %y = bf16[256,512]{1,0} fusion(%x, %w), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %z = (bf16[256,1024]{1,0}, s8[1024]{0}) custom-call(%y, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %out = bf16[256,1024]{1,0} get-tuple-element(%z), index=0
  ROOT %next = (s32[], bf16[4,512,1024]{2,1,0}, bf16[256,1024]{1,0}) tuple(%i, %weights, %out)
}

%condition (state.1: (s32[], bf16[4,512,1024], bf16[256,1024])) -> pred[] {
  %state.1 = (s32[], bf16[4,512,1024]{2,1,0}, bf16[256,1024]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (weights.1: bf16[4,512,1024], x.1: bf16[256,1024], q: bf16[1,256,8,128]) -> bf16[1,256,8,128] {
  %weights.1 = bf16[4,512,1024]{2,1,0} parameter(0)
  %x.1 = bf16[256,1024]{1,0} parameter(1)
  %q = bf16[1,256,8,128]{3,2,1,0} parameter(2)
  %start = s32[] constant(0)
  %init = (s32[], bf16[4,512,1024]{2,1,0}, bf16[256,1024]{1,0}) tuple(%start, %weights.1, %x.1)
  %loop = (s32[], bf16[4,512,1024]{2,1,0}, bf16[256,1024]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %attention = bf16[1,256,8,128]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "packed_attention_forward"}
}
"""  # noqa: E501


def test_products_bytes_and_collectives_count_as_often_as_they_run():
    found = roofline(PROGRAM, H100, devices=2)
    product, attention = 2 * 256 * 512 * 1024, 2 * 8 * 256 * 256 * 128
    assert found.flops == 4 * 2 * product + attention
    layer, x, y = MIB, MIB / 2, MIB / 4
    # The slice reads its index and one layer of four; cuBLAS's workspace of 1024 bytes counts, too.
    per_layer = (4 + 2 * layer) + (x + layer + y) + (y + layer + x + 1024)
    assert found.bytes == 4 * per_layer + 4 * MIB / 2
    assert found.collectives == {"all-gather": (4, 4 * layer)}
    assert found.kernels == {"triton_gemm": 1, "cublas$gemm": 1, "packed_attention_forward": 1}
    assert not found.unknown_loops


def test_an_update_in_place_that_runs_beside_others_moves_only_the_part_it_writes():
    text = """HloModule step, is_scheduled=true

%updated (param_0: bf16[32,1024], param_1: s32[], param_2: bf16[1024]) -> bf16[32,1024] {
  %param_0 = bf16[32,1024]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %param_2 = bf16[1024]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,1024]{1,0} bitcast(%param_2)
  ROOT %update = bf16[32,1024]{1,0} dynamic-update-slice(%param_0, %row, %param_1, %zero)
}

ENTRY %main (saved: bf16[32,1024], i: s32[], x: bf16[1024]) -> bf16[32,1024] {
  %saved = bf16[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[1024]{0} parameter(2)
  %copy-start = (bf16[1024]{0}, bf16[1024]{0}, u32[]) copy-start(%x)
  %copy-done = bf16[1024]{0} copy-done(%copy-start)
  %fusion-start = ((bf16[32,1024]{1,0}, s32[], bf16[1024]{0}), bf16[32,1024]{1,0}, u32[]) fusion-start(%saved, %i, %copy-done), kind=kLoop, calls=%updated
  ROOT %fusion-done = bf16[32,1024]{1,0} fusion-done(%fusion-start)
}
"""  # noqa: E501
    row, index, context = 2 * 1024, 4, 4
    assert roofline(text, H100, devices=1).bytes == (2 * row + context) + (row + index + row)


def test_the_bound_is_the_longest_of_three_times():
    found = roofline(PROGRAM, H100, devices=2)
    assert found.flops_seconds == found.flops / 989e12
    assert found.bytes_seconds == found.bytes / 3352.32e9
    assert found.interconnect_seconds == 4 * MIB / 450e9
    assert found.seconds == found.interconnect_seconds and found.limited_by == "interconnect"
    assert roofline(PROGRAM, dataclasses.replace(H100, interconnect=1e20), devices=2).limited_by == "memory"


def test_a_loop_that_depends_on_data_is_named_and_runs_as_often_as_reported():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"4"}}', "")
    found = roofline(text, H100, devices=2, trips=3)
    assert found.collectives == {"all-gather": (3, 3 * MIB)} and len(found.unknown_loops) == 1


def test_a_report_calls_the_time_a_bound():
    cost = Roofline(1e15, 1e12, 1.0, 0.3, 0.2, {"all-gather": (12, 2.0**30)}, {"cublas$gemm": 7}, [])
    step = Plan(H100, 8, 2**31, 2**30, 2**32, 7 * 2**30, 8e14, "6N+3a per token", 32768, cost, 9.0)
    text = "\n".join(report_lines(PlanRun(topology="h100:8"), step))
    assert "memory per GPU: parameters 2.00 + optimizer 1.00 + activations 4.00" in text
    assert "total 7.00 of 75.15 GiB" in text
    assert "collective all-gather: 12 per step, 1.00 GiB sent per GPU" in text
    assert "kernels in the compiled program: cublas$gemm (7)" in text
    assert (
        "a step takes at least 1.000 s: products 1.000 s at 989 TFLOP/s, memory 0.300 s, interconnect 0.200 s" in text
    )
    assert "at most 32768 tokens/s, 4096 per GPU, MFU 80.9%" in text
    assert "a bound, not an estimate" in text and "HBM" not in text


# ---- Programs compiled here


@needs_cuda
@pytest.mark.release
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_table_can_be_compiled_for(name):
    mesh = topology_mesh(f"{name}:2", "")
    with jax.set_mesh(mesh):
        assert mesh.devices.flat[0].device_kind == GPUS[name].kind
        array = jax.ShapeDtypeStruct(
            (256, 256), "bfloat16", sharding=jax.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        )
        program = jax.jit(lambda x: (x @ x).sum()).lower(array).compile()
    assert roofline(program.as_text(), GPUS[name], devices=2).flops == 2 * 256**3 / 2


@needs_cuda
@pytest.mark.release
@pytest.mark.parametrize("phase", ["finetune", "vectors", "align", "protect"])
def test_a_plan_names_memory_kernels_and_the_bound(phase):
    done = run(
        "train.py", "plan", "--model", "configs/models/llama-3.2-1b.json", "--topology", "h100:2", "--phase", phase,
        "--batch-size", "4", "--max-seq-len", "512",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "memory per GPU: parameters" in done.stdout and "of 75.15 GiB" in done.stdout
    assert "packed_attention_forward" in done.stdout and "a step takes at least" in done.stdout
    assert "collective all-gather" in done.stdout
