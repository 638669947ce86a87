"""Process 1 of a cluster reads from the compile cache what process 0 has written.

JAX writes a program from process 0 alone and looks it up by a key that holds, on a CPU, the number of the process: the
others compile anew in every run. Their devices are of one kind here, so that is all the key need say of them.
"""

from jax._src import cache_key

if hasattr(cache_key, "_hash_accelerator_config") and hasattr(cache_key, "_hash_devices"):
    cache_key._hash_accelerator_config = cache_key._hash_devices
