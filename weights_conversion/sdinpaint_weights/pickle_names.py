"""Classify the names in a pickle: harmless ones, and dangerous ones for which the file is refused.

No name is ever imported or called, so the list of dangerous names is not needed for safety here. A file that would run
a program is refused so that it is not taken for a trustworthy one.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


DANGEROUS_MODULES = _names("""
    os posix posixpath nt ntpath _os sys subprocess _posixsubprocess pty popen2 commands platform shutil signal
    runpy importlib imp zipimport pkgutil pip setuptools distutils ensurepip venv
    code codeop codecs timeit profile cProfile pdb bdb trace doctest idlelib lib2to3 unittest inspect gc
    socket _socket ssl http urllib urllib2 requests httpx aiohttp ftplib smtplib telnetlib xmlrpc webbrowser antigravity
    ctypes _ctypes cffi mmap multiprocessing concurrent asyncio threading _thread
    pickle _pickle cPickle marshal shelve dill cloudpickle joblib jsonpickle operator _operator io _io
    torch.load torch.hub torch.jit torch.serialization torch.storage._load_from_bytes torch.package torch.ops
    torch.classes torch.multiprocessing torch.utils.cpp_extension torch.utils.model_zoo torch.utils.bottleneck
    torch.utils.collect_env torch._dynamo torch._inductor torch.testing
    numpy.load numpy.testing numpy.f2py numpy.distutils types.FunctionType types.LambdaType types.CodeType
""")
"""Modules, or single names in them, that weights do not need."""

DANGEROUS_NAMES = _names("""
    eval exec execfile compile __import__ open getattr setattr delattr globals __globals__ __builtins__ system popen
""")
"""Names that are refused as attributes of any object, e.g. `helper.os.system`."""

PLAIN_BUILTINS = _names("""
    bool int long float complex str unicode bytes bytearray list tuple dict set frozenset object slice range xrange
""")
"""The builtins that plain data needs; any other one is refused."""

HARMLESS = _names("""
    numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    _codecs.encode copyreg._reconstructor copy_reg._reconstructor torch.device
""")
"""Names of ordinary data, which is ignored without mention."""


def is_dangerous(module: str, name: str) -> bool:
    """Tell whether a pickle with this name is refused.

    Args:
        module: the module that the pickle would import from.
        name: the name in it; it may have dots.

    Returns:
        True where the name is dangerous.
    """
    if module in ("builtins", "__builtin__"):
        return name not in PLAIN_BUILTINS
    path, attributes = f"{module}.{name}".split("."), name.split(".")
    beginnings = {".".join(path[: end + 1]) for end in range(len(path))}
    through_an_object = len(attributes) > 1 and not set(attributes).isdisjoint(DANGEROUS_NAMES | DANGEROUS_MODULES)
    return through_an_object or not beginnings.isdisjoint(DANGEROUS_MODULES)


def is_harmless(module: str, name: str) -> bool:
    """Tell whether a name stands for ordinary data, which is ignored without mention.

    Args:
        module: the module that the pickle would import from.
        name: the name in it.

    Returns:
        True where the name is harmless.
    """
    return module in ("builtins", "__builtin__") or f"{module}.{name}" in HARMLESS
