"""Every way of computing attention agrees with plain attention; kernels of other platforms in interpret mode."""

import dataclasses
import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.batch import SHARED
from secvec_jax.model import attention
from secvec_jax.model.attention_blocks import needed_blocks
from secvec_jax.model.attention_blockwise import blockwise
from secvec_jax.model.attention_masks import visible
from secvec_jax.model.attention_splash import splash, splash_blocks
from secvec_jax.model.attention_triton import triton
from secvec_jax.model.decoder import ForwardOptions, abstract_decoder
from secvec_jax.sharding import make_mesh
from tests.toys import ARCHITECTURE

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the CUDA plugin is not installed"
)


def packed(heads: int, kv_heads: int, length: int = 256, head_dim: int = 128, prefix: int = 0, dtype=jnp.float32):
    """Query, key, value, segments and positions of two packed lines, padding at the end of the first.

    prefix: the first tokens, which all rows of a line share.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, length, heads, head_dim), dtype)
    key = jax.random.normal(keys[1], (2, kv_heads, head_dim, length), dtype)
    value = jax.random.normal(keys[2], (2, kv_heads, length, head_dim), dtype)
    segments, positions = np.zeros((2, 2, length), np.int32)
    for line, shares in enumerate([(0.23, 0.24, 0.8, 0.94), (0.5, 1)]):
        ends = [prefix + int(share * (length - prefix)) for share in shares]
        for number, (start, end) in enumerate(zip((prefix, *ends), ends)):
            segments[line, start:end] = number + 1
            positions[line, start:end] = np.arange(prefix, prefix + end - start)
        segments[line, :prefix], positions[line, :prefix] = SHARED, np.arange(prefix)
    return query, key, value, segments, positions


def check_against_plain(attend, query, key, value, segments, positions, window, softcap, tolerances):
    """The output and the gradients of `attend` are those of plain attention in float32.

    tolerances: of the output, and of each gradient relative to its largest value.
    """
    mask = visible(segments, segments, positions, positions, window=window)
    said = jnp.asarray(segments != 0, jnp.float32)[:, :, None, None]  # what padding attends to is nobody's business

    @partial(jax.jit, static_argnums=0)
    def with_gradients(f, *x):
        def loss(*x):
            out = said * f(x[0], (x[1],), (x[2],))
            return (out.astype(jnp.float32) ** 2).sum(), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*x)
        return out, *gradients

    exact = [x.astype(jnp.float32) for x in (query, key, value)]
    expected = with_gradients(partial(attention.attend, mask=mask, softcap=softcap), *exact)
    found = with_gradients(attend, query, key, value)
    np.testing.assert_allclose(np.asarray(found[0], np.float32), expected[0], atol=tolerances[0])
    for one, other in zip(found[1:], expected[1:]):
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=tolerances[1] * float(abs(other).max()))


F32 = (jnp.float32, (2e-5, 2e-4))
BF16 = (jnp.bfloat16, (2e-2, 2e-2))
release = pytest.mark.release


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads"),
    [(None, None, 2, 2), (50, 2.0, 4, 1), *(pytest.param(*case, marks=release) for case in (
        (50, None, 4, 1), (None, 2.0, 4, 1), (50, 2.0, 2, 2)))],
)  # fmt: skip
def test_the_kernel_for_tpus_is_plain_attention(window, softcap, heads, kv_heads):
    arrays = packed(heads, kv_heads)
    attend = partial(splash, segments=arrays[3], window=window, softcap=softcap, interpret=True)
    check_against_plain(attend, *arrays, window, softcap, F32[1])


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads", "head_dim", "prefix"),
    [(50, 2.0, 4, 2, 48, 20), *(pytest.param(*case, marks=release) for case in (
        (None, None, 2, 2, 64, 0), (None, None, 4, 1, 128, 0), (50, None, 4, 1, 96, 0), (None, 2.0, 2, 2, 256, 0),
        (None, None, 2, 1, 128, 140)))],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerances"), [F32, pytest.param(*BF16, marks=release)])
def test_the_kernel_for_gpus_is_plain_attention(window, softcap, heads, kv_heads, head_dim, prefix, dtype, tolerances):
    *arrays, segments, positions = packed(heads, kv_heads, 384, head_dim, prefix, dtype)
    settings = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions), "interpret": True}
    attend = partial(triton, **settings, window=window, softcap=softcap)
    check_against_plain(attend, *arrays, segments, positions, window, softcap, tolerances)


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads", "length", "prefix"),
    [
        (None, None, 2, 2, 256, 0),
        (50, 2.0, 4, 1, 201, 0),
        (50, None, 4, 2, 201, 30),
        (None, 2.0, 4, 2, 40, 0),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerances"), [F32, BF16])
def test_blockwise_attention_is_plain_attention(window, softcap, heads, kv_heads, length, prefix, dtype, tolerances):
    *arrays, segments, positions = packed(heads, kv_heads, length, 16, prefix, dtype)
    settings = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions), "shared_prefix": prefix > 0}
    attend = partial(blockwise, **settings, window=window, softcap=softcap, block=64)
    check_against_plain(attend, *arrays, segments, positions, window, softcap, tolerances)


@pytest.mark.parametrize("window", [None, 20])
def test_blockwise_attention_sees_the_keys_of_adapters_everywhere(window):
    query, key, value, segments, positions = packed(4, 2, 150, 16)
    before = jax.random.normal(jax.random.key(1), (1, 2, 16, 70))
    keys, values = (before, key), (before.swapaxes(2, 3), value)
    marks = jnp.asarray(segments), jnp.asarray(positions)
    settings = {"segments": marks[0], "positions": marks[1], "window": window, "shared_prefix": False, "softcap": None}
    plain = attention.self_attention(*marks, path="plain", window=window, shared_prefix=False, prefix_len=70)

    def with_gradients(attend):
        out, gradients = jax.vjp(lambda *x: attend(x[0], x[1], x[2]), query, keys, values)
        return jax.tree.leaves((out, gradients(jnp.ones_like(out))))

    for found, expected in zip(with_gradients(partial(blockwise, **settings, block=64)), with_gradients(plain)):
        np.testing.assert_allclose(found, expected, atol=2e-4 * float(abs(expected).max()))


@pytest.mark.parametrize("kernel", ["splash", "triton", "blockwise"])
def test_packed_rows_do_not_see_each_other(kernel):
    """The fault of MaxText's cuDNN path (its issue 4476): what one row says must not change another."""
    query, key, value, segments, positions = packed(2, 2)
    segments, positions = jnp.asarray(segments), jnp.asarray(positions)
    attend = {
        "splash": partial(splash, segments=segments, interpret=True),
        "triton": partial(triton, segments=segments, positions=positions, interpret=True),
        "blockwise": partial(blockwise, segments=segments, positions=positions, shared_prefix=False, block=64),
    }[kernel]
    start = int(jnp.argmax(segments[1] == 2))
    before, after = (
        attend(query, (key.at[1, :, :, :start].add(shift),), (value.at[1, :, :start].add(shift),), window=None)
        for shift in (0, 3)
    )
    np.testing.assert_array_equal(before[1, start:], after[1, start:])
    assert float(abs(before[1, :start] - after[1, :start]).max()) > 1


