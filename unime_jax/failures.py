"""What of an error is for the user, and not for us."""

import errno

from unime_jax.types import UserError

# What an operating system says of paths that cannot be: of names that are too long, of files where
# directories are meant to be, and the other way round.
_PATHS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_OF_XLA = ("JaxRuntimeError", "XlaRuntimeError")  # its older name
_NO_MEMORY = (
    "the devices' memory does not suffice ({}); training takes less with a smaller "
    "config.train.chunk, config.model.remat=full or config.train.quantize=nf4, which `python -m "
    "unime_jax.plan` tells beforehand; elsewhere devices can share a model (--fsdp, config.mesh)"
)


def describe(error: BaseException) -> str:
    """Returns the line that an error is for the user; "" where it is a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ in _OF_XLA and "RESOURCE_EXHAUSTED" in str(error):
        return _NO_MEMORY.format(str(error).partition("\n")[0][:200].rstrip("."))
    if not isinstance(error, OSError):
        return ""
    name = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{name}; free some and start again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{name}: {error.strerror}"
    if error.errno in _PATHS and error.filename:
        return f"{error.filename}: {error.strerror}; give another path"
    return ""
