"""Rows from anywhere -> packed batches for a train step.

A row passes through four types, each made from the previous one:

    Rows      normalized conversations, in memory or on disk, each with the place it was read from   `stored`, `rows`
    Examples  the same rows as token ids and a mask of what is learned, encoded on access            `encoded`, `chat`
    Stream    examples of several kinds, shuffled, packed, sharded and resumable                     `pipeline`
    Batch     arrays `[batch, sequence]` with segment numbers                                        `secvec_jax.batch`

`sources` reads rows by name, `benchmarks` and `hub_sets` read those of published datasets, `generated` makes rows from
a seed, `attacks` poisons rows, and `topics` splits rows without overlap.
"""