def test_padding_does_not_make_the_kernel_for_gpus_visit_blocks_of_other_rows():
    segments = np.repeat([[1, 2, 3, 0]], [100, 60, 40, 56], axis=1).astype(np.int32)  # blocks of 32 tokens
    first_key, end_query = needed_blocks(segments, np.zeros_like(segments), None, 32, 32)
    assert first_key.tolist() == [[0, 0, 0, 0, 3, 5, 5, 6]]
    assert end_query.tolist() == [[4, 4, 4, 5, 5, 7, 8, 8]]


@pytest.mark.parametrize("rows", [4, 1])
def test_each_device_of_a_mesh_computes_its_own_rows_and_heads(rows):
    """One row is not divided over the devices: all compute it."""
    query, key, value, segments, positions = (jnp.tile(x[:1], (rows, *[1] * (x.ndim - 1))) for x in packed(4, 2, 96, 8))
    query = query * jnp.arange(1, rows + 1)[:, None, None, None]
    settings = {"window": 50, "shared_prefix": False, "block": 32}

    def attend(segments, positions, query, key, value):
        return blockwise(query, (key,), (value,), segments=segments, positions=positions, **settings)

    expected = attend(segments, positions, query, key, value)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        program = jax.jit(attend).lower(segments, positions, query, key, value).compile()
        found = program(segments, positions, query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "f32[1,1,2,32,32]" in program.as_text()  # the scores of one row, one key-value head, its two query heads


def loss_of(attend, query, key, value):
    return attend(query, (key,), (value,)).astype(jnp.float32).sum()


def largest_scores(text: str, length: int) -> list[str]:
    """The types in a program's text with two axes of `length`."""
    types = set(re.findall(r"\b[a-z]+\d*\[[\d,]+\]", text))
    return [found for found in types if re.findall(r"\d+", found.partition("[")[2]).count(str(length)) > 1]


def test_blockwise_attention_holds_no_scores_of_all_tokens_and_its_memory_grows_with_them():
    def compiled(length):
        query = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
        key, value = (jax.ShapeDtypeStruct((1, 1, *shape), jnp.bfloat16) for shape in ((64, length), (length, 64)))
        marks = jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]
        attend = attention.self_attention(*marks, path="blockwise", window=None, shared_prefix=False)
        return jax.jit(jax.grad(partial(loss_of, attend), (0, 1, 2))).lower(query, key, value).compile()

    programs = {length: compiled(length) for length in (4096, 8192)}
    assert not largest_scores(programs[4096].as_text(), 4096)
    assert largest_scores("f32[1,2,4096,4096]{3,2,1,0} dot(bf16[1,4096,64])", 4096) == ["f32[1,2,4096,4096]"]
    sizes = {length: program.memory_analysis().temp_size_in_bytes for length, program in programs.items()}
    assert sizes[8192] < 2.2 * sizes[4096]


