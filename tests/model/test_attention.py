"""The kernels of other platforms agree with plain attention, in interpret mode where they cannot run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secvec_jax.model import attention


def packed(heads: int, kv_heads: int, seed: int = 0):
    """Query, key, value, segments and positions of two packed lines of 256 tokens, padding at the end."""
    keys = jax.random.split(jax.random.key(seed), 3)
    query = jax.random.normal(keys[0], (2, 256, heads, 128))
    key = jax.random.normal(keys[1], (2, kv_heads, 128, 256))
    value = jax.random.normal(keys[2], (2, kv_heads, 256, 128))
    segments = np.zeros((2, 256), np.int32)
    for line, ends in enumerate([(60, 61, 200, 240), (128, 256)]):
        for number, (start, end) in enumerate(zip((0, *ends), ends)):
            segments[line, start:end] = number + 1
    return query, key, value, segments, np.broadcast_to(np.arange(256), (2, 256))


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads"),
    [(None, None, 2, 2), (50, 2.0, 4, 1), *(pytest.param(*case, marks=pytest.mark.release) for case in (
        (50, None, 4, 1), (None, 2.0, 4, 1), (50, 2.0, 2, 2)))],
)  # fmt: skip
def test_the_fused_kernel_and_its_gradients_are_plain_attention(window, softcap, heads, kv_heads):
    *arrays, segments, positions = packed(heads, kv_heads)
    mask = attention.visible(segments, segments, positions, positions, window=window)
    said = jnp.asarray(segments > 0, jnp.float32)[:, :, None, None]  # what padding attends to is nobody's business

    def fused(query, key, value):
        own = {"segments": segments, "window": window, "softcap": softcap}
        return said * attention._splash(query, (key,), (value,), **own, interpret=True)

    def plain(query, key, value):
        return said * attention.attend(query, (key,), (value,), mask, softcap)

    def with_gradients(f):
        def loss(*x):
            out = f(*x)
            return (out**2).sum(), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return out, gradients

    (ours, gradients), (theirs, expected) = with_gradients(fused), with_gradients(plain)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for one, other in zip(gradients, expected):
        np.testing.assert_allclose(one, other, atol=2e-4 * float(abs(other).max()))


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
    assert attention._splash_blocks(length, head_dim) == expected
