"""The account of a compiled TPU program: excerpts of real programs, and with libtpu programs compiled here.

hlo/: programs for a v5p as libtpu of JAX 0.10.2 wrote them, with layouts, most of the configuration and what computes
nothing left out.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secvec_jax.planning.schedule import Account, account
from secvec_jax.planning.torus import CHIPS

V5P = CHIPS["TPU v5"]
LINK = V5P.link_bandwidth
MIB = 2**20
LINE = [(i, 0, 0) for i in range(4)]
SQUARE = [(x, y, 0) for y in range(2) for x in range(2)]
CUBE = [(x, y, z) for z in range(4) for y in range(4) for x in range(4)]


def excerpt(name: str, coords: list) -> Account:
    return account((Path(__file__).parent / "hlo" / f"{name}.txt").read_text(), V5P, coords)


def program(*lines: str) -> str:
    """An entry computation of these instructions."""
    return "\n".join(
        ["HloModule test, is_scheduled=true", "", "ENTRY %main () -> () {", *(f"  {x}" for x in lines), "}"]
    )


def works(name: str, operand: str, cycles: int) -> str:
    config = f'backend_config={{"flag_configs":[],"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"%{name} = bf16[8,128]{{1,0:T(8,128)(2,1)}} negate(%{operand}), {config}"


PAIRS = "source_target_pairs={{0,1},{1,2},{2,3}}"
START = (
    "%start = (bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[512,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})"
    f" collective-permute-start(%x), channel_id=1, {PAIRS}"
)
DONE = "%done = bf16[512,1024]{1,0:T(8,128)(2,1)} collective-permute-done(%start)"
X = "%x = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)"


# ---- Loops


def test_loops_run_as_often_as_their_condition_says():
    found = excerpt("loops", [(0, 0, 0)])
    # fori_loop(3, 21), the dearer branch of a cond, and a while_loop up to an argument, which counts once.
    assert found.flops == (18 + 1 + 1) * 2 * 1024**3
    assert found.unknown_loops == ["while.2 jit(f)/while"]
    assert found.seconds * V5P.clock > 20 * 18458
    assert dict(found.seconds_by_op)["jit(f)/while/body/closed_call/dot_general"] == pytest.approx(
        18 * 18458 / V5P.clock
    )


def test_a_kernel_costs_the_roofline_of_what_it_declares():
    found = excerpt("loops", [(0, 0, 0)])
    assert found.kernel_flops == 2 * 1024**3
    assert found.kernel_seconds == pytest.approx(2 * 1024**3 / V5P.peak)


@pytest.mark.parametrize(
    ("start", "step", "direction", "limit", "trips"),
    [
        (0, 1, "LT", 7, 7),
        (3, 2, "LT", 8, 3),
        (9, -1, "GT", 2, 7),
        (0, 1, "LE", 7, 8),
        (4, 1, "NE", 9, 5),
        (9, 1, "LT", 2, 0),
    ],
)
@pytest.mark.parametrize("carried", [False, True])
def test_trip_counts_from_the_condition(start, step, direction, limit, trips, carried):
    """The limit may stand in the condition, or be carried along."""
    bound = "%n = s32[] get-tuple-element(%q), index=1" if carried else f"%n = s32[] constant({limit})"
    text = f"""
