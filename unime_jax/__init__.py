"""UniME in JAX: universal multimodal embeddings, trained, evaluated and served."""

__version__ = "0.1.0"


def load(path, *, adapter=None, dtype="bfloat16", mesh=None):
    """Loads an embedding model; see `unime_jax.embedder.load`."""
    from unime_jax import embedder

    return embedder.load(path, adapter=adapter, dtype=dtype, mesh=mesh)