def compiled_for(gpu: str, function, *shapes_and_types):
    """The function compiled for a GPU that is not here."""
    from secvec_jax.planning.plan import topology_mesh

    mesh = topology_mesh(gpu, "")
    with jax.set_mesh(mesh):
        everywhere = jax.NamedSharding(mesh, jax.P())
        arguments = [jax.ShapeDtypeStruct(*one, sharding=everywhere) for one in shapes_and_types]
        return jax.jit(function).lower(*arguments).compile()


@needs_cuda
@release
@pytest.mark.parametrize(
    ("gpu", "length", "heads", "kv_heads", "head_dim", "window", "softcap"),
    [
        ("h100", 4096, 32, 32, 128, None, None),
        ("l4", 1024, 8, 4, 256, 512, 50.0),
        ("b200", 384, 8, 1, 256, 512, 50.0),
        ("a100-40", 1024, 32, 32, 96, 2047, None),
        ("rtx4090", 640, 14, 2, 64, None, None),
    ],
)
def test_the_kernel_for_gpus_compiles_for_them(gpu, length, heads, kv_heads, head_dim, window, softcap):
    def with_gradients(segments, positions, query, key, value):
        settings = {"window": window, "softcap": softcap, "shared_prefix": True}
        attend = attention.self_attention(segments, positions, path="triton", **settings)
        return jax.value_and_grad(partial(loss_of, attend), (0, 1, 2))(query, key, value)

    marks = [((2, length), jnp.int32)] * 2
    shapes = (2, length, heads, head_dim), (2, kv_heads, head_dim, length), (2, kv_heads, length, head_dim)
    program = compiled_for(gpu, with_gradients, *marks, *((shape, jnp.bfloat16) for shape in shapes))
    assert not largest_scores(program.as_text(), length)
    assert program.memory_analysis().temp_size_in_bytes < 0.4 * 2**30


@needs_cuda
@release
@pytest.mark.parametrize("head_dim", [64, 512])
def test_a_training_at_4096_tokens_on_a_gpu_holds_no_scores_of_all_tokens(head_dim):
    """By the fused kernel, and blockwise where heads are too large for it."""
    architecture = dataclasses.replace(ARCHITECTURE, head_dim=head_dim)
    decoder = abstract_decoder(architecture)

    def loss(tokens, segments, positions, *weights):
        model = jax.tree.unflatten(jax.tree.structure(decoder), weights)
        return model(tokens, segments, positions, (), ForwardOptions(jnp.bfloat16)).astype(jnp.float32).sum()

    weights = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(decoder)]
    gradients = jax.grad(loss, tuple(range(3, 3 + len(weights))))
    program = compiled_for("h100", gradients, *[((2, 4096), jnp.int32)] * 3, *weights)
    text = program.as_text()
    assert not largest_scores(text, 4096)
    assert ("packed_attention_forward" in text) == (head_dim == 64)


@pytest.mark.parametrize(
    ("on", "arguments", "expected"),
    [
        (("cpu", "cpu"), {}, "blocks of queries"),
        (("cpu", "cpu"), {"prefix_len": 5}, "plain"),
        (("tpu", "TPU v5"), {"shared_prefix": False}, "splash"),
        (("tpu", "TPU v5"), {}, "blockwise"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {}, "triton"),
        (("gpu", "NVIDIA GeForce RTX 4090"), {"head_dim": 96}, "triton"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {"prefix_len": 5}, "blockwise"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {"length": 300}, "blockwise"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {"dtype": jnp.float32}, "blockwise"),
        (("gpu", "NVIDIA H100 80GB HBM3"), {"head_dim": 512}, "blockwise"),
        (("gpu", "Tesla T4"), {}, "blockwise"),
        (("gpu", "NVIDIA GeForce RTX 2080 Ti"), {}, "blockwise"),
        (("gpu", "AMD Instinct MI300X"), {}, "blockwise"),
    ],
)
def test_the_path_follows_from_platform_and_shapes(on, arguments, expected, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: on[0])
    monkeypatch.setattr(attention, "device_kind", lambda: on[1])
    shapes = {"length": 4096, "head_dim": 128, "dtype": jnp.bfloat16} | arguments
    assert attention.attention_path(**shapes) == expected
    assert expected in attention.PATHS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_a_product_is_rotation_bit_for_bit(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 8)).astype(dtype)
    positions = jnp.arange(18).reshape(2, 9)
    frequencies = jnp.asarray([1.0, 0.3, 0.1, 0.02])
    angles = positions[..., None].astype(jnp.float32) * frequencies
    one, other = attention.rotate(x, positions, frequencies), attention._rotate_by_product(x, angles)
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(
    ("length", "head_dim", "expected"),
    [(8192, 128, (512, 2048)), (8192, 256, (512, 1024)), (2048, 64, (512, 2048)), (384, 256, (128, 128))],
)
def test_the_backward_kernels_blocks_fit_into_vmem(length, head_dim, expected):
    """At heads of 256, blocks of 2048 keys took 20.6 of 16 MiB (Gemma 2 9B, compiled for a v5p)."""
    assert splash_blocks(length, head_dim) == expected