%body () -> () {{
  %p = (s32[], s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %m = s32[] get-tuple-element(%p), index=1
  %a = bf16[8,128] get-tuple-element(%p), index=2
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  {works("b", "a", 1000)}
  ROOT %t = (s32[], s32[], bf16[8,128]) tuple(%next, %m, %b)
}}

%condition () -> () {{
  %q = (s32[], s32[], bf16[8,128]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  {bound}
  ROOT %less = pred[] compare(%j, %n), direction={direction}
}}
""" + program(
        f"%zero = s32[] constant({start})",
        "%c = s32[] copy(%zero)",
        f"%limit = s32[] constant({limit})",
        "%x = bf16[8,128] parameter(0)",
        "%init = (s32[], s32[], bf16[8,128]) tuple(%c, %limit, %x)",
        "ROOT %while = (s32[], s32[], bf16[8,128]) while(%init), condition=%condition, body=%body",
    )
    found = account(text, V5P, [(0, 0, 0)])
    assert not found.unknown_loops
    assert dict(found.seconds_by_op).get("b", 0) == pytest.approx(trips * 1000 / V5P.clock)


def test_a_known_trip_count_is_taken():
    loop = 'while(%x), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"5"}}'
    body = f"%b () -> () {{\n  %p = bf16[8,128] parameter(0)\n  {works('y', 'p', 100)}\n}}\n"
    found = account(body + program("%x = bf16[8,128] parameter(0)", f"%w = bf16[8,128] {loop}"), V5P, [(0, 0, 0)])
    assert found.seconds == pytest.approx(500 / V5P.clock)


# ---- Collectives


def test_windowed_products():
    """Three layers over 8 chips: two products each, whose weights go around in both directions while they are used."""
    cube = [(x, y, z) for z in range(2) for y in range(2) for x in range(2)]
    found = excerpt("windowed", cube)
    assert found.flops == 3 * 2 * 2 * 4096 * 4096 * 16384
    # One shard goes ahead, and the last pass sends two that nobody needs: 9 messages, where a ring needs 7.
    assert found.collectives == {"collective-permute": (3 * 2 * 9, 3 * 2 * 9 * 16 * MIB)}
    assert found.seconds == pytest.approx(found.compute_seconds + found.exposed_seconds)
    assert not found.unknown_loops and not found.unestimated


def test_a_collective_that_is_spread_over_fusions():
    """Three layers over 4 chips: the first gather is waited for, the second runs beside the first product."""
    found = excerpt("spread", SQUARE)
    gather = 3 / 4 * 32 * MIB / (2 * LINK)
    assert found.collectives == {"all-gather": (6, 6 * 24 * MIB)}
    assert found.exposed_seconds == pytest.approx(3 * gather)
    assert found.flops == 3 * 2 * 2 * 4096 * 2048 * 8192


def test_an_asynchronous_collective_is_waited_for_where_the_text_does():
    wire = MIB / LINK
    at_once = account(program(X, START, DONE, works("y", "x", 1000)), V5P, LINE)
    beside = account(program(X, START, works("y", "x", 1000), DONE), V5P, LINE)
    hidden = account(program(X, START, works("y", "x", 10**6), DONE), V5P, LINE)
    assert at_once.exposed_seconds == pytest.approx(wire)
    assert beside.exposed_seconds == pytest.approx(wire - 1000 / V5P.clock)
    assert hidden.exposed_seconds == 0
    assert at_once.compute_seconds == pytest.approx(1000 / V5P.clock)
    assert at_once.collectives == {"collective-permute": (1, MIB)}


def test_links_are_taken_in_turns_by_direction():
    def exposed(pairs: str) -> float:
        begin, end = START.replace("%start", "%other").replace(PAIRS, pairs), DONE.replace("%start", "%other")
        return account(program(X, START, begin, DONE, end.replace("%done", "%last")), V5P, LINE).exposed_seconds

    assert exposed(PAIRS) == pytest.approx(2 * MIB / LINK)
    assert exposed("source_target_pairs={{1,0},{2,1},{3,2}}") == pytest.approx(MIB / LINK)


@pytest.mark.parametrize(
    ("groups", "coords", "members", "links"),
    [
        ("{{0,1},{2,3}}", LINE, 2, 1),
        ("{}", LINE, 4, 1),
        ("{{0,1,2,3}}", SQUARE, 4, 2),
        ("[2,2]<=[4]", LINE, 2, 1),
        ("[16,4]<=[16,4]", CUBE, 4, 2),
        ("[4,16]<=[4,16]T(0,1)", CUBE, 16, 4),
        ("[16,4]<=[4,4,4]T(1,2,0)", CUBE, 4, 2),
        ("[1,64]<=[64]", CUBE, 64, 6),
        ("[32,2]<=[64]", CUBE, 2, 1),
        ("mesh['a'=4,'b'=16] {'a'}", CUBE, 4, 2),
        ("mesh['a'=4,'b'=16] {'b'}", CUBE, 16, 4),
        ("mesh['a'=4,'b'=16] {'b':(1)4}", CUBE, 4, 2),
        ("mesh['a'=8,'b'=8], device_ids=([4,4,4]T(2,0,1)) {'a':(2)4}", CUBE, 4, 2),
    ],
)
def test_groups_in_any_form(groups, coords, members, links):
    gather = f"%y = bf16[512,4096]{{1,0}} all-gather(%x), channel_id=3, replica_groups={groups}, dimensions={{1}}"
    found = account(program(X, gather), V5P, coords)
    sent = (members - 1) * MIB
    assert found.collectives == {"all-gather": (1, sent)}
    assert found.exposed_seconds == pytest.approx(sent / links / LINK)


def test_bytes_that_a_ring_sends():
    kinds = {"all-gather": 3.0, "all-reduce": 1.5, "reduce-scatter": 0.75, "all-to-all": 0.75}
    for kind, share in kinds.items():
        found = account(program(X, f"%y = bf16[512,1024] {kind}(%x), replica_groups={{{{0,1,2,3}}}}"), V5P, SQUARE)
        assert found.collectives == {kind: (1, share * MIB)}


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter () -> () {
  %input = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce = bf16[512,1024] all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    fusion = "%y = bf16[128,1024]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"
    assert account(fused + program(X, fusion), V5P, SQUARE).collectives == {"reduce-scatter": (1, 0.75 * MIB)}


# ---- What has no estimate


def test_copies_without_an_estimate_cost_their_bytes():
    copied = account(program(X, "%y = bf16[512,1024] copy(%x)"), V5P, LINE)
    assert copied.seconds == pytest.approx(2 * MIB / V5P.memory_bandwidth) and copied.unestimated == 0
    assert account(program(X, "%y = bf16[512,1024] tanh(%x)"), V5P, LINE).unestimated == 1
    assert account(program(X, "%y = bf16[1024,512] bitcast(%x)"), V5P, LINE).seconds == 0


def test_a_product_is_never_faster_than_the_peak():
    product = "%y = f32[512,512] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    config = ', backend_config={"window_config":{"estimated_cycles":"1"}}'
    found = account(program(X, product + config), V5P, LINE)
    assert found.flops == 2 * 512 * 512 * 1024
    assert found.seconds == pytest.approx(found.flops / V5P.peak)


def test_products_with_padding_are_not_counted():
    """A batched product is a convolution over the batch whose window meets one input at a time."""
    lines = (
        "%a = bf16[16,512,64] parameter(0)",
        "%b = bf16[16,64,128] parameter(1)",
        "%y = f32[16,512,128] convolution(%a, %b), "
        "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
    )
    assert account(program(*lines), V5P, LINE).flops == 16 * 2 * 512 * 64 * 128


def test_a_fusion_counts_though_a_call_in_it_is_free():
    fused = """
%fused () -> () {
  %input = bf16[512,1024] parameter(0)
  %parts = bf16[512,1024] custom-call(%input), custom_call_target="ConcatBitcast"
  ROOT %product = bf16[512,512] convolution(%parts, %input), dim_labels=bf_oi->bf
}
"""
    text = fused + program(X, "%y = bf16[512,512] fusion(%x), kind=kOutput, calls=%fused")
    assert account(text, V5P, LINE).flops == 2 * 512 * 512 * 1024


# ---- Programs compiled here

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

topology, chips, layers, unroll, gradient, D, F, T = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:chips]
mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))

def loss(weights, x):
    def layer(x, w):
        return x + jax.nn.relu(x @ w[0]) @ w[1], None
    body = jax.checkpoint(layer, prevent_cse=unroll > 1) if gradient else layer
    return (jax.lax.scan(body, x, weights, unroll=unroll)[0].astype(jnp.float32) ** 2).mean()

def step(weights, x):
    if not gradient:
        return loss(weights, x)
    return jax.tree.map(lambda w, g: w - g, (weights, x), jax.grad(loss, argnums=(0, 1))(weights, x))

def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

weights = array((layers, D, F), None, "fsdp", None), array((layers, F, D), None, None, "fsdp")
with jax.set_mesh(mesh):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(weights, array((chips * T, D), "fsdp", None)).compile()
from secvec_jax.planning.schedule import account
from secvec_jax.planning.torus import CHIPS
import dataclasses
found = account(compiled.as_text(), CHIPS[devices[0].device_kind], [d.coords for d in devices])
print(json.dumps(dataclasses.asdict(found) | {"optimal": compiled.cost_analysis()["optimal_seconds"]}))
"""

D, F, T = 2048, 8192, 4096

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def compiled(topology: str, chips: int, layers: int, unroll: int = 1, gradient: bool = False) -> tuple[Account, float]:
    """The account of an MLP stack, and the compiler's own seconds; libtpu wants its settings before JAX starts."""
    settings = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost"}
    arguments = json.dumps([topology, chips, layers, unroll, gradient, D, F, T])
    environment = os.environ | settings | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, arguments], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    optimal = found.pop("optimal")
    found["collectives"] = {kind: tuple(sums) for kind, sums in found["collectives"].items()}
    return Account(**found), optimal


@needs_libtpu
@pytest.mark.release
@pytest.mark.parametrize(("topology", "chips"), [("v5p:2x2x1", 1), ("v5p:2x2x1", 4), ("v5e:2x2", 1)])
def test_a_scanned_stack_costs_what_the_unrolled_one_does(topology, chips):
    scanned, _ = compiled(topology, chips, layers=4)
    unrolled, optimal = compiled(topology, chips, layers=4, unroll=4)
    assert scanned.flops == unrolled.flops == 4 * 2 * 2 * T * D * F
    assert scanned.seconds == pytest.approx(unrolled.seconds, rel=0.1)
    assert not scanned.unknown_loops and not unrolled.unestimated
    if optimal > 0:
        assert unrolled.seconds > 0.95 * optimal


@needs_libtpu
@pytest.mark.release
@pytest.mark.parametrize(("topology", "chips"), [("v5p:2x2x1", 1), ("v5p:2x2x1", 4), ("v5p:2x2x2", 8)])
def test_flops_and_bytes_of_a_training_step(topology, chips):
    """Forward, the first product again, and two products backward for each: 7 of 2 * T * D * F."""
    found, _ = compiled(topology, chips, layers=3, gradient=True)
    assert found.flops == 3 * 7 * 2 * T * D * F
    assert found.flops / found.compute_seconds < V5P.peak
    weights = 3 * 2 * D * F * 2 * (chips - 1) / chips
    sent = sum(size for _, size in found.collectives.values())
    if chips == 4:
        # XLA pads a shard to whole tiles of its strategy, and puts the rows right by a permute.
        assert found.collectives["all-gather"] == (12, 2 * weights)
        assert found.collectives["reduce-scatter"] == (6, pytest.approx(weights, rel=0.02))
    assert 3 * weights <= sent <= 3 * weights * 9 / 7
